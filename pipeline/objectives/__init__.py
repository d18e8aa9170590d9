"""The training objectives. To add one, write its package and add a line here."""

from pipeline.config.section import Registry

OBJECTIVES = Registry(
    {
        "contrastive": "pipeline.objectives.contrastive",
        "masked_next_token": "pipeline.objectives.masked_tokens",
    }
)

"""What a model is trained to do. To add an objective, write its folder and add its line here."""

from pipeline.config.registry import Registry

OBJECTIVES = Registry(
    {
        "contrastive": "pipeline.objectives.contrastive",
        "masked_next_token": "pipeline.objectives.masked_tokens",
    }
)

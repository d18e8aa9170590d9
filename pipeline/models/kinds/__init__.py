"""What differs between the kinds of model that a recipe can train. All else is shared: data, loss, step, engine.

A kind's model takes (packed items, with_images, features) and returns (N, D) float32 unit rows (mntp: costs, while it
trains); it has `dimension`, `pads` (whether attention pads a chunk's items to its longest), `always_with_images` and
`checkpoint_activations()`.
"""

from pipeline.config import TRAINED_PARTS
from pipeline.models import decoder, llm2clip
from pipeline.models.kinds.kind import Kind, Processor
from pipeline.models.kinds.llave import LlaveKind
from pipeline.models.kinds.texts import CaptionKind, MntpKind
from pipeline.models.kinds.towers import ClipKind, Llm2ClipKind
from pipeline.models.llave import is_original
from pipeline.models.loading import config_dict

__all__ = ["KINDS", "Kind", "Processor", "kind_of"]

KINDS: dict[str, Kind] = {
    "llave": LlaveKind(),
    "caption": CaptionKind(),
    "mntp": MntpKind(),
    "llm2clip": Llm2ClipKind(),
    "clip": ClipKind(),
}
assert all(tuple(kind.parts) == TRAINED_PARTS[name] for name, kind in KINDS.items())


def kind_of(path: str) -> Kind | None:
    """The kind of model in a folder or of a hub name, by its files; None if it is none of ours.

    Raises PipelineError where there is no model.
    """
    config = config_dict(path)
    model_type = config.get("model_type")
    if model_type == "llava_onevision" or is_original(config):  # of which `load_config` says: convert it
        return KINDS["llave"]
    if decoder.SETTINGS in config:
        return KINDS["caption"]
    if llm2clip.settings(path) is not None:
        return KINDS["llm2clip"]
    return KINDS["clip"] if model_type == "clip" else None

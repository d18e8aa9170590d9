"""Load the config of a Qwen-VL, and check that this project supports it."""

from dataclasses import dataclass, fields
from typing import Any, cast

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLVisionModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from pipeline.errors import PipelineError
from pipeline.models import loading
from pipeline.models.files import fetched
from pipeline.models.qwen_vl.config import QwenVLArchitecture, QwenVLSection
from pipeline.models.qwen_vl.patches import Patches, video_limit
from pipeline.models.qwen_vl.prompts import CHAT, PROMPTS

Numbers = tuple[float, float, float]

SETTINGS = "embedding"  # the field of config.json that holds the `Settings` of an export


@dataclass(frozen=True)
class Version:
    """One of the families of transformers that this package supports.

    tower: its vision tower.  whole: its model without LM head.  mean, std: the normalisation of images.
    """

    config: type[PreTrainedConfig]
    tower: type[PreTrainedModel]
    whole: type[PreTrainedModel]
    mean: Numbers
    std: Numbers


_CLIP = cast(tuple[Numbers, Numbers], (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)))
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
VERSIONS = {
    "qwen2_vl": Version(Qwen2VLConfig, Qwen2VisionTransformerPretrainedModel, Qwen2VLModel, *_CLIP),
    "qwen2_5_vl": Version(Qwen2_5_VLConfig, Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLModel, *_CLIP),
    "qwen3_vl": Version(Qwen3VLConfig, Qwen3VLVisionModel, Qwen3VLModel, *_HALF),
}
EXPERTS = ("qwen3_vl_moe",)


@dataclass(frozen=True)
class Settings:
    """How a model embeds an item, in its config.json.

    instruction: the system's turn of the prompt, "" if that has none.  min_pixels, max_pixels: to which images are
    resized.  max_video_tokens: of a video with its timestamps, which its frames share.  prompt: a name in PROMPTS.
    """

    instruction: str
    min_pixels: int
    max_pixels: int
    max_video_tokens: int
    prompt: str

    @classmethod
    def of(cls, config: PreTrainedConfig, path: str, max_tokens: int = 4096) -> "Settings":
        """Return a config's settings; those it lacks are the prompt's defaults.  path: for errors.

        max_tokens: of an item, as of a recipe.
        """
        area = (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2
        stored = getattr(config, SETTINGS, None)
        stored = {} if stored is None else stored
        name = stored.get("prompt", CHAT) if isinstance(stored, dict) else None
        if isinstance(name, str) and (its := PROMPTS.get(name)):
            own = cls(its.instruction or "", its.least * area, its.most * area, video_limit(max_tokens), name)
            values = vars(own) | stored
            if {each: type(value) for each, value in values.items()} == {each.name: each.type for each in fields(cls)}:
                return cls(**values)
        raise PipelineError(
            f"{path}: {SETTINGS}={stored!r} in its config.json is not supported; expected are "
            f"{', '.join(each.name for each in fields(cls))}, and a prompt of {', '.join(PROMPTS)}: was it written by "
            "a later version?"
        )


def stores_instruction(config: PreTrainedConfig) -> bool:
    """Whether this project wrote the config, with all settings. A published model's has at most its prompt."""
    return "instruction" in (getattr(config, SETTINGS, None) or {})


def version(config: PreTrainedConfig) -> Version:
    return VERSIONS[config.model_type]


def load_config(path: str) -> Any:
    """Return the config of a folder or hub name; PipelineError if this project does not support the model."""
    values = loading.config_dict(path)
    kind = values.get("model_type")
    if kind in EXPERTS:
        raise PipelineError(f"{path} is a {kind} model, with experts, which are not supported: use a dense Qwen-VL")
    if kind not in VERSIONS:
        raise PipelineError(f"{path} is a {kind} model; expected {', '.join(VERSIONS)}")
    file = fetched(path, weights=False) / "config.json"
    if not isinstance(values.get("vision_config"), dict):
        raise PipelineError(f"{file}: vision_config is missing: name a whole model")
    with loading.reading(file):
        config = VERSIONS[kind].config.from_dict(values)  # of Qwen2-VL, text fields may be at the top level
        _require_supported(str(file), config)
    return config


def tower_heads(config: Any) -> PreTrainedConfig:
    """Return the vision tower's heads under the names that other models' configs have for them."""
    heads = config.vision_config.num_heads
    return PreTrainedConfig.from_dict({"num_attention_heads": heads, "hidden_size": tower_width(config)})


def config_of_architecture(architecture: QwenVLArchitecture) -> Any:
    """Return the config of model.architecture; PipelineError for a field that transformers would ignore."""
    kind: Any = VERSIONS[architecture.model_type].config
    parts = kind.sub_configs
    loading.refuse_unknown("vision", architecture.vision, parts["vision_config"]())
    loading.refuse_unknown("text", architecture.text, parts["text_config"]())
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = kind(
        vision_config=parts["vision_config"](**architecture.vision),
        text_config=parts["text_config"](**tokens | architecture.text),
    )
    _require_supported("model.architecture", config)
    return config


def config_of(model: QwenVLSection) -> Any:
    """Return the config of the recipe's model, with the recipe's `Settings`, without loading or building the model."""
    if model.path:
        config = load_config(model.path)
    else:
        assert model.architecture
        config = config_of_architecture(model.architecture)
    where = model.path or "model.architecture"
    if model.prompt and model.prompt != Settings.of(config, where, model.max_tokens).prompt:
        setattr(config, SETTINGS, {"prompt": model.prompt})
    settings = vars(Settings.of(config, where, model.max_tokens))
    values = {name: getattr(model, name, None) or value for name, value in settings.items()}
    values["max_video_tokens"] = video_limit(model.max_tokens)  # of this training, not of one before it
    if values["min_pixels"] > values["max_pixels"]:
        raise PipelineError(
            f"model.min_pixels={values['min_pixels']} is more than model.max_pixels={values['max_pixels']}: set both"
        )
    if model.instruction and PROMPTS[values["prompt"]].instruction is None:
        raise PipelineError(
            f"model.instruction: the prompt {values['prompt']} has no turn for it: put it into the items' texts"
        )
    setattr(config, SETTINGS, values)
    return config


def patches(config: Any, path: str, max_tokens: int) -> Patches:
    """Return how a model with this config cuts images into patches.  path: for errors.  max_tokens: of an item."""
    vision, its = config.vision_config, Settings.of(config, path, max_tokens)
    limits = its.min_pixels, its.max_pixels, its.max_video_tokens
    stamped = config.model_type == "qwen3_vl"
    return PROMPTS[its.prompt].patches(vision.patch_size, vision.spatial_merge_size, *limits, stamped=stamped)


def positions_per_second(config: Any) -> int | None:
    """Return how many positions a second of a video has; None: each two frames have one, whatever their times."""
    return getattr(config.vision_config, "tokens_per_second", None)


def tower_width(config: Any) -> int:
    """Return the width of a patch's state in the tower."""
    vision = config.vision_config
    return int(vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size)


def _require_supported(where: str, config: Any) -> None:
    """Raise PipelineError if the config's parts do not fit each other, or are not supported.  where: for errors."""
    text, vision = config.text_config, config.vision_config
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    sections = text.rope_parameters.get("mrope_section")
    width = vision.hidden_size if config.model_type == "qwen2_vl" else vision.out_hidden_size
    window, side = getattr(vision, "window_size", None), vision.patch_size * vision.spatial_merge_size
    deep, layers = len(getattr(vision, "deepstack_visual_indexes", ())), text.num_hidden_layers
    for name, value, supported, expected in (
        ("text_config's mrope_section", sections, sum(sections or ()) == half, f"three numbers, {half} in all,"),
        ("vision_config's output width", width, width == text.hidden_size, f"the text's, {text.hidden_size},"),
        ("vision_config.temporal_patch_size", vision.temporal_patch_size, vision.temporal_patch_size == 2, "2"),
        ("vision_config.in_channels", vision.in_channels, vision.in_channels == 3, "3"),
        ("vision_config.window_size", window, window is None or window >= side, f"a token's side, {side}, or more"),
        ("deepstack, layers", deep, deep <= layers, f"at most {layers}, the layers of the language model,"),
    ):
        if not supported:
            raise PipelineError(f"{where}: {name}={value!r} is not supported; {expected} is")

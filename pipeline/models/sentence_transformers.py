"""Write the files by which sentence-transformers loads an export, so that its `encode` gives this project's vectors.

    modules.json                        Transformer, Pooling unless the model pools itself, Normalize
    1_Pooling/config.json               the pooling mode, and whether the prompt is pooled
    sentence_bert_config.json           how items become tokens, and which of the model's methods reads them
    config_sentence_transformers.json   prompts, and the similarity of two vectors

The fields are those that sentence-transformers 6.2.0 reads. Modules have the names, and pooling modes the flags, of all
versions: vLLM looks for these in the first two files.
"""

import json
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

from pipeline.data.sample import MEDIA_INSTRUCTION

MODULES, READING, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
TEXT_ENCODER = "text_encoder"  # the field of config.json that marks a text encoder of this project
# Before version 5.4, sentence-transformers stored a flag for each pooling mode.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

# Pillow resizes images, as in training. torchvision, the default where it is installed, rounds otherwise.
_PILLOW = {"use_fast": False}
_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}

# The images of an item stand before its text. `raise_exception` is transformers'.
_CHAT_TEMPLATE = """\
{%- set item = namespace(instruction=$instruction, text="", images=0) -%}
{%- for message in messages -%}
{%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
{%- for part in parts -%}
{%- if part.type == "text" and message.role == "system" and $has_system -%}
{%- set item.instruction = part.text -%}
{%- elif part.type == "text" -%}
{%- set item.text = item.text + part.text -%}
{%- elif part.type == "image" and $has_images -%}
{%- set item.images = item.images + 1 -%}
{%- else -%}
{{- raise_exception("an item has a part of type " + part.type + ", which this folder does not read here") -}}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if item.images and not item.text.strip() -%}
{%- set item.text = $of_images if item.images > 1 else $of_image -%}
{%- endif -%}
{{- $before + item.instruction + $after -}}
{{- $image * item.images + (item.text.lstrip() if item.images and $strips else item.text) + $suffix -}}
"""


def describes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether this project itself follows the files of a folder.  config: its config.json.

    It does for a sentence embedder, and not for its own text encoders or models of more than texts.
    """
    own = {TEXT_ENCODER, "text_config", "vision_config"} & config.keys()
    return not own and (folder / MODULES).is_file()


def write(
    folder: Path,
    transformer: dict[str, Any],
    pooling: Literal["mean", "lasttoken"] | None,
    dimension: int,
    prompt: str = "",
    *,
    pools_prompt: bool = True,
) -> None:
    """Write all files to an export's folder.

    transformer: the content of sentence_bert_config.json, such as that of `messages`.  pooling: None if the model
    returns pooled vectors.  dimension: of the hidden states.  prompt: stands before each text, or in the system's turn.
    """
    modules = [("Transformer", ""), *([("Pooling", "1_Pooling")] if pooling else [])]
    modules.append(("Normalize", f"{len(modules)}_Normalize"))
    for name, place in modules[1:]:
        (folder / place).mkdir(exist_ok=True)
        fields = {"word_embedding_dimension": dimension} | {flag: mode == pooling for flag, mode in FLAGS.items()}
        _write(folder / place / "config.json", fields | {"include_prompt": pools_prompt} if name == "Pooling" else {})
    listed = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{name}"}
        for number, (name, place) in enumerate(modules)
    ]
    _write(folder / MODULES, listed)
    _write(folder / READING, {"transformer_task": "feature-extraction"} | transformer)
    named: dict[str, Any] = {"prompts": dict.fromkeys(("query", "document"), prompt)}
    if prompt:
        named["default_prompt_name"] = "document"
    _write(
        folder / PROMPTS,
        {"model_type": "SentenceTransformer", **named, "similarity_fn_name": "cosine"},
    )


def messages(*modalities: Modality, special_tokens: bool) -> dict[str, Any]:
    """Return the settings of a model whose items a chat template puts in their prompt; see `chat_template`.

    special_tokens: whether the tokenizer adds its own start and end tokens.
    """
    config = {
        "modality_config": dict.fromkeys(modalities, _STATES) | {"message": _STATES | {"format": "structured"}},
        "module_output_name": "token_embeddings",
    }
    if not special_tokens:
        config["processing_kwargs"] = {"text": {"add_special_tokens": False}}
    return config | ({"processor_kwargs": dict(_PILLOW)} if "image" in modalities else {})


def texts(processor: dict[str, Any], *, special_tokens: bool) -> dict[str, Any]:
    """Return the settings of a model of texts alone.  processor: fields that replace the tokenizer's own."""
    config: dict[str, Any] = {"modality_config": {"text": _STATES}, "module_output_name": "token_embeddings"}
    config["processing_kwargs"] = {"text": {"add_special_tokens": special_tokens}}
    return config | ({"processor_kwargs": processor} if processor else {})


def towers(max_tokens: int) -> dict[str, Any]:
    """Return the settings of a CLIP, whose towers pool by themselves.  max_tokens: of a text."""
    methods = {name: {"method": f"get_{name}_features", "method_output_name": "pooler_output"} for name in MODALITIES}
    reads = {"modality_config": methods, "module_output_name": "sentence_embedding", "max_seq_length": max_tokens}
    return reads | {"processor_kwargs": dict(_PILLOW)}


def chat_template(prefix: str, suffix: str, instruction: str = "", image: str = "", *, strips: bool = False) -> str:
    """Return a chat template that renders an item as the prompt: prefix, images, text, suffix.

    prefix: {} in it is the system message; without it, the item's text begins with the message.
    instruction: the default system message.  image: what stands for an image; "" if images are not supported.
    strips: whether white space between the last image and the text is removed.
    """
    before, system, after = prefix.partition("{}")
    values = {"instruction": instruction, "before": before, "after": after, "image": image, "suffix": suffix}
    values |= {f"of_{images}": MEDIA_INSTRUCTION.format(images) for images in ("image", "images")}
    # Jinja's literals are Python's. Characters beyond ASCII stay as they are.
    literals = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    flags = {"has_system": bool(system), "has_images": bool(image), "strips": strips}
    return Template(_CHAT_TEMPLATE).substitute(literals, **{name: str(flag).lower() for name, flag in flags.items()})


def _write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

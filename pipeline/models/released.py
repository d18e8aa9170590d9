"""Published models that are read in a way of their own, or refused by name.

Some config.json name code to run, where a class of transformers computes just as well:
- LLM2CLIP's text encoders (arXiv 2411.04997; microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned and
  LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned on the hub), a Llama that attends both ways. They do not store their
  template, which stands in the code that uses them (llm2clip/data/extract_embedding.py; the model card of the 1B).
- GME (arXiv 2412.16855; Alibaba-NLP/gme-Qwen2-VL-2B-Instruct and -7B-Instruct on the hub), a Qwen2-VL. Its prompt is
  in its code: modeling_gme_qwen2vl.py, and gme_inference.py before that, when config.json named no code.
"""

from pathlib import Path
from typing import Any

# The classes in auto_map, without the repository before them that transformers writes if the code was on the hub: that
# of the 8B model, by issue 60 of microsoft/LLM2CLIP and the file beside its weights; and that in the 1B's config.json.
_LLAMAS_BOTH_WAYS = ("modeling_llama_encoder.LlamaEncoderModel", "modeling_bidirectional_llama_encoder.LlamaBiModel")
_TEXT_ENCODER = {
    "auto_map": None,
    "architectures": ["LlamaModel"],
    "is_causal": False,
    "text_encoder": {"pooling": "mean", "instruction": "", "template": "llama3"},
}
_GME_CODE, _GME_SCRIPT = "modeling_gme_qwen2vl.", "gme_inference.py"
_GME_CACHED = "models--Alibaba-NLP--gme-Qwen2-VL-"  # a folder in the hub's cache, into which no script is downloaded
_TOKEN = 28**2  # pixels of a token of Qwen2-VL

# Architectures that resemble supported ones: the model's name, and what differs.
_REFUSED = {
    "LLaVAOneVision1_5_ForConditionalGeneration": (
        "LLaVA-OneVision-1.5",
        "transformers does not have its vision encoder, and its decoder is Qwen3",
    ),
    "LlavaForConditionalGeneration": ("LLaVA-1.5 or LLaVA-Interleave", "it does not tile images"),
    "LlavaNextForConditionalGeneration": ("LLaVA-NeXT", "it tiles images in another way, for another vision encoder"),
    "LlavaLlamaForCausalLM": ("original LLaVA with a Llama", "the decoder must be Qwen2"),
    "LlavaMistralForCausalLM": ("original LLaVA with a Mistral", "the decoder must be Qwen2"),
}
_INSTEAD = "use a LLaVA-OneVision with Qwen2, such as llava-hf/llava-onevision-qwen2-7b-ov-hf, or a Qwen3-VL"


def refusal(config: dict[str, Any]) -> str:
    """Return why a model is not supported and which are instead, if its config.json is of a known one; else ""."""
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        if isinstance(name, str) and name in _REFUSED:
            model, difference = _REFUSED[name]
            return f"{model} ({name}) is not supported, because {difference}: {_INSTEAD}"
    return ""


def fields_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json to override for a published model, None for one to remove; empty for others.

    folder: the model's.  config: its config.json. A folder of LLM2Vec's own has the same classes, adapters or
    llm2vec_config.json, and any template: it is no such model.
    """
    if config.get("model_type") == "qwen2_vl":
        return _gme(folder, config)
    auto_map = config.get("auto_map")
    if config.get("model_type") != "llama" or not isinstance(auto_map, dict) or auto_map.keys() != {"AutoModel"}:
        return {}
    code = auto_map["AutoModel"]
    if not isinstance(code, str) or code.rpartition("--")[2] not in _LLAMAS_BOTH_WAYS:
        return {}
    return {} if (folder / "llm2vec_config.json").exists() else _TEXT_ENCODER


def _gme(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """As `fields_of`, for a Qwen2-VL. An export of a GME that was trained further has settings of its own."""
    if code := config.get("auto_map"):
        classes = list(code.values()) if isinstance(code, dict) else []
        names = [each.rpartition("--")[2] if isinstance(each, str) else "" for each in classes]
        if not names or not all(name.startswith(_GME_CODE) for name in names):
            return {}
    elif not (folder / _GME_SCRIPT).is_file() and not any(part.startswith(_GME_CACHED) for part in folder.parts):
        return {}
    limits = {f"{end}_pixels": config.get(f"{end}_image_tokens") for end in ("min", "max")}
    pixels = {name: tokens * _TOKEN for name, tokens in limits.items() if isinstance(tokens, int)}
    return {"auto_map": None, "embedding": config.get("embedding") or {"prompt": "gme"} | pixels}

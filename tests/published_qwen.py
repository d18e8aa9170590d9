"""Folders laid out like published embedders on Qwen-VL backbones, with small weights that depend on names alone.

Weights and images come from numpy's generators, whose numbers are the same on every processor.
"""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen3VLConfig, Qwen3VLModel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = sorted(ByteLevel.alphabet())
MERGES = [("e", "n"), ("Ġ", "i"), ("t", "h"), ("Ġi", "m"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
IDS = {token: number for number, token in enumerate([*BYTES, *map("".join, MERGES), *SPECIAL])}
HIDDEN, DEPTH, LAYERS, WIDTH = 32, 2, 3, 16

# The fields of Qwen2-VL-2B-Instruct's config.json, which GME's and VLM2Vec's have, too, with small numbers.
QWEN2_VL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": IDS["<|endoftext|>"],
    "eos_token_id": IDS["<|im_end|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
    "vision_token_id": IDS["<|vision_pad|>"],
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 32768,
    "max_window_layers": LAYERS,
    "model_type": "qwen2_vl",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "mlp_ratio": 2,
        "num_heads": 2,
        "in_chans": 3,
        "hidden_size": HIDDEN,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "vocab_size": len(IDS),
}
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
# The fields of Qwen3-VL-2B-Instruct's config.json.
QWEN3_VL: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": IDS["<|image_pad|>"],
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": IDS["<|endoftext|>"],
        "dtype": "float32",
        "eos_token_id": IDS["<|im_end|>"],
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": len(IDS),
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": IDS["<|video_pad|>"],
    "vision_config": {
        "deepstack_visual_indexes": [0, 1],
        "depth": DEPTH,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": WIDTH,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 2 * WIDTH,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 36,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": IDS["<|vision_end|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
}
QWEN3_PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
# The adapters that VLM2Vec's code makes: `MMEBModel.build` of src/model/model.py, and src/arguments.py.
ADAPTERS = {
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "init_lora_weights": "gaussian",
    "use_dora": True,
    "use_rslora": False,
    "alpha_pattern": {},
    "rank_pattern": {},
    "inference_mode": True,
    "task_type": None,
    "target_modules": [f"{name}_proj" for name in ("qkv", "o", "gate_up", "down", "k", "q", "out", "v", "gate", "up")],
}


def numbers(name: str, *shape: int) -> np.ndarray:
    """Return float32 normal numbers that depend on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def picture(width: int, height: int) -> bytes:
    """Return a PNG: large soft patches and noise, so that how it is resized matters."""
    rng = np.random.default_rng(1000 * width + height)
    soft = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((-(-height // 4), -(-width // 4), 1)))[:height, :width]
    pixels = (soft * 3 + rng.integers(0, 256, (height, width, 3))) // 4
    buffer = io.BytesIO()
    Picture.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def stored_weights() -> dict[str, torch.Tensor]:
    """Return a Qwen2-VL's tensors by the names that they have in published files."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(IDS), HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        for name, out, into in (("q", 32, 32), ("k", 16, 32), ("v", 16, 32)):
            shapes |= linear(f"{layer}self_attn.{name}_proj", out, into)
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (48, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, 48)
        shapes |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["visual.patch_embed.proj.weight"] = (WIDTH, 3, 2, 14, 14)
    for number in range(DEPTH):
        block = f"visual.blocks.{number}."
        shapes |= {f"{block}norm{each}.{leaf}": (WIDTH,) for each in (1, 2) for leaf in ("weight", "bias")}
        shapes |= linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{block}attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}mlp.fc1", 2 * WIDTH, WIDTH) | linear(f"{block}mlp.fc2", WIDTH, 2 * WIDTH)
    shapes |= {f"visual.merger.ln_q.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    shapes |= linear("visual.merger.mlp.0", 4 * WIDTH, 4 * WIDTH) | linear("visual.merger.mlp.2", HIDDEN, 4 * WIDTH)
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a weight: norms near 1, biases small, and matrices that keep their input's size."""
    values = numbers(name, *shape)
    if len(shape) > 1:
        values = values / np.sqrt(np.float32(np.prod(shape[1:]))) if "embed" not in name.split(".")[-2] else values
    else:
        values = 0.2 * values + (0 if name.endswith("bias") else 1)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def adapter_weights() -> dict[str, torch.Tensor]:
    """Return adapters of DoRA for some layers, by peft's names of that time."""
    rank, found = ADAPTERS["r"], {}
    base = stored_weights()
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"):
        out, into = base[f"{layer}.weight"].shape
        name = f"base_model.model.{layer}."
        found[f"{name}lora_A.weight"] = torch.from_numpy(numbers(f"{name}A", rank, into)) / 4
        found[f"{name}lora_B.weight"] = torch.from_numpy(numbers(f"{name}B", out, rank)) / 4
        length = base[f"{layer}.weight"].norm(dim=1)
        found[f"{name}lora_magnitude_vector"] = length * torch.from_numpy(1 + numbers(f"{name}m", out) / 8)
    return found


def write_tokenizer(folder: Path) -> None:
    added = [{"id": IDS[token], "content": token, "special": True} for token in SPECIAL]
    for token in added:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PRETOKENS}, "behavior": "Isolated", "invert": False}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": ""}
    model |= {"end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    vocabulary = {token: number for token, number in IDS.items() if token not in SPECIAL}
    model |= {"vocab": vocabulary, "merges": [" ".join(pair) for pair in MERGES]}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    whole |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}
    whole |= {"post_processor": level, "decoder": level, "model": model}
    dump(folder / "tokenizer.json", whole)
    dump(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("".join(f"{one} {two}\n" for one, two in MERGES))
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}
    settings |= {"pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 32768, "errors": "replace"}
    settings |= {"add_prefix_space": False, "split_special_tokens": False, "clean_up_tokenization_spaces": False}
    settings["additional_special_tokens"] = SPECIAL[1:]
    settings["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added
    }
    dump(folder / "tokenizer_config.json", settings)


def write_qwen2_vl(folder: Path, **fields: object) -> Path:
    """Write a folder like Qwen2-VL-2B-Instruct's.  fields: of config.json, to add."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    dump(folder / "config.json", QWEN2_VL | fields)
    dump(folder / "preprocessor_config.json", PREPROCESSOR)
    save_file(stored_weights(), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_qwen3_vl(folder: Path) -> Path:
    """Write a folder like Qwen3-VL-Embedding's, whose configs are those of Qwen3-VL-2B-Instruct."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    dump(folder / "config.json", QWEN3_VL)
    dump(folder / "preprocessor_config.json", QWEN3_PREPROCESSOR)
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig.from_dict(json.loads(json.dumps(QWEN3_VL))))
    weights = {f"model.{name}": _weight(name, tuple(each.shape)) for name, each in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_gme(folder: Path, layout: str) -> Path:
    """Write a folder like GME's.  layout: "code", whose config.json names code, or "script", the one before it."""
    if layout == "script":
        write_qwen2_vl(folder)
        (folder / "gme_inference.py").write_text("raise SystemExit('executed')\n")
        return folder
    code = {"AutoConfig": "modeling_gme_qwen2vl.GmeQwen2VLConfig", "AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}
    write_qwen2_vl(folder, auto_map=code, architectures=["GmeQwen2VL"])
    (folder / "modeling_gme_qwen2vl.py").write_text("raise SystemExit('executed')\n")
    return folder


def write_adapters(folder: Path, base: Path) -> Path:
    """Write a folder like VLM2Vec-V2.0's: adapters of the Qwen2-VL at `base`."""
    folder.mkdir(parents=True)
    dump(folder / "adapter_config.json", ADAPTERS | {"base_model_name_or_path": str(base)})
    save_file(adapter_weights(), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def dump(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values))

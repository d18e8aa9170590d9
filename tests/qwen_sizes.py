"""The sizes of the published Qwen-VL models."""

from typing import Any

# (version; the tower's width, MLP and depth; hidden size, layers, heads, key-value heads, MLP and vocabulary; published
# number of parameters; whether that includes an LM head besides the embedding).
SIZES: dict[str, tuple[str, tuple[int, int, int], tuple[int, ...], int, bool]] = {
    "Qwen2-VL-2B": ("qwen2_vl", (1280, 5120, 32), (1536, 28, 12, 2, 8960, 151_936), 2_208_985_600, False),
    "Qwen2-VL-7B": ("qwen2_vl", (1280, 5120, 32), (3584, 28, 28, 4, 18_944, 152_064), 8_291_375_616, True),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", (1280, 3420, 32), (2048, 36, 16, 2, 11_008, 151_936), 3_754_622_976, False),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", (1280, 3420, 32), (3584, 28, 28, 4, 18_944, 152_064), 8_292_166_656, True),
    "Qwen3-VL-2B": ("qwen3_vl", (1024, 4096, 24), (2048, 28, 16, 8, 6144, 151_936), 2_127_532_032, False),
    "Qwen3-VL-4B": ("qwen3_vl", (1024, 4096, 24), (2560, 36, 32, 8, 9728, 151_936), 4_437_815_808, False),
    "Qwen3-VL-8B": ("qwen3_vl", (1152, 4304, 27), (4096, 36, 32, 8, 12_288, 151_936), 8_767_123_696, True),
}


def fields_of(size: str) -> dict[str, Any]:
    """Return the fields of `model.architecture` of one of SIZES."""
    kind, (width, wide, depth), (hidden, layers, heads, key_value_heads, mlp, vocabulary), *_ = SIZES[size]
    vision: dict[str, Any] = {"depth": depth, "num_heads": 16}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": width, "mlp_ratio": wide // width, "hidden_size": hidden}
    else:
        vision |= {"hidden_size": width, "intermediate_size": wide, "out_hidden_size": hidden}
    sections = [16, 24, 24]
    if kind == "qwen3_vl":
        sections, vision["deepstack_visual_indexes"] = [24, 20, 20], [8, 16, 24] if depth == 27 else [5, 11, 17]
    text = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    text |= {"num_key_value_heads": key_value_heads, "intermediate_size": mlp}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return {"model_type": kind, "vision": vision, "text": text | {"rope_parameters": rope}}

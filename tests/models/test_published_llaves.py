"""Published models of LLaVA's line, by their configs with small sizes: read like transformers, or refused by name."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close_in_norm
from PIL import Image
from safetensors.torch import load_file, save_file
from sections import section
from transformers import LlamaConfig, LlavaOnevisionImageProcessorPil, LlavaOnevisionModel, Qwen3Config

from pipeline import home
from pipeline.config import EvaluationRun
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.llave import weights
from pipeline.models.registry import family_of, saved, training

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
SIDES = range(1, 7)

# config.json of lmms-lab/llava-onevision-qwen2-7b-ov, without sizes. Earlier revisions of such models have model_type
# qwen2, under which the hub lists LLaVE-2B and Aquila-VL-2B-llava-qwen, too.
ONEVISION = {
    "_name_or_path": "lmms-lab/llava-onevision-qwen2-7b-ov",
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "image_token_index": 151646,
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_grid_pinpoints": [[384 * across, 384 * down] for across in SIDES for down in SIDES],
    "image_split_resolution": None,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_newline_position": None,  # only some revisions have it
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def original(folder: Path, **fields: object) -> Path:
    """Write a small checkpoint with the fields of ONEVISION and others; None removes one."""
    shutil.copytree(GOLDEN, folder)
    sizes = json.loads((GOLDEN / "config.json").read_text())
    values = {name: sizes[name] for name in SIZES if name in sizes} | ONEVISION | fields
    removed = [name for name, value in values.items() if value is None and name not in ("rope_scaling",)]
    (folder / "config.json").write_text(json.dumps({n: v for n, v in values.items() if n not in removed}))
    return folder


def in_transformers_format(folder: Path, tiny_model: str) -> Path:
    """Write a folder like llava-hf/llava-onevision-qwen2-7b-ov-hf: its config's fields and its tensors' names."""
    shutil.copytree(tiny_model, folder)
    values = json.loads((folder / "config.json").read_text())
    side, rows = values["vision_config"]["image_size"], values["text_config"]["vocab_size"]
    for name in ("mm_newline_position", "multimodal_projector_bias", "dtype"):
        values.pop(name, None)
    values |= {
        "_name_or_path": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [[side * down, side * across] for down in SIDES for across in SIDES],
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.45.0.dev0",
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    (folder / "config.json").write_text(json.dumps(values))
    parts = {"language_model.": "language_model.model.", "vision_tower.": "vision_tower.vision_model."}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        part = next((part for part in parts if name.startswith(part)), "")
        tensors[parts.get(part, "") + name.removeprefix(part)] = tensor
    tensors["language_model.lm_head.weight"] = torch.ones(rows, values["text_config"]["hidden_size"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    processor.image_grid_pinpoints = values["image_grid_pinpoints"]
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(home.CACHE, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "published",
    [
        {"model_type": "llava"},
        {"model_type": "qwen2", "_name_or_path": "/models/Qwen2.5-1.5B-Instruct", "sliding_window": 32768},
        "transformers",
    ],
    ids=["original", "qwen2", "transformers"],
)
def test_published_configs_embed_as_transformers_does(published, tiny_model, tmp_path):
    if published == "transformers":
        folder = in_transformers_format(tmp_path / "published", tiny_model)
    else:
        folder = original(tmp_path / "published", **published)
    assert family_of(str(folder)) is saved("llave")
    training("llave").check(section("llave", path=str(folder)))
    embedder = Embedder.load(folder, CPU)
    read = weights.opened(str(folder))
    theirs = LlavaOnevisionModel.from_pretrained(read).eval()
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(read)
    side = theirs.config.vision_config.image_size
    wide = (5 if side < 100 else 2) * side  # several tiles of 384 pixels take seconds
    for height, width in ((0, 0), (side, side), (3 * side // 2, wide)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        pictures = [Image.fromarray(pixels)] if height else []
        text = "<image>\nWhat is it?" if pictures else "a red star"
        encoded = embedder.processor.encode_parts(text, [partial(Image.Image.copy, each) for each in pictures], None)
        inputs = dict(processor([pictures], return_tensors="pt")) if pictures else {}
        with torch.no_grad():
            ids = torch.from_numpy(encoded.input_ids).long()[None]
            hidden = theirs(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        found = embedder.embed([{"text": text, "images": pictures}])
        assert_close_in_norm(F.normalize(hidden[0, -1], dim=-1), found[0])


CODE = "configuration_llavaonevision1_5.Llavaonevision1_5Config"
INTERLEAVE = {"model_type": "siglip_vision_model", "num_hidden_layers": 26, "hidden_size": 1152, "image_size": 384}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param(
            {
                "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
                "auto_map": {"AutoConfig": CODE},
                "model_type": "llavaonevision1_5",
                "text_config": {"model_type": "LLaVAOneVision1_5_text", "hidden_size": 2560},
                "vision_config": {"model_type": "rice_vit", "depth": 24},
            },
            "LLaVA-OneVision-1.5 (LLaVAOneVision1_5_ForConditionalGeneration) is not supported, because",
            id="onevision-1.5",
        ),
        pytest.param(
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "model_type": "llava",
                "text_config": {"model_type": "qwen2", "hidden_size": 1024},
                "vision_config": INTERLEAVE,
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
            },
            "LLaVA-1.5 or LLaVA-Interleave (LlavaForConditionalGeneration) is not supported, because",
            id="interleave",
        ),
        pytest.param(
            {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"},
            "LLaVA-NeXT (LlavaNextForConditionalGeneration) is not supported, because",
            id="next",
        ),
        pytest.param(
            {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"},
            "original LLaVA with a Llama (LlavaLlamaForCausalLM) is not supported, because",
            id="llama",
        ),
    ],
)
def test_models_that_resemble_llave_are_refused_by_name(config, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for use in (
        lambda: Embedder.load(tmp_path, CPU),
        lambda: load_encoder(str(tmp_path), EvaluationRun(), CPU),
        lambda: training("llave").check(section("llave", path=str(tmp_path))),
    ):
        with pytest.raises(PipelineError) as error:
            use()
        assert said in str(error.value) and "use a LLaVA-OneVision with Qwen2, such as" in str(error.value)


def test_originals_with_other_options_are_refused(tmp_path):
    """The first is as in llava-next-interleave-qwen-0.5b."""
    for number, (fields, said) in enumerate(
        [
            ({"image_aspect_ratio": "anyres", "mm_newline_position": None}, "='anyres' is not supported"),
            ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode='average' is not supported"),
            ({"add_faster_video": True}, "add_faster_video=True is not supported"),
        ]
    ):
        with pytest.raises(PipelineError, match=said):
            Embedder.load(original(tmp_path / str(number), **fields), CPU)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
def test_other_decoders_in_llava_onevision_are_refused_by_name(kind, tiny_model, tmp_path):
    """Qwen3 normalises queries and keys, and Llama has no biases: the decoder's changed classes are Qwen2's."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    sizes = {name: values["text_config"][name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    values["text_config"] = kind(**sizes, num_attention_heads=4, num_key_value_heads=2).to_dict()
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(PipelineError, match=f"text_config.model_type='{kind.model_type}' is not supported; qwen2, as"):
        Embedder.load(folder, CPU)

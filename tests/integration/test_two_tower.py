"""Steps of LLM2CLIP's stages and of CLIP equal one process with the whole batch."""

from pathlib import Path

import pytest
import torch
from comparison import assert_equal, zero_config
from launch import launch
from sections import section

from pipeline.models.clip import model as clip
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.registry import training
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.processor import Settings

WORKER = str(Path(__file__).with_name("two_tower.py"))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 24, "patch_size": 8, "projection_dim": 20}
TEXTS = ["query target negative star what a caption shows", "0 1 2 3 4 5 6 7 8 9"]
SHAPES = {
    "text_encoder": {"text": SIZES | {"vocab_size": 320, "num_key_value_heads": 2}},
    "llm2clip": {"vision": VISION},
    "clip": {"vision": VISION, "text": SIZES | {"vocab_size": 600, "max_position_embeddings": 50}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Create a model folder per family, and DeepSpeed's configs in the same folder."""
    folder = tmp_path_factory.mktemp("models")
    for kind, architecture in SHAPES.items():
        made = folder / f"{kind}-made"
        encoder = {"text_encoder": str(folder / "text_encoder")} if kind == "llm2clip" else {}
        model = section(kind, architecture=architecture, **encoder)
        training(kind).build(model, TEXTS, 1, made)
        # Biases are initialized to zero, where a relative difference is meaningless. Those of trained models are not.
        if kind == "text_encoder":
            model = randomised(decoder.TextEncoder.load(str(made), torch.float32))
            decoder.save(model, dict(model.named_parameters()), str(made), folder / kind, None, Settings())
        elif kind == "clip":
            clip.save(randomised(clip.Clip.load(str(made), torch.float32)), str(made), folder / kind)
        else:
            model = randomised(llm2clip.Llm2Clip.load(str(made), torch.float32, SIZES["hidden_size"]))
            llm2clip.save(model, str(folder / "text_encoder"), folder / kind, None)
    for stage in range(4):
        zero_config(f"zero{stage}", folder)
    return folder


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05, generator=generator)
    return model


@pytest.mark.parametrize(("world", "cases"), [(1, "alone"), (2, "two")])
def test_step_equals_one_process_with_whole_batch(world, cases, models, tmp_path):
    out = tmp_path / "out.json"
    ended = launch([WORKER, str(models), str(out), cases], world)
    assert ended.status == [0] * world, ended.output[-4000:]
    assert_equal(out, f"{world} processes")

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import fork_server
from sections import section
from transformers import AutoModel

from pipeline.models.registry import training

# The files that take longest, which come first: at the end no process waits long for another one's file.
_LONGEST = ("exactness", "llm2clip", "training", "collectives", "world_size", "installed", "damaged_runs", "two_tower")
_BUILD = Path(__file__).with_name("build_cpu_adam.py")
_building = pytest.StashKey[subprocess.Popen]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile DeepSpeed's CPU Adam, once per machine, while other tests run.

    Also start the fork server, which imports the modules that ranks need; Slurm starts its ranks without it.
    """
    if not session.config.option.collectonly:
        if any("slurm" not in item.path.parts for item in session.items):
            fork_server()
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(_BUILD.parents[2])}
        session.stash[_building] = subprocess.Popen([sys.executable, _BUILD], **pipes, env=environment)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if building := session.stash.get(_building, None):
        building.send_signal(signal.SIGINT)  # SIGKILL would leave PyTorch's lock file
        building.wait()


@pytest.fixture(scope="session", autouse=True)
def cpu_adam(request: pytest.FixtureRequest) -> None:
    """Wait for the build before any test's time limit starts."""
    building = request.session.stash[_building]
    errors = building.communicate()[1]
    assert building.returncode == 0, errors.decode()[-4000:]


@pytest.fixture(scope="session", autouse=True)
def as_many_threads_as_a_rank_has() -> None:
    """Use one thread: another number rounds sums differently in the last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of a Qwen2-VL, a Qwen2.5-VL and a Qwen3-VL with random weights, by their model_type."""
    root = tmp_path_factory.mktemp("models")
    tower = {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 48, "depth": 2, "num_heads": 2}
    towers = {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, "depth": 2, "num_heads": 2},
        "qwen2_5_vl": tower | {"window_size": 16, "fullatt_block_indexes": [1]},  # windows of two tokens a side
        "qwen3_vl": tower | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]},
    }
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 320, "initializer_range": 0.1}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]}
    texts = {
        "qwen2_vl": text | {"rope_parameters": rope},
        "qwen2_5_vl": text | {"rope_parameters": rope},
        "qwen3_vl": text | {"head_dim": 16, "rope_parameters": rope | {"mrope_section": [4, 2, 2]}},
    }
    for kind, vision in towers.items():
        architecture = {"model_type": kind, "vision": vision | {"patch_size": 4}, "text": texts[kind]}
        training("qwen_vl").build(section("qwen_vl", architecture=architecture), ["a small red star"], 1, root / kind)
        with torch.no_grad():  # at zero, where biases begin, a relative difference has no meaning
            model = AutoModel.from_pretrained(root / kind)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
            model.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in towers}


@pytest.fixture(scope="session")
def tiny_qwen(tiny_qwens: dict[str, str]) -> str:
    """Return the folder of a Qwen3-VL with random weights."""
    return tiny_qwens["qwen3_vl"]

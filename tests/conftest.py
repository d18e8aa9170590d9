"""Fixtures shared by all tests."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType

# ATEN_CPU_CAPABILITY limits only torch's own kernels; oneDNN and MKL detect the processor themselves. Limit all three
# alike: in bf16, torch's attention fails if oneDNN packs weights for AMX and torch cannot use it. This must be set
# before torch is imported; subprocesses inherit it.
if less := {"default": ("SSE41", "SSE4_2"), "avx2": ("AVX2", "AVX2")}.get(os.environ.get("ATEN_CPU_CAPABILITY", "")):
    os.environ |= dict(zip(("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"), less, strict=True))

# The garbage collector would visit all imported objects again and again. `pytest_collection_finish` enables it.
gc.disable()

import hypothesis
import pytest
import torch
from limits import HANG_SECONDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# A shell's background jobs ignore Ctrl-C, and programs that tests start and interrupt would inherit this.
with suppress(ValueError):  # not the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pipeline.models.llave.config import LlaveArchitecture
from pipeline.models.llave.folder import save_folder
from pipeline.models.llave.model import Llave, build
from pipeline.storage import objects
from tools.s3_server import S3Server

# The time that an example and its generation take depends on the machine.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")

_STARTS = {"subprocess", "on_two_ranks"}  # names in modules that start processes
_TOLERANT = {"assert_close_in_norm", "rounding", "assert_close", "assert_allclose", "allclose", "isclose", "approx"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="leave out slow tests: marked so, or in files that start programs"
    )
    parser.addoption("--rounded", action="store_true", help="run only tests that allow for rounding")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test a time limit, so that a hanging test ends. Leave out what --fast or --rounded excludes.

    Files with slow tests, or that start processes, come first: at the end no process waits long for another one's file.
    """
    for item in items:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3 * HANG_SECONDS))
    if config.getoption("--fast"):  # files that start programs import subprocess; each program imports torch again
        slow = [item for item in items if item.get_closest_marker("slow") or hasattr(item.module, "subprocess")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in {*slow}]
    if config.getoption("--rounded"):
        exact = {item for item in items if not _allows_for_rounding(_written(item.function), set())}
        config.hook.pytest_deselected(items=[*exact])
        items[:] = [item for item in items if item not in exact]
    long = {item.path for item in items if item.get_closest_marker("slow") or _STARTS & vars(item.module).keys()}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """Let the garbage collector run again, without the objects of imported modules."""
    gc.freeze()
    gc.enable()


def _written(test: Callable) -> Callable:
    """Return the function as written; hypothesis' `given` wraps it."""
    return test.hypothesis.inner_test if hasattr(test, "hypothesis") else test


def _allows_for_rounding(function: Callable, seen: set[Callable]) -> bool:
    """Whether a function, or one of its module that it calls, compares with a tolerance, or has a constant like one."""
    seen.add(function)
    codes, inside = [function.__code__], vars(sys.modules[function.__module__])
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        if _TOLERANT.intersection(code.co_names) or any(map(_is_tolerance, code.co_consts)):
            return True
    values = [inside.get(name) for code in codes for name in code.co_names]
    own = [each for each in values if isinstance(each, FunctionType) and each.__module__ == function.__module__]
    return any(map(_is_tolerance, values)) or any(_allows_for_rounding(each, seen) for each in own if each not in seen)


def _is_tolerance(value: object) -> bool:
    return isinstance(value, float) and (0 < abs(value) < 0.1 or 0.9 < abs(value) < 1)  # also a least cosine


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Check that no child process is left; one would delay the end of this process."""
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def default_store_settings() -> Iterator[None]:
    """Undo `objects.configure` after each test: opening a dataset calls it, and it is for the whole process."""
    yield
    objects.configure()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Start a real S3 server with the bucket `pipeline-tests`; the environment points to it for the whole session."""
    with S3Server("pipeline-tests") as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that saves a LLaVA-OneVision of random weights with given configs and returns its folder."""

    def make(vision: dict, text: dict) -> str:
        side = vision["image_size"]
        pinpoints = [(side * rows, side * columns) for rows in (1, 2) for columns in (1, 2)]
        architecture = LlaveArchitecture(vision=vision, text=text, image_grid_pinpoints=pinpoints)
        folder = tmp_path_factory.mktemp("models") / "model"
        build(architecture, ["a small red star at the top left", "a large blue ring"], seed=1, folder=folder)
        # Biases are initialized to zero, where a relative difference is meaningless. Those of trained models are not.
        model = Llave.load(str(folder), torch.float32)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.05)
        save_folder(model, dict(model.named_parameters()), str(folder), folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., str]) -> str:
    """Return the folder of a LLaVA-OneVision with random weights and about 100,000 parameters."""
    return make_model(
        vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 8,
        },
        text={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
        },
    )

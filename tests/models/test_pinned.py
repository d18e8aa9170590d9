"""Where memory cannot be pinned, pageable memory holds the same, with one warning."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.batch import Encoded, Image
from pipeline.models import pinned
from pipeline.models.chunks import CachedFeatures, offloaded, pack, plan_chunks, sent
from pipeline.models.staging import Staging
from pipeline.training import copies

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse to pin, as cudaHostAlloc does, and return what asked for it."""
    asked, pinned_anew = [], {"empty": torch.empty, "empty_like": torch.empty_like}

    def refusing(name: str):
        def allocate(*args, pin_memory: bool = False, **options) -> Tensor:
            if pin_memory:
                asked.append(name)
                raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")
            return pinned_anew[name](*args, **options)

        return allocate

    for name in pinned_anew:
        monkeypatch.setattr(torch, name, refusing(name))
    pinned._warn.cache_clear()
    return asked


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_other_errors_of_the_gpu_are_raised():
    def allocate(pins: bool) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        pinned.pinned(allocate)


def test_first_refusal_is_a_warning(refused, caplog):
    for size in (5, 7):
        assert pinned.pinned(lambda pins, size=size: torch.empty(size, pin_memory=pins)).shape == (size,)
    assert refused == ["empty", "empty"]
    (said,) = warnings(caplog)
    assert said.startswith("CPU memory could not be pinned (CUDA error: out of memory), so copies")
    assert "ulimit -l" in said and "plan_memory" in said


def test_what_is_not_refused_is_pinned(caplog):
    assert pinned.pinned(lambda pins: torch.full((), pins))
    assert not warnings(caplog)


def test_chunks_are_staged_in_pageable_memory(refused, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    staging = Staging(CPU)
    staging._stream = SimpleNamespace(record_event=lambda: SimpleNamespace(synchronize=lambda: None))
    draws = np.random.default_rng(0)
    for count in (1, 2, 3, 9):
        image = Image(draws.integers(0, 256, (count, 3, 5, 5), dtype=np.uint8), 5, 5)
        packed = pack([Encoded(draws.integers(0, 99, 3 * count, dtype=np.int32), (image,))])
        staged = staging.sent(packed, tiles=True).packed
        assert torch.equal(staged.input_ids, packed.input_ids) and torch.equal(staged.tiles, packed.tiles)
        assert torch.equal(staged.position_ids, packed.position_ids)
    assert len(refused) > 1 and len(warnings(caplog)) == 1


class OnGpu:
    """A tensor as if it were on a GPU."""

    device = CUDA

    def __init__(self, values: Tensor) -> None:
        self.values, self.nbytes = values, values.nbytes

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Tensor:
        return function(args[0].values, *args[1:], **(kwargs or {}))


def test_features_are_offloaded_to_pageable_memory(refused, caplog, monkeypatch):
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda to, of, **options: copy(to, getattr(of, "values", of), **options))
    values = iter(range(100))
    frozen = SimpleNamespace(device=CPU, features_of=lambda *_: OnGpu(torch.full((1000,), float(next(values)))))
    chunks, features = plan_chunks([Encoded(np.ones(9, np.int32))] * 5, 9, CPU), None
    features = CachedFeatures(frozen, 0)
    assert [float(features(chunk, chunk.packed).values[0]) for chunk in chunks] == [0, 1, 2, 3, 4]
    assert [features(chunk, chunk.packed).unique().tolist() for chunk in chunks] == [[0], [1], [2], [3], [4]]
    assert len(refused) == 5 and len(warnings(caplog)) == 1
    assert torch.equal(offloaded(torch.arange(3)), torch.arange(3))  # from the CPU, nothing is pinned
    assert len(refused) == 5


def test_small_tensors_are_sent_from_pageable_memory(caplog, monkeypatch):
    def refuse(self: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    went = []
    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: went.append((self.tolist(), device)))
    sent(torch.arange(3), CUDA)
    sent(torch.arange(2), CUDA)
    assert went == [([0, 1, 2], CUDA), ([0, 1], CUDA)] and len(warnings(caplog)) == 1


def test_checkpoints_are_copied_to_pageable_memory(refused, caplog):
    assert copies._allocate(9, True).shape == (9,) and refused == ["empty"]
    assert copies._allocate(9, False).shape == (9,) and refused == ["empty"]
    assert len(warnings(caplog)) == 1

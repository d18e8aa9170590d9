"""Copies of states: exact, in memory that is used again, and only if there is enough."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.jobs import limits
from pipeline.training.copies import Copies, _allocated

CPU = torch.device("cpu")


def saved(state: object) -> bytes:
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def state_of_many_kinds() -> dict:
    """Return a state with all that DeepSpeed's states contain."""
    flat = torch.arange(1000.0)
    trained = nn.Parameter(flat[:300].view(20, 15))
    trained.grad = torch.ones(20, 15)  # torch.save leaves it out
    with_attributes = flat[300:700].clone().requires_grad_()
    with_attributes.ds_id = "7"
    return {
        "module": {"a": flat[:300].view(20, 15), "b": flat[300:].view(7, 100).T, "again": flat},
        "parameters": (trained, [with_attributes]),
        "bf16": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "shape": flat.view(10, 100).shape,
        "nested": [{"step": torch.tensor(3.0), "betas": (0.9, 0.999)}] * 2,
    }


def test_copy_is_saved_with_the_same_bytes_and_does_not_change():
    state, copies = state_of_many_kinds(), Copies(CPU)
    before, buffers = saved(state), []
    for _ in range(2):
        kept = copies.of(state)
        copies.fill()
        tensors = [kept["module"]["again"], *kept["parameters"][1], kept["bf16"], kept["nested"][0]["step"]]
        buffers.append(sorted(tensor.data_ptr() for tensor in tensors))
        state["module"]["again"].add_(1)
        state["nested"][0]["betas"] = None
        with torch.no_grad():
            state["parameters"][1][0].zero_()
        assert saved(kept) == before
        assert saved(state) != before
        state = state_of_many_kinds()
    # One copy of the 1000 numbers, whatever shares them, and the second copy in the memory of the first.
    assert sorted(size for size, _ in copies._used) == [0, 4, 10, 1600, 4000]
    assert all(len(used) == 1 for used in copies._used.values())
    assert buffers[0] == buffers[1]


def test_content_is_copied_when_filled_and_that_of_volatile_tensors_at_once():
    state, copies = {"weight": torch.zeros(3), "count": torch.zeros(9)[2:4]}, Copies(CPU)
    kept = copies.of(state, [state["count"]])
    for tensor in state.values():
        tensor.add_(1)
    copies.fill()
    assert kept["weight"].tolist() == [1, 1, 1]
    assert kept["count"].tolist() == [0, 0]


def test_without_memory_nothing_is_copied_and_that_is_logged_once(monkeypatch, caplog):
    state, copies = {"x": torch.ones(1000), "same": torch.ones(1000)}, Copies(CPU)
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr(limits, "available_memory", lambda: 4 * 8000 - 1)
        assert copies.of(state) is None
        assert copies.of(state) is None
        assert caplog.text.count("training stops while a checkpoint is written") == 1
        monkeypatch.setattr(limits, "available_memory", lambda: 4 * 8000)
        assert copies.of(state)
        monkeypatch.setattr(limits, "available_memory", lambda: 0)
        assert copies.of(state)  # in the same memory
        copies.free()
        assert copies.of(state) is None


def test_pinned_memory_is_counted_as_torch_allocates_it():
    assert [_allocated(size, True) for size in (0, 1, 4096, 4097)] == [0, 1, 4096, 8192]
    assert _allocated(4097, False) == 4097


def test_on_a_gpu_a_stream_of_its_device_copies_after_the_states_are_there_and_before_they_are_written(monkeypatch):
    done, device = [], torch.device("cuda", 1)

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: str) -> None:
            done.append(f"wait for {other}")

        def synchronize(self) -> None:
            done.append(f"synchronize with {copied()} copied")

    @contextmanager
    def using(stream: Stream) -> Iterator[None]:
        done.append("use the stream")
        yield
        done.append("leave it")

    def copied() -> float:
        return float(kept["a"].sum())

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the main stream of {device}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"use {device}"))
    copies = Copies(device)
    kept = copies.of({"a": torch.ones(5)})
    assert done == ["wait for the main stream of cuda:1"]
    copies.fill()
    assert done[1:] == ["use cuda:1", "use the stream", "leave it", "synchronize with 5.0 copied"]

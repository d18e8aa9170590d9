"""Run code on CUDA tensors without data, and record the kernels that a GPU would run and what waits for it.

Host tensors stay real: numpy, index arithmetic and tokenizers do what they always do. A tensor on device="cuda" is a
FakeTensor, with dtype, shape, strides and device but no memory. Every operator goes through `Tracer`, which fails where
a GPU would. Values that the host sent to the device are remembered, so that code which reads them back takes its way.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import roofline
import streams
import torch
from scopes import Scope, scope_of
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten, c10d = torch.ops.aten, torch.ops.c10d
torch.cuda._lazy_init = lambda: None  # factories call it

# A torch without CUDA would replace it by the operators that it is made of. The kernel is never called.
_library = torch.library.Library("aten", "IMPL")
_library.impl("silu_backward", lambda *_: None, "CUDA")

_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
_SHAPE_ON_DEVICE = {
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.repeat_interleave, aten.bincount),
}
_MATMULS = {
    *(aten.mm, aten.addmm, aten.addmm_, aten._addmm_activation, aten.bmm, aten.baddbmm),
    *(aten.convolution, aten.convolution_backward),
}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_NCCL = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.half, torch.float, torch.double, torch.bfloat16}
_REMEMBERED = 1 << 16  # elements


@dataclass
class Record:
    """What a GPU would do.

    kernels: launches, bytes: of device memory, seconds: by the roofline; each by part (see `Scope`) and operator.
    waits: how often the host waits for the device, by what and where.  waits_in_layers: those inside a model's layer.
    copies: asynchronous ones, by what and where.  collectives: by name, dtype and where.
    attention: calls by kernel, dtype and shape.  flops: of matmuls and attention.
    """

    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    waits_in_layers: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    flops: int = 0


class Tracer(TorchDispatchMode):
    """record: what was recorded since the last `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.record = Record()
        self._scopes: dict[int, Scope] = {}  # of forward operators, by the sequence number of their autograd node
        self._pairs: dict[tuple[int, int], int] = {}

    def reset(self) -> None:
        self.record = Record()

    def __enter__(self) -> "Tracer":
        self._lift, self._tolist = torch._C._only_lift_cpu_tensors(), FakeTensor.tolist
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the host, then copied
        FakeTensor.tolist = lambda x: x.cpu().tolist()  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        torch._C._set_only_lift_cpu_tensors(self._lift)
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]

    def on_device(self, x: Tensor, values: Tensor | None = None) -> FakeTensor:
        """Return a tensor like x on the device.  values: what it holds, if that is to be remembered."""
        with self.fake:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
        if values is not None:
            fake.known = values.clone()
        return fake

    def attention(self, pairs: int, queries: int, keys: int, what: str) -> None:
        """Note a call of attention on packed rows.  pairs: of a query and a key that it sees."""
        self._pairs[queries, keys] = pairs
        self.record.attention[what] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs = [x for x in tensors if isinstance(x, FakeTensor)]
        packet, target = func._overloadpacket, kwargs.get("device")
        to = None if target is None else torch.device(target).type
        if not inputs and to != "cuda":
            return self._on_host(func, packet, args, kwargs)
        if func.namespace == "prim":
            with self.fake:
                return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._collective(func, args, inputs)
        if packet is aten._local_scalar_dense:
            self.wait("item()")
            return self._values(args[0]).item()
        if packet is aten._to_copy and inputs and to == "cpu":
            self.wait("device to host")
            return self._values(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if packet is aten.empty_like and to == "cpu":
            host = torch.empty(args[0].shape, dtype=args[0].dtype)
            host.pinned = bool(kwargs.get("pin_memory"))  # type: ignore[attr-defined]
            return host
        if packet is aten.copy_ and args[0].device != args[1].device:
            return self._copied(*args, **kwargs)
        if packet is aten._to_copy and not inputs:
            return self._sent(args[0], kwargs)
        scope = self._scope()
        self._check(packet, args, inputs, scope)
        with self.fake:
            out = func(*args, **kwargs)
        if func.is_view:
            for each in tree_leaves(out):
                streams.viewed(each, args[0])
        else:
            for each in inputs:
                streams.used(each, scope.where)
        self._remember(func, args, kwargs, inputs, out)
        if not (packet in _FREE or func.is_view):
            self._account(func, args, kwargs, out, inputs, scope)
        return out

    def _on_host(self, func: Any, packet: Any, args: tuple, kwargs: dict) -> Any:
        if packet is aten.is_pinned:
            return getattr(args[0], "pinned", False)
        pins = packet is aten._pin_memory or kwargs.pop("pin_memory", None)
        out = args[0].clone() if packet is aten._pin_memory else func(*args, **kwargs)
        if pins or (packet is aten.slice and getattr(args[0], "pinned", False)):
            out.pinned = True
        return out

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        scope = self._scope()
        self.record.waits[f"{what}: {scope.where}"] += 1
        if scope.layer:
            self.record.waits_in_layers[f"{what}: {scope.where}"] += 1

    def _scope(self) -> Scope:
        """Where the current operator comes from; in a backward pass, where its forward operator came from."""
        node = torch._C._current_autograd_node()
        # `sys._getframe` also sees the frames of a custom backward function and of a recomputation.
        scope = scope_of(_frames(sys._getframe(1)))
        if node is None:
            # Autograd has already created the node of an operator whose kernel runs.
            self._scopes[torch.autograd._get_sequence_nr() - 1] = scope
            return scope
        if node.name().endswith("AccumulateGrad"):
            return Scope("gradients", False, "accumulation of gradients")
        forward = self._scopes.get(node._sequence_nr(), scope)
        return Scope(
            forward.part if scope.part == "other" else scope.part,
            scope.layer or forward.layer,
            f"backward of {forward.where}" if scope.where == "torch" else scope.where,
        )

    def _values(self, x: FakeTensor) -> Tensor:
        """Return the values of a device tensor if they are remembered, else ones (floats) or zeros."""
        known = getattr(x, "known", None)
        if known is not None:
            return known.clone()
        return (torch.ones if x.dtype.is_floating_point else torch.zeros)(x.shape, dtype=x.dtype)

    def _remember(self, func: Any, args: tuple, kwargs: dict, inputs: list[FakeTensor], out: Any) -> None:
        """Compute small results whose inputs are all remembered; forget what an operator overwrites."""
        if func._schema.is_mutable:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and hasattr(x, "known"):
                    del x.known
            return
        small = isinstance(out, FakeTensor) and not out.is_floating_point() and out.numel() <= _REMEMBERED
        if small and inputs and all(hasattr(x, "known") for x in inputs):
            known, options = tree_map(lambda x: getattr(x, "known", x), (args, kwargs))
            out.known = func(*known, **{name: x for name, x in options.items() if name != "device"}).clone()

    def _sent(self, x: Tensor, kwargs: dict) -> FakeTensor:
        """Copy from host to device. From pageable memory the copy waits for the device even if it is `non_blocking`."""
        if kwargs.get("non_blocking") and getattr(x, "pinned", False):
            self.record.copies[f"host to device: {self._scope().where}"] += 1
        else:
            self.wait("host to device" if not kwargs.get("non_blocking") else "host to device, pageable")
        values = x.to(kwargs.get("dtype") or x.dtype)
        made = self.on_device(values, values)
        streams.made(made)
        return made

    def _copied(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        host, what = (source, "to device") if isinstance(to, FakeTensor) else (to, "to host")
        if non_blocking and getattr(host, "pinned", False):
            self.record.copies[f"copy_ {what}: {self._scope().where}"] += 1
        else:
            self.wait(f"copy_ {what}")
        if isinstance(to, FakeTensor):
            if hasattr(to, "known"):
                del to.known
        else:
            to.copy_(self._values(source))
        return to

    def _check(self, packet: Any, args: tuple, inputs: list[FakeTensor], scope: Scope) -> None:
        """Raise what a GPU would, besides what FakeTensor raises for operands on different devices; note waits."""
        if packet in _MATMULS:
            dtypes = {x.dtype for x in inputs if x.is_floating_point()}
            assert len(dtypes) < 2, f"{packet.__name__} of {dtypes} at {scope.where}: a GPU refuses it"
        if packet in _INDEXED:
            indices = [x for x in args[1] if x is not None]
            if any(not isinstance(x, FakeTensor) for x in indices):
                self.wait("host index on a device tensor")
            if any(x.dtype == torch.bool for x in indices):
                self.wait("bool index: its shape is on the device")
        if packet in _SHAPE_ON_DEVICE:
            self.wait(f"{packet.__name__}: its shape is on the device")

    def _collective(self, func: Any, args: tuple, inputs: list[FakeTensor]) -> Any:
        """Note a collective of NCCL. Every rank is taken to have sent the same."""
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        name, scope = func._schema.name.removeprefix("c10d::").strip("_"), self._scope()
        for x in tensors:
            assert isinstance(x, FakeTensor), f"{name} at {scope.where}: NCCL takes device tensors, not {x.device}'s"
            assert x.is_contiguous(), f"{name} at {scope.where}: a tensor is not contiguous"
            assert x.dtype in _NCCL or x.dtype == torch.bool, f"{name} at {scope.where}: {x.dtype}"
        self.record.collectives[f"{name} {str(inputs[0].dtype)[6:]}: {scope.where}"] += 1
        total = name == "allreduce" and args[2].op() == int(torch.distributed.ReduceOp.SUM)
        for x in inputs:
            if hasattr(x, "known") and name != "allreduce":
                del x.known
            elif total and hasattr(x, "known"):
                x.known *= torch.distributed.get_world_size()
        work = FakeWork().boxed()
        returned = {"allreduce_": args[0], "broadcast_": args[0], "allgather_": args[0]}
        returned |= {"_allgather_base_": args[0], "_reduce_scatter_base_": args[0]}
        short = func._schema.name.removeprefix("c10d::")
        return (returned[short], work) if short in returned else work

    def _account(self, func: Any, args: tuple, kwargs: dict, out: Any, inputs: list[FakeTensor], scope: Scope) -> None:
        packet, part = func._overloadpacket, scope.part
        name = packet.__name__
        attention = "varlen" in name or "scaled_dot" in name
        if packet in _MATMULS or attention:
            part = part if part == "tower" else ("attention" if attention else "matmul")
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        launches, moved = 1, sum(map(_size, [*inputs, *outputs]))  # in place, a tensor is read and written
        if name in ("slice_backward", "select_backward"):  # zeros, and a copy into them
            launches, moved = 2, moved + _size(outputs[0])
        if "varlen" in name:
            backward = "backward" in name
            query, key = args[backward : backward + 2]
            flops = (10 if backward else 4) * query.shape[1] * query.shape[2] * self._pairs[len(query), len(key)]
        else:
            flops = roofline.flops(func, args, kwargs, out)
        record = self.record
        record.kernels[part, name] += launches
        record.bytes[part, name] += moved
        record.seconds[part, name] += roofline.seconds(name, flops, moved, launches, inputs)
        record.flops += flops


def _frames(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _size(x: Tensor) -> int:
    """Bytes of memory that hold a tensor's elements: an expanded dimension has one element."""
    elements = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        elements *= length if stride else 1
    return elements * x.element_size()


def faked(module: torch.nn.Module, tracer: Tracer) -> torch.nn.Module:
    """Move a module's parameters and buffers from the host or the meta device to the device; shared ones stay shared.

    Raises AssertionError for a tensor that is neither: `Module.to` would leave it on the host.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(x: Tensor | None) -> Tensor | None:
        if x is None or isinstance(x, FakeTensor):
            return x
        if id(x) not in moved:
            fake: Tensor = tracer.on_device(x)
            moved[id(x)] = x, torch.nn.Parameter(fake, x.requires_grad) if isinstance(x, torch.nn.Parameter) else fake
        return moved[id(x)][1]

    for each in module.modules():
        each._parameters.update({name: move(x) for name, x in each._parameters.items()})
        each._buffers.update({name: move(x) for name, x in each._buffers.items()})
        left = [name for name, x in vars(each).items() if isinstance(x, Tensor) and not isinstance(x, FakeTensor)]
        assert not left, f"{type(each).__name__}: {left} would stay on the host"
    return module

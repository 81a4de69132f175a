"""Follow the memory of a training step that runs on fake tensors, byte by byte and kind by kind.

Built on torch's `MemTracker`, which knows when the storage of every tensor comes and goes.  Its subclass
for FSDP takes one micro-batch, and parameters gathered by a module's own call; a step here has
several, and an output layer that is gathered by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._guards import active_fake_mode
from torch.distributed._tools.mem_tracker import MemTracker, _UpdateType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.planner.report import Breakdown, Part
from qdora.quant.weight import TILE_BYTES

_P = ParamSpec("_P")
_R = TypeVar("_R")

CPU = torch.device("cpu")
_TOTAL = "Total"
"""Under which `MemTracker` keeps the sum of all kinds."""

_aten, _c10d = torch.ops.aten, torch.ops.c10d
_COLLECTIVES: Mapping[Any, tuple[str, int]] = {
    _c10d._allgather_base_.default: ("all-gather", 0),
    _c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
    _c10d.allreduce_.default: ("all-reduce", 0),
    torch.ops._c10d_functional.all_reduce.default: ("all-reduce", 0),
}
"""Name of each collective, and which of its arguments holds the shares of all ranks."""


class StepTracker(MemTracker):
    """While entered, knows what is in memory, and what was there at the worst moment of each stretch.

    Answers what fake tensors cannot: a number read from one is 1, a mask selects everything.

    Args:
        vocabulary: tensors with so many columns are logits.

    Attributes:
        exchanged: bytes of all ranks' shares together, by collective.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._ref_class = Part  # type: ignore[assignment]
        self._vocabulary = vocabulary
        self._inside: Part | None = None
        self._shapes_only = False
        self._stretch = ""
        self._worst: dict[str, dict[str, int]] = {}
        self._restore: list[Callable[[], object]] = []
        self.exchanged: dict[str, int] = {}

    @property
    def current(self) -> Breakdown:
        """What is in memory now."""
        return _breakdown(self._curr_mem_snap.get(CPU, {}))

    @property
    def peaks(self) -> dict[str, Breakdown]:
        """The worst moment of each stretch since `restart`, by its name."""
        return {stretch: _breakdown(parts) for stretch, parts in self._worst.items()}

    def restart(self) -> None:
        """Forget the stretches so far and what was exchanged in them."""
        self._worst.clear()
        self.exchanged.clear()

    def begin(self, stretch: str) -> None:
        """From here on, moments belong to a stretch of this name."""
        self._stretch = stretch
        self._look()

    def mark(self, tensors: Iterable[torch.Tensor], part: Part) -> None:
        """Say what tensors are for, whether they were seen before or not."""
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, part)  # type: ignore[arg-type]

    def mark_rest(self, part: Part) -> None:
        """Say what everything is for that is in memory now; a later `mark` says it better."""
        for info, _ in list(self._WINFO.values()):
            before = info.reftype
            # A buffer for gathered parameters stays as one of no size, and grows again.
            if before is not part and before is not Part.GATHERED:
                info.reftype = part
                self._update_snap(_UpdateType.REF, info, old_reftype=before)

    def follow_fsdp(self, model: nn.Module) -> None:
        """Tell the buffers of a sharded model's collectives from other tensors, until the end."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    self._replace(group, "unshard", self._gathering(group.unshard))
                    self._replace(group, "wait_for_unshard", self._gathering(group.wait_for_unshard))
                    self._replace(group, "post_backward", self._reducing(group, group.post_backward))

    def follow_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Tell the gradients of parameters that are not sharded, until the end."""
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                handle = parameter.register_post_accumulate_grad_hook(self._mark_gradient)
                self._restore.append(handle.remove)

    def _mark_gradient(self, parameter: torch.Tensor) -> None:
        self.mark(_gradients([parameter]), Part.GRADIENTS)

    def _gathering(self, method: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(method)
        def inner(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            before, self._inside = self._inside, Part.GATHERED
            try:
                return method(*args, **kwargs)
            finally:
                self._inside = before

        return inner

    def _reducing(self, group: Any, method: Callable[_P, _R]) -> Callable[_P, _R]:
        reduce = self._gathering(method)

        @wraps(method)
        def inner(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            gathered = [p._unsharded_param for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            self.mark(_gradients(gathered), Part.GATHERED)
            result = reduce(*args, **kwargs)
            self.mark(_gradients(p.sharded_param for p in group.fsdp_params), Part.GRADIENTS)
            return result

        return inner

    def _pass_over_shapes(self) -> None:
        """DTensor runs each operation on whole fake tensors first, for the shape of its result."""
        original = ShardingPropagator._propagate_tensor_meta_non_cached

        @wraps(original)
        def inner(*args: Any, **kwargs: Any) -> Any:
            self._shapes_only = True
            try:
                return original(*args, **kwargs)
            finally:
                self._shapes_only = False

        ShardingPropagator._propagate_tensor_meta_non_cached = inner  # type: ignore[method-assign]
        self._restore.append(
            partial(setattr, ShardingPropagator, "_propagate_tensor_meta_non_cached", original)
        )

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)
        self._restore.append(partial(delattr, owner, name))

    def __enter__(self) -> StepTracker:
        self._fake_mode_on_entry = active_fake_mode()
        self._track_resize()
        self._pass_over_shapes()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        TorchDispatchMode.__exit__(self, *args)
        self._restore_resize()
        while self._restore:
            self._restore.pop()()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # comes back as operations on its shards
        if self._shapes_only or active_fake_mode() is not self._fake_mode_on_entry:
            return func(*args, **kwargs or {})
        if func is _aten._local_scalar_dense.default:
            return 1
        if func is _aten.index.Tensor and _is_mask(args[1]):
            result = _all_of(args[0], args[1][0])
        else:
            result = func(*args, **kwargs or {})
        if func in _COLLECTIVES:
            self._count(func, args)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._see(func, tensor)
        self._look()
        return result

    def _see(self, func: Any, tensor: torch.Tensor) -> None:
        if self._inside is not None:
            part = self._inside
        elif tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            part = Part.LOGITS
        elif func.namespace == "bitsandbytes":
            part = Part.TILES
        else:
            part = Part.ACTIVATIONS
        self._track(part, tensor)  # type: ignore[arg-type]

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name, position = _COLLECTIVES[func]
        whole = args[position]
        tensors = whole if isinstance(whole, (list, tuple)) else [whole]
        size = sum(t.numel() * t.element_size() for t in tensors)
        self.exchanged[name] = self.exchanged.get(name, 0) + size

    def _look(self) -> None:
        now = self._curr_mem_snap.get(CPU)
        worst = self._worst.get(self._stretch)
        if now is not None and (worst is None or now[_TOTAL] > worst[_TOTAL]):
            self._worst[self._stretch] = now.copy()


def _breakdown(parts: Mapping[str, int]) -> Breakdown:
    return Breakdown.of({Part(part): count for part, count in parts.items() if part != _TOTAL})


def _gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def _all_of(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As much as a mask can select: every token of the worst batch has a label."""
    return tensor.reshape(-1, *tensor.shape[mask.dim() :]).clone()


CPU = torch.device("cpu")
"""Where every fake tensor is, also one that stands for a GPU's: autograd asks for a real device."""


@contextmanager
def fake_processes(count: int, fsdp: FsdpSettings | None, device: str) -> Iterator[DistributedContext]:
    """Rank 0, whose share is the largest; its collectives return at once.

    Args:
        device: `cuda` or `cpu`, whose tile sizes and copies to suppose.
    """
    assert not dist.is_initialized(), "an estimate is made by a process alone"
    with ExitStack() as stack:
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch puts its own around it
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(_tiles_of(device))
        stack.enter_context(_no_tracing())
        if fsdp is not None and fsdp.offload and device != "cpu":
            stack.enter_context(_copies_of_shards())
        yield DistributedContext(0, count, CPU, fsdp)


def _tiles_of(device: str) -> AbstractContextManager[object]:
    return mock.patch.dict(TILE_BYTES, {"cpu": TILE_BYTES[device]})


def _no_tracing() -> AbstractContextManager[object]:
    """Transformers takes fake tensors for the tracing of a graph, and would make a mask of T x T for it."""
    return mock.patch.object(masking_utils, "is_tracing", return_value=False)


def _copies_of_shards() -> AbstractContextManager[object]:
    """An offloaded shard is copied to the GPU before it is gathered; here it is on the same device."""
    original: Any = vars(FSDPParam)["all_gather_inputs"]
    copies = property(lambda parameter: [shard.clone() for shard in original.fget(parameter)])
    return mock.patch.object(FSDPParam, "all_gather_inputs", copies)

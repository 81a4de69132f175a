"""Fake tensors, fake ranks, and a tracker of what a step holds: all private names of torch and transformers.

Each stands under the reason for which it is needed, and `tests/unit/planner/test_internals.py` fails where
one of them changes.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import _unregister_all_process_groups
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import distributed_c10d
from torch.distributed._tools.mem_tracker import MemTracker, _UpdateType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from qdora.adapters import kernels
from qdora.adapters import tiles as adapted
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import parameter_groups
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError
from qdora.planner.report import Breakdown, Moment, Part
from qdora.quant import QUANTIZATIONS
from qdora.quant.base import TILE_BYTES
from qdora.training import attention, layers

P = ParamSpec("P")
R = TypeVar("R")

CPU = torch.device("cpu")
"""Device of every fake tensor, also of one that stands for a GPU's: autograd asks for a real device."""
_TOTAL = "Total"
"""Key under which `MemTracker` keeps the sum of all kinds."""

_aten, _c10d = torch.ops.aten, torch.ops.c10d
_DEVICE = torch.ops.prim.device.default
"""Where a tensor is, which is asked of fake ones as an operation: nearly half of all."""
_COLLECTIVES: Mapping[Any, tuple[str, int]] = {
    _c10d._allgather_base_.default: ("all-gather", 0),
    _c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
    _c10d.allreduce_.default: ("all-reduce", 0),
    torch.ops._c10d_functional.all_reduce.default: ("all-reduce", 0),
}
"""Name of each collective, and which of its arguments holds the shards of all ranks."""


def fake_tensors() -> FakeTensorMode:
    """Context manager: tensors that are created have a shape, a dtype and a device, and no numbers."""
    return FakeTensorMode(allow_non_fake_inputs=True)


real_tensors = unset_fake_temporarily
"""Context manager within `fake_tensors`: create tensors with numbers for a while."""


def in_backward() -> bool:
    """Whether autograd runs a backward pass now: recomputation calls a layer's forward there."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module, a class or an object, and restore it at the end."""
    own = name in vars(owner)
    original = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def fake_ranks(world_size: int, fsdp: FsdpSettings | None, device: str) -> Iterator[DistributedContext]:
    """The context of rank 0, whose shards are the largest; its collectives return at once.

    Args:
        device: `cuda` or `cpu`, whose tile sizes, kernels and copies to suppose.
    """
    assert not dist.is_initialized(), "an estimate is made outside of a launch"
    with ExitStack() as stack:
        stack.enter_context(replaced(sys, "excepthook", sys.excepthook))  # init_process_group wraps it
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        stack.callback(TILE_BYTES.update, dict(TILE_BYTES))
        TILE_BYTES["cpu"] = TILE_BYTES[device]
        stack.enter_context(replaced(kernels, "available", lambda _: device == "cuda"))
        stack.enter_context(replaced(attention, "flash_device", lambda _: device == "cuda"))
        stack.enter_context(replaced(attention, "float32_device", lambda _: device == "cpu"))
        # Fake tensors are taken for the tracing of a graph, for which a (T, T) mask would be made.
        stack.enter_context(replaced(masking_utils, "is_tracing", lambda *_: False))
        if fsdp is not None and fsdp.offload and device != "cpu":
            # An offloaded shard is copied to the GPU before it is gathered; here it is on the same device.
            inputs: Any = vars(FSDPParam)["all_gather_inputs"]
            copies = property(lambda parameter: [shard.clone() for shard in inputs.fget(parameter)])
            stack.enter_context(replaced(FSDPParam, "all_gather_inputs", copies))
        yield DistributedContext(0, world_size, CPU, fsdp)


def apart(work: Callable[[], R]) -> R:
    """Do work outside of the launch that this process belongs to: in a forked process, in no process group.

    Args:
        work: uses no GPU; its result can be pickled.
    Raises: InputError: `work` raised one.
    """
    if not dist.is_initialized():
        return work()
    forked = multiprocessing.get_context("fork")
    receiver, sender = forked.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # of several, one survives a fork
        _leave_process_groups()
        try:
            sender.send((work(), None))
        except InputError as error:
            sender.send((None, error))

    process = forked.Process(target=run)
    process.start()
    sender.close()
    result, error = receiver.recv()
    process.join()
    if error is not None:
        raise error
    done: R = result
    return done


_left: list[Any] = []
"""Process groups of the parent, for as long as this process lives: their threads, which a destructor would
wait for, are not in it."""


def _leave_process_groups() -> None:
    """Forget the process groups of a forked process' parent, so that it can make its own."""
    world = vars(distributed_c10d)
    for name in ("_pg_map", "_pg_names", "_pg_group_ranks", "_pg_backend_config"):
        _left.append(dict(world[name]))
        world[name].clear()
    _left.append(world["_world"])
    world["_world"] = distributed_c10d._World()
    world["_world"].group_count = 0  # names are kept in caches: those of the next groups must be the same
    _unregister_all_process_groups()


class StepTracker(MemTracker):
    """Context manager that follows the bytes of every tensor, by kind, and keeps the peak of each phase.

    Built on torch's `MemTracker`, which knows when a storage is allocated, resized and freed.  Its own hooks,
    and its subclass for FSDP, are not used: they take one micro-batch, and parameters gathered by a module's
    own call; a step here has several, and an output layer that is gathered by hand.

    Answers what fake tensors cannot: a number read from one is 1.

    Args:
        vocabulary: tensors with so many columns are logits.

    Attributes:
        exchanged: bytes of all ranks' shards, by collective.
        starts: where each phase since `restart` began.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._ref_class = Part  # type: ignore[assignment]
        self._vocabulary = vocabulary
        self._inside: Part | None = None  # kind of what is created now; found from its shape where None
        self._blind = False
        self._phase = ""
        self._peaks: dict[str, dict[str, int]] = {}
        self.starts: dict[str, Moment] = {}
        self._restore = ExitStack()
        self.exchanged: dict[str, int] = {}

    @property
    def current(self) -> Breakdown:
        """What is in memory now."""
        return _breakdown(self._curr_mem_snap.get(CPU, {}))

    @property
    def peaks(self) -> dict[str, Breakdown]:
        """What was in memory at the peak of each phase since `restart`, by its name."""
        return {phase: _breakdown(parts) for phase, parts in self._peaks.items()}

    def restart(self) -> None:
        """Forget the phases so far and what was exchanged in them."""
        self._peaks.clear()
        self.starts.clear()
        self.exchanged.clear()

    def begin(self, phase: str) -> None:
        """From here on, peaks are those of a phase of this name."""
        self._phase = phase
        self.starts[phase] = Moment(self.current, dict(self.exchanged))
        self._keep_peak()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Within it, tensors have numbers and are in CPU memory, of which no account is kept here."""
        with replaced(self, "_blind", True), real_tensors():
            yield

    def mark(self, tensors: Iterable[torch.Tensor], part: Part) -> None:
        """Set the kind of tensors, whether they were seen before or not."""
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, part)  # type: ignore[arg-type]

    def mark_rest(self, part: Part) -> None:
        """Set the kind of everything that is in memory now; a later `mark` is more precise."""
        for info, _ in list(self._WINFO.values()):
            before = info.reftype
            # A buffer for gathered parameters stays, as one of size 0, and grows again.
            if before is not part and before is not Part.GATHERED:
                info.reftype = part
                self._update_snap(_UpdateType.REF, info, old_reftype=before)

    def follow_fsdp(self, model: nn.Module) -> None:
        """Distinguish the buffers of a sharded model's collectives from other tensors, until the end."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in parameter_groups(module):
                    for name in ("unshard", "wait_for_unshard"):
                        gathering = self._with("_inside", Part.GATHERED, getattr(group, name))
                        self._replace(group, name, gathering)
                    self._replace(group, "post_backward", self._reducing(group))

    def follow_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Distinguish the gradients of parameters that are not sharded, until the end."""
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                handle = parameter.register_post_accumulate_grad_hook(
                    lambda p: self.mark(_gradients([p]), Part.GRADIENTS)
                )
                self._restore.callback(handle.remove)

    def _with(self, name: str, value: Any, function: Callable[P, R]) -> Callable[P, R]:
        """The function, an attribute of this tracker having another value while it runs."""

        @wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            with replaced(self, name, value):
                return function(*args, **kwargs)

        return inner

    def _reducing(self, group: Any) -> Callable[..., Any]:
        """An FSDP group's `post_backward`, from gradients of gathered parameters to those of shards."""
        reduce = self._with("_inside", Part.GATHERED, group.post_backward)

        @wraps(reduce)
        def inner(*args: Any, **kwargs: Any) -> Any:
            gathered = [p._unsharded_param for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            self.mark(_gradients(gathered), Part.GATHERED)
            result = reduce(*args, **kwargs)
            self.mark(_gradients(p.sharded_param for p in group.fsdp_params), Part.GRADIENTS)
            return result

        return inner

    def _tiling(self, tiles: Callable[..., Iterator[R]]) -> Callable[..., Iterator[R]]:
        """The tiles of a frozen weight or of an adapted one, what they create being tiles."""

        @wraps(tiles)
        def inner(*args: Any, **kwargs: Any) -> Iterator[R]:
            iterator = tiles(*args, **kwargs)
            following = self._with("_inside", Part.TILES, lambda: next(iterator, None))
            while (item := following()) is not None:
                yield item

        return inner

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._restore.enter_context(replaced(owner, name, value))

    def __enter__(self) -> StepTracker:
        self._fake_mode_on_entry = active_fake_mode()
        # `resize_` of a storage is no operation that a dispatch mode sees.
        self._track_resize()
        self._restore.callback(self._restore_resize)
        # DTensor runs each operation on full fake tensors first, for the shape of its result.
        name = "_propagate_tensor_meta_non_cached"
        propagate = self._with("_blind", True, getattr(ShardingPropagator, name))
        self._replace(ShardingPropagator, name, propagate)
        for kind in set(QUANTIZATIONS.values()):
            self._replace(kind, "tiles", self._tiling(kind.tiles))
        self._replace(adapted, "adapted_tiles", self._tiling(adapted.adapted_tiles))
        # Fakes have one device: what is in CPU memory is known by its kind.
        keep = self._with("_inside", Part.OFFLOADED, torch.clone)
        hooks = torch.autograd.graph.saved_tensors_hooks
        self._replace(layers, "save_on_cpu", lambda **_: hooks(keep, torch.clone))
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        TorchDispatchMode.__exit__(self, *args)
        self._restore.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and follow the tensors of its result."""
        if func is _DEVICE:
            return CPU
        if any(kind is DTensor for kind in types):
            return NotImplemented  # comes back as operations on its shards
        if self._blind or active_fake_mode() is not self._fake_mode_on_entry:
            return func(*args, **kwargs or {})
        result = self._compute(func, args, kwargs or {})
        if func in _COLLECTIVES:
            name, position = _COLLECTIVES[func]
            size = sum(tensor.nbytes for tensor in _tensors(args[position]))
            self.exchanged[name] = self.exchanged.get(name, 0) + size
        for tensor in _tensors(result):
            is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
            part = self._inside or (Part.LOGITS if is_logits else Part.ACTIVATIONS)
            self._track(part, tensor)  # type: ignore[arg-type]
        self._keep_peak()
        return result

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 1
        return func(*args, **kwargs)

    def _keep_peak(self) -> None:
        now, peak = self._curr_mem_snap.get(CPU), self._peaks.get(self._phase)
        if now is not None and (peak is None or _on_device(now) > _on_device(peak)):
            self._peaks[self._phase] = now.copy()


def _on_device(parts: Mapping[str, int]) -> int:
    return parts[_TOTAL] - parts.get(Part.OFFLOADED, 0)


def _breakdown(parts: Mapping[str, int]) -> Breakdown:
    return Breakdown({Part(part): count for part, count in parts.items() if part != _TOTAL})


def _tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of an operation's result or argument."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]

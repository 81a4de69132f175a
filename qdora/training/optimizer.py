"""The optimizer of the trained parameters, on float32 masters that are rounded back after each step.

A bfloat16 parameter that is stepped in place loses every update smaller than half its spacing.  The masters
keep those; there are as many as adapter parameters, which are few.  Published code that has no masters is
repeated by those of the parameters' own dtype: what is stepped then is the rounded parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qdora.config import TrainingConfig
from qdora.training.optimizers import OPTIMIZERS


class AdapterOptimizer:
    """An optimizer of `OPTIMIZERS` with float32 state, whatever the parameters' dtype.

    Args:
        parameters: the trained parameters by name; their gradients are float32.
        config: which one and its settings; `master_weights` false: state, step and gradient in `storage`.
        storage: dtype in which the parameters are stored where they are not sharded; a shard is float32.
            Theirs where None.
        rate_ratio: of the learning rate of a parameter, by its name, to the configured one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainingConfig,
        storage: torch.dtype | None = None,
        rate_ratio: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        self.parameters = dict(parameters)
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            dtype = torch.float32 if config.master_weights else storage or parameter.dtype
            # A float32 parameter is its own master.  One of 16 bits without another is that too, but for its
            # gradient, which is float32: the object that is stepped holds its rounding.
            own = parameter.dtype == dtype == torch.float32
            self.masters[name] = parameter if own else nn.Parameter(parameter.detach().to(dtype))
        pairs = zip(self.parameters.values(), self.masters.values(), strict=True)
        self._rounded = {parameter: master for parameter, master in pairs if master is not parameter}
        self._config = config
        self._groups: dict[float, list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            self._groups.setdefault(rate_ratio(name), []).append(master)
        self._optimizer = self._make()

    def _make(self) -> torch.optim.Optimizer:
        rate = self._config.learning_rate
        groups = [
            {"params": masters, "lr": rate * ratio, "rate_ratio": ratio}
            for ratio, masters in self._groups.items()
        ]
        return OPTIMIZERS[self._config.optimizer].make(groups, self._config)

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, skip: torch.Tensor | None = None) -> None:
        """One update from the gradients of the parameters.

        Args:
            skip: scalar, on any device: where it is not 0 everything stays as it is.  AdamW reads it where
                the parameters are, so that nothing waits for it; for another optimizer the host waits.
        """
        if skip is not None:
            if self._optimizer.defaults.get("fused"):
                device = next(iter(self.masters.values())).device
                # Where torch's fused kernels look for overflow of scaled gradients, with this effect.
                self._optimizer.found_inf = skip.to(device, torch.float32)  # type: ignore[attr-defined]
            elif skip.item():
                return
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_ratio"]
        for name, parameter in self.parameters.items():
            gradient, master = parameter.grad, self.masters[name]
            master.grad = None if gradient is None else gradient.to(master.dtype)
        self._optimizer.step()
        if self._rounded:
            parameters, masters = map(_locals, (self._rounded, self._rounded.values()))
            torch._foreach_copy_(parameters, masters)
            # A shard is written to without a version, by which a stale norm is known.
            torch.autograd.graph.increment_version(self._rounded)
            for master in self._rounded.values():
                master.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and the optimizer's state as flat named tensors, sharded where the parameters are.

        Names and full shapes do not depend on the world size, nor on whether a step was made.  A 16-bit
        parameter is the rounding of its master, so it is not among them.
        """
        kept = {name: _kept(self._optimizer, master) for name, master in self.masters.items()}
        if not all(kept.values()):
            started = self._started()
            for name in (name for name, tensors in kept.items() if not tensors):
                found = _kept(started, self.masters[name])
                kept[name] = {key: torch.zeros_like(tensor) for key, tensor in found.items()}
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            tensors[f"master/{name}"] = master.detach()
            tensors |= {f"{key}/{name}": tensor for key, tensor in kept[name].items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue exactly where `state` was taken.

        Args:
            tensors: as `state` names them; of a sharded one, it or this rank's local shard.  On any device.
        Raises: ValueError: a tensor is missing or has another shape.
        """
        started = self._started()
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            found = _kept(started, master)
            for key, target in {"master": master, **found}.items():
                _copy_named(tensors, f"{key}/{name}", local_shard(target))
            _put_back(started, master, found)
            # What is computed from a parameter is cached by its version, which a local shard does not count.
            torch.autograd.graph.increment_version(master)
            if master is not parameter:
                parameter.copy_(master)
        self._optimizer = started

    @torch.no_grad()
    def _started(self) -> torch.optim.Optimizer:
        """Another optimizer of the same parameters with state, which optimizers make in their first step.

        That step is made at a rate of 0, without a gradient, and moves nothing.
        """
        optimizer = self._make()
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for master in self.masters.values():
            master.grad = None
        return optimizer


_SHARED = ("qmap1", "qmap2", "eps_sq", "mean_square")
"""What an optimizer keeps with a parameter and makes anew: tables and workspace."""


def _kept(optimizer: torch.optim.Optimizer, master: nn.Parameter) -> dict[str, torch.Tensor]:
    """An optimizer's state of a parameter, counts as tensors too; empty before its first step."""
    state: Mapping[str, Any] = optimizer.state.get(master, {})
    found = {
        key: value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for key, value in state.items()
        if value is not None and key not in _SHARED
    }
    group = _group_of(optimizer, master)
    if isinstance(group.get("step"), torch.Tensor) and state:
        # optimi counts the steps of a group: each parameter has a copy.
        found["step"] = group["step"].clone()
    return found


def _put_back(
    optimizer: torch.optim.Optimizer, master: nn.Parameter, kept: Mapping[str, torch.Tensor]
) -> None:
    """Give an optimizer what is no view of its own state: the counts."""
    state, group = optimizer.state[master], _group_of(optimizer, master)
    for key, tensor in kept.items():
        if key not in state:
            group[key] = tensor
        elif not isinstance(state[key], torch.Tensor):
            state[key] = type(state[key])(tensor.item())


def _group_of(optimizer: torch.optim.Optimizer, master: nn.Parameter) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is master for p in g["params"]))


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor; any other tensor itself."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _locals(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """As `local_shard`, of each."""
    return [local_shard(tensor) if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _copy_named(tensors: Mapping[str, torch.Tensor], key: str, target: torch.Tensor) -> None:
    source = local_shard(tensors[key]) if key in tensors else None
    if source is None or source.shape != target.shape:
        got = "missing" if source is None else f"of shape {tuple(source.shape)}"
        raise ValueError(f"tensor {key} is {got}, expected shape {tuple(target.shape)}")
    target.copy_(source)

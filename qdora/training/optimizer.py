"""AdamW for 16-bit parameters, on float32 masters that are rounded back after each step; its learning rate.

A bfloat16 parameter that is stepped in place loses every update smaller than half its spacing.  The masters
keep those; there are as many as adapter parameters, which are few.  Published code that has no masters is
repeated by those of the parameters' own dtype: what is stepped then is the rounded parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qdora.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    Rises linearly over the warm-up, to the configured rate on the step after it; then constant, or down to 0
    after the last step, linearly or on half a cosine.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class AdapterOptimizer:
    """AdamW (arXiv:1711.05101) with float32 state, whatever the parameters' dtype.

    Args:
        parameters: the trained parameters by name; their gradients are float32.
        config: betas and weight decay; `master_weights` false: state, step and gradient in `storage`.
        storage: dtype in which the parameters are stored where they are not sharded; a shard is float32.
            Theirs where None.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainingConfig,
        storage: torch.dtype | None = None,
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
        self._adamw = torch.optim.AdamW(
            list(self.masters.values()),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, skip: torch.Tensor | None = None) -> None:
        """One update from the gradients of the parameters.

        Args:
            skip: scalar, on any device: where it is not 0 everything stays as it is.  It is read where the
                parameters are, so that nothing waits for it.
        """
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.parameters.items():
            gradient, master = parameter.grad, self.masters[name]
            master.grad = None if gradient is None else gradient.to(master.dtype)
        if skip is not None:
            device = next(iter(self.masters.values())).device
            # Where torch's fused kernels look for overflow of scaled gradients, with this effect.
            self._adamw.found_inf = skip.to(device, torch.float32)  # type: ignore[attr-defined]
        self._adamw.step()
        if self._rounded:
            parameters, masters = map(_locals, (self._rounded, self._rounded.values()))
            torch._foreach_copy_(parameters, masters)
            # A shard is written to without a version, by which a stale norm is known.
            torch.autograd.graph.increment_version(self._rounded)
            for master in self._rounded.values():
                master.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments as flat named tensors, sharded where the parameters are.

        Names and full shapes do not depend on the world size, nor on whether a step was made.  A 16-bit
        parameter is the rounding of its master, so it is not among them.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            moments = self._adamw.state.get(master) or _zero_moments(master)
            tensors[f"master/{name}"] = master.detach()
            tensors |= {f"{key}/{name}": moments[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue exactly where `state` was taken.

        Args:
            tensors: as `state` names them; of a sharded one, it or this rank's local shard.  On any device.
        Raises: ValueError: a tensor is missing or has another shape.
        """
        for name, parameter in self.parameters.items():
            master, moments = self.masters[name], _zero_moments(self.masters[name])
            for key, target in {"master": master, **moments}.items():
                _copy_named(tensors, f"{key}/{name}", local_shard(target))
            # What is computed from a parameter is cached by its version, which a local shard does not count.
            torch.autograd.graph.increment_version(master)
            if master is not parameter:
                parameter.copy_(master)
            self._adamw.state[master] = moments


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor; any other tensor itself."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _locals(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """As `local_shard`, of each."""
    return [local_shard(tensor) if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _zero_moments(master: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter before its first step."""
    return {
        "step": torch.zeros((), device=master.device),
        "exp_avg": torch.zeros_like(master),
        "exp_avg_sq": torch.zeros_like(master),
    }


def _copy_named(tensors: Mapping[str, torch.Tensor], key: str, target: torch.Tensor) -> None:
    source = local_shard(tensors[key]) if key in tensors else None
    if source is None or source.shape != target.shape:
        got = "missing" if source is None else f"of shape {tuple(source.shape)}"
        raise ValueError(f"tensor {key} is {got}, expected shape {tuple(target.shape)}")
    target.copy_(source)

"""AdamW for 16-bit adapters: torch's AdamW on float32 masters, rounded back after each step.

A bfloat16 parameter that is stepped in place loses every update smaller than half its
spacing.  The masters keep those; there are as many as adapter parameters, which are few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qdora.config import TrainingConfig


class AdapterOptimizer:
    """AdamW (arXiv:1711.05101) with float32 state, whatever the parameters' storage.

    Args:
        parameters: the trained parameters by name; their gradients are float32.
        config: betas and weight decay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> None:
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self._adamw = torch.optim.AdamW(
            list(self.masters.values()),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the gradients of the parameters."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.parameters.items():
            self.masters[name].grad = parameter.grad
        self._adamw.step()
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                parameter.copy_(master)
                master.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Float32 parameters and moments as flat named tensors, sharded where the parameters are.

        The same names and shapes for any number of processes, before the first step too.  A parameter in
        16 bits is the rounding of its master, so it is not among them.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            moments = self._adamw.state.get(master) or _at_rest(master)
            tensors[f"master/{name}"] = master.detach()
            tensors |= {f"{key}/{name}": moments[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue exactly where `state` was taken.

        Args:
            tensors: as `state` names them; of a sharded one, it or the rows of this process.  On any device.
        Raises: ValueError: a tensor is missing or has another shape.
        """
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            state = {"master": master, **_at_rest(master)}
            for key, place in state.items():
                local_shard(place).copy_(_named(tensors, f"{key}/{name}", local_shard(place)))
            # What is computed from a parameter is kept until its version changes; rows do not count theirs.
            torch.autograd.graph.increment_version(master)
            if master is not parameter:
                parameter.copy_(master)
            self._adamw.state[master] = {key: place for key, place in state.items() if key != "master"}


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _at_rest(master: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter before its first step."""
    return {
        "step": torch.zeros((), device=master.device),
        "exp_avg": torch.zeros_like(master),
        "exp_avg_sq": torch.zeros_like(master),
    }


def _named(tensors: Mapping[str, torch.Tensor], key: str, like: torch.Tensor) -> torch.Tensor:
    tensor = tensors.get(key)
    rows = None if tensor is None else local_shard(tensor)
    if rows is None or rows.shape != like.shape:
        got = "missing" if rows is None else f"of shape {tuple(rows.shape)}"
        raise ValueError(f"tensor {key} is {got}, expected shape {tuple(like.shape)}")
    return rows


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total_steps`.

    Rises linearly over the warm-up, reaching the configured rate on its last step + 1; then
    constant, or falling to 0 after the last step, on a line or half a cosine.
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

"""AdamW for 16-bit adapters: torch's AdamW on float32 masters, rounded back after each step.

A bfloat16 parameter that is stepped in place loses every update smaller than half its
spacing.  The masters keep those; there are as many as adapter parameters, which are few.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

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
        """Parameters, masters and moments as flat named tensors; `load_state` takes them back."""
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            tensors[f"parameter/{name}"] = self.parameters[name].detach()
            if master is not self.parameters[name]:
                tensors[f"master/{name}"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue exactly where `state` was taken.

        Raises: ValueError: a tensor is missing or has another shape.
        """
        for name, parameter in self.parameters.items():
            parameter.copy_(_named(tensors, f"parameter/{name}", parameter))
            master = self.masters[name]
            if master is not parameter:
                master.copy_(_named(tensors, f"master/{name}", master))
            self._adamw.state[master] = {
                "step": _named(tensors, f"step/{name}", torch.zeros(())).clone(),
                "exp_avg": _named(tensors, f"exp_avg/{name}", master).to(master.device).clone(),
                "exp_avg_sq": _named(tensors, f"exp_avg_sq/{name}", master).to(master.device).clone(),
            }


def _named(tensors: Mapping[str, torch.Tensor], key: str, like: torch.Tensor) -> torch.Tensor:
    tensor = tensors.get(key)
    if tensor is None or tensor.shape != like.shape:
        got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise ValueError(f"tensor {key} is {got}, expected shape {tuple(like.shape)}")
    return tensor

"""LoRA with a gate: one trained number a layer that the low-rank update is multiplied by.

A gate near 1 stored in bfloat16 does not train, as a magnitude there does not.  So the parameter is the
offset from 1, g = 1 + offset, and like a magnitude it acts where numbers are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from qdora.adapters.base import Factors, adapter_parameter, full_tensor, widened
from qdora.adapters.lora import LoraUpdate, alpha_settings
from qdora.config import AdapterConfig

UNGATED = "ungated"
"""Setting of a saved adapter: `lora_alpha` and `alpha_pattern` without the gates."""
GATES = "gates"
"""Setting of a saved adapter: the gate of each layer, for those who read it."""


class GatedLoraUpdate(LoraUpdate):
    """c g B A with a trained gate g, also in the norm: ||W + c g B A||.

    PEFT has no gate, but an alpha for each layer: a file says c g there, so that PEFT computes the same.

    Attributes:
        gate_offset: (1,) parameter, zero at the start; g is 1 more.
    """

    kind = "gated_lora"
    peft_keys: ClassVar[Mapping[str, str]] = {**LoraUpdate.peft_keys, "gate_offset": "gate_offset"}
    gate_offset: nn.Parameter

    def create_parameters(
        self, shape: tuple[int, int], config: AdapterConfig, device: torch.device, shared: Any
    ) -> None:
        """A, B and the gate's offset."""
        super().create_parameters(shape, config, device, shared)
        self.gate_offset = adapter_parameter(torch.empty(1, dtype=self.storage, device=device))

    def initial(self, name: str) -> torch.Tensor:
        """Of A and B what the start draws, of the gate's offset zero."""
        return torch.zeros(1) if name == "gate_offset" else super().initial(name)

    def factors(self) -> Factors:
        """A, B, the scale, and the gate in every row of B."""
        wide = torch.promote_types(self.gate_offset.dtype, torch.float32)
        gate_O = (1 + widened(self.gate_offset, wide)).expand(self.b_OR.shape[0])
        return Factors(
            self.a_RI,
            self.b_OR,
            None,
            gate_O,
            self.scale,
            watched=(self.a_RI, self.b_OR, self.gate_offset),
        )

    def gate(self) -> float:
        """g as it is now; a collective where the update is sharded."""
        return 1 + float(full_tensor(self.gate_offset, self.storage))

    @classmethod
    def peft_settings(cls, updates: Mapping[str, Self]) -> dict[str, Any]:
        """As LoRA's, with the gates in PEFT's alpha; a collective where the updates are sharded."""
        settings, gates = super().peft_settings(updates), {name: u.gate() for name, u in updates.items()}
        if not updates:
            return settings
        gated = alpha_settings({name: gates[name] * u.scale * u.r for name, u in updates.items()})
        return settings | gated | {UNGATED: {key: settings[key] for key in gated}, GATES: gates}

    @classmethod
    def config_from_peft(cls, settings: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
        """As LoRA's, of the alpha without the gates."""
        ungated = settings[UNGATED]
        if not isinstance(ungated, dict):
            raise TypeError(f"{UNGATED} = {ungated!r}; expected lora_alpha and alpha_pattern")
        return super().config_from_peft({**settings, **ungated}, layers)

    @classmethod
    def saved_shapes(cls, shape: tuple[int, int], r: int) -> dict[str, tuple[int, ...]]:
        """LoRA's, and that of the gate's offset."""
        return {**super().saved_shapes(shape, r), "gate_offset": (1,)}

    def extra_repr(self) -> str:
        """LoRA's; a gate may be sharded, so its value is not shown."""
        return f"{super().extra_repr()}, gated"

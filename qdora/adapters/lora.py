"""LoRA: A and B are trained (arXiv:2106.09685 §4.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch

from qdora.adapters.base import Factors, LowRankUpdate, adapter_parameter, assign_full
from qdora.adapters.init import CONVERT, INITS, init_from_peft
from qdora.adapters.peft_settings import expression, number, patterns
from qdora.config import AdapterConfig, UpdateType
from qdora.quant.base import FrozenWeight

Number = TypeVar("Number", int, float)


class LoraUpdate(LowRankUpdate):
    """c B A, both trained.

    Attributes:
        a_RI: (R, I) parameter.
        b_OR: (O, R) parameter.
        init: how they start.
        subtracted: the initial A and B, where c B A was taken out of the base weight; a saved adapter needs
            them to do the same to the base that it is loaded onto.
    """

    kind: ClassVar[UpdateType] = "lora"
    peft_type = "LORA"
    peft_keys: ClassVar[Mapping[str, str]] = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight"}
    peft_magnitude = True
    extra_keys = ("initial_A", "initial_B")

    def create_parameters(
        self, shape: tuple[int, int], config: AdapterConfig, device: torch.device, shared: Any
    ) -> None:
        """A and B."""
        self.init = config.init
        self.subtracted: tuple[torch.Tensor, torch.Tensor] | None = None
        a_RI = torch.empty(config.r, shape[1], dtype=self.storage, device=device)
        self.a_RI = adapter_parameter(a_RI)
        self.b_OR = adapter_parameter(a_RI.new_empty(shape[0], config.r))

    @classmethod
    def largest_rank(cls, shape: tuple[int, int]) -> int | None:
        """The smaller side: above it B A gains nothing over a full matrix."""
        return min(shape)

    @property
    def r(self) -> int:
        """Rank."""
        return self.a_RI.shape[0]

    def initial(self, name: str) -> torch.Tensor:
        """What the start draws."""
        a_RI, b_OR = INITS[self.init].draw(self.b_OR.shape[0], self.a_RI.shape[1], self.r, self.seed)
        return a_RI if name == "a_RI" else b_OR

    @property
    def sees_weight(self) -> bool:
        """Whether the start makes A and B of the weight."""
        return INITS[self.init].from_weight is not None

    @torch.no_grad()
    def reset_from_weight(self, weight: FrozenWeight) -> torch.Tensor | None:
        """As `LowRankUpdate.reset_from_weight`: A and B made of the weight."""
        split = INITS[self.init].from_weight
        if split is None:
            return None
        values = split(weight.dense(torch.float32), self.r, self.scale)
        for parameter, value in zip((self.a_RI, self.b_OR), values, strict=True):
            assign_full(parameter, value, self.storage)
        self.subtracted = self.a_RI.detach().clone(), self.b_OR.detach().clone()
        return self.residual(weight)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """The factors that were taken out of the base weight, where any were."""
        return {} if self.subtracted is None else dict(zip(self.extra_keys, self.subtracted, strict=True))

    @torch.no_grad()
    def load_extra(
        self, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], weight: FrozenWeight
    ) -> None:
        """The saved factors, or those that PEFT makes of the weight when it loads an adapter of its own."""
        init = init_from_peft(settings.get("init_lora_weights", True))
        split = INITS[init].from_weight
        if self.extra_keys[0] in tensors:
            a_RI, b_OR = (tensors[key].to(weight.device) for key in self.extra_keys)
            self.init, self.subtracted = init, (a_RI, b_OR)
        elif split is not None:
            self.init, self.subtracted = init, split(weight.dense(torch.float32), self.r, self.scale)

    @torch.no_grad()
    def residual(self, weight: FrozenWeight) -> torch.Tensor | None:
        """As `LowRankUpdate.residual`: W less the initial c B A that `subtracted` keeps."""
        if self.subtracted is None:
            return None
        a_RI, b_OR = (factor.to(weight.device, torch.float32) for factor in self.subtracted)
        return weight.dense(torch.float32).sub_((self.scale * b_OR) @ a_RI)  # rounded as PEFT rounds it

    def subtracted_factors(self) -> Factors | None:
        """As `LowRankUpdate.subtracted_factors`: the initial A and B, and the scale."""
        return None if self.subtracted is None else Factors(*self.subtracted, None, None, self.scale)

    def factors(self) -> Factors:
        """A, B and the scale."""
        return Factors(self.a_RI, self.b_OR, None, None, self.scale)

    @classmethod
    def peft_settings(cls, updates: Mapping[str, Self]) -> dict[str, Any]:
        """Rank, alpha and their exceptions.  Alpha is that of alpha / r, whatever the scale came from."""
        if not updates:
            return {}
        ranks = {name: update.r for name, update in updates.items()}
        r, first = _most_common(ranks), next(iter(updates.values()))
        alphas = alpha_settings({name: update.scale * update.r for name, update in updates.items()})
        return {
            "r": r,
            "lora_alpha": alphas["lora_alpha"],
            "rank_pattern": {name: value for name, value in ranks.items() if value != r},
            "alpha_pattern": alphas["alpha_pattern"],
            "lora_dropout": first.dropout,
            "use_rslora": False,
            "init_lora_weights": INITS[first.init].peft,
        }

    @classmethod
    def config_from_peft(cls, settings: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
        """As `LowRankUpdate.config_from_peft`, PEFT's patterns resolved to full names."""
        r, alpha = number(settings, "r"), float(number(settings, "lora_alpha"))
        rank_of, alpha_of = patterns(settings, "rank_pattern"), patterns(settings, "alpha_pattern")
        init = init_from_peft(settings.get("init_lora_weights", True))
        ranks = {name: _by_pattern(rank_of, name, r) for name in layers}
        alphas = {name: float(_by_pattern(alpha_of, name, alpha)) for name in layers}
        return {
            "r": r,
            "alpha": alpha,
            "rslora": settings.get("use_rslora") or False,
            "rank_pattern": {name: value for name, value in ranks.items() if value != r},
            "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
            "dropout": float(number(settings, "lora_dropout", 0.0)),
            "init": "kaiming" if INITS[init].from_weight else init,  # `load_extra` repeats the others
        }

    @classmethod
    def derives_base(cls, settings: Mapping[str, Any], quantization: str | None = None) -> bool:
        """As `LowRankUpdate.derives_base`: where the start is made of the weight."""
        start = INITS[init_from_peft(settings.get("init_lora_weights", True))]
        if quantization not in (None, "none") and start.from_weight is not None and not start.quantized:
            raise ValueError(
                f"init_lora_weights = {start.peft!r} is made of an unquantized weight, as in PEFT, and this "
                f"one is {quantization}: load the model with quantization='none', or {CONVERT}"
            )
        return start.from_weight is not None

    @classmethod
    def saved_shapes(cls, shape: tuple[int, int], r: int) -> dict[str, tuple[int, ...]]:
        """Those of A and B, now and at the start."""
        a_RI, b_OR = (r, shape[1]), (shape[0], r)
        return {"lora_A.weight": a_RI, "lora_B.weight": b_OR, "initial_A": a_RI, "initial_B": b_OR}

    def extra_repr(self) -> str:
        """Rank, scale, dropout, start and dtype, for printing."""
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}, {self.init}, {self.a_RI.dtype}"


def alpha_settings(alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's settings for an alpha of each layer: the most common one, and its exceptions."""
    values = {name: _integer(value) for name, value in alphas.items()}
    alpha = _most_common(values)
    exceptions = {name: value for name, value in values.items() if value != alpha}
    return {"lora_alpha": alpha, "alpha_pattern": exceptions}


def _most_common(values: Mapping[str, Number]) -> Number:
    return Counter(values.values()).most_common(1)[0][0]


def _integer(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _by_pattern(values: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, matches the name or its dotted end."""
    for key, value in values.items():
        if expression(rf"(.*\.)?({key})$").match(name):
            return value
    return default

"""VeRA: vectors are trained around a frozen random pair of matrices (arXiv:2310.11454 §3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from qdora.adapters.base import Factors, LowRankUpdate, SharedBuffers, adapter_parameter
from qdora.adapters.peft_settings import number
from qdora.config import AdapterConfig

D_INITIAL = 0.1
"""Start of VeRA's d (arXiv:2310.11454 §3.1)."""


class VeraMatrices(SharedBuffers):
    """VeRA's frozen random matrices, one pair for all layers of a model (arXiv:2310.11454 §3.1).

    Drawn from a seed, A before B, as PEFT draws them: a file needs the seed alone.

    Attributes:
        a_RI: (R, largest I) float32, Kaiming-uniform in ±sqrt(6/I); a layer takes its first columns.
        b_OR: (largest O, R) float32, Kaiming-uniform in ±sqrt(6/R); a layer takes its first rows.
        seed: from which they were drawn; None where a file gave others.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor

    def __init__(self, shape: tuple[int, int], r: int, *, seed: int, device: torch.device | None) -> None:
        super().__init__()
        self.seed: int | None = seed
        self.register_buffer("a_RI", torch.empty(r, shape[1], device="meta"), persistent=False)
        self.register_buffer("b_OR", torch.empty(shape[0], r, device="meta"), persistent=False)
        if device is None or device.type != "meta":
            self.materialize(device)

    def materialize(self, device: torch.device | None) -> None:
        """Draw the matrices that the seed gives, onto a device."""
        assert self.seed is not None
        generator = torch.Generator().manual_seed(self.seed)
        for name in ("a_RI", "b_OR"):
            shape = getattr(self, name).shape
            bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            setattr(self, name, drawn.to(device))

    def extra_repr(self) -> str:
        """Shapes and seed, for printing."""
        return f"A {tuple(self.a_RI.shape)}, B {tuple(self.b_OR.shape)}, seed {self.seed}"


class VeraUpdate(LowRankUpdate):
    """diag(b) B diag(d) A; the vectors are trained, the matrices frozen.

    Attributes:
        matrices: shared with the other layers.
        d_R: (R,) parameter, 0.1 at the start.
        b_O: (O,) parameter, zero at the start.
        scale: 1, VeRA has none.
    """

    kind = "vera"
    peft_type = "VERA"
    peft_keys: ClassVar = {"d_R": "vera_lambda_d", "b_O": "vera_lambda_b"}
    shared_keys = ("base_model.vera_A", "base_model.vera_B")

    def create_parameters(
        self, shape: tuple[int, int], config: AdapterConfig, device: torch.device, shared: Any
    ) -> None:
        """The vectors; the matrices are `shared`."""
        self.scale = 1.0
        self.matrices: VeraMatrices = shared
        self.out_features, self.in_features = shape
        self.d_R = adapter_parameter(torch.empty(config.r, dtype=self.storage, device=device))
        self.b_O = adapter_parameter(torch.empty(self.out_features, dtype=self.storage, device=device))

    @classmethod
    def create_shared(
        cls, shapes: Sequence[tuple[int, int]], config: AdapterConfig, device: torch.device, seed: int
    ) -> VeraMatrices:
        """One pair of matrices, as large as the largest layers need."""
        largest = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        return VeraMatrices(largest, config.r, seed=seed, device=device)

    @property
    def r(self) -> int:
        """Rank."""
        return self.matrices.a_RI.shape[0]

    def initial(self, name: str) -> torch.Tensor:
        """0.1 for d, zero for b."""
        return torch.full((self.r,), D_INITIAL) if name == "d_R" else torch.zeros(self.out_features)

    def initial_values(self) -> dict[str, torch.Tensor]:
        """The vectors', and the seed of the matrices."""
        return {**super().initial_values(), "seed": torch.tensor(self.matrices.seed or 0)}

    def factors(self) -> Factors:
        """This layer's part of the matrices, and the vectors."""
        a_RI, b_OR = self.matrices.a_RI[:, : self.in_features], self.matrices.b_OR[: self.out_features]
        return Factors(a_RI, b_OR, self.d_R, self.b_O, self.scale)

    @classmethod
    def peft_settings(cls, updates: Mapping[str, Self]) -> dict[str, Any]:
        """Rank, dropout and the matrices' seed."""
        first = next(iter(updates.values()))
        seed = first.matrices.seed
        return {
            "r": first.r,
            "projection_prng_key": seed or 0,
            "save_projection": seed is None,
            "vera_dropout": first.dropout,
            "d_initial": D_INITIAL,
        }

    @classmethod
    def config_from_peft(cls, settings: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
        """As `LowRankUpdate.config_from_peft`."""
        return {"r": number(settings, "r"), "dropout": float(number(settings, "vera_dropout", 0.0))}

    @classmethod
    def saved_shapes(cls, shape: tuple[int, int], r: int) -> dict[str, tuple[int, ...]]:
        """Those of the vectors."""
        return {"vera_lambda_d": (r,), "vera_lambda_b": (shape[0],)}

    @classmethod
    def seed_from_peft(cls, settings: Mapping[str, Any]) -> int:
        """PEFT's projection_prng_key."""
        return int(number(settings, "projection_prng_key", 0))

    @classmethod
    def shared_tensors(cls, updates: Mapping[str, Self]) -> dict[str, torch.Tensor]:
        """The matrices, where their seed is not enough."""
        matrices = next(iter(updates.values())).matrices
        if matrices.seed is not None:
            return {}
        return dict(zip(cls.shared_keys, (matrices.a_RI, matrices.b_OR), strict=True))

    @classmethod
    @torch.no_grad()
    def load_shared(cls, updates: Mapping[str, Self], tensors: Mapping[str, torch.Tensor]) -> None:
        """As `LowRankUpdate.load_shared`: other matrices than the seed gives are the ones that count."""
        matrices = next(iter(updates.values())).matrices
        for key, own in zip(cls.shared_keys, (matrices.a_RI, matrices.b_OR), strict=True):
            given = tensors.get(key)
            if given is None or given.shape != own.shape:
                got = "missing" if given is None else f"of shape {tuple(given.shape)}"
                raise ValueError(f"{key} is {got}, expected shape {tuple(own.shape)}")
            if not torch.equal(given.to(own), own):
                own.copy_(given)
                matrices.seed = None

    def extra_repr(self) -> str:
        """Rank, dropout and dtype, for printing."""
        return f"r={self.r}, dropout={self.dropout:g}, {self.d_R.dtype}"

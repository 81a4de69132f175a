"""Singular values of base weights and of what training changed in them, and effective ranks.

O out_features   I in_features   K rank   S singular values
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from qdora.analysis.trained import TrainedLayer

Kind = Literal["base", "change", "update"]
KINDS: tuple[Kind, ...] = ("base", "change", "update")


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix of one layer.

    Attributes:
        layer: full name.
        index: number of the decoder layer, from 0; None outside of one.
        module: last part of the name.
        kind: `base`: the weight W at step 0, dequantized.  `change`: ΔW = W' - W.  `update`: s ∘ c B A, what
            is left of ΔW without the rescaling of rows; only where there is a magnitude.
        values: largest first; of a product of factors no more than its rank.
    """

    layer: str
    index: int | None
    module: str
    kind: Kind
    values: tuple[float, ...]

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ / Σσ: between 1 and the number of values; 0 of a zero matrix.

        Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.
        """
        sigma_S = torch.tensor(self.values, dtype=torch.float64)
        total = sigma_S.sum()
        if not total > 0:
            return 0.0
        p_S = sigma_S / total
        return float((-torch.xlogy(p_S, p_S).sum()).exp())

    @property
    def stable_rank(self) -> float:
        """||·||²_F / σ₁²: between 1 and the rank; 0 of a zero matrix."""
        sigma_S = torch.tensor(self.values, dtype=torch.float64)
        return float((sigma_S / sigma_S[0]).square().sum()) if self.values and self.values[0] > 0 else 0.0

    @property
    def frobenius(self) -> float:
        """||·||_F."""
        return float(torch.tensor(self.values, dtype=torch.float64).norm())


def layer_spectra(layer: TrainedLayer, kinds: Collection[Kind] = KINDS) -> Iterator[Spectrum]:
    """The singular values of one layer, with at most two dense matrices of its size.

    Those of a low-rank update are exact and need none: they are those of the small factor that QR leaves.
    With a magnitude, or after full fine-tuning, ΔW has full rank and is made dense.
    """
    factors = layer.update_factors()
    dense = layer.is_rescaled or layer.trained_OI is not None
    if "base" in kinds:
        yield _spectrum(layer, "base", singular_values(layer.before()))
    if "change" in kinds and (dense or factors is not None):
        if factors is None or layer.is_rescaled:
            minus_OI = layer.before().neg_()  # the other one may be the file's own
            values_S = singular_values(minus_OI.add_(layer.after()))
        else:
            values_S = product_singular_values(*factors)
        yield _spectrum(layer, "change", values_S)
    if "update" in kinds and layer.is_rescaled and factors is not None:
        yield _spectrum(layer, "update", product_singular_values(*factors))


def singular_values(w_OI: torch.Tensor) -> torch.Tensor:
    """(S,) largest first, in the dtype of the matrix."""
    values_S: torch.Tensor = torch.linalg.svdvals(w_OI)
    return values_S


def product_singular_values(a_KI: torch.Tensor, b_OK: torch.Tensor) -> torch.Tensor:
    """(S,) singular values of B A, largest first, S the smallest of O, K and I; B A is not formed.

    B = Q_b R_b and Aᵀ = Q_a R_a, with orthonormal columns in both Q: those of B A are those of R_b R_aᵀ.
    """
    rb = torch.linalg.qr(b_OK, mode="r").R
    ra = torch.linalg.qr(a_KI.T, mode="r").R
    return singular_values(rb @ ra.T)


def _spectrum(layer: TrainedLayer, kind: Kind, values_S: torch.Tensor) -> Spectrum:
    values = tuple(float(f"{value:.7g}") for value in values_S.tolist())  # digits that float32 resolves
    return Spectrum(layer.name, layer.index, layer.module, kind, values)


def summary_rows(spectra: Iterable[Spectrum]) -> list[dict[str, object]]:
    """One row a matrix, for a table: how many values, the largest and smallest, and the ranks."""
    return [
        {
            "layer": spectrum.layer,
            "index": spectrum.index,
            "module": spectrum.module,
            "kind": spectrum.kind,
            "values": len(spectrum.values),
            "largest": spectrum.values[0],
            "smallest": spectrum.values[-1],
            "frobenius": spectrum.frobenius,
            "effective_rank": spectrum.effective_rank,
            "stable_rank": spectrum.stable_rank,
        }
        for spectrum in spectra
    ]

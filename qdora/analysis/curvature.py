"""Curvature of the loss in the low-rank subspace of each layer, from Gauss-Newton products.

For a layer's update ΔW = Z Q with orthonormal rows Q (R, I), the row space of A, the Gauss-Newton matrix of
the mean loss over completion tokens n is

    H = 1/N Σ_n J_nᵀ (diag(p_n) - p_n p_nᵀ) J_n,   J_n = ∂ logits_n / ∂ Z,

which is Fisher's for cross entropy.  With u_n = p_n - onehot(y_n) for labels y_n drawn from the model's own
p_n, E[u uᵀ] is the Hessian of the loss in the logits, and tokens are independent: so a product with H is, in
expectation, G <G, ·> / N with G = Σ_n J_nᵀ u_n (O, R), the gradient of an ordinary loss on drawn labels.  One
backward pass gives G of all layers, through the layers and kernels of training; none of them needs a second
derivative, which they do not have.

What a rank r may use are directions of Q, each with any output: the eigenvalues of the partial trace over
outputs, M = E[Gᵀ G] / N (R, R), are the curvature that each further direction adds.

O out_features   I in_features   R rank of the subspace   N completion tokens   P probes   V vocabulary
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qdora.adapters.inject import adapted_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.config import AdapterConfig
from qdora.data.batches import Batch
from qdora.training.attention import training_attention
from qdora.training.loss import CHUNK_BYTES, completion_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Curvature:
    """One layer's curvature in its subspace.

    Attributes:
        eigenvalues: of M, largest first; nats per completion token and squared unit of ΔW.
        trace: their sum, the trace of the Gauss-Newton matrix in the subspace.
        trace_error: its standard error over probes and batches; None of a single one.
    """

    eigenvalues: tuple[float, ...]
    trace: float
    trace_error: float | None


def subspace(targets: Sequence[str], shapes: Mapping[str, tuple[int, int]], r: int) -> AdapterConfig:
    """A LoRA whose fresh A spans a random subspace of each layer's inputs, and whose B is zero.

    Args:
        targets: patterns of the layers.
        shapes: (out, in) of the layers that they match, by name.
        r: directions of each subspace; less where a side of the layer is smaller.
    """
    smaller = {name: min(shape) for name, shape in shapes.items() if min(shape) < r}
    return AdapterConfig(
        dora=False, r=r, alpha=r, targets=tuple(targets), rank_pattern=smaller, dtype="float32"
    )


class Directions:
    """The coordinates Z of one layer's update in its subspace.

    Args:
        layer: with a LoRA.
    """

    def __init__(self, layer: AdaptedLinear) -> None:
        assert layer.update is not None
        factors = layer.update.factors()
        self.b_OR = factors.b_OR
        # Aᵀ = Qᵀ U, so c B A = (c B Uᵀ) Q: the gradient in Z = c B Uᵀ is that in B times (c U)⁻¹.
        self._u_RR: torch.Tensor = (
            torch.linalg.qr(factors.a_RI.detach().double().T, mode="r").R * factors.scale
        )

    @property
    def r(self) -> int:
        """R."""
        return self._u_RR.shape[0]

    def take_gradient(self) -> torch.Tensor:
        """The gradient in Z that a backward pass left in B: (O, R) float64; none is left."""
        gradient, self.b_OR.grad = self.b_OR.grad, None
        assert gradient is not None
        g_OR: torch.Tensor = torch.linalg.solve_triangular(
            self._u_RR, gradient.double(), upper=True, left=False
        )
        return g_OR


def label_gradients(
    model: PreTrainedModel, directions: Mapping[str, Directions], batch: Batch, targets_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """G = Σ_n J_nᵀ (p_n - onehot(y_n)) of each layer, (O, R) float64, for given labels y.

    Args:
        directions: of the layers; their B is trainable.
        targets_N: y, one for each completion token.
    """
    completion_loss(model, replace(batch, targets_N=targets_N)).backward()
    return {name: own.take_gradient() for name, own in directions.items()}


def curvature(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    probes: int,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Curvature]:
    """Curvature in the subspace of every layer, at the weights as they are.

    Takes the memory of a training step without an optimizer's, and for each batch (1 + 3 P) / 3 of its time.

    Args:
        model: with the LoRA of `subspace`.  Left in evaluation mode, nothing trainable.
        batches: the sample, on the model's device.
        probes: how often labels are drawn for each batch, P.
        seed: of the draws.
        done: called after each backward pass.
    """
    directions = trainable_directions(model)
    totals = {
        name: torch.zeros(own.r, own.r, dtype=torch.float64, device=own.b_OR.device)
        for name, own in directions.items()
    }
    traces: dict[str, list[float]] = {name: [] for name in directions}
    generator = torch.Generator(batches[0].input_ids_BT.device).manual_seed(seed)
    labels = 0
    with training_attention(model):
        for batch in batches:
            for targets_N in drawn_labels(model, batch, probes, generator):
                for name, g_OR in label_gradients(model, directions, batch, targets_N).items():
                    product_RR = g_OR.T @ g_OR
                    totals[name] += product_RR
                    traces[name].append(float(product_RR.trace()) / len(targets_N))
                labels += len(targets_N)
                done()
    model.requires_grad_(False)
    return {name: _curvature(totals[name] / labels, traces[name]) for name in directions}


def trainable_directions(model: PreTrainedModel) -> dict[str, Directions]:
    """Let B of every layer have gradients, and nothing else; their directions, by the layer's name."""
    model.eval()
    model.requires_grad_(False)
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.update is not None}
    directions = {name: Directions(layer) for name, layer in layers.items()}
    for own in directions.values():
        own.b_OR.requires_grad_(True)
    return directions


def _curvature(m_RR: torch.Tensor, traces: Sequence[float]) -> Curvature:
    values = torch.linalg.eigvalsh(m_RR).flip(0).clamp_min(0).tolist()
    error = statistics.stdev(traces) / math.sqrt(len(traces)) if len(traces) > 1 else None
    return Curvature(tuple(values), float(m_RR.trace()), error)


@torch.no_grad()
def drawn_labels(
    model: PreTrainedModel, batch: Batch, probes: int, generator: torch.Generator
) -> torch.Tensor:
    """(P, N) labels of a batch's completion tokens, drawn from what the model predicts for each."""
    hidden_BTI = model.get_decoder()(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
    hidden_NI = hidden_BTI.flatten(0, 1).index_select(0, batch.labelled_N)
    head = model.get_output_embeddings()
    step = max(1, CHUNK_BYTES // (4 * head.out_features))
    drawn = [
        torch.multinomial(head(chunk_NI).float().softmax(-1), probes, replacement=True, generator=generator)
        for chunk_NI in hidden_NI.split(step)
    ]
    return torch.cat(drawn).T.contiguous()

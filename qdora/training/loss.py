"""The loss: cross entropy on completion tokens, with logits only where there are labels.

Shape legend: B sequences, T tokens, N labelled positions, I hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from qdora.data.batches import Batch
from qdora.distributed.fsdp import gathered
from qdora.errors import InputError
from qdora.training.attention import keeps_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 256 << 20
"""Memory of the float32 logits that exist at one time."""

_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def check_output_layer(model: PreTrainedModel) -> None:
    """Refuse models that change their logits after the output layer, which the loss applies itself.

    Raises: InputError: naming the setting.
    """
    for setting in _LOGIT_SETTINGS:
        if getattr(model.config.get_text_config(), setting, None):
            raise InputError(f"models with {setting} are not supported for training")


def completion_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Summed cross entropy of the labelled tokens.

    Nothing here waits for the device.  A batch that is padded on the right needs no attention mask: under the
    causal mask no token attends to padding.

    Args:
        model: a causal language model; its output layer is applied to labelled positions only.
        batch: on the model's device.  Joined sequences need `training_attention`, until backward has run.
    Returns: scalar float32, the sum over tokens, in nats.
    """
    joined: dict[str, Any] = {}
    if batch.segments is not None:
        assert keeps_apart(model), "joined sequences outside of training_attention"
        joined = {"position_ids": batch.position_ids_BT, "segments": batch.segments}
    decoder = model.get_decoder()
    hidden_BTI = decoder(input_ids=batch.input_ids_BT, use_cache=False, **joined).last_hidden_state
    hidden_NI = hidden_BTI.flatten(0, 1).index_select(0, batch.labelled_N)
    head = model.get_output_embeddings()
    with gathered(head) as logits_of:
        # Without gradients none is computed for a trained output layer either.
        trained = [p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled()]
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_NI, batch.targets_N, logits_of, head.out_features, *trained
        )
    return loss


def chunks(count: int, step: int) -> Iterator[slice]:
    """Positions whose logits exist at the same time, from the first to the last; the planner runs a few."""
    return (slice(start, start + step) for start in range(0, count, step))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy after an output layer, computed with the logits of one chunk of positions at a time.

    A chunk's gradients are computed in forward, while its logits exist; backward scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NI: torch.Tensor,
        targets_N: torch.Tensor,
        logits_of: Callable[..., torch.Tensor],
        vocabulary: int,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        needs_grad = ctx.needs_input_grad[0] or bool(trained)
        grads = [torch.empty_like(hidden_NI)] if needs_grad else []
        grads += [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        total = hidden_NI.new_zeros((), dtype=torch.float32)
        step = max(1, CHUNK_BYTES // (4 * vocabulary))
        for rows in chunks(len(hidden_NI), step):
            chunk_NI = hidden_NI[rows].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                logits_NV = logits_of(chunk_NI).float()
                loss = F.cross_entropy(logits_NV, targets_N[rows], reduction="sum")
            total += loss.detach()
            if needs_grad:
                grads[0][rows], *parts = torch.autograd.grad(loss, [chunk_NI, *trained])
                for grad, part in zip(grads[1:], parts, strict=True):
                    grad += part
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NI, *trained = (kept * grad.to(kept.dtype) for kept in ctx.saved_tensors)
        return hidden_NI, None, None, None, *trained

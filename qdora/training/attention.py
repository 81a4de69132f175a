"""Causal attention of a training batch, without masks: each row attends to itself, or each joined sequence.

transformers finds out from a mask or from the positions what may attend to what, and waits for the device
to do so.  Here the batch says it: this implementation is set for the time of a training step, no mask is
made, and the model hands `segments` through to it.

Shape legend: B rows, H heads, G heads of keys and values, T tokens, D width of a head; n sequences of L each.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdora.data.batches import Segments
from qdora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATION = "qdora_causal"
"""Name under which transformers knows it.  It makes no mask for a name that it has no mask function for."""

FAMILIES = frozenset(
    {
        "gemma",
        "gemma3_text",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
"""`model_type` of the models that are tested: their attention is causal, at most within a window, which it
hands over."""


def check_packing(config: PreTrainedConfig) -> None:
    """Refuse to join sequences for a model that may let one see another.

    Raises: InputError: naming the architecture and those that are known.
    """
    if config.model_type not in FAMILIES:
        raise InputError(
            f"data.packing: whether the attention of a {config.model_type!r} model keeps joined sequences "
            f"apart is not known; known: {', '.join(sorted(FAMILIES))}. Allowed for this one: none"
        )


@contextmanager
def training_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend as its training batches say, forward, recomputed and backward, until the block ends.

    Without effect on families that are not in `FAMILIES`: there transformers looks at the batch.
    """
    from transformers import AttentionInterface  # with the model it has been imported

    AttentionInterface.register(IMPLEMENTATION, causal_attention)
    config = model.config
    before = config._attn_implementation
    if config.model_type in FAMILIES and before == "sdpa":
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before


def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether joined sequences would not see one another now."""
    return bool(model.config._attn_implementation == IMPLEMENTATION)


def flash_device(device: torch.device) -> bool:
    """Whether torch's flash attention computes there: GPUs of NVIDIA since Ampere."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def float32_device(device: torch.device) -> bool:
    """Whether 16-bit attention is computed in float32 there: its backward pass on a CPU is up to three times
    faster so."""
    return device.type == "cpu"


def _has_variable_length_kernel(query: torch.Tensor) -> bool:
    width = query.shape[-1]
    fits = query.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    return fits and flash_device(query.device)


def causal_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        attention_mask: None, since none is made.
        dropout: probability of dropping an attention weight.
        scaling: of the scores; 1 / sqrt(D) where None.
        sliding_window: a token attends to so many tokens, itself included; None: to all before it.
        segments: the sequences of a joined row.
    Returns: (B, T, H, D) and None.
    """
    assert attention_mask is None
    heads = query_BHTD, key_BGTD, value_BGTD
    if segments is None:
        return _attend(module, *heads, dropout, scaling, sliding_window), None
    return _attend_apart(module, *heads, dropout, scaling, sliding_window, segments), None


def _attend(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """(B, T, H, D) by transformers' own call of torch's kernels, with a mask for a window only."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length, mask_TT = query_BHTD.shape[2], None
    if sliding_window is not None and sliding_window <= length:
        place_T = torch.arange(length, device=query_BHTD.device)
        back_TT = place_T[:, None] - place_T
        mask_TT = (back_TT >= 0) & (back_TT < sliding_window)
    dtype = torch.float32 if float32_device(query_BHTD.device) else query_BHTD.dtype
    output_BTHD, _ = sdpa_attention_forward(
        module,
        query_BHTD.to(dtype),
        key_BGTD.to(dtype),
        value_BGTD.to(dtype),
        mask_TT,
        dropout=dropout,
        scaling=scaling,
    )
    return output_BTHD.to(query_BHTD.dtype)


def _attend_apart(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    segments: Segments,
) -> torch.Tensor:
    """(1, T, H, D) of a joined row."""
    if not dropout and _has_variable_length_kernel(query_BHTD):
        return _variable_length(query_BHTD, key_BGTD, value_BGTD, scaling, sliding_window, segments)
    sizes = [count * length for count, length in segments.runs]
    heads = (x_1HTD.split(sizes, dim=2) for x_1HTD in (query_BHTD, key_BGTD, value_BGTD))
    outputs = []
    for (count, length), *run in zip(segments.runs, *heads, strict=True):
        # Neighbours of equal length are a batch, without a copy.
        q_nHLD, k_nGLD, v_nGLD = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in run)
        output_nLHD = _attend(module, q_nHLD, k_nGLD, v_nGLD, dropout, scaling, sliding_window)
        outputs.append(output_nLHD.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def _variable_length(
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    segments: Segments,
) -> torch.Tensor:
    """(1, T, H, D) by the flash kernel that takes sequences of any lengths in a row."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer heads of keys without being told, and does not know the argument.
    grouped: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped = {"enable_gqa": True}
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query_BHTD, key_BGTD, value_BGTD))
    ends, longest = segments.ends_S1, max(segments.lengths)
    back = -1 if sliding_window is None else sliding_window - 1
    output_THD = varlen_attn(
        q_THD, k_TGD, v_TGD, ends, ends, longest, longest, scale=scaling, window_size=(back, 0), **grouped
    )
    assert isinstance(output_THD, torch.Tensor)
    return output_THD.unsqueeze(0)

"""Logits where there is a label, and nowhere else: for a model of transformers that is asked for its loss.

transformers computes the logits of every position, V numbers each, and takes the loss of those with a label.
Here the labelled positions are chosen before the output layer, and the labels come beside them as the
`shift_labels` that transformers' own loss takes; what it computes is the same sum.

    B sequences   T tokens   I hidden size   V vocabulary   N labelled positions
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qdora.errors import InputError

_IGNORED = -100
_OTHERWISE = ("shift_labels", "logits_to_keep", "fused_lm_head")
"""What a caller gives that has chosen positions or labels in its own way, the last one TRL."""
_HANDLES = "_qdora_label_logits"


class _Positions(NamedTuple):
    """Of a forward pass.

    Attributes:
        shape: (B, T) of its labels.
        labelled_N: into the flattened positions.
    """

    shape: torch.Size
    labelled_N: torch.Tensor


# Not an attribute: `nn.DataParallel` runs copies of a model in threads.
_positions: ContextVar[_Positions | None] = ContextVar("positions", default=None)


def logits_at_labels(model: nn.Module, on: bool = True) -> None:
    """Compute logits at labelled positions alone, in training with `labels`; off: at every position again.

    The loss is the same.  `logits` of the output are then those of the labelled positions, (1, N, V): not for
    a trainer that reads them in a training step.  Evaluation, generation and calls without labels are as they
    were, and so are the callers that choose positions themselves, as TRL's trainers do from version 1.16.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
    Raises: InputError: it takes its loss in another way; in a forward pass, labels that do not have the shape
        of the hidden states.
    Source: `ForCausalLMLoss` and its `shift_labels` in transformers.
    """
    causal = _causal_model(model)
    if causal is None:
        if on:
            raise InputError(
                f"logits at labels alone: a {type(model).__name__} does not take its loss by transformers' "
                f"ForCausalLMLoss; allowed: models for causal language modelling that do"
            )
        return
    for handle in vars(causal).pop(_HANDLES, ()):
        handle.remove()
    if on:
        handles = [
            causal.register_forward_pre_hook(_choose, with_kwargs=True),
            causal.get_output_embeddings().register_forward_pre_hook(_select),
            causal.register_forward_hook(_end, always_call=True),
        ]
        setattr(causal, _HANDLES, handles)


def _causal_model(model: nn.Module) -> Any:
    """The model that computes logits and loss; None where there is none, or it has a loss of another kind."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module.get_output_embeddings(), nn.Module):
            forward = inspect.unwrap(type(module).forward)
            kinds = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
            # BART's and T5's take the loss themselves, of labels that are shifted already.
            by_loss_function = "loss_function" in forward.__code__.co_names
            known = by_loss_function and module.loss_function is ForCausalLMLoss
            return module if known and inspect.Parameter.VAR_KEYWORD in kinds else None
    return None


def _choose(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the model's forward pass: the labelled positions, and the labels that they predict, (1, N)."""
    labels_BT = kwargs.get("labels")
    if labels_BT is None or not model.training or torch.compiler.is_compiling():
        return None
    if any(kwargs.get(name) is not None for name in _OTHERWISE):
        return None
    # Token t predicts the label of t + 1.
    shifted = F.pad(labels_BT, (0, 1), value=_IGNORED)[..., 1:].flatten()
    labelled_N = (shifted != _IGNORED).nonzero().squeeze(1)
    _positions.set(_Positions(labels_BT.shape, labelled_N))
    return args, {**kwargs, "shift_labels": shifted[labelled_N][None]}


def _select(head: nn.Module, args: tuple[Any, ...]) -> Any:
    """Before its output layer: the hidden states of these positions, (B, T, I) to (1, N, I)."""
    positions = _positions.get()
    if positions is None:
        return None
    hidden_BTI, *others = args
    if hidden_BTI.shape[:-1] != positions.shape:
        raise InputError(
            f"logits at labels alone: labels of shape {tuple(positions.shape)} do not fit hidden states of "
            f"shape {tuple(hidden_BTI.shape)}"
        )
    labelled_N = positions.labelled_N.to(hidden_BTI.device)
    return hidden_BTI.flatten(0, -2).index_select(0, labelled_N)[None], *others


def _end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After the forward pass, also one that failed."""
    _positions.set(None)

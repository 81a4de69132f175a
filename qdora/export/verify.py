"""Read an export with plain transformers and compare its logits with the adapted model's.

One model is in memory, and of the exported one the module that computes: its tensors are read from the
files when it is called, and dropped when it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from qdora.errors import InputError
from qdora.models.sources import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERIFIED_POSITIONS = (4, 64)
"""Sequences and tokens on which logits are compared."""

BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-5}
"""Largest relative error of logits: the weights' rounding (2⁻¹¹, 2⁻⁸, 2⁻²⁴), grown over the layers."""

Materialize = Callable[[str, nn.Module], Mapping[str, torch.Tensor]]
"""From a module's full name and the module, its parameters are on the meta device, to their values."""


class VerificationError(InputError):
    """The export does not load cleanly, or its logits differ from the adapted model's."""


@dataclass(frozen=True)
class Verification:
    """How near the exported model's logits are to the adapted model's.

    Attributes:
        relative_error: ||exported − adapted|| / ||adapted|| over all logits.
        bound: largest relative error that is accepted.
        same_next_token: fraction of positions with the same most likely next token.
        positions: how many were compared.
    """

    relative_error: float
    bound: float
    same_next_token: float
    positions: int

    def __str__(self) -> str:
        return (
            f"verified: plain transformers loads it; logits differ by {self.relative_error:.1e} relative "
            f"(bound {self.bound:.0e}), the same next token at {100 * self.same_next_token:.1f}% of "
            f"{self.positions} positions"
        )


@torch.no_grad()
def verify_export(
    directory: str | Path, model: PreTrainedModel, input_ids_BT: torch.Tensor | None = None
) -> Verification:
    """Load the folder with transformers and compare its logits with the adapted model's.

    Args:
        directory: the exported folder, unquantized.
        model: the adapted model, in evaluation mode.
        input_ids_BT: (B, T) tokens to compare on; seeded ones where None.
    Raises: VerificationError: it does not load, tensors are missing or left over, or the logits are out of
        bound.
    """
    directory, device = Path(directory), next(model.parameters()).device
    ids_BT = random_tokens(model) if input_ids_BT is None else input_ids_BT
    adapted_BTV = logits(model, ids_BT)
    stored = refuse_faults(directory)
    # The looser of the bounds for the exported weights' dtype and the adapted model's activations.
    embedded = model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=device))
    bound = max(BOUNDS[stored], BOUNDS.get(embedded.dtype, 0.0))
    compute = torch.float32 if device.type == "cpu" else stored
    with streamed(directory, device, compute) as exported:
        return compare(directory, logits(exported, ids_BT, device), adapted_BTV, bound)


def random_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Seeded tokens: any text would do, and a folder may come without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, VERIFIED_POSITIONS, generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """(B, T, V) float32 on the CPU.

    Args:
        device: of a model whose parameters are elsewhere.
    """
    device = next(model.parameters()).device if device is None else device
    logits_BTV: torch.Tensor = model(input_ids=ids_BT.to(device)).logits
    return logits_BTV.float().cpu()


def compare(
    directory: Path, exported_BTV: torch.Tensor, adapted_BTV: torch.Tensor, bound: float
) -> Verification:
    """Raises: VerificationError: the logits are out of bound."""
    error = float((exported_BTV - adapted_BTV).norm() / adapted_BTV.norm())
    same = (exported_BTV.argmax(-1) == adapted_BTV.argmax(-1)).float().mean()
    if not error <= bound:
        raise VerificationError(
            f"{directory}: relative error of the logits {error:.2e} exceeds the bound {bound:.0e}"
        )
    return Verification(error, bound, float(same), adapted_BTV[..., 0].numel())


def refuse_faults(directory: Path) -> torch.dtype:
    """Have transformers load a folder, onto the meta device; the dtype that its config.json says.

    Raises: VerificationError: it does not load, or tensors are missing, left over or of another shape.
    """
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, device_map="meta", dtype="auto", output_loading_info=True
        )
        dtype: torch.dtype = transformers.AutoConfig.from_pretrained(directory).dtype
    except Exception as cause:
        raise VerificationError(f"{directory}: transformers cannot load it: {cause}") from cause
    _, info = loaded
    faults = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise VerificationError(f"{directory}: transformers reports {faults}")
    return dtype


@contextmanager
def streamed(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[PreTrainedModel, Callable[[str], torch.Tensor]], Materialize | None] | None = None,
) -> Iterator[PreTrainedModel]:
    """The model of a folder as plain transformers builds it, of which only the module that computes exists.

    Args:
        directory: or a GGUF file.
        device: that computes.
        dtype: in which.
        prepare: changes modules of the model, on the meta device; returns what materializes them, which
            leaves other modules out by returning nothing.
    """
    from accelerate import init_empty_weights

    checkpoint = open_checkpoint(str(directory))
    config = checkpoint.config if directory.is_file() else transformers.AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    own = None if prepare is None else prepare(model, checkpoint.read)
    names = frozenset(checkpoint.names())
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    stored_as = {
        name: next((n for n in tied if n in names), name) for tied in users.values() for name in tied
    }

    def values(name: str, module: nn.Module) -> Mapping[str, torch.Tensor]:
        found = own(name, module) if own is not None else {}
        if found:
            return found
        leaves = (leaf for leaf, _ in module.named_parameters(recurse=False))
        return {leaf: checkpoint.read(stored_as[f"{name}.{leaf}"]).to(device, dtype) for leaf in leaves}

    for name, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            module._buffers[leaf] = buffer.to(device)
        if any(True for _ in module.parameters(recurse=False)):
            _read_when_called(module, name, values)
    model.eval()
    yield model


def _read_when_called(module: nn.Module, name: str, values: Materialize) -> None:
    empty = dict(module._parameters)

    def materialize(module: nn.Module, arguments: Any) -> None:
        for leaf, tensor in values(name, module).items():
            kind = nn.Parameter(tensor, requires_grad=False) if type(tensor) is torch.Tensor else tensor
            module._parameters[leaf] = kind  # type: ignore[assignment]

    def drop(module: nn.Module, arguments: Any, output: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(materialize)
    module.register_forward_hook(drop)

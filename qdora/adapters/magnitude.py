"""The magnitude of an adapted layer: one trained number per output row (DoRA, arXiv:2402.09353 §4).

A magnitude near 1 stored in bfloat16 does not train: its spacing there is 2⁻⁸ and every
step of an optimizer rounds away.  So the parameter is the offset from the frozen start:
m = initial + offset, with the offset in bfloat16 around 0, where the spacing is fine.
"""

from __future__ import annotations

import torch

from qdora.adapters.base import AdapterModule, adapter_parameter, full_tensor


class Magnitude(AdapterModule):
    """m = initial + offset.

    Attributes:
        offset_O: (O,) parameter, zero at the start.
        initial_O: (O,) frozen, at least float32, not 0: the row norms of W, or a loaded magnitude.
    """

    initial_O: torch.Tensor

    def __init__(self, initial_O: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.register_buffer("initial_O", initial_O, persistent=False)
        self.storage = dtype
        self.offset_O = adapter_parameter(torch.zeros_like(initial_O, dtype=dtype))

    def initial(self, name: str) -> torch.Tensor:
        """An offset of zero."""
        return torch.zeros(self.offset_O.shape)

    def value(self) -> torch.Tensor:
        """m: (O,), dtype of `initial_O`; a collective where the offset is sharded."""
        return self.initial_O + full_tensor(self.offset_O, self.storage).to(self.initial_O.dtype)

    def start_from(self, norm_O: torch.Tensor) -> None:
        """Freeze the start at the row norms of a weight, (O,) at least float32."""
        self.initial_O = norm_O

    def load(self, m_O: torch.Tensor) -> None:
        """Start from a given magnitude: it becomes the frozen part, exactly, and the offset zero.

        A magnitude of 0, which an all-zero row has elsewhere, becomes the norm that such a row has here.
        """
        self.initial_O.copy_(m_O)
        least = torch.finfo(self.initial_O.dtype).tiny ** 0.5
        self.initial_O.masked_fill_(self.initial_O == 0, least)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Rows and dtype, for printing."""
        return f"{self.offset_O.shape[0]}, {self.offset_O.dtype}"

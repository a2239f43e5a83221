"""What follows the layers, in the library: the final norm and the language-model head."""

from __future__ import annotations

from ctypes import CDLL, addressof

import torch
from torch import Tensor, nn

from anee_core.adapter.instrumentation import hooked
from anee_core.adapter.layout import Parts
from anee_core.steps.native.pointers import Pointers, UnfitError
from anee_core.steps.native.structs import LANES


class _Following:
    """A module after the layers as structs, and whether it still is what it was."""

    def __init__(self, native: CDLL, module: nn.Module, dtype: torch.dtype) -> None:
        self.pointers = Pointers(dtype)
        self._module, self._library = module, native

    @property
    def current(self) -> bool:
        """Whether the structs still say what the module does."""
        return not hooked(self._module) and self.pointers.current


class NativeNorm(_Following):
    """The final norm as a function of hidden states."""

    def __init__(self, native: CDLL, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__(native, parts.final_norm, dtype)
        self._weights = self.pointers.norm(parts.final_norm)

    @classmethod
    def of(cls, native: CDLL, parts: Parts, dtype: torch.dtype) -> NativeNorm | None:
        """Return the norm, or None where the model has none, or one of an unknown kind."""
        try:
            return cls(native, parts, dtype)
        except UnfitError:
            return None

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return normed states [B, T, D] of [B, T, D]."""
        states = hidden_states.contiguous()
        batch, length, width = states.shape
        normed, scratch = torch.empty_like(states), torch.empty(width)
        self._library.anee_norm(
            addressof(self._weights), states.data_ptr(), normed.data_ptr(), batch * length, width, self.pointers.kind,
            scratch.data_ptr(),
        )  # fmt: skip
        return normed


class NativeHead(_Following):
    """The language-model head as a function of normed hidden states."""

    def __init__(self, native: CDLL, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__(native, parts.head, dtype)
        self._matrix = self.pointers.matrix(parts.head)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return logits [B, T, V] of [B, T, D]."""
        states, matrix = hidden_states.contiguous(), self._matrix
        tokens = states.shape[0] * states.shape[1]
        logits = states.new_empty(*states.shape[:2], matrix.outputs)
        scratch = torch.empty(tokens * (matrix.inputs + matrix.outputs + 2 * LANES))
        self._library.anee_linear(
            addressof(matrix), states.data_ptr(), logits.data_ptr(), tokens, self.pointers.kind, scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return logits

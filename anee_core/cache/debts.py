"""Keys and values that layers are owed: of tokens that skipped them, for when a later token runs the layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anee_core.adapter.layer_call import LayerCall


class Debt(NamedTuple):
    """One token of each row that skipped a layer, and has no keys and values there yet."""

    slot: int
    """Slot of the token, the same in every row."""
    hidden_states: Tensor
    """[B, 1, D] hidden states in front of the layer."""
    call: LayerCall
    """What the layer receives beside them."""


class Debts:
    """What every layer is owed, oldest first."""

    def __init__(self) -> None:
        self._by_layer: dict[int, list[Debt]] = {}

    def add(self, layer_idx: int, debt: Debt) -> int:
        """Note a debt, and return how many the layer has now."""
        owed = self._by_layer.setdefault(layer_idx, [])
        owed.append(debt)
        return len(owed)

    def layers(self) -> list[int]:
        """Return the layers that are owed something."""
        return [layer_idx for layer_idx, owed in self._by_layer.items() if owed]

    def count(self, layer_idx: int) -> int:
        """Return how many slots of a row are without keys and values in a layer."""
        return len(self._by_layer.get(layer_idx, ()))

    def joined(self, layer_idx: int) -> tuple[Tensor, LayerCall, Tensor]:
        """Return what a layer is owed side by side: hidden states [B, P, D], their call, their slots [P]."""
        slots, states, calls = zip(*self._by_layer[layer_idx], strict=True)
        together = states[0] if len(states) == 1 else torch.cat(states, dim=1)
        return together, LayerCall.joined(calls), torch.tensor(slots)

    def drop(self, layer_idx: int) -> None:
        """Forget what a layer was owed, which is written now."""
        del self._by_layer[layer_idx]

    def abort(self, starts: list[int]) -> None:
        """Forget the debts of slots from ``starts`` on, one number for each layer: their tokens are taken back."""
        for layer_idx, owed in self._by_layer.items():
            owed[:] = [debt for debt in owed if debt.slot < starts[layer_idx]]

    def nbytes(self, layer_idx: int) -> int:
        """Return the bytes of the hidden states that a layer's debts keep."""
        return sum(debt.hidden_states.nbytes for debt in self._by_layer.get(layer_idx, ()))

    def clear(self) -> None:
        """Forget everything."""
        self._by_layer = {}

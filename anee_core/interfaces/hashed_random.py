"""Pseudo-random numbers that follow from where they are used, so that any order of work draws the same."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(layer: Tensor, position: Tensor, token: Tensor, salt: int) -> Tensor:
    """Return pseudo-random numbers in [0, 1) that depend on the arguments only, broadcast over layer, row, column.

    Each argument is mixed in by a multiply and a xor-shift over 31 bits, which int64 holds without overflow.
    """
    state = torch.full_like(layer, (0x2545F491 + 0x9E3779B * salt) & 0x7FFFFFFF)
    for value in (layer, position, token):
        state = (state ^ (value * 0x1B873593 + 0x165667B1)) & 0x7FFFFFFF
        state = (state * 0x45D9F3B) & 0x7FFFFFFF
        state = (state ^ (state >> 15)) & 0x7FFFFFFF
        state = (state * 0x2C1B3C6D) & 0x7FFFFFFF
        state = state ^ (state >> 13)
    return state.double() / 0x80000000

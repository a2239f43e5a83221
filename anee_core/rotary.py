"""Rotary position embedding of keys (Su et al., 2021, arXiv:2104.09864), in the half-split form."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``states`` [B, H, T, Dh] by angles ``cos``, ``sin`` [B, T, R]; dims from R on stay as they are."""
    width = cos.shape[-1]
    rotated, rest = states[..., :width], states[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = rotated * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)

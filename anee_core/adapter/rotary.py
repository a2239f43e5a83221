"""Rotary position embedding of keys (Su et al., 2021, arXiv:2104.09864), in the half-split form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``states`` [B, H, T, Dh] by angles ``cos``, ``sin`` [B, T, R]; dims from R on stay as they are."""
    width = cos.shape[-1]
    rotated, rest = states[..., :width], states[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    # Some families turn in fp32.
    rotated = (rotated * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(states.dtype)
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)


def rotate_interleaved(states: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the first 2 R dims of ``states`` [B, H, T, Dh] by angles [B, T, R]."""
    width = 2 * cos.shape[-1]
    cos, sin = (angle.unsqueeze(1).repeat_interleave(2, dim=-1) for angle in (cos, sin))
    rotated = states[..., :width]
    turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    rotated = (rotated * cos + turned * sin).to(states.dtype)
    return torch.cat((rotated, states[..., width:]), dim=-1)


def length_limit(config: Any) -> int | None:
    """Return the sequence length from which on rotary frequencies depend on the length, or None if they never do.

    Up to it they are constant (``dynamic`` scaling, and LongRoPE, arXiv:2402.13753, with its short factors). Beyond it
    cached keys would have to be turned again with every token.
    """
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *given.values()]  # one set of parameters, or one for each kind of layer
    limits = []
    for parameters in (kind for kind in kinds if isinstance(kind, dict)):
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
        elif "dynamic" in str(parameters.get("rope_type")):
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)

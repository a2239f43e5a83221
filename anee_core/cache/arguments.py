"""What callers may ask of a cache between forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anee_core.errors import CacheError
from anee_core.ranges import MOST, Within

_TOKENS = Within(0, MOST)
_REPEATS = Within(1, MOST)
_EITHER_WAY = Within(-MOST, MOST)


def checked_capacity(capacity: int | None) -> int:
    """Return the number of tokens to have room for, 0 if none is named."""
    if capacity is not None:
        _TOKENS.check("capacity", capacity, CacheError)
    return capacity or 0


def check_rollback(count: int, seen: int) -> None:
    """Raise `CacheError` unless ``count`` of ``seen`` tokens can be taken back."""
    _EITHER_WAY.check("the number of tokens to roll back", count, CacheError)
    if not 0 <= count <= seen:
        raise CacheError(f"cannot roll back {count} tokens: {seen} were seen")


def check_crop(tokens_to_remove: int) -> None:
    """Raise `CacheError` unless it is a number of tokens to keep, or a negative one of those to forget."""
    _EITHER_WAY.check("tokens_to_remove", tokens_to_remove, CacheError)


def check_repeats(repeats: int) -> None:
    """Raise `CacheError` unless rows can be repeated as often."""
    _REPEATS.check("repeats", repeats, CacheError)


def check_rows(rows: Any, batch: int) -> None:
    """Raise `CacheError` unless ``rows`` is a tensor [N] of rows of the batch; on a device values are not looked at."""
    right = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int32, torch.int64)
    if right and batch:
        right = rows.numel() > 0 and not (rows.is_cpu and bool(((rows < 0) | (rows >= batch)).any()))
    if not right:
        got = rows.tolist() if isinstance(rows, Tensor) and rows.numel() < 10 else type(rows).__name__
        raise CacheError(f"rows are a tensor [N] of numbers from 0 to {max(batch - 1, 0)}; got {got}")

"""The one expression that says which slots a query sees."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.cache.slots import Slots


def visible(slots: Slots, query_position: Tensor, window: int | None) -> Tensor:
    """Return which slots each query sees, [B, 1, T, S] bool; ``query_position`` is [B, T].

    A slot is visible if it is valid and its position is not after the query's, nor before the query's window.
    """
    return slots.valid()[:, None, None, :] & in_reach(slots.positions(), query_position, window)


def in_reach(position: Tensor, query_position: Tensor, window: int | None) -> Tensor:
    """Return which positions [B, S] each query at [B, T] may look back to, [B, 1, T, S] bool."""
    position, query = position[:, None, None, :], query_position[:, None, :, None]
    seen = position <= query
    return seen if window is None else seen & (position > query - window)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a visibility mask into what every attention backend adds to its scores.

    A query that sees nothing (padding) gets to see everything: its output is never used, but in fp16 the smallest
    number plus a negative score is minus infinity, and a row of those would put NaN into keys and values.
    """
    seen = seen | ~seen.any(-1, keepdim=True)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


class MaskMaker:
    """Maker of the masks of one forward; one serves all layers with the same slots and window.

    Args:
        query_position: [B, T] positions of the new tokens.
        dtype: of the masks.
        implicit_causal: whether the attention backend is causal by itself when it gets no mask for a first block (sdpa
            is, eager is not).
        always: whether layers want a mask in any case.
    """

    def __init__(self, query_position: Tensor, dtype: torch.dtype, implicit_causal: bool, always: bool = False) -> None:
        self._query_position, self._dtype, self._implicit_causal = query_position, dtype, implicit_causal
        self._always = always
        self._made: dict[tuple[int, int | None], Tensor] = {}

    def needed(self, slots: Slots, window: int | None, subset: bool) -> bool:
        """Return whether a layer needs a mask; ``subset`` if it runs only some tokens of the block."""
        if self._always or not slots.full or (window is not None and (slots.gaps or slots.used > window)):
            return True
        tokens = self._query_position.shape[1]
        first_block = slots.used == tokens
        return tokens > 1 and (subset or not (first_block and self._implicit_causal))

    def mask(self, slots: Slots, window: int | None, alive: Tensor | None = None) -> Tensor:
        """Return the additive mask [B, 1, T, S].

        ``alive`` [B, T, S] says what the layer still holds when each token's turn comes, if that is not all the same.
        """
        if alive is not None:
            return additive(visible(slots, self._query_position, window) & alive[:, None], self._dtype)
        key = (id(slots), window)
        if key not in self._made:
            self._made[key] = additive(visible(slots, self._query_position, window), self._dtype)
        return self._made[key]

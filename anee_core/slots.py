"""Which token each cache slot holds: its position, when it came, when it was dropped. Keys and values live elsewhere.

Layers that hold the same tokens share one `Slots`; a layer that drops tokens of its own gets a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.long).max
"""``died`` of a slot that is held."""
EMPTY = -1
"""``died`` of a slot that holds no token: padding, or free again."""


class Slots:
    """Per-row bookkeeping of up to ``capacity`` slots.

    For each row and slot: ``position`` (the token's position id), ``born`` (its index in the sequence of tokens seen)
    and ``died`` (how many tokens had been seen when it was dropped), all [B, capacity] int64. A slot is valid while
    ``died`` is NEVER. ``used`` slots have been handed out. ``full`` is known on the host: True while every used slot
    of every row is valid.
    """

    def __init__(self, batch: int, device: torch.device, capacity: int) -> None:
        self.position = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.born = torch.zeros_like(self.position)
        self.died = torch.full_like(self.position, EMPTY)
        self.used = 0
        self.full = True
        self.evicting = False
        # Slots from here on were appended one block after another: slot s of every row is token s - offset.
        self._aligned_from = 0

    @property
    def capacity(self) -> int:
        """Number of slots there is room for."""
        return self.position.shape[1]

    def clone(self) -> Slots:
        """Return an independent copy."""
        twin = Slots.__new__(Slots)
        twin.position, twin.born, twin.died = self.position.clone(), self.born.clone(), self.died.clone()
        twin.used, twin.full, twin.evicting = self.used, self.full, self.evicting
        twin._aligned_from = self._aligned_from
        return twin

    def valid(self) -> Tensor:
        """Return which used slots hold a token that was not dropped, [B, used] bool."""
        return self.died[:, : self.used] == NEVER

    def positions(self) -> Tensor:
        """Return the position ids of the used slots, [B, used]."""
        return self.position[:, : self.used]

    def extend(self, position_ids: Tensor, real: Tensor | None, seen: int) -> int:
        """Hand out slots for tokens [B, T] and return the first; there is room for them, see `grow`.

        ``real`` [B, T] is False for padding, ``seen`` is the number of tokens before them.
        """
        count = position_ids.shape[1]
        start, end = self.used, self.used + count
        self.position[:, start:end] = position_ids
        self.born[:, start:end] = torch.arange(seen, seen + count, device=self.born.device)
        self.died[:, start:end] = NEVER if real is None else torch.where(real, NEVER, EMPTY)
        self.used = end
        self.full = self.full and real is None
        return start

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` slots, at least as many as there are."""
        batch, old = self.position.shape
        extra = capacity - old
        self.position = torch.cat((self.position, self.position.new_zeros(batch, extra)), dim=1)
        self.born = torch.cat((self.born, self.born.new_zeros(batch, extra)), dim=1)
        self.died = torch.cat((self.died, self.died.new_full((batch, extra), EMPTY)), dim=1)

    def evict(self, keep: Tensor, seen: int) -> None:
        """Drop the valid slots where ``keep`` [B, used] is False; they can come back until `bury`."""
        died = self.died[:, : self.used]
        dropped = (died == NEVER) & ~keep
        self.died[:, : self.used] = torch.where(dropped, seen, died)
        self.full = False
        self.evicting = True

    def bury(self) -> None:
        """Make drops final."""
        self.died[self.died != NEVER] = EMPTY
        self.evicting = False

    def rollback(self, to: int, seen: int) -> None:
        """Forget the tokens from index ``to`` on, and bring back what was dropped when more than ``to`` were seen."""
        died = self.died[:, : self.used]
        died = torch.where((died > to) & (died != EMPTY), NEVER, died)
        self.died[:, : self.used] = torch.where(self.born[:, : self.used] >= to, EMPTY, died)
        self.used -= min(seen - to, self.used - self._aligned_from)

    def held(self) -> Tensor:
        """Return the number of valid slots of each row, [B]."""
        return self.valid().sum(1)

    def last_drop(self) -> Tensor:
        """Return the largest ``died`` of a slot that can still come back, a scalar; EMPTY if there is none."""
        return torch.where(self.died == NEVER, EMPTY, self.died).max()

    def compact(self, longest: int, capacity: int) -> Tensor:
        """Move each row's valid slots to the front, in order, and return the slot each came from, [B, longest].

        ``longest`` is the largest number of valid slots in a row, ``capacity`` how many slots to make room for.
        """
        valid = self.valid()
        source = torch.argsort(~valid, dim=1, stable=True)[:, :longest]
        self.position = self.positions().gather(1, source)
        self.born = self.born.gather(1, source)
        self.died = torch.where(valid.gather(1, source), NEVER, EMPTY)
        self.used = self._aligned_from = longest
        self.full = False
        self.grow(capacity)
        return source

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]``."""
        self.position, self.born, self.died = (t.index_select(0, rows) for t in (self.position, self.born, self.died))

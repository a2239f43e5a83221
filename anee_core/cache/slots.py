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
    """Bookkeeping of up to ``capacity`` slots for each row. A slot is valid while its ``died`` is NEVER."""

    def __init__(self, batch: int, device: torch.device, capacity: int) -> None:
        self.position = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        """[B, capacity] int64 index of the slots' tokens among the real tokens of their row."""
        self.born = torch.zeros_like(self.position)
        """[B, capacity] int64 index of each token in the sequence of tokens seen."""
        self.died = torch.full_like(self.position, EMPTY)
        """[B, capacity] int64: how many tokens had been seen when the token was dropped; or NEVER, or EMPTY."""
        self.used = 0
        """Number of slots that have been handed out, in every row."""
        self.full = True
        """Whether every used slot of every row is valid. This and what follows is known on the host."""
        self.evicting = False
        """Whether some tokens were dropped since the last compaction."""
        self.gaps = False
        """Whether tokens between others may have been dropped."""
        self.check_at = 0
        """Number of used slots from which on it is worth looking whether to compact."""
        # Slots from here on were appended one block after another: slot s of every row is token s - offset.
        self._aligned_from = 0

    @classmethod
    def nothing(cls) -> Slots:
        """Return the slots of a layer before its first token."""
        return cls(0, torch.device("cpu"), 0)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.position.shape[0]

    @property
    def capacity(self) -> int:
        """Number of slots there is room for."""
        return self.position.shape[1]

    def clone(self) -> Slots:
        """Return an independent copy."""
        twin = Slots.__new__(Slots)
        twin.position, twin.born, twin.died = self.position.clone(), self.born.clone(), self.died.clone()
        twin.used, twin.full, twin.evicting = self.used, self.full, self.evicting
        twin.gaps = self.gaps
        twin.check_at, twin._aligned_from = self.check_at, self._aligned_from
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
        self.born[:, start:end] = seen if count == 1 else torch.arange(seen, seen + count, device=self.born.device)
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

    def evict(self, alive: Tensor, seen: int) -> None:
        """Drop valid slots: ``alive`` [B, T, used] says after each of the T newest tokens what is still held.

        ``seen`` is the number of tokens read, those included. What is dropped can come back until it is compacted away.
        """
        died = self.died[:, : self.used]
        dropped = (died == NEVER) & ~alive[:, -1]
        # The count of tokens that it outlived says when it went.
        self.died[:, : self.used] = torch.where(dropped, seen - alive.shape[1] + 1 + alive.sum(1), died)
        self.full = False
        self.evicting = self.gaps = True

    def rollback(self, to: int, seen: int) -> None:
        """Forget the tokens from index ``to`` on, and bring back what was dropped when more than ``to`` were seen."""
        died = self.died[:, : self.used]
        died = torch.where((died > to) & (died != EMPTY), NEVER, died)
        self.died[:, : self.used] = torch.where(self.born[:, : self.used] >= to, EMPTY, died)
        aligned = self.used - self._aligned_from
        self.full = self.full and seen - to <= aligned  # others leave holes
        self.used -= min(seen - to, aligned)

    def held(self) -> Tensor:
        """Return the number of valid slots of each row, [B]."""
        return self.valid().sum(1)

    def next_positions(self) -> Tensor:
        """Return the position after the last held token of each row, [B, 1]."""
        if not self.used:
            return self.position.new_zeros(self.batch, 1)
        return torch.where(self.valid(), self.positions(), -1).amax(1, keepdim=True) + 1

    def held_by_token(self, pending: int) -> Tensor:
        """Return how many slots are held after each of the ``pending`` newest tokens, if none drops any, [B, T]."""
        before = self.used - pending
        if self.full:
            counts = torch.arange(before + 1, self.used + 1, device=self.position.device)
            return counts.expand(self.batch, -1)
        valid = self.valid()
        return valid[:, :before].sum(1, keepdim=True) + valid[:, before:].cumsum(1)

    def last_drop(self, until: int) -> Tensor:
        """Return the largest ``died`` that is at most ``until``, a scalar; EMPTY if nothing was dropped by then."""
        return torch.where(self.died <= until, self.died, EMPTY).max()

    def compact(self, longest: int, capacity: int, full: bool) -> Tensor:
        """Move each row's valid slots to the front, in order, and return the slot each came from, [B, longest].

        ``longest`` is the largest number of valid slots in a row, ``capacity`` how many slots to make room for,
        ``full`` whether all rows have that many.
        """
        valid = self.valid()
        source = torch.argsort(~valid, dim=1, stable=True)[:, :longest]
        self.position = self.positions().gather(1, source)
        self.born = self.born.gather(1, source)
        self.died = torch.where(valid.gather(1, source), NEVER, EMPTY)
        self.used = self._aligned_from = longest
        self.full, self.evicting = full, False
        self.grow(capacity)
        return source

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]``."""
        self.position, self.born, self.died = (t.index_select(0, rows) for t in (self.position, self.born, self.died))

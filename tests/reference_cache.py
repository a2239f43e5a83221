"""The slow, obvious twin of `AdaptiveCache`: lists of tokens, nothing shared, nothing preallocated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from anee_core.errors import CacheError


@dataclass
class Token:
    """One token of one row in one layer; ``key`` and ``value`` [H, Dh] are None until written."""

    index: int
    position: int
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    dropped_at: int | None = None


class ReferenceCache:
    """One list of tokens per layer and row. Padding gets no token; a dropped one stays until it is freed.

    A token dropped when n tokens had been seen comes back when the cache is rolled back to fewer than n, unless it was
    freed in between. ``horizons`` are the largest n of a freed token in each row: no rollback can go below them.
    ``horizon`` is the largest in all rows that there ever were; whether a rollback goes below that is up to the cache.
    """

    def __init__(self, num_layers):
        self.layers = [[] for _ in range(num_layers)]
        self.batch = self.seen = self.pending = self.horizon = 0
        self.horizons = []
        self.keeps_dropped = False

    def begin(self, position_ids, real):
        """Open a forward over tokens [B][T]; ``real`` [B][T] is False for padding, None for no padding."""
        if self.batch not in (0, len(position_ids)):
            raise CacheError("other number of rows")
        self.abort()
        self.batch = len(position_ids)
        self.pending = len(position_ids[0])
        self.horizons.extend([0] * (self.batch - len(self.horizons)))
        for layer in self.layers:
            layer.extend([] for _ in range(self.batch - len(layer)))
            for row, positions in enumerate(position_ids):
                for column, position in enumerate(positions):
                    if real is None or real[row][column]:
                        layer[row].append(Token(self.seen + column, position))

    def write(self, layer, row, column, key, value):
        """Store the key and value [H, Dh] of one token of the open forward."""
        for token in self.layers[layer][row]:
            if token.index == self.seen + column:
                token.key, token.value = key.clone(), value.clone()

    def evict(self, layer, row, positions, ago=0):
        """Drop the tokens at these positions, when ``ago`` tokens less had been seen than now."""
        for token in self.held(layer, row):
            if token.position in positions:
                token.dropped_at = self.seen + self.pending - ago

    def commit(self):
        """Close the forward, and free what was dropped unless recording."""
        self.seen, self.pending = self.seen + self.pending, 0
        if self.keeps_dropped:
            return
        for layer, i in itertools.product(self.layers, range(self.batch)):
            self.horizons[i] = max([self.horizons[i], *(t.dropped_at for t in layer[i] if t.dropped_at is not None)])
            layer[i] = [token for token in layer[i] if token.dropped_at is None]
        self.horizon = max([self.horizon, *self.horizons])

    def abort(self):
        """Take back the open forward, if there is one."""
        if self.pending:
            self._back_to(self.seen)
        self.pending = 0

    def may_refuse(self, count):
        """Return whether a rollback goes below the horizon of rows that are no longer there, and of none that are."""
        return 0 < count <= self.seen and max(self.horizons, default=0) <= self.seen - count < self.horizon

    def rollback(self, count):
        """Forget the last ``count`` tokens."""
        self.abort()
        to = self.seen - count
        if count < 0 or to < 0 or (count and to < max(self.horizons, default=0)):
            raise CacheError("cannot roll back")
        self._back_to(to)
        self.seen = to

    def reorder(self, rows):
        """Make row i a copy of row ``rows[i]``."""
        self.layers = [[[replace(token) for token in layer[r]] for r in rows] for layer in self.layers]
        self.horizons = [self.horizons[r] for r in rows]
        self.batch = len(rows)

    def held(self, layer, row):
        """Return the tokens that are not dropped, oldest first."""
        return [token for token in self.layers[layer][row] if token.dropped_at is None]

    def attend(self, layer, row, query, position, window=None):
        """Return what one query [H, Dh] at a position gets from the tokens it sees, [H, Dh]; None if it sees none."""
        tokens = [t for t in self.held(layer, row) if t.position <= position]
        tokens = [t for t in tokens if window is None or t.position > position - window]
        if not tokens:
            return None
        scores = torch.stack([(query * t.key).sum(-1) for t in tokens]) / query.shape[-1] ** 0.5
        return (scores.softmax(0)[..., None] * torch.stack([t.value for t in tokens])).sum(0)

    def _rows(self):
        return [row for layer in self.layers for row in layer]

    def _back_to(self, to):
        for row in self._rows():
            row[:] = [token for token in row if token.index < to]
            for token in row:
                if token.dropped_at is not None and token.dropped_at > to:
                    token.dropped_at = None

"""What one thread's forward works with, and the graphs that it has captured."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from anee_core.steps.graphs.buffers import Graphs

_MOST = 4
"""Caches whose graphs are kept: those of a fifth take the place of the ones that were not used for longest."""


class Workspace(threading.local):
    """What one thread's forward works with, and the graphs of the caches that it has decoded with."""

    def __init__(self) -> None:
        self.graphs: Graphs | None = None
        """Graphs of the forward under way; None if there are none."""
        self._known: OrderedDict[Hashable, Graphs | None] = OrderedDict()

    def find(self, key: Hashable, hidden_states: Tensor, capacity: int) -> Graphs | None:
        """Return the graphs that belong to a key; None at its first token.

        A cache may move with each token, as in a beam search, and then capturing is not worth it.
        """
        if key not in self._known:
            self._known[key] = None
        elif self._known[key] is None:
            self._known[key] = Graphs(hidden_states, capacity)
        self._known.move_to_end(key)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return self._known[key]

"""What is known of each token of a sequence, recorded per token, so that a rollback needs no undoing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class TokenLog:
    """Entries [B, tokens, ...] that grow with the sequence. Like the cache, they outlive inference mode."""

    fill: ClassVar[float] = 0.0
    """Of entries that nothing was recorded in."""

    def __init__(self, entries: Tensor) -> None:
        self._entries = entries

    @torch.inference_mode(False)
    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]``."""
        self._entries = self._entries.index_select(0, rows.to(self._entries.device))

    def _reserve(self, length: int) -> None:
        """Have room for entries of ``length`` tokens."""
        held = self._entries.shape[1]
        if length > held:
            extra = max(held, length - held, 64)
            room = self._entries.new_full((self._entries.shape[0], extra, *self._entries.shape[2:]), self.fill)
            self._entries = torch.cat((self._entries, room), dim=1)

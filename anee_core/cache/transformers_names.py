"""What transformers asks of a cache, under its names."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from anee_core.cache.arguments import check_crop, check_repeats


class TransformersNames(Cache):  # type: ignore[misc]  # transformers ships without types
    """Translation of what transformers asks of a cache into the names of `AdaptiveCache`."""

    keeps_dropped: bool
    """Whether dropped slots stay, so that a rollback can bring them back."""

    @property
    @abstractmethod
    def seen(self) -> int:
        """Number of tokens read, dropped ones included."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Number of rows; 0 before the first forward."""

    @abstractmethod
    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens."""

    @abstractmethod
    def accept(self) -> None:
        """Make final what was dropped so far."""

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row ``rows[i]``."""

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` is exact."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen, dropped ones included."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens: transformers counts them as a negative number.

        A positive number is the length to keep, as in older versions. What is left has been accepted,
        so slots dropped because of it are freed.
        """
        check_crop(tokens_to_remove)
        self.rollback(max(self.seen - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove)
        self.accept()

    def activate_past_recording(self) -> None:
        """Keep dropped slots until the next `crop`, so that they can be brought back."""
        self.keeps_dropped = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search's choice of rows."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        check_repeats(repeats)
        self.reorder(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at ``indices``, numbers or one bool per row."""
        flags = isinstance(indices, Tensor) and indices.dtype == torch.bool
        self.reorder(indices.nonzero()[:, 0] if flags else indices)

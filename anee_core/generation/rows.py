"""The rows of a batch that is being decoded: their tokens, where they end, and which go on."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 4096
"""Most new tokens that there is room for from the start."""


class Rows:
    """Sequences that grow by a token at a time; a row that has ended may leave the batch.

    Args:
        prompts: token ids [B, T], on the device where they are wanted.
        new: tokens that a row may get, at most.
        pad: what stands behind a row's end.
    """

    def __init__(self, prompts: Tensor, new: int, pad: int) -> None:
        self.batch, self.prompt = prompts.shape
        self._pad, self._most = pad, self.prompt + new
        self.sequences = prompts.new_full((self.batch, self.prompt + min(new, _AT_ONCE)), pad)
        """All rows, [B, S], with room for some more tokens."""
        self.sequences[:, : self.prompt] = prompts
        self.places = torch.arange(self.batch, device=prompts.device)
        """Which rows are in the batch now, [R]."""
        self._running = torch.ones(self.batch, dtype=torch.bool, device=prompts.device)
        self._ends = torch.full((self.batch,), self._most)
        self._length = self.prompt

    @property
    def room(self) -> bool:
        """Whether a further token has a place."""
        return self._length < self._most

    @property
    def tokens(self) -> Tensor:
        """What the rows in the batch hold so far, [R, T]."""
        return self.sequences[self.places, : self._length]

    @property
    def last(self) -> Tensor:
        """The newest token of each row in the batch, [R, 1]."""
        return self.sequences[self.places, self._length - 1, None]

    def append(self, token: Tensor) -> Tensor:
        """Give each row in the batch its next token [R], and return what it got: padding if it has ended."""
        if self._length == self.sequences.shape[1]:
            self._grow()
        token = torch.where(self._running, token, self._pad)
        self.sequences[self.places, self._length] = token
        self._length += 1
        return token

    @torch.inference_mode(False)  # what it makes is given to the caller
    def _grow(self) -> None:
        extra = min(self._length, self._most - self._length)
        room = self.sequences.new_full((self.batch, extra), self._pad)
        self.sequences = torch.cat((self.sequences, room), dim=1)

    def close(self, over: Tensor) -> bool:
        """End the rows of the batch that are ``over`` [R] with their newest token; return whether any has ended now."""
        closing = (over & self._running).cpu()  # the one host read of a token
        if not bool(closing.any()):
            return False
        self._ends[self.places.cpu()[closing]] = self._length
        self._running = self._running & ~over
        return True

    @property
    def any_running(self) -> bool:
        """Whether any row goes on."""
        return bool(self._running.any())

    def leave(self) -> Tensor:
        """Take the rows that have ended out of the batch, and return which of it stay."""
        stay = self._running.nonzero()[:, 0]
        self.places, self._running = self.places[stay], self._running[stay]
        return stay

    def finished(self) -> Tensor:
        """Return all rows, up to the end of the longest, [B, T + N]."""
        return self.sequences[:, : int(self._ends.max())]

    def new_tokens(self) -> list[list[int]]:
        """Return each row's new tokens, without padding."""
        pairs = zip(self.sequences.cpu(), self._ends.tolist(), strict=True)
        return [row[self.prompt : end].tolist() for row, end in pairs]

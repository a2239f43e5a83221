"""The tokens of one forward, and those of them that run one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """The tokens of one forward."""

    embeddings: Tensor
    """[B, T, D] embeddings of the tokens."""
    position_ids: Tensor
    """[B, T] index of each token among the real tokens of its row: what it sees goes by these."""
    input_ids: Tensor | None = None
    """[B, T] ids of the tokens; None if embeddings were given."""
    real: Tensor | None = None
    """[B, T] bool, False for padding; None if there is none."""
    phase: Literal["prefill", "decode"] = "decode"
    """Whether the forward reads a prompt or decodes tokens."""
    given_positions: Tensor | None = None
    """[B, T] positions that the caller gave for the model to encode; None for ``position_ids``."""

    @property
    def encoded_positions(self) -> Tensor:
        """Positions that the model encodes, by rotation or as embeddings, [B, T]; they serve nothing else."""
        return self.position_ids if self.given_positions is None else self.given_positions

    def split(self, length: int) -> list[Block]:
        """Return the block in pieces of at most ``length`` tokens."""
        if length >= self.position_ids.shape[1]:
            return [self]
        return [self._piece(slice(t, t + length)) for t in range(0, self.position_ids.shape[1], length)]

    def cut(self, at: int) -> tuple[Block | None, Block | None]:
        """Return the first ``at`` tokens and the others; None for none."""
        tokens = self.position_ids.shape[1]
        first = self if at >= tokens else self._piece(slice(0, at)) if at else None
        return first, self if at == 0 else None if at >= tokens else self._piece(slice(at, tokens))

    def _piece(self, at: slice) -> Block:
        return Block(
            self.embeddings[:, at],
            self.position_ids[:, at],
            None if self.input_ids is None else self.input_ids[:, at],
            None if self.real is None else self.real[:, at],
            self.phase,
            None if self.given_positions is None else self.given_positions[:, at],
        )


@dataclass(frozen=True)
class Selection:
    """The tokens of a block that run one layer."""

    kind: Literal["all", "none", "some"]
    """Whether all, none or some of them run it."""
    run: tuple[Tensor, Tensor] | None = None
    """Rows [R, 1] and columns [R, C] of those that run, if they are some; a row with fewer than C repeats its last one,
    which computes the same twice and so changes nothing.
    """
    skip: tuple[Tensor, Tensor] | None = None
    """Rows [1, N] and columns [1, N] of those that skip the layer, if they are some."""

    def counts(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Return how many of a block's rows run the layer, how many of its tokens do, and how many tokens skip it.

        What is computed twice counts twice.
        """
        if self.run is not None and self.skip is not None:
            return self.run[1].shape[0], self.run[1].numel(), self.skip[1].numel()
        return (rows, rows * columns, 0) if self.kind == "all" else (0, 0, rows * columns)


ALL, NONE = Selection("all"), Selection("none")

"""Documents packed into one row, as trainers do to save padding: each is a row of its own to the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anee_core.model.inputs import Inputs


@dataclass(frozen=True)
class Packed:
    """Where the tokens of packed rows lie in rows of one document each, [N, longest], padded on the right."""

    row: Tensor
    """[B, T] row of each token among the documents."""
    column: Tensor
    """[B, T] column of each token there."""

    @classmethod
    def find(cls, inputs: Inputs) -> Packed | None:
        """Return where the documents lie; None if every row is one document.

        A document ends where the next position is not the one after, as transformers has it.
        """
        positions = inputs.position_ids
        given = inputs.inputs_embeds if inputs.input_ids is None else inputs.input_ids
        if positions is None or given is None or positions.dim() != 2 or positions.shape[1] != given.shape[1]:
            return None
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions.diff(dim=1) != 1
        if not bool(starts[:, 1:].any()):
            return None
        starts = starts.expand(given.shape[0], -1)
        row = starts.flatten().cumsum(0).view(starts.shape) - 1
        index = torch.arange(positions.shape[1], device=positions.device).expand_as(starts)
        column = index - torch.where(starts, index, 0).cummax(1).values
        return cls(row, column)

    def apart(self, inputs: Inputs) -> Inputs:
        """Return the inputs with each document in a row of its own."""
        real = torch.ones_like(self.row)
        positions = inputs.position_ids
        assert positions is not None
        return Inputs(
            input_ids=None if inputs.input_ids is None else self._apart(inputs.input_ids),
            attention_mask=self._apart(real),
            position_ids=self._apart(positions.expand(self.row.shape)),
            inputs_embeds=None if inputs.inputs_embeds is None else self._apart(inputs.inputs_embeds),
        )

    def together(self, states: Tensor) -> Tensor:
        """Return what the documents' tokens became, [N, longest, ...], in the order of the packed rows, [B, T, ...]."""
        return states[self.row.to(states.device), self.column.to(states.device)]

    def _apart(self, tokens: Tensor) -> Tensor:
        row, column = self.row.to(tokens.device), self.column.to(tokens.device)
        shape = int(row.max()) + 1, int(column.max()) + 1, *tokens.shape[2:]
        return tokens.new_zeros(shape).index_put((row, column), tokens)

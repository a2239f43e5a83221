"""Families that turn neighbours by angles of which the model gives each one twice, half a width apart."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from anee_adapters.table import TableAdapter
from anee_core.interfaces import LayerCall, Parts, rotate_interleaved


class NeighboursAdapter(TableAdapter):
    """A table of names, and rotary positions that turn neighbours."""

    def project_kv(self, parts: Parts, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return keys and values as the default does, but with neighbours of the keys turned."""
        keys, values = super().project_kv(parts, layer_idx, hidden_states, replace(call, position_embeddings=None))
        cos, sin = _once(call)
        return rotate_interleaved(keys, sin, cos), values

    def angles(self, parts: Parts, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return the angles, one for each number of a pair."""
        cos, sin = _once(call)
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def _once(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [B, T, R / 2] each."""
    assert call.position_embeddings is not None
    cos, sin = (angle.chunk(2, dim=-1)[0] for angle in call.position_embeddings)
    return cos, sin

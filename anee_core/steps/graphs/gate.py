"""A linear gate in a captured graph: it decides on the device, and the host reads what it did once per token."""

from __future__ import annotations

import torch
from torch import Tensor

from anee_core.accounting.budget import SLACK
from anee_core.interfaces.formulas import TIE, unit_norm
from anee_core.steps.calls import GateCall


class GateBuffers:
    """What a gate knows of one new token in each row, and what it decides, where graphs find it.

    Args:
        call: what the buffers are for; they serve later calls of the same gate too.
        like: hidden states [B, 1, D].
    """

    @torch.inference_mode(False)
    def __init__(self, call: GateCall, like: Tensor) -> None:
        device, batch, layers = like.device, len(like), len(call.gate.bias)
        self._of, self._most = call.gate, None if call.limit is None else call.limit.most
        self._gate = call.gate.to(device)
        self.always: list[bool] = call.always.tolist()
        self.runs = torch.zeros(layers, batch, dtype=torch.bool, device=device)
        """Which rows run each layer, [L, B]; written by `decide`."""
        self._scores = torch.zeros(batch, layers, device=device)
        self._shares = torch.zeros(batch, layers, device=device)
        self._recent = torch.zeros(batch, call.gate.window, layers, device=device)
        self._compared = torch.zeros(batch, layers, dtype=torch.long, device=device)
        self.wanted = torch.zeros(batch, device=device)
        """What the layers that always run would take, with the least that the others take; see `decide`."""
        self._extra = torch.zeros(layers, batch, device=device)

    def serves(self, call: GateCall) -> bool:
        """Whether the buffers were made for such a call."""
        return call.gate is self._of and self._most == (None if call.limit is None else call.limit.most)

    def fill(self, call: GateCall) -> None:
        """Put in what is known in front of the first layer."""
        recent, compared = _recent(call.known.scores[:, : call.known.seen], self._gate.window)
        self._recent.copy_(recent)
        self._compared.copy_(compared)
        self._shares.copy_(call.known.shares[:, 0])
        if call.limit is not None:
            self.wanted.copy_(call.limit.wanted[:, 0])
            self._extra.copy_((call.limit.run_shares - call.limit.skip_shares)[..., 0])

    def decide(self, layer_idx: int, hidden_states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows of [B, 1, D] run a layer, [B], and what all layers wanted so far would take, [B].

        The second is to be handed on from layer to layer, and begins as `wanted`: a graph may be run more than once to
        be captured, so nothing is added up in a buffer.
        """
        gate = self._gate
        score = gate.score(unit_norm(hidden_states[:, 0].float()), layer_idx)
        self._scores[:, layer_idx] = score
        if self.always[layer_idx]:
            self.runs[layer_idx] = True
            return self.runs[layer_idx], wanted
        least = score - TIE * gate.spread[layer_idx]
        lower = (self._recent[..., layer_idx] < least[:, None]).sum(1)
        rank = gate.rank(score, lower, self._compared[:, layer_idx], layer_idx)
        runs = rank >= self._shares[:, layer_idx]
        if self._most is not None:
            wanted = wanted + runs * self._extra[layer_idx]
            runs = runs & (wanted <= self._most + SLACK)
        self.runs[layer_idx] = runs
        return self.runs[layer_idx], wanted

    def record(self, call: GateCall) -> None:
        """Write the tokens' scores behind those of earlier ones, for later ones to be compared with."""
        call.known.scores[:, call.known.seen] = self._scores.masked_fill(self._shares < 0, torch.nan)


def _recent(scores: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the last ``window`` of earlier tokens' scores that count, and how many there are.

    Of ``scores`` [B, S, L], those that are not NaN count. The first result is [B, window, L], in any order, with NaN
    where there are fewer; the second is [B, L].
    """
    counts = ~scores.isnan()
    total = counts.sum(1)
    place = counts.cumsum(1) - 1 - (total - window).clamp(min=0)[:, None]
    place = place.where(counts & (place >= 0), window)  # the others go where nobody looks
    room = scores.new_full((len(scores), window + 1, scores.shape[2]), torch.nan)
    return room.scatter_(1, place, scores)[:, :window], total.clamp(max=window)

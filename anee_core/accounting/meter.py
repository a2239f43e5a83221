"""Counting of what one forward executes: next to nothing while it runs, since sums are made when somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from anee_core.accounting.costs import CostModel
from anee_core.accounting.token_state import TokenState


class Meter:
    """The count of what one forward over B x T tokens executes.

    Args:
        costs: what the model's parts cost.
        policy_work: returns the FLOPs of a layer's token policy, per new token and per pair of new token and slot.
        shape: B and T.
        context: tokens of a row that were seen before or are new.
    """

    def __init__(
        self, costs: CostModel, policy_work: Callable[[int], tuple[int, int]], shape: Sequence[int], context: int
    ) -> None:
        self._costs, self._policy_work = costs, policy_work
        self._rows, self._tokens, self._context = shape[0], shape[0] * shape[1], context
        self._layers: list[tuple[int, int, int, int]] = []
        self._states: tuple[Tensor, list[int]] | None = None
        self._inside = self._head_calls = self._head_tokens = 0

    def layer(self, rows: int, running: int, skipping: int, slots: int) -> None:
        """Count the next layer: how many rows and tokens run it, how many skip it, and the slots of a row."""
        self._layers.append((rows, running, skipping, slots))

    def layers(self, states: Tensor, slots: list[int]) -> None:
        """Count all layers: the `TokenState` of each token at each, [L, B, T], and the slots of a row in each."""
        self._states = states, slots

    def policy(self, flops: int) -> None:
        """Count what a token policy executed inside a layer."""
        self._inside += flops

    def head(self, tokens: int) -> None:
        """Count one call of the head."""
        self._head_calls, self._head_tokens = self._head_calls + 1, self._head_tokens + tokens

    def total(self) -> Spent:
        """Return what was executed, and what the dense model would have executed."""
        costs, tokens = self._costs, self._tokens
        if self._states is not None:
            states, held = self._states
            runs, skips = ((states == kind).sum((1, 2)).tolist() for kind in (TokenState.RUNS, TokenState.SKIPPED))
            self._layers = list(zip([self._rows] * len(held), runs, skips, held, strict=True))
        spent = Spent(
            policy_flops=self._inside,
            head_flops=self._head_tokens * costs.head.flops,
            head_bytes=self._head_calls * costs.head.weight_bytes,
        )
        if self._layers:
            spent.embedding_flops = tokens * costs.embedding.flops
            spent.embedding_bytes = costs.embedding.read(tokens)
        for layer_idx, (rows, running, skipping, slots) in enumerate(self._layers):
            run, propagate = costs.run[layer_idx], costs.propagate[layer_idx]
            spent.layer_flops += running * (run.flops + slots * costs.pair_flops) + rows * slots * costs.slot_flops
            per_token, per_pair = self._policy_work(layer_idx)
            spent.policy_flops += tokens * (per_token + slots * per_pair)
            spent.propagation_flops += skipping * propagate.flops
            if costs.shortcut:
                spent.shortcut_flops += skipping * costs.shortcut[layer_idx].flops
                spent.shortcut_bytes += costs.shortcut[layer_idx].read(skipping)
            spent.dense_layer_flops += tokens * (run.flops + self._context * costs.pair_flops)
            spent.dense_layer_flops += self._rows * self._context * costs.slot_flops
            spent.layer_bytes += run.read(running)
            spent.propagation_bytes += propagate.read(skipping)
            spent.dense_layer_bytes += run.read(tokens)
        return spent


@dataclass
class Spent:
    """Work executed by a number of forwards, against the dense model's for the same tokens."""

    layer_flops: int = 0
    """FLOPs of layers that tokens ran, attention included."""
    propagation_flops: int = 0
    """FLOPs of giving tokens their keys and values in layers that they skipped."""
    shortcut_flops: int = 0
    """FLOPs of shortcuts in the place of skipped layers."""
    policy_flops: int = 0
    """FLOPs of the matrix products of token policies."""
    dense_layer_flops: int = 0
    """FLOPs of the dense model's layers for the same tokens."""
    head_flops: int = 0
    """FLOPs of the language-model head."""
    embedding_flops: int = 0
    """FLOPs of what leads from tokens to the first layer, and from the last layer to the head."""
    layer_bytes: int = 0
    """Bytes of weights read by layers that tokens ran."""
    propagation_bytes: int = 0
    """Bytes of weights read to give tokens their keys and values in layers that they skipped."""
    shortcut_bytes: int = 0
    """Bytes of weights read by shortcuts."""
    dense_layer_bytes: int = 0
    """Bytes of weights read by the dense model's layers for the same tokens."""
    head_bytes: int = 0
    """Bytes of weights read by the language-model head."""
    embedding_bytes: int = 0
    """Bytes of weights read between tokens and the first layer, and between the last layer and the head."""

    def add(self, other: Spent) -> None:
        """Add another record's counts to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def share(self) -> float:
        """Share of the dense decoder-layer FLOPs that was executed, propagation and shortcuts included."""
        if not self.dense_layer_flops:
            return 0.0
        return (self.layer_flops + self.propagation_flops + self.shortcut_flops) / self.dense_layer_flops

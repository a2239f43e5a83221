"""What steps are given: the input of a layer, a gate, an interaction, a whole stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anee_core.adapter.layer_call import LayerCall
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.interfaces.formulas import LinearGate, LinearInteraction
from anee_core.interfaces.shortcut import Shortcut

Places = tuple[Tensor, Tensor]
"""Rows [R, 1] and columns [R, C] of some tokens of a block, which broadcast together."""


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What goes into one layer: a block of tokens, or some of them."""

    layer_idx: int
    """Index of the layer."""
    hidden_states: Tensor
    """[B, T, D] hidden states of the whole block."""
    call: LayerCall
    """What the layer receives beside them, for the whole block."""
    cache: AdaptiveCache
    """Cache that gets the tokens' keys and values."""
    places: Places | None = None
    """Rows and columns of the tokens that are meant, [R, C]; None for the whole block."""

    def selected(self) -> tuple[Tensor, LayerCall]:
        """Return the hidden states [R, C, D] of the tokens that are meant, and the call for them, without a mask."""
        if self.places is None:
            return self.hidden_states, self.call
        return self.hidden_states[self.places], self.call.select(*self.places)


@dataclass(frozen=True)
class Limit:
    """A limit on what each token spends, as a share of a dense token's layer FLOPs."""

    run_shares: Tensor
    """[L, B, T] what it takes to run each layer."""
    skip_shares: Tensor
    """[L, B, T] what it takes to skip each layer."""
    wanted: Tensor
    """[B, T] what it takes to skip all layers but those that always run."""
    most: float
    """Share that no token may exceed."""


@dataclass(frozen=True)
class KnownScores:
    """What a linear gate compares new tokens with."""

    shares: Tensor
    """[B, T, L] share of tokens that is to skip each layer."""
    scores: Tensor
    """[B, S, L] scores of the earlier tokens, with room for the step to write the new ones behind them."""
    seen: int
    """Number of earlier tokens."""


@dataclass(frozen=True)
class GateCall:
    """A linear gate, and what it needs to know of the new tokens."""

    gate: LinearGate
    """The gate."""
    known: KnownScores
    """What it compares the tokens with."""
    always: Tensor
    """[L] bool: which layers always run."""
    limit: Limit | None
    """What no token may exceed; None for no limit."""


@dataclass(frozen=True)
class DropCall:
    """A linear interaction that decides what each row's new token keeps of the cache."""

    interaction: LinearInteraction
    """The interaction."""
    held: Tensor
    """[L, B] int32, into which the step writes how many slots each layer holds after the token."""


@dataclass(frozen=True)
class Stack:
    """A forward through all layers, for a step that can take them at once."""

    call: LayerCall
    """What every layer receives."""
    masks: Sequence[Tensor | None]
    """Mask of each layer, [B, 1, T, S] or None; all None where tokens are dropped."""
    states: Tensor
    """[L, B, T] uint8 on the host: a `TokenState` for each token at each layer. If there is a ``gate``, the step writes
    what that decides of all tokens that are no padding.
    """
    gate: GateCall | None
    """What decides on the way who runs; None if ``states`` says it."""
    dropping: DropCall | None
    """What drops tokens of the cache; None for nothing."""
    shortcut: Shortcut | None
    """What tokens get in the place of layers that they skip; None for nothing."""
    inputs: Tensor | None = None
    """[L, B, T, D], into which the step writes what each layer receives; None if nobody wants to know."""

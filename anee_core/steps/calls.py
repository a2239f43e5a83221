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
    """What goes into one layer: the hidden states [B, T, D] of a block, or of it the tokens at ``places`` [R, C].

    ``call`` is what the layer receives beside them, for the whole block. ``cache`` gets their keys and values.
    """

    layer_idx: int
    hidden_states: Tensor
    call: LayerCall
    cache: AdaptiveCache
    places: Places | None = None

    def selected(self) -> tuple[Tensor, LayerCall]:
        """Return the hidden states [R, C, D] of the tokens that are meant, and the call for them, without a mask."""
        if self.places is None:
            return self.hidden_states, self.call
        return self.hidden_states[self.places], self.call.select(*self.places)


@dataclass(frozen=True)
class Limit:
    """The share ``most`` of a dense token's layer FLOPs that no token may exceed.

    ``run_shares`` and ``skip_shares`` [L, B, T] are what each layer takes of them; ``wanted`` [B, T] is what it takes
    to skip all layers but those that always run.
    """

    run_shares: Tensor
    skip_shares: Tensor
    wanted: Tensor
    most: float


@dataclass(frozen=True)
class KnownScores:
    """What a linear gate compares with.

    ``shares`` [B, T, L] says which share of tokens is to skip each layer; ``scores`` [B, S, L] holds those of the
    ``seen`` earlier tokens, and has room for the step to write the new ones behind them.
    """

    shares: Tensor
    scores: Tensor
    seen: int


@dataclass(frozen=True)
class GateCall:
    """A linear gate, and what it needs to know of the new tokens.

    Some layers run ``always`` [L]; if there is a ``limit``, no token exceeds it.
    """

    gate: LinearGate
    known: KnownScores
    always: Tensor
    limit: Limit | None


@dataclass(frozen=True)
class DropCall:
    """A linear interaction that decides what each row's new token keeps of the cache.

    The step writes into ``held`` [L, B] int32 how many slots each layer holds after it.
    """

    interaction: LinearInteraction
    held: Tensor


@dataclass(frozen=True)
class Stack:
    """A forward through all layers, for a step that can take them at once.

    Every layer receives ``call``, and its own of the ``masks`` [B, 1, T, S], or None. ``states`` [L, B, T] uint8 on the
    host holds a `TokenState` for each token at each layer; if there is a ``gate``, the step writes what that decides of
    all that are no padding.
    ``dropping`` says what is dropped, if anything; there are no masks then. ``shortcut`` is what skipped tokens get.
    ``inputs`` [L, B, T, D], if given, is for the step to write what each layer receives.
    """

    call: LayerCall
    masks: Sequence[Tensor | None]
    states: Tensor
    gate: GateCall | None
    dropping: DropCall | None
    shortcut: Shortcut | None
    inputs: Tensor | None = None

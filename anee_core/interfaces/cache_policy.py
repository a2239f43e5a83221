"""Token policies: what decides which cached tokens a layer keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from anee_core.interfaces.configurable import Configurable
from anee_core.interfaces.formulas import LinearInteraction
from anee_core.interfaces.setting import Setting


@dataclass(frozen=True)
class CacheView:
    """One layer's cache as a `CachePolicy` sees it: S slots in the order of their tokens, the T newest at the end."""

    layer_idx: int
    """Index of the layer."""
    position_ids: Tensor
    """[B, S] index of the slots' tokens among the real tokens of their row, whatever positions the caller gave."""
    valid: Tensor
    """[B, S] bool: which slots hold a token."""
    query_position: Tensor
    """[B, T] index of the new tokens, counted likewise."""
    ran: Tensor
    """[B, T] bool: which of the new tokens run the layer and so attend."""
    real: Tensor
    """[B, T] bool: which of the new tokens are no padding."""
    state: Mapping[str, Tensor]
    """What was remembered of each slot, [B, S, ...], by name."""
    states: Tensor | None = None
    """[B, T, D] what the layer's attention gets of the new tokens, normed; None unless the policy wants it."""
    keys: Tensor | None = None
    """[B, H, S, Dh] keys of the slots; None unless the policy wants them."""
    attention: Tensor | None = None
    """[B, H, T, S] logits before softmax: -inf where a new token cannot see a slot, whatever was dropped. Of tokens
    that do not run they say nothing. None unless the policy wants them.
    """


Wants = frozenset[Literal["states", "keys", "attention"]]
"""Costly parts of a `CacheView`, by field."""


class CachePolicy(Configurable, ABC):
    """What decides which cached tokens a layer keeps.

    Tokens are taken in order: each attends to what is held, then the layer drops what the policy no longer wants. What
    was dropped once stays dropped.
    """

    wants: ClassVar[Wants] = frozenset()
    """Which costly parts of a `CacheView` it needs."""
    before_attention: ClassVar[bool] = False
    """Whether what a token makes the layer drop is hidden from that token's own attention already."""
    rewrites: ClassVar[bool] = False
    """Whether `decide` changes what is remembered of slots."""

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped, so that the engine need not ask."""
        return False

    @property
    def alike(self) -> bool:
        """Whether all layers keep the same tokens, by their positions alone.

        Nothing is remembered then, and one decision serves all layers.
        """
        return False

    @property
    def interaction(self) -> LinearInteraction | None:
        """The formula that `decide` follows, if it is that of a linear interaction, once bound."""
        return None

    def bind(self, setting: Setting) -> CachePolicy:
        """Return a policy for one model; this one stays as it is and can serve others.

        Raises:
            PolicyError: the options or the weights do not fit the model.
        """
        return self

    def work(self, layer_idx: int) -> tuple[int, int]:
        """Return the FLOPs of matrix products that it executes per new token, and per pair of new token and slot."""
        return 0, 0

    def remember(self, view: CacheView) -> Mapping[str, Tensor]:
        """Return what to store of the new tokens beside their keys and values, by name, [B, T, ...].

        ``view.state`` and ``view.attention`` are not there yet.
        """
        return {}

    @abstractmethod
    def retain(self, view: CacheView) -> Tensor:
        """Return what to keep after each new token, a bool tensor that broadcasts to [B, T, S].

        The newest token's own slot is kept in any case, and later ones are not asked about.
        """

    def decide(self, view: CacheView) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what `retain` does, and what is remembered of slots from now on, [B, S, ...], where that changes."""
        return self.retain(view), {}

"""Shortcuts: what estimates a skipped layer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from anee_core.accounting.work import Work
from anee_core.interfaces.configurable import Configurable
from anee_core.interfaces.formulas import LowRankMap
from anee_core.interfaces.setting import Setting


class Shortcut(Configurable, ABC):
    """What estimates, for little, what a skipped layer would have done to the hidden state."""

    def bind(self, setting: Setting) -> Shortcut:
        """Return a shortcut for one model; this one stays as it is and can serve others.

        Raises:
            PolicyError: the options or the weights do not fit the model.
        """
        return self

    @property
    def low_rank(self) -> LowRankMap | None:
        """The formula that `estimate` follows, if it is that of a low-rank map, once bound."""
        return None

    @abstractmethod
    def work(self, layer_idx: int) -> Work:
        """Return what `estimate` executes per token, once bound."""

    @abstractmethod
    def estimate(self, layer_idx: int, hidden_states: Tensor) -> Tensor:
        """Return what to add to the hidden states [..., D] of tokens that skip a layer, of the same shape."""

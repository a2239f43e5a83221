"""Layer policies: what decides when a layer is worth running."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal

from torch import Tensor

from anee_core.errors import PolicyError
from anee_core.interfaces.configurable import Configurable
from anee_core.interfaces.formulas import TIE, LinearGate
from anee_core.interfaces.setting import Setting


class Action(IntEnum):
    """What happens to one token at one layer."""

    PROCESS = 0
    """Run the layer."""
    SKIP = 1
    """Leave the hidden state as it is; the layer's cache still gets the token's keys and values."""
    EXIT = 2
    """SKIP this layer and all later ones, but for the protected ones."""


@dataclass(frozen=True)
class DecisionContext:
    """What a controller is told of the tokens that it decides on, beside their signals."""

    layer_idx: int
    """First layer that is decided on."""
    num_layers: int
    """Number of decoder layers."""
    position_ids: Tensor
    """[B, T] index of the tokens among the real tokens of their row, whatever positions the caller gave."""
    input_ids: Tensor | None
    """[B, T] ids of the tokens; None if embeddings were given."""
    phase: Literal["prefill", "decode"]
    """Whether the forward reads a prompt or decodes tokens."""
    budget: float | None
    """Share of the dense decoder-layer FLOPs that may be spent; None for no budget."""
    score: Tensor | None = None
    """[B, T] what the controller gave each token at this layer, if it compares tokens (see `Controller.compares`)."""
    lower: Tensor | None = None
    """[B, T] how many of the earlier tokens that a token is compared with have a lower score."""
    compared: Tensor | None = None
    """[B, T] how many earlier tokens it is compared with."""


class Controller(Configurable, ABC):
    """What decides when a layer is worth running."""

    signals: ClassVar[tuple[str, ...]] = ()
    """Signals it wants, in the order in which it gets them."""
    profiler: ClassVar[str] = "signals"
    """Name of the registered profiler that knows them; by default the standard one."""
    default_budget: ClassVar[float | None] = None
    """Budget if the caller names none; None for no budget."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `bind` needs a `Calibration` of the model."""
        return False

    @property
    def runs_all(self) -> bool:
        """Whether every layer runs for every token, so that the engine need not ask."""
        return False

    def bind(self, setting: Setting) -> Controller:
        """Return a controller for one model; this one stays as it is and can serve others.

        Raises:
            PolicyError, BudgetError: the options or the budget do not fit the model.
        """
        return self

    def protected(self, num_layers: int) -> frozenset[int]:
        """Return the layers that always run, whatever `decide` says."""
        return frozenset()

    @property
    def compares(self) -> int:
        """With how many earlier tokens of its sequence, at most, it compares a token at each layer; see `score`."""
        return 0

    def score(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return the number [B, T] by which tokens are compared at a layer; NaN for a token that none is compared with.
        None is compared with the tokens of a prompt that is read densely either.
        """
        raise NotImplementedError(f"{type(self).__name__} compares tokens, so it has to implement score")

    def tie(self, layer_idx: int) -> float:
        """Return by how much two scores at a layer may differ and still count as equal: sums depend on their order."""
        return 0.0 if self.linear is None else TIE * float(self.linear.spread[layer_idx])

    @property
    def linear(self) -> LinearGate | None:
        """The formula that `decide` follows, if it is that of a linear gate, once bound."""
        return None

    def shares(self, position_ids: Tensor) -> Tensor:
        """Return the share of tokens that is to skip each layer, [B, T, L], for tokens at positions [B, T].

        Only a controller that is `linear` has to say so.
        """
        raise NotImplementedError(f"{type(self).__name__} is no linear gate")

    @abstractmethod
    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions [N, B, T] (uint8) for the N >= 1 layers from ``context.layer_idx`` on.

        ``signals`` is [B, T, F]. N is the controller's choice: one that needs nothing from inside the pass decides all
        layers at once. A decision may use only the token's own path and earlier tokens.
        """


def protect_ends(protect: tuple[int, ...], num_layers: int) -> frozenset[int]:
    """Return the first ``protect[0]`` and the last ``protect[1]`` of ``num_layers`` layers."""
    if not isinstance(protect, tuple) or len(protect) != 2 or min(protect) < 0:
        raise PolicyError(f"protect takes two counts, first and last layers, like 'protect=2 2'; got {protect}")
    first, last = protect
    return frozenset(i for i in range(num_layers) if i < first or i >= num_layers - last)

"""The interfaces of ANEE: ModelAdapter, Profiler, Controller, CachePolicy and Shortcut.

Policies see tensors, never modules, so none of them can depend on a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from anee_core.accounting import CostModel, Work
from anee_core.adapter import LayerCall, ModelAdapter
from anee_core.checkpoint import CheckpointFormat
from anee_core.errors import PolicyError
from anee_core.layout import Layout, Parts
from anee_core.recipe import Recipe

__all__ = [
    "Action",
    "CachePolicy",
    "CacheView",
    "Calibration",
    "Controller",
    "DecisionContext",
    "LayerCall",
    "Layout",
    "ModelAdapter",
    "Observation",
    "Parts",
    "Profiler",
    "Recipe",
    "Setting",
    "Shortcut",
]


class Action(IntEnum):
    """What happens to one token at one layer."""

    PROCESS = 0
    """Run the layer."""
    SKIP = 1
    """Leave the hidden state as it is; the layer's cache still gets the token's keys and values."""
    EXIT = 2
    """SKIP this layer and all later ones, but for the protected ones."""


@dataclass(frozen=True)
class Calibration:
    """What was measured once on a model, for controllers to use.

    ``importance`` [L] is the rise in KL(dense || skipped), in nats per token, when one layer is skipped;
    ``confidence`` [Q] holds evenly spaced quantiles of the largest next-token probability.
    """

    importance: Tensor
    confidence: Tensor
    fingerprint: str
    source: str


@dataclass(frozen=True)
class Setting:
    """The model that a policy is about to serve: sizes, costs, budget and what calibration found.

    ``width`` is D, ``dtype`` and ``device`` are those of the model's weights. ``backbone`` is what the model's config
    says under ``anee_backbone``: the name of its very weights, for policies that were trained for them.
    """

    costs: CostModel
    budget: float | None = None
    hard: bool = False
    calibration: Calibration | None = None
    width: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    backbone: str | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.costs.num_layers


@dataclass(frozen=True)
class Observation:
    """What a profiler may look at in front of one layer.

    ``hidden_states`` and ``previous`` are [B, T, D]: the layer's input and the input of the layer before (the same
    tensor in front of the first). ``feedback`` [B, T, 3] holds entropy and largest probability of the distribution
    that each token was drawn from, and the share of dense FLOPs that its sequence has spent before it.
    ``seen`` [B, T] counts the tokens before it, ``spent`` [B, T] what the token itself has spent.
    """

    hidden_states: Tensor
    previous: Tensor
    layer_idx: int
    num_layers: int
    spent: Tensor
    seen: Tensor
    budget: float
    feedback: Tensor | None = None


class Profiler(ABC):
    """Measures the state of tokens."""

    names: ClassVar[tuple[str, ...]]
    """Signals this profiler knows."""
    feedback: ClassVar[frozenset[str]] = frozenset()
    """Signals that depend on the model's own output for earlier tokens."""

    @abstractmethod
    def observe(self, observation: Observation, names: tuple[str, ...]) -> Tensor:
        """Return the named signals [B, T, F], in that order, on the device of the hidden states."""


@dataclass(frozen=True)
class DecisionContext:
    """Where a decision is taken. ``position_ids`` and ``input_ids`` are [B, T].

    For a controller that compares tokens (`Controller.compares`): ``score`` [B, T] is what it gave each at this layer,
    ``lower`` how many of the earlier tokens in the sequence have a lower one, and ``compared`` how many those are.
    """

    layer_idx: int
    num_layers: int
    position_ids: Tensor
    input_ids: Tensor | None
    phase: Literal["prefill", "decode"]
    budget: float | None
    score: Tensor | None = None
    lower: Tensor | None = None
    compared: Tensor | None = None


class Configurable:
    """A dataclass whose fields are the options that a policy string can set."""

    positional: ClassVar[str | None] = None
    """The option whose name may be left out where it stands first."""
    checkpoint: ClassVar[CheckpointFormat | None] = None
    """For what is trained: what the folder named by its option ``folder`` holds. If the option is empty, `anee.load`
    takes the folder that an installed plugin has for the model."""

    @property
    def holds_weights(self) -> bool:
        """Whether it was made with trained weights in memory, so that it needs no folder."""
        return False

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Return the options a policy string may set."""
        return tuple(f.name for f in fields(cls) if f.init and not f.name.startswith("_"))  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """Return the options and their values."""
        return {name: getattr(self, name) for name in self.option_names()}


@dataclass(frozen=True)
class LinearGate:
    """A controller's `decide` as a formula, for steps that take all layers at once.

    A token's score at a layer is ``weight`` [L, D] times its hidden state at unit norm, plus ``bias`` [L]. Its rank is
    the share of the last ``window`` tokens with lower scores, where a normal distribution with ``mean`` [L] and
    ``spread`` [L] counts for ``prior`` further tokens. It skips the layer if its rank is below the share of tokens that
    are to skip it; a share below 0 says that it runs the layer and that no token is compared with it. All in fp32.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    spread: Tensor
    prior: float
    window: int


class Controller(Configurable, ABC):
    """Decides when a layer is worth running."""

    name: ClassVar[str]
    signals: ClassVar[tuple[str, ...]] = ()
    """Signals it wants, in the order in which it gets them."""
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

    @property
    def linear(self) -> LinearGate | None:
        """The formula that `decide` follows, if it is that of a linear gate, once bound."""
        return None

    def shares(self, position_ids: Tensor) -> Tensor:
        """Return the shares [B, T, L] of tokens like those at positions [B, T] that are to skip each layer, for a
        controller that is `linear`.
        """
        raise NotImplementedError(f"{type(self).__name__} is no linear gate")

    @abstractmethod
    def decide(self, signals: Tensor, context: DecisionContext) -> Tensor:
        """Return actions [N, B, T] (uint8) for the N >= 1 layers from ``context.layer_idx`` on.

        ``signals`` is [B, T, F]. N is the controller's choice: one that needs nothing from inside the pass decides all
        layers at once. A decision may use only the token's own path and earlier tokens.
        """


class Shortcut(Configurable, ABC):
    """Estimates what a skipped layer would have done to the hidden state, for little."""

    name: ClassVar[str]

    def bind(self, setting: Setting) -> Shortcut:
        """Return a shortcut for one model; this one stays as it is and can serve others.

        Raises:
            PolicyError: the options or the weights do not fit the model.
        """
        return self

    @abstractmethod
    def work(self, layer_idx: int) -> Work:
        """Return what `estimate` executes per token, once bound."""

    @abstractmethod
    def estimate(self, layer_idx: int, hidden_states: Tensor) -> Tensor:
        """Return what to add to the hidden states [..., D] of tokens that skip a layer, of the same shape."""


@dataclass(frozen=True)
class CacheView:
    """One layer's cache as a `CachePolicy` sees it: S slots in the order of their tokens, the T newest at the end.

    ``query_position`` [B, T] are the new tokens' positions, ``ran`` [B, T] says which of them run the layer and so
    attend, ``real`` [B, T] which are no padding. ``position_ids`` and ``valid`` are [B, S]. ``state`` is what was
    remembered of each slot, [B, S, ...].

    Only for a policy that wants them: ``states`` [B, T, D], what the layer's attention gets of the new tokens, normed;
    ``keys`` [B, H, S, Dh]; and ``attention`` [B, H, T, S], the logits before softmax: -inf where a new token cannot see
    a slot, whatever was dropped. Of tokens that do not run, they say nothing.
    """

    layer_idx: int
    position_ids: Tensor
    valid: Tensor
    query_position: Tensor
    ran: Tensor
    real: Tensor
    state: Mapping[str, Tensor]
    states: Tensor | None = None
    keys: Tensor | None = None
    attention: Tensor | None = None


Wants = frozenset[Literal["states", "keys", "attention"]]
"""Costly parts of a `CacheView`."""


@dataclass(frozen=True)
class LinearInteraction:
    """The formula of a cache policy whose tokens keep a slot j while ``query x . key x_j / sqrt(r) + bias > 0``, where
    x [D] is what a layer's attention gets of each; ``query`` and ``key`` are [L, r, D], ``bias`` is [L].

    What is dropped is hidden from the token's own attention, and a token that skips the layer drops nothing. ``state``
    is the name under which ``key x_j`` is remembered. A step that knows the formula can decide by itself, for one new
    token in each row.
    """

    query: Tensor
    key: Tensor
    bias: Tensor
    state: str


class CachePolicy(Configurable, ABC):
    """Decides which cached tokens a layer keeps.

    Tokens are taken in order: each attends to what is held, then the layer drops what the policy no longer wants. What
    was dropped once stays dropped.
    """

    name: ClassVar[str]
    wants: ClassVar[Wants] = frozenset()
    """Which of them it needs."""
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
        """Whether all layers keep the same tokens, by their positions alone; nothing is remembered then, and one
        decision serves all layers.
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


def protect_ends(protect: tuple[int, ...], num_layers: int) -> frozenset[int]:
    """Return the first ``protect[0]`` and the last ``protect[1]`` of ``num_layers`` layers."""
    if len(protect) != 2 or min(protect) < 0:
        raise PolicyError(f"protect takes two counts, first and last layers, like 'protect=2 2'; got {protect}")
    first, last = protect
    return frozenset(i for i in range(num_layers) if i < first or i >= num_layers - last)

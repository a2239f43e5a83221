"""Options of trainings: what is trained, and how. It imports nothing heavy, so that a command line can read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from anee_core.errors import InputError
from anee_core.ranges import (
    Count,
    CountOrNone,
    Length,
    Number,
    PartialShare,
    Positive,
    Share,
    Size,
    Weight,
    Within,
    check_numbers,
)
from anee_core.training.schedules import parse_schedule

Backbone = Literal["frozen", "lora", "full"]

MOST = 0.95
"""Largest budget with shares of its own: under one of 1 nothing is skipped, whatever the score."""


@dataclass(frozen=True)
class AsaOptions:
    """What is trained for adaptively sparse attention, and how."""

    backbone: Backbone = "frozen"
    """What of the model is trained beside the interactions: nothing ("frozen"), low-rank updates of its linears
    ("lora"), or everything ("full").
    """
    gamma: Weight = 0.3
    """Weight of the mean share of context that is kept."""
    target: PartialShare | None = None
    """Share of the context to drop; gamma then adapts until it is met."""
    rank: Size = 64
    """Width of the interaction projections."""
    alpha: str | None = None
    """Schedule of the sparse sigmoid's sharpness; see `parse_schedule`. None: from 2 to 8 over four fifths of the run.
    """
    beta: Number | None = None
    """Bias of the interactions at the start. None: where nothing is dropped at the first alpha."""
    start: str | None = None
    """Folder with weights to start from, trained before for the same model."""
    distil: bool | None = None
    """Whether to learn from the dense model instead of the text; if the whole model is trained, it learns from the
    text as a dense one too, and serves both. None: unless the whole model is trained.
    """
    length: Length = 512
    """Tokens per block."""
    batch: Size = 4
    """Blocks per batch."""
    rate: Positive = 1e-3
    """Learning rate of the interactions."""
    backbone_rate: Positive = 1e-4
    """Learning rate of the model's own weights."""
    warmup: CountOrNone = 20
    """Steps until the learning rates are reached."""
    lora_rank: Size = 16
    """Rank of the low-rank updates."""
    valid_blocks: Size = 8
    """Blocks to validate on."""

    def __post_init__(self) -> None:
        if self.backbone not in get_args(Backbone):
            raise InputError(f"backbone is {', '.join(get_args(Backbone))}; got '{self.backbone}'")
        check_numbers(self)
        if self.alpha is not None:
            parse_schedule(self.alpha)


@dataclass(frozen=True)
class GateOptions:
    """How a gate is trained."""

    least: Annotated[float, Within(0, MOST, False, True, True)] = 0.5
    """Smallest budget that is trained for; each sequence draws its own from there to 0.95."""
    knots: Annotated[int, Within(2, 1024)] = 6
    """Budgets with shares of their own; between them shares are interpolated."""
    temperature: Positive = 0.5
    """Temperature of the sigmoid that stands in for the step in the backward pass, in standard deviations."""
    noise: Weight = 0.3
    """Scale of the Gumbel noise on the scores."""
    pressure: Positive = 0.5
    """How fast the price of spending rises while a budget is exceeded, per step."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class GateTraining:
    """What is trained, and on what."""

    gate: GateOptions = field(default_factory=GateOptions)
    """How the gate is trained."""
    rank: Size = 128
    """Width of the shortcuts."""
    length: Length = 256
    """Tokens per block."""
    batch: Size = 4
    """Blocks per batch."""
    rate: Positive = 1.0
    """Factor on the learning rates."""
    warmup: CountOrNone = 10
    """Steps until the learning rates are reached."""
    valid_blocks: Size = 8
    """Blocks to validate on."""
    calibration_sequences: Size = 32
    """Pieces of text for the fit that the training starts from."""
    start: str | None = None
    """Folder with a gate and shortcuts for the same model to start from, instead of a fit."""
    protect: tuple[CountOrNone, CountOrNone] = (1, 2)
    """How many first and last layers always run."""
    first: CountOrNone = 4
    """How many first tokens of a sequence run every layer."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.length <= self.first:
            raise InputError(f"length is above first ({self.first}); got {self.length}")


@dataclass(frozen=True)
class ReinforceOptions:
    """How decisions are drawn and rewarded."""

    rollouts: Annotated[int, Within(2, 1024)] = 4
    """Rollouts that are drawn for each text; the others are a rollout's baseline."""
    temperature: Positive = 0.1
    """Temperature of the decisions, in standard deviations of the scores: the lower, the fewer are left to chance."""
    near_dense: Weight = 0.1
    """Divergence, in nats, under which spending less than the budget is rewarded."""
    entropy: Weight = 1e-3
    """Weight of the decisions' entropy at the start; it falls to zero over the run."""
    hard: Share = 0.5
    """Share of the texts under a hard budget, which no token exceeds."""
    steps: Count = 100
    """Optimiser steps."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class RlTraining:
    """Both stages of a training of the policy "rl"."""

    supervised: GateTraining = field(default_factory=GateTraining)
    """The first stage; its text, lengths and batches are those of the second too."""
    reinforce: ReinforceOptions = field(default_factory=ReinforceOptions)
    """The second stage."""
    steps: Count = 100
    """Steps of REINFORCE; the first stage has those of the run."""
    rate: Positive = 0.3
    """Factor on the learning rates of the second stage."""
    samples: CountOrNone = 32
    """Texts that the model writes under the policy of the first stage, for the second to read as well."""

    def __post_init__(self) -> None:
        check_numbers(self)

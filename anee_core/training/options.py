"""Options of trainings: what is trained, and how. It imports nothing heavy, so that a command line can read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from anee_core.errors import InputError
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
    gamma: float = 0.3
    """Weight of the mean share of context that is kept."""
    target: float | None = None
    """Share of the context to drop; gamma then adapts until it is met."""
    rank: int = 64
    """Width of the interaction projections."""
    alpha: str | None = None
    """Schedule of the sparse sigmoid's sharpness; see `parse_schedule`. None: from 2 to 8 over four fifths of the run.
    """
    beta: float | None = None
    """Bias of the interactions at the start. None: where nothing is dropped at the first alpha."""
    start: str | None = None
    """Folder with weights to start from, trained before for the same model."""
    distil: bool | None = None
    """Whether to learn from the dense model instead of the text; if the whole model is trained, it learns from the
    text as a dense one too, and serves both. None: unless the whole model is trained.
    """
    length: int = 512
    """Tokens per block."""
    batch: int = 4
    """Blocks per batch."""
    rate: float = 1e-3
    """Learning rate of the interactions."""
    backbone_rate: float = 1e-4
    """Learning rate of the model's own weights."""
    warmup: int = 20
    """Steps until the learning rates are reached."""
    lora_rank: int = 16
    """Rank of the low-rank updates."""
    valid_blocks: int = 8
    """Blocks to validate on."""

    def __post_init__(self) -> None:
        if self.backbone not in get_args(Backbone):
            raise InputError(f"backbone is {', '.join(get_args(Backbone))}; got '{self.backbone}'")
        if self.gamma < 0 or (self.target is not None and not 0 < self.target < 1):
            raise InputError(f"gamma is at least 0 and target lies in (0, 1); got {self.gamma:g} and {self.target}")
        if min(self.rank, self.batch, self.lora_rank, self.valid_blocks) < 1 or self.length < 2:
            raise InputError("rank, batch, lora_rank and valid_blocks are at least 1, length at least 2")
        if min(self.rate, self.backbone_rate) <= 0 or self.warmup < 0:
            raise InputError(
                f"rate and backbone_rate are above 0, warmup at least 0; got {self.rate:g}, {self.backbone_rate:g} and "
                f"{self.warmup}"
            )
        if self.alpha is not None:
            parse_schedule(self.alpha)


@dataclass(frozen=True)
class GateOptions:
    """How a gate is trained."""

    least: float = 0.5
    """Smallest budget that is trained for; each sequence draws its own from there to 0.95."""
    knots: int = 6
    """Budgets with shares of their own; between them shares are interpolated."""
    temperature: float = 0.5
    """Temperature of the sigmoid that stands in for the step in the backward pass, in standard deviations."""
    noise: float = 0.3
    """Scale of the Gumbel noise on the scores."""
    pressure: float = 0.5
    """How fast the price of spending rises while a budget is exceeded, per step."""

    def __post_init__(self) -> None:
        if not 0 < self.least < MOST or self.knots < 2:
            raise InputError(
                f"least lies in (0, {MOST:g}) and knots are at least 2; got {self.least:g} and {self.knots}"
            )
        if self.temperature <= 0 or self.noise < 0 or self.pressure <= 0:
            raise InputError("temperature and pressure are above 0, noise at least 0")


@dataclass(frozen=True)
class GateTraining:
    """What is trained, and on what."""

    gate: GateOptions = field(default_factory=GateOptions)
    """How the gate is trained."""
    rank: int = 128
    """Width of the shortcuts."""
    length: int = 256
    """Tokens per block."""
    batch: int = 4
    """Blocks per batch."""
    rate: float = 1.0
    """Factor on the learning rates."""
    warmup: int = 10
    """Steps until the learning rates are reached."""
    valid_blocks: int = 8
    """Blocks to validate on."""
    calibration_sequences: int = 32
    """Pieces of text for the fit that the training starts from."""
    start: str | None = None
    """Folder with a gate and shortcuts for the same model to start from, instead of a fit."""
    protect: tuple[int, int] = (1, 2)
    """How many first and last layers always run."""
    first: int = 4
    """How many first tokens of a sequence run every layer."""

    def __post_init__(self) -> None:
        if min(self.rank, self.batch, self.valid_blocks, self.calibration_sequences) < 1 or self.length <= self.first:
            raise InputError(f"rank, batch and blocks are at least 1, and length is above first ({self.first})")
        if self.rate <= 0 or self.warmup < 0:
            raise InputError(f"rate is above 0, warmup at least 0; got {self.rate:g} and {self.warmup}")


@dataclass(frozen=True)
class ReinforceOptions:
    """How decisions are drawn and rewarded."""

    rollouts: int = 4
    """Rollouts that are drawn for each text; the others are a rollout's baseline."""
    temperature: float = 0.1
    """Temperature of the decisions, in standard deviations of the scores: the lower, the fewer are left to chance."""
    near_dense: float = 0.1
    """Divergence, in nats, under which spending less than the budget is rewarded."""
    entropy: float = 1e-3
    """Weight of the decisions' entropy at the start; it falls to zero over the run."""
    hard: float = 0.5
    """Share of the texts under a hard budget, which no token exceeds."""
    steps: int = 100
    """Optimiser steps."""

    def __post_init__(self) -> None:
        if self.rollouts < 2 or self.steps < 1:
            raise InputError(f"rollouts are at least 2, steps at least 1; got {self.rollouts} and {self.steps}")
        if self.temperature <= 0 or self.entropy < 0 or self.near_dense < 0:
            raise InputError("temperature is above 0, entropy and near_dense at least 0")
        if not 0 <= self.hard <= 1:
            raise InputError(f"hard is a share of the texts, in [0, 1]; got {self.hard:g}")


@dataclass(frozen=True)
class RlTraining:
    """Both stages of a training of the policy "rl"."""

    supervised: GateTraining = field(default_factory=GateTraining)
    """The first stage; its text, lengths and batches are those of the second too."""
    reinforce: ReinforceOptions = field(default_factory=ReinforceOptions)
    """The second stage."""
    steps: int = 100
    """Steps of REINFORCE; the first stage has those of the run."""
    rate: float = 0.3
    """Factor on the learning rates of the second stage."""
    samples: int = 32
    """Texts that the model writes under the policy of the first stage, for the second to read as well."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 0 or self.rate <= 0:
            raise InputError("steps of REINFORCE are at least 1, samples at least 0, and rate is above 0")

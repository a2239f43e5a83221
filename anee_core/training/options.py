"""What is trained, and how. Imports nothing heavy, so that a command line can read it."""

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
    """What is trained, and how.

    Args:
        backbone: what of the model is trained beside the interactions: nothing ("frozen"), low-rank updates of its
            linears ("lora"), or everything ("full").
        gamma: weight of the mean share of context that is kept.
        target: share of the context to drop; gamma then adapts until it is met.
        rank: width of the interaction projections.
        alpha: schedule of the sparse sigmoid's sharpness; see `parse_schedule`. None: from 2 to 8 over four fifths of
            the run.
        beta: bias of the interactions at the start. None: where nothing is dropped at the first alpha.
        start: folder with weights to start from, trained before for the same model.
        distil: whether to learn from the dense model instead of the text; if the whole model is trained, it learns from
            the text as a dense one too, and serves both. None: unless the whole model is trained.
        length: tokens per block.
        batch: blocks per batch.
        rate: learning rate of the interactions.
        backbone_rate: learning rate of the model's own weights.
        warmup: steps until the learning rates are reached.
        lora_rank: rank of the low-rank updates.
        valid_blocks: blocks to validate on.
    """

    backbone: Backbone = "frozen"
    gamma: float = 0.3
    target: float | None = None
    rank: int = 64
    alpha: str | None = None
    beta: float | None = None
    start: str | None = None
    distil: bool | None = None
    length: int = 512
    batch: int = 4
    rate: float = 1e-3
    backbone_rate: float = 1e-4
    warmup: int = 20
    lora_rank: int = 16
    valid_blocks: int = 8

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
    """How a gate is trained.

    Args:
        least: smallest budget that is trained for; each sequence draws its own from there to 0.95.
        knots: budgets with shares of their own; between them shares are interpolated.
        temperature: of the sigmoid that stands in for the step in the backward pass, in standard deviations.
        noise: scale of the Gumbel noise on the scores.
        pressure: how fast the price of spending rises while a budget is exceeded, per step.
    """

    least: float = 0.5
    knots: int = 6
    temperature: float = 0.5
    noise: float = 0.3
    pressure: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.least < MOST or self.knots < 2:
            raise InputError(
                f"least lies in (0, {MOST:g}) and knots are at least 2; got {self.least:g} and {self.knots}"
            )
        if self.temperature <= 0 or self.noise < 0 or self.pressure <= 0:
            raise InputError("temperature and pressure are above 0, noise at least 0")


@dataclass(frozen=True)
class GateTraining:
    """What is trained, and on what.

    Args:
        gate: how the gate is trained.
        rank: width of the shortcuts.
        length: tokens per block.
        batch: blocks per batch.
        rate: factor on the learning rates.
        warmup: steps until the learning rates are reached.
        valid_blocks: blocks to validate on.
        calibration_sequences: pieces of text for the fit that the training starts from.
        start: folder with a gate and shortcuts for the same model to start from, instead of a fit.
        protect: how many first and last layers always run.
        first: how many first tokens of a sequence run every layer.
    """

    gate: GateOptions = field(default_factory=GateOptions)
    rank: int = 128
    length: int = 256
    batch: int = 4
    rate: float = 1.0
    warmup: int = 10
    valid_blocks: int = 8
    calibration_sequences: int = 32
    start: str | None = None
    protect: tuple[int, int] = (1, 2)
    first: int = 4

    def __post_init__(self) -> None:
        if min(self.rank, self.batch, self.valid_blocks, self.calibration_sequences) < 1 or self.length <= self.first:
            raise InputError(f"rank, batch and blocks are at least 1, and length is above first ({self.first})")
        if self.rate <= 0 or self.warmup < 0:
            raise InputError(f"rate is above 0, warmup at least 0; got {self.rate:g} and {self.warmup}")


@dataclass(frozen=True)
class ReinforceOptions:
    """How decisions are drawn and rewarded.

    Args:
        rollouts: how many are drawn for each text; the others are a rollout's baseline.
        temperature: of the decisions, in standard deviations of the scores: the lower, the fewer are left to chance.
        near_dense: divergence, in nats, under which spending less than the budget is rewarded.
        entropy: weight of the decisions' entropy at the start; it falls to zero over the run.
        hard: share of the texts under a hard budget, which no token exceeds.
        steps: optimiser steps.
    """

    rollouts: int = 4
    temperature: float = 0.1
    near_dense: float = 0.1
    entropy: float = 1e-3
    hard: float = 0.5
    steps: int = 100

    def __post_init__(self) -> None:
        if self.rollouts < 2 or self.steps < 1:
            raise InputError(f"rollouts are at least 2, steps at least 1; got {self.rollouts} and {self.steps}")
        if self.temperature <= 0 or self.entropy < 0 or self.near_dense < 0:
            raise InputError("temperature is above 0, entropy and near_dense at least 0")
        if not 0 <= self.hard <= 1:
            raise InputError(f"hard is a share of the texts, in [0, 1]; got {self.hard:g}")


@dataclass(frozen=True)
class RlTraining:
    """Both stages.

    Args:
        supervised: the first; its text, lengths and batches are those of the second too.
        reinforce: the second.
        steps: of REINFORCE; the first stage has those of the run.
        rate: factor on the learning rates of the second.
        samples: texts that the model writes under the policy of the first stage, for the second to read as well.
    """

    supervised: GateTraining = field(default_factory=GateTraining)
    reinforce: ReinforceOptions = field(default_factory=ReinforceOptions)
    steps: int = 100
    rate: float = 0.3
    samples: int = 32

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 0 or self.rate <= 0:
            raise InputError("steps of REINFORCE are at least 1, samples at least 0, and rate is above 0")

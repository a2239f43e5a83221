"""A model, a policy and a way to run layers, bound to each other: what every forward works with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from anee_core.accounting.budget import Budget, check_budget
from anee_core.accounting.costs import CostModel
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter, cost_model
from anee_core.errors import BudgetError
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.interfaces.profiler import Profiler
from anee_core.interfaces.setting import Calibration, Setting
from anee_core.policy.policy import Policy, budget_of
from anee_core.ranges import check_flags, check_kind
from anee_core.steps.layer_step import LayerStep
from anee_core.steps.reference import ReferenceStep, devices_of


@dataclass(frozen=True)
class Terms:
    """On what terms a policy runs a model."""

    budget: float | None = None
    """Share of the dense decoder-layer FLOPs that may be spent, in (0, 1]; None for the policy's default."""
    hard: bool = False
    """Whether no token may exceed the budget; otherwise it holds on average."""
    calibration: Calibration | None = None
    """What the controller needs to know of the model, if anything."""

    def __post_init__(self) -> None:
        check_flags(hard=self.hard)
        if self.budget is not None:
            check_budget(self.budget)
        if self.calibration is not None:
            check_kind(
                "calibration", self.calibration, Calibration, "a Calibration; anee.load also takes options for one"
            )


@dataclass(frozen=True)
class Bound:
    """What every forward of an engine works with."""

    adapter: ModelAdapter
    """Adapter of the model's family."""
    parts: Parts
    """The model's modules."""
    policy: Policy
    """Policy, bound to this very model."""
    budget: Budget
    """Limit on what a token may spend, for this very model."""
    step: LayerStep
    """Way in which layers are run."""
    reference: ReferenceStep
    """Step that calls the model's own modules."""
    devices: tuple[torch.device, ...]
    """Device of each layer."""
    windows: tuple[int | None, ...]
    """How many positions back each layer sees, itself included; None for all."""

    @property
    def costs(self) -> CostModel:
        """What the model's parts cost, shortcuts included."""
        return self.budget.costs

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.costs.num_layers


def bind(
    adapter: ModelAdapter,
    parts: Parts,
    policy: Policy,
    terms: Terms,
    step: LayerStep | None = None,
    costs: CostModel | None = None,
) -> Bound:
    """Bind a policy's parts to a model.

    Args:
        adapter: knows the model's family.
        parts: the model's modules.
        policy: what decides.
        terms: the budget, and what calibration found.
        step: how layers are run; None for the model's own modules.
        costs: what the model's parts cost, if that is known already.

    Raises:
        PolicyError, BudgetError: policy, budget and model do not fit together.
    """
    check_kind("controller", policy.controller, Controller, "a Controller")
    check_kind("cache_policy", policy.cache_policy, CachePolicy, "a CachePolicy")
    check_kind("profiler", policy.profiler, Profiler, "a Profiler")
    costs = replace(costs or cost_model(adapter, parts), shortcut=())
    limit = budget_of(policy, terms.budget)
    if policy.controller.runs_all and limit is not None and limit < 1.0:
        raise BudgetError(
            f"policy '{policy}' runs every layer, so it cannot keep a budget of {limit:g}; "
            "choose one that skips layers, or leave the budget out"
        )
    hard = terms.hard or policy.hard
    setting = Setting(
        costs,
        limit,
        hard,
        terms.calibration or policy.calibration,
        width=parts.config.hidden_size,
        dtype=parts.model.dtype,
        device=parts.embedding.weight.device,
        backbone=getattr(parts.config, "anee_backbone", None),
    )
    shortcut = None if policy.shortcut is None else policy.shortcut.bind(setting)
    if shortcut is not None:
        costs = replace(costs, shortcut=tuple(shortcut.work(i) for i in range(costs.num_layers)))
        setting = replace(setting, costs=costs)
    budget = Budget(costs, policy.controller.protected(costs.num_layers), limit, hard)
    controller, cache_policy = policy.controller.bind(setting), policy.cache_policy.bind(setting)
    reference = ReferenceStep(adapter, parts)
    return Bound(
        adapter=adapter,
        parts=parts,
        policy=replace(
            policy,
            controller=controller,
            cache_policy=cache_policy,
            shortcut=shortcut,
            calibration=setting.calibration,
            budget=limit,
            hard=hard,
        ),
        budget=budget,
        step=step or reference,
        reference=reference,
        devices=devices_of(parts),
        windows=tuple(adapter.window(parts.config, i) for i in range(costs.num_layers)),
    )

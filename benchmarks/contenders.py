"""The policies that skip layers which results hold side by side: ours, and the literature's ways of doing so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from baselines import block_influence, early_exits, without_least_influential

import anee
from anee_core.calibration import CalibrationOptions, calibrate
from anee_core.evaluation import text_blocks
from anee_core.model import AdaptiveModel

NAMES = (
    "rl",
    "gate only",
    "best set",
    "best set + shortcuts",
    "random",
    "random + shortcuts",
    "block influence",
    "early exit",
)
_PROTECT = "protect=2 2"


def contenders(
    model: AdaptiveModel,
    text: str,
    budgets: Sequence[float],
    *,
    length: int = 512,
    blocks: int = 4,
    gate: str | None = None,
    shortcuts: str | None = None,
    hard: bool = False,
) -> dict[str, Callable[[float], AdaptiveModel]]:
    """Return what makes each contender's model for one of ``budgets``, by its name. Nothing is worked out before.

    Args:
        model: the dense one.
        text: file that layer sets and thresholds are found on.
        budgets: all that will be asked for.
        length: tokens of its blocks, for block influence and early exit.
        blocks: how many of them.
        gate: folder with a gate and shortcuts, in place of the policy "rl".
        shortcuts: folder with shortcuts for the others, in place of the model's own.
        hard: no token exceeds the budget, under policies that take one.
    """
    calibration = cache(lambda: calibrate(model, CalibrationOptions(text=Path(text))))
    calibrating = cache(lambda: text_blocks(model, text, length, blocks))
    influence = cache(lambda: block_influence(model, calibrating()))
    exits = cache(lambda: early_exits(model, calibrating(), list(budgets)))
    gated = f":{gate}" if gate else ""
    shortcut = f"+shortcuts:{shortcuts}" if shortcuts else "+shortcuts"

    def named(policy: str) -> Callable[[float], AdaptiveModel]:
        return lambda budget: anee.load(
            model.model, policy, budget, tokenizer=model.tokenizer, calibration=calibration(), hard=hard
        )

    def without(budget: float) -> AdaptiveModel:
        policy = without_least_influential(model, influence(), budget)
        return anee.load(model.model, policy, tokenizer=model.tokenizer)

    policies = {
        "rl": f"gate{gated}+shortcuts{gated}" if gate else "rl",
        "gate only": f"gate{gated}",
        "best set": f"static:{_PROTECT}",
        "best set + shortcuts": f"static:{_PROTECT}{shortcut}",
        "random": f"random:{_PROTECT}",
        "random + shortcuts": f"random:{_PROTECT}{shortcut}",
    }
    return {name: named(policy) for name, policy in policies.items()} | {
        "block influence": without,
        "early exit": lambda budget: anee.load(model.model, exits()[budget], tokenizer=model.tokenizer),
    }

"""A training run of a gate: from a model and text files to a folder with a gate and shortcuts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anee_core.calibration.early_scores import expecting_early_scores
from anee_core.calibration.gate import calibrate_gate
from anee_core.calibration.options import FitOptions, GateCalibration
from anee_core.calibration.shares import from_trained
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.display import progress_bar
from anee_core.engine.engine import Engine
from anee_core.errors import InputError
from anee_core.evaluation.text_quality import text_quality
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.policy.policy import Policy
from anee_core.policy.shortcuts import LowRankShortcut, ShortcutWeights
from anee_core.training.data import Batches, read_text
from anee_core.training.gate import GatedModel
from anee_core.training.loop import accelerator_of, run_training
from anee_core.training.options import GateTraining
from anee_core.training.run_options import RunOptions
from anee_core.training.schedules import trapezoid

logger = logging.getLogger(__name__)

_RATES = {"down": 2e-4, "up": 2e-4, "shortcut_bias": 2e-4, "weight": 1e-3, "bias": 1e-2, "thresholds": 1e-2}
_LONG = 512
"""Tokens of the texts on which spending is measured: scores drift for longer than blocks for training are."""
_CORRECTIONS = 2
"""How often the shares are moved by what was spent beside the budget: the first time is nearly enough."""


def train_gate(
    model: AdaptiveModel,
    text: Sequence[str | Path],
    run: RunOptions,
    options: GateTraining | None = None,
    valid: str | Path | None = None,
) -> list[dict[str, float]]:
    """Train a gate and shortcuts for a model, and return the figures of every validation.

    ``run.folder`` gets what ``policy="gate:FOLDER+shortcuts:FOLDER"`` loads, the closed-form fit that the training
    starts from (in ``start``), and the checkpoints of the run; a run found there is continued.

    Args:
        model: with a tokenizer; it stays as it is.
        text: files to learn from.
        run: how the run goes.
        options: what is trained.
        valid: file to validate on. Default: the first blocks of the training text, which are then left out of training.

    Raises:
        InputError: too little text, or options out of range.
        CheckpointError: the folder holds another run.
        MissingPackageError: datasets is not installed.
    """
    options = options or GateTraining()
    accelerator = accelerator_of(run)
    with accelerator.main_process_first():
        cache = run.folder / "tokens"
        blocks, held_out = read_text(model, text, valid, cache, options.length, options.valid_blocks)
        start = start_of(model, blocks, run, options)
    objective = gated_model(model, start, options, held_out).to(accelerator.device)
    batches = Batches(blocks, options.batch, run.seed, accelerator.process_index, accelerator.num_processes)
    optimizer = optimizer_of(objective, options.rate)
    rate = trapezoid(run.steps, options.warmup, decay=max(run.steps // 2, 1))
    history = run_training(objective, [optimizer], rate, batches, run, accelerator, asdict(options))
    if accelerator.is_main_process:
        before = dict(GateWeights.load(start).facts)
        write(objective, options, run, {"valid": history[-1] if history else {}, "start": before})
    return history


def start_of(model: AdaptiveModel, blocks: Any, run: RunOptions, options: GateTraining) -> Path:
    """Return the folder that a training starts from: the one asked for, or that of a closed-form fit.

    The fit is made if it is not there, on some of the blocks of all texts.
    """
    if options.start is not None:
        return Path(options.start)
    start = run.folder / "start"
    if not (start / "gate.json").exists():
        fit = FitOptions(rank=options.rank, seed=run.seed)
        sequences = min(options.calibration_sequences, len(blocks))
        tokens = Batches(blocks, sequences, run.seed).batch(0)
        calibration = GateCalibration(None, sequences, options.length, fit=fit, progress=run.progress)
        calibrate_gate(model, start, calibration, tokens)
    return start


def gated_model(model: AdaptiveModel, folder: Path, options: GateTraining, held_out: Tensor) -> GatedModel:
    """Return a model with the gate and shortcuts of a folder, ready to be trained; the model itself is frozen.

    Raises:
        InputError: they are of another shape.
    """
    gate, shortcuts = GateWeights.load(folder), ShortcutWeights.load(folder)
    layers, width = len(model.parts.layers), model.config.hidden_size
    if gate.weight.shape != (layers, width) or shortcuts.down.shape != (layers, options.rank, width):
        raise InputError(
            f"{folder} has a gate of {list(gate.weight.shape)} and shortcuts of {list(shortcuts.down.shape)}, this "
            f"training needs {[layers, width]} and {[layers, options.rank, width]}; choose their rank, and the model "
            "that they are of"
        )
    for parameter in model.parts.model.parameters():
        parameter.requires_grad_(False)
    least = max(options.gate.least, float(gate.budgets[0]))
    costs = Engine(model.adapter, model.parts, Policy(shortcut=LowRankShortcut.of(shortcuts))).costs
    controller, chosen = _controller(options), replace(options.gate, least=least)
    return GatedModel(model.adapter, model.parts, costs, gate, shortcuts, controller, chosen, held_out)


def optimizer_of(objective: GatedModel, factor: float) -> torch.optim.Optimizer:
    """Return an optimiser of what is trained of a gate and shortcuts; ``factor`` scales the learning rates."""
    parts = ((getattr(objective, name), rate * factor) for name, rate in _RATES.items())
    groups = [{"params": [part], "lr": rate} for part, rate in parts if part.requires_grad]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def write(objective: GatedModel, options: GateTraining, run: RunOptions, facts: dict[str, Any]) -> None:
    """Save what was trained in the run's folder, with shares that meet every budget on the held-out blocks.

    Shortcuts are saved in bf16, which halves the folder.
    """
    gate, shortcuts = objective.fitted()
    facts = {"steps": run.steps, **facts}
    small = {n: getattr(shortcuts, n).to(torch.bfloat16) for n in ("down", "up", "bias")}
    replace(shortcuts, facts=facts, **small).save(run.folder)
    cpu = replace(gate, facts=facts, **{n: getattr(gate, n).cpu() for n in ("mean", "spread", "budgets", "shares")})
    costs, controller = objective.costs, _controller(options)
    protected = controller.protected(costs.num_layers)
    from_trained(cpu, costs, protected).save(run.folder)
    if objective.held_out is not None:
        model = AdaptiveModel(objective.parts.model, objective.adapter)
        cpu = expecting_early_scores(cpu, model, deployed(run.folder, options), objective.held_out)
        budgets = objective.budgets.cpu().numpy()
        places, beyond = np.append(budgets, 1.0), np.zeros(len(budgets) + 1)
        for _ in range(_CORRECTIONS):
            beyond[:-1] += spending(objective, run.folder, options, run.progress) - budgets
            from_trained(cpu, costs, protected, lambda b: float(np.interp(b, places, beyond))).save(run.folder)
    logger.info("wrote %s", run.folder)


def spending(objective: GatedModel, folder: Path, options: GateTraining, progress: bool = False) -> np.ndarray:
    """Return what a folder's gate and shortcuts spend on the held-out blocks under the trained budgets, [Q].

    They run as deployed.
    """
    assert objective.held_out is not None
    policy, budgets = deployed(folder, options), objective.budgets.tolist()
    model = AdaptiveModel(objective.parts.model, objective.adapter)
    limit = model.adapter.max_positions(model.config) or _LONG
    blocks, found = _joined(objective.held_out, min(limit, _LONG)), []
    with progress_bar(progress) as bar:
        task = bar.add_task("what budgets spend", total=len(budgets) * len(blocks))
        for budget in budgets:
            quality = text_quality(model.set_policy(policy, budget), blocks, advance=lambda: bar.advance(task))
            found.append(quality.spent)
    logger.info("spent: %s", ", ".join(f"{s:.3f} of {b:.3f}" for s, b in zip(found, budgets, strict=True)))
    return np.array(found)


def _joined(blocks: Tensor, longest: int) -> Tensor:
    """Return blocks [N, T] that follow each other in a text as fewer ones, of up to ``longest`` tokens."""
    count, length = blocks.shape
    together = max(min(longest // length, count), 1)
    return blocks[: count - count % together].reshape(-1, together * length)


def deployed(folder: Path, options: GateTraining) -> Policy:
    """Return the policy that a run's folder holds, with the tokens and layers protected that were in training."""
    controller = GateController(str(folder), protect=options.protect, first=options.first)
    return Policy(controller, shortcut=LowRankShortcut(str(folder)))


def _controller(options: GateTraining) -> GateController:
    """Return a controller with the tokens and layers protected that always run."""
    return GateController(protect=options.protect, first=options.first)

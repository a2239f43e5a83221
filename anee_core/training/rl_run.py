"""A training run of the policy "rl": a gate trained against the dense model, then REINFORCE, kept where it wins."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anee_core.calibration.samples import own_samples
from anee_core.display import progress_bar
from anee_core.evaluation.text_quality import dense_logits, text_quality
from anee_core.files import write_whole
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.training.data import Batches, read_text
from anee_core.training.gate_run import deployed, gated_model, optimizer_of, train_gate, write
from anee_core.training.loop import accelerator_of, run_training
from anee_core.training.options import MOST, GateTraining, RlTraining
from anee_core.training.reinforce import Reinforce
from anee_core.training.run_options import RunOptions
from anee_core.training.schedules import trapezoid

logger = logging.getLogger(__name__)

_FILES = ("gate.json", "gate.safetensors", "shortcuts.json", "shortcuts.safetensors")
_SAMPLES, _STAGES = "samples.safetensors", "stages.json"


def train_rl(
    model: AdaptiveModel,
    text: Sequence[str | Path],
    run: RunOptions,
    options: RlTraining | None = None,
    valid: str | Path | None = None,
) -> dict[str, dict[float, float]]:
    """Train both stages; return how far each is from the dense model on held-out text, by budget.

    The stages are kept in ``supervised`` and ``reinforce`` inside ``run.folder``, which itself gets the better one, and
    what is returned in ``stages.json``. A run found there is continued.

    Args:
        model: with a tokenizer; it stays as it is.
        text: files to learn from.
        run: how the run goes.
        options: what is trained.
        valid: file to validate on. Default: the first blocks of the training text, which are then left out of training.

    Raises:
        InputError, CheckpointError, MissingPackageError: see `train_gate`.
    """
    options = options or RlTraining()
    shared = options.supervised
    first = replace(run, folder=run.folder / "supervised")
    second = replace(run, folder=run.folder / "reinforce", steps=options.steps)
    train_gate(model, text, first, shared, valid)
    accelerator = accelerator_of(second)
    with accelerator.main_process_first():
        cache = first.folder / "tokens"
        blocks, held_out = read_text(model, text, valid, cache, shared.length, shared.valid_blocks)
        gated = gated_model(model, first.folder, shared, held_out)
        blocks = with_samples(model, blocks, first.folder, gated.options.least, second, options)
    objective = Reinforce(gated, replace(options.reinforce, steps=options.steps)).to(accelerator.device)
    optimizer = optimizer_of(gated, options.rate)
    batches = Batches(blocks, shared.batch, run.seed + 1, accelerator.process_index, accelerator.num_processes)
    rate = trapezoid(options.steps, shared.warmup, decay=max(options.steps // 2, 1))
    run_training(objective, [optimizer], rate, batches, second, accelerator, asdict(options))
    found: dict[str, dict[float, float]] = {}
    if accelerator.is_main_process:
        write(gated, shared, second, {})
        for name, folder in (("supervised", first.folder), ("reinforce", second.folder)):
            found[name] = divergences(model, folder, shared, held_out, gated.budgets.tolist())
        best = min(found, key=lambda name: sum(found[name].values()))
        for file in _FILES:
            write_whole(run.folder / file, partial(shutil.copy, run.folder / best / file))
        write_whole(run.folder / _STAGES, json.dumps({"kept": best, "divergence": found}, indent=2) + "\n")
        logger.info("'%s' is the better stage; wrote %s", best, run.folder)
    return found


def with_samples(
    model: AdaptiveModel, blocks: Any, stage: Path, least: float, run: RunOptions, options: RlTraining
) -> Any:
    """Return blocks of text with others that the model writes under a stage's policy.

    Budgets go from ``least`` to 0.95. That is the text that the model will see where it is deployed.
    """
    from datasets import Dataset, concatenate_datasets

    shared = options.supervised
    length, kept = shared.length, run.folder / _SAMPLES
    if not kept.exists() and options.samples:
        budgets = torch.linspace(least, MOST, min(options.samples, 4)).tolist()
        counts = [len(part) for part in torch.arange(options.samples).chunk(len(budgets))]
        probe, policy, drawn = AdaptiveModel(model.model, model.adapter, fast=True), deployed(stage, shared), []
        with torch.inference_mode(), progress_bar(run.progress) as bar:
            task = bar.add_task("the model's own samples", total=length * len(counts))
            for i, (budget, count) in enumerate(zip(budgets, counts, strict=False)):
                engine = probe.set_policy(policy, budget).engine
                drawn.append(own_samples(probe, engine, count, length, run.seed + i, lambda: bar.advance(task)))
        run.folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, lambda draft: save_file({"tokens": torch.cat(drawn).cpu()}, draft))
    if not options.samples:
        return blocks
    written = Dataset.from_dict({"input_ids": load_file(kept)["tokens"].tolist()}, features=blocks.features)
    return concatenate_datasets([blocks, written.with_format("torch")])


def divergences(
    model: AdaptiveModel, folder: Path, options: GateTraining, blocks: Tensor, budgets: list[float]
) -> dict[float, float]:
    """Return the divergence of a gate and its shortcuts from the dense model at each budget, in nats per token.

    They run as deployed, on token ids [N, T].
    """
    policy = deployed(folder, options)
    probe, dense = AdaptiveModel(model.model, model.adapter), dense_logits(model, blocks)
    return {
        round(budget, 3): text_quality(probe.set_policy(policy, budget), blocks, dense=dense).divergence
        for budget in budgets
    }

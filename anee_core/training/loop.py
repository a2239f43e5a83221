"""The training loop: steps, progress, validation, logs, and checkpoints that resume bit for bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from anee_core.display import progress_bar
from anee_core.errors import TrainingError
from anee_core.files import writable_folder
from anee_core.training.checkpoints import Checkpoints
from anee_core.training.data import Batches
from anee_core.training.objective import Objective
from anee_core.training.run_options import RunOptions
from anee_core.training.schedules import Schedule

logger = logging.getLogger(__name__)


def accelerator_of(options: RunOptions) -> Accelerator:
    """Return the accelerator of a run, on one process or as `accelerate launch` says, and seed everything.

    Raises:
        OutputError: the run's folder cannot be written.
    """
    writable_folder(options.folder)
    logs = {}
    try:
        import tensorboard  # noqa: F401

        logs = {"log_with": "tensorboard", "project_dir": str(options.folder)}
    except ImportError:
        logger.warning("no logs will be written: they need tensorboard (pip install 'anee[train]')")
    # A process that has trained before would be held to the precision of that run.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate, **logs)
    set_seed(options.seed, device_specific=True)
    return accelerator


def run_training(
    objective: Objective,
    optimizers: list[torch.optim.Optimizer],
    rate: Schedule,
    batches: Batches,
    options: RunOptions,
    accelerator: Accelerator,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train, and return the figures of every validation.

    It takes many parameters because it joins what each kind of training makes in its own way.

    Args:
        objective: gives the loss; those of its parameters that require a gradient are trained.
        optimizers: each holds some of them; their learning rates are the largest of the run.
        rate: factor on the learning rates at each step.
        batches: of this process.
        options: how the run goes.
        accelerator: from `accelerator_of`.
        settings: what else must be the same when the run is continued, but for learning rates and validation.

    Raises:
        CheckpointError: the folder holds a run with other options, or one that cannot be read.
        OutputError: the folder cannot be written.
        TrainingError: the loss or a weight is no longer finite.
    """
    run = _Run(objective, optimizers, options, accelerator, settings or {})
    step = run.resume()
    accelerator.init_trackers("logs")
    with progress_bar(options.progress and accelerator.is_main_process) as bar:
        task = bar.add_task("training", total=options.steps, completed=step)
        while step < options.steps:
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["largest_lr"] * rate(step)
            objective.begin(step)
            figures = run.step(batches, step)
            objective.after(figures)
            step += 1
            figures["lr"] = optimizers[0].param_groups[0]["lr"]
            if (options.validate_every and step % options.validate_every == 0) or step == options.steps:
                figures |= {f"valid/{name}": value for name, value in run.validate(step).items()}
            accelerator.log(figures, step=step)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if "/" not in name)
            bar.update(task, completed=step, description=shown)
            if step % options.save_every == 0 or step == options.steps:
                run.save(step)
    accelerator.end_training()
    return run.history


class _Run:
    """A run's state: what is trained, the optimisers, and the history of validations."""

    def __init__(
        self,
        objective: Objective,
        optimizers: list[torch.optim.Optimizer],
        options: RunOptions,
        accelerator: Accelerator,
        settings: Mapping[str, Any],
    ) -> None:
        self.objective, self.options, self.accelerator = objective, options, accelerator
        self.history: list[dict[str, float]] = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["largest_lr"] = group["lr"]
        self.optimizers = (
            list(accelerator.prepare(*optimizers)) if len(optimizers) > 1 else [accelerator.prepare(*optimizers)]
        )
        self.module = accelerator.prepare_model(objective)
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        tensors = {**self.trained, **objective.adapted()}
        self._checkpoints = Checkpoints(options, accelerator, self.optimizers, tensors, settings)

    def step(self, batches: Batches, step: int) -> dict[str, float]:
        """Take one optimiser step and return its figures, averaged over its batches."""
        options, accelerator = self.options, self.accelerator
        sums: dict[str, float] = {}
        self.module.train()
        for i in range(options.accumulate):
            input_ids = batches.batch(step * options.accumulate + i).to(accelerator.device)
            with accelerator.accumulate(self.module):
                loss, figures = self.module(input_ids)
                accelerator.backward(loss)
                if accelerator.sync_gradients and options.clip:
                    accelerator.clip_grad_norm_(self.trained.values(), options.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            for name, value in {"loss": loss.detach(), **figures}.items():
                sums[name] = sums.get(name, 0.0) + float(value) / options.accumulate
        mean = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
        averaged = dict(zip(sums, mean.tolist(), strict=True))
        if not math.isfinite(averaged["loss"]):
            raise self._diverged(step + 1, f"the loss is {averaged['loss']}")
        return averaged

    def _diverged(self, step: int, why: str) -> TrainingError:
        folder = self.options.folder
        kept = (folder / "checkpoint").is_dir()
        again = f"the checkpoint in {folder} is from before: go on from it" if kept else "start again"
        return TrainingError(f"training went wrong at step {step} ({why}); {again} with a lower learning rate")

    def validate(self, step: int) -> dict[str, float]:
        """Return the objective's figures of held-out text, and note them."""
        self.objective.eval()
        with torch.no_grad():
            figures = self.objective.validate()
        if figures:
            self.history.append({"step": step, **figures})
            if self.accelerator.is_main_process:
                logger.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        return figures

    def save(self, step: int) -> None:
        """Keep everything that a run needs to go on from here.

        Raises:
            TrainingError: something that is trained is no longer finite.
        """
        broken = next((name for name, tensor in self._checkpoints.tensors.items() if not tensor.isfinite().all()), None)
        if broken is not None:
            raise self._diverged(step, f"{broken} is not finite")
        self._checkpoints.save(step, self.history)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and return the step to go on with."""
        step, self.history = self._checkpoints.resume()
        return step

"""The training loop: steps, progress, validation, logs, and checkpoints that resume bit for bit."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file

from anee_core.display import progress_bar
from anee_core.errors import CheckpointError, TrainingError
from anee_core.training.checkpoints import lasting_settings, random_state, run_identity, set_random_state
from anee_core.training.data import Batches
from anee_core.training.objective import Objective
from anee_core.training.run_options import RunOptions
from anee_core.training.schedules import Schedule

logger = logging.getLogger(__name__)

_TRAINED, _SETTINGS, _STEP, _SCALER = "trained.safetensors", "run.json", "step.json", "scaler.pt"


def accelerator_of(options: RunOptions) -> Accelerator:
    """Return the accelerator of a run, on one process or as `accelerate launch` says, and seed everything."""
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
        # As it will be read back: tuples become lists.
        self._identity = json.loads(json.dumps({**run_identity(options, accelerator), **lasting_settings(settings)}))
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
        self.saved = {**self.trained, **objective.adapted()}

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
        """Write a checkpoint beside the last one, then put it in its place."""
        broken = next((name for name, tensor in self.saved.items() if not tensor.isfinite().all()), None)
        if broken is not None:
            raise self._diverged(step, f"{broken} is not finite")
        folder = self.options.folder
        draft, place = folder / "draft", folder / "checkpoint"
        accelerator = self.accelerator
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        accelerator.wait_for_everyone()
        torch.save(random_state(), draft / f"random-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            save_file({k: p.detach().cpu().contiguous() for k, p in self.saved.items()}, draft / _TRAINED)
            for i, optimizer in enumerate(self.optimizers):
                torch.save(optimizer.state_dict(), draft / f"optimizer-{i}.pt")
            if accelerator.scaler is not None:
                torch.save(accelerator.scaler.state_dict(), draft / _SCALER)
            (draft / _STEP).write_text(json.dumps({"step": step, "history": self.history}))
            (folder / _SETTINGS).write_text(json.dumps(self._identity, indent=2) + "\n")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            old = folder / "old"
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)
                place.rename(old)
            draft.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and return the step to go on with."""
        folder = self.options.folder
        # Between two renames only the older one has a name.
        place = next((p for p in (folder / "checkpoint", folder / "old") if p.is_dir()), None)
        if place is None:
            folder.mkdir(parents=True, exist_ok=True)
            return 0
        wanted = self._identity
        try:
            found = json.loads((folder / _SETTINGS).read_text())
            state = json.loads((place / _STEP).read_text())
            tensors = load_file(place / _TRAINED)
            moments = [torch.load(place / f"optimizer-{i}.pt", weights_only=True) for i in range(len(self.optimizers))]
            chance = torch.load(place / f"random-{self.accelerator.process_index}.pt", weights_only=True)
            scaler = self.accelerator.scaler
            scaled = None if scaler is None else torch.load(place / _SCALER, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"the run in {folder} cannot be continued ({error}); choose another folder"
            ) from error
        different = sorted(k for k in wanted if found.get(k) != wanted[k])
        if different or set(tensors) != set(self.saved):
            changes = ", ".join(f"{k} was {found.get(k)}, is {wanted[k]}" for k in different) or "other weights"
            raise CheckpointError(
                f"{folder} holds another run ({changes}); continue it as it was, or choose another folder"
            )
        with torch.no_grad():
            for name, parameter in self.saved.items():
                parameter.copy_(tensors[name])
        for optimizer, moment in zip(self.optimizers, moments, strict=True):
            largest = [group["largest_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(moment)
            for group, rate in zip(optimizer.param_groups, largest, strict=True):
                group["largest_lr"] = rate  # the one asked for now
        if scaler is not None:
            scaler.load_state_dict(scaled)
        set_random_state(chance)
        self.history = state["history"]
        logger.info("going on from step %d of %s", state["step"], folder)
        return int(state["step"])

"""Checkpoints of a run, which resume bit for bit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from anee_core.errors import CheckpointError
from anee_core.files import write_whole, writing
from anee_core.training.run_options import RunOptions

logger = logging.getLogger(__name__)

_TRAINED, _SETTINGS, _STEP, _SCALER = "trained.safetensors", "run.json", "step.json", "scaler.pt"
_CHANGEABLE = frozenset({"rate", "backbone_rate", "valid_blocks"})
"""Settings that a run may go on with though they were others before."""


class Checkpoints:
    """The checkpoints of one run, in its folder: each is written beside the last one and then takes its place.

    Args:
        options: how the run goes.
        accelerator: of this process.
        optimizers: as prepared; their state is kept.
        tensors: what is trained, and what changes without a gradient, by name; filled by `resume`.
        settings: what else must be the same when the run is continued, but for learning rates and validation.
    """

    def __init__(
        self,
        options: RunOptions,
        accelerator: Accelerator,
        optimizers: Sequence[Any],
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> None:
        self._folder, self._accelerator, self._optimizers = options.folder, accelerator, optimizers
        self.tensors = tensors
        # As it will be read back: tuples become lists.
        self._identity = json.loads(json.dumps({**_identity(options, accelerator), **_lasting(settings)}))

    def save(self, step: int, history: list[dict[str, float]]) -> None:
        """Write a checkpoint; all processes call it.

        Raises:
            OutputError: the folder cannot be written; the checkpoint before it is still there.
        """
        with writing(self._folder):
            self._save(step, history)

    def _save(self, step: int, history: list[dict[str, float]]) -> None:
        draft, place, old = (self._folder / name for name in ("draft", "checkpoint", "old"))
        accelerator = self._accelerator
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        accelerator.wait_for_everyone()
        _write(_random_state(), draft / f"random-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            save_file({k: p.detach().cpu().contiguous() for k, p in self.tensors.items()}, draft / _TRAINED)
            for i, optimizer in enumerate(self._optimizers):
                _write(optimizer.state_dict(), draft / f"optimizer-{i}.pt")
            if accelerator.scaler is not None:
                _write(accelerator.scaler.state_dict(), draft / _SCALER)
            (draft / _STEP).write_text(json.dumps({"step": step, "history": history}))
            write_whole(self._folder / _SETTINGS, json.dumps(self._identity, indent=2) + "\n")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)
                place.rename(old)
            draft.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def resume(self) -> tuple[int, list[dict[str, float]]]:
        """Load the last checkpoint, and return its step and history; 0 and none if there is no checkpoint.

        Raises:
            CheckpointError: the folder holds a run with other options, or one that cannot be read.
        """
        # Between two renames only the older one has a name.
        places = (self._folder / "checkpoint", self._folder / "old")
        place = next((place for place in places if place.is_dir()), None)
        if place is None:
            return 0, []
        scaler = self._accelerator.scaler
        try:
            found = json.loads((self._folder / _SETTINGS).read_text())
            state = json.loads((place / _STEP).read_text())
            tensors = load_file(place / _TRAINED)
            count = len(self._optimizers)
            moments = [torch.load(place / f"optimizer-{i}.pt", weights_only=True) for i in range(count)]
            chance = torch.load(place / f"random-{self._accelerator.process_index}.pt", weights_only=True)
            scaled = None if scaler is None else torch.load(place / _SCALER, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"the run in {self._folder} cannot be continued ({error}); choose another folder"
            ) from error
        self._check(found, set(tensors))
        with torch.no_grad():
            for name, parameter in self.tensors.items():
                parameter.copy_(tensors[name])
        for optimizer, moment in zip(self._optimizers, moments, strict=True):
            largest = [group["largest_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(moment)
            for group, rate in zip(optimizer.param_groups, largest, strict=True):
                group["largest_lr"] = rate  # the one asked for now
        if scaler is not None:
            scaler.load_state_dict(scaled)
        _set_random_state(chance)
        logger.info("going on from step %d of %s", state["step"], self._folder)
        return int(state["step"]), state["history"]

    def _check(self, found: Mapping[str, Any], names: set[str]) -> None:
        """Raise `CheckpointError` unless a run with these settings and tensors is this one."""
        wanted = self._identity
        different = sorted(k for k in wanted if found.get(k) != wanted[k])
        if different or names != set(self.tensors):
            changes = ", ".join(f"{k} was {found.get(k)}, is {wanted[k]}" for k in different) or "other weights"
            raise CheckpointError(
                f"{self._folder} holds another run ({changes}); continue it as it was, or choose another folder"
            )


def _write(state: Any, place: Path) -> None:
    with place.open("wb") as file:  # given a name, torch would not tell of a full disk
        torch.save(state, file)


def _identity(options: RunOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Return what must be the same for a run to go on as if it had not stopped. More steps may be asked for."""
    chosen = asdict(options)
    same = {name: chosen[name] for name in ("accumulate", "clip", "precision", "seed")}
    return {**same, "processes": accelerator.num_processes}


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, nested ones too, that must stay as they are."""
    return {
        name: _lasting(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _CHANGEABLE
    }


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

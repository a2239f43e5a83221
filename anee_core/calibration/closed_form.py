"""Fit shortcuts and a gate in closed form: ridge regressions on each layer's input at unit norm.

A shortcut is the reduced-rank regression of what the layer adds. The gate is the regression of how far the shortcut is
off: the logarithm of its error relative to what the layer adds.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anee_core.calibration.fingerprint import digest_of, fingerprint
from anee_core.calibration.options import FitOptions
from anee_core.calibration.ridge import Moments
from anee_core.display import progress_bar
from anee_core.engine.whole_sequences import WholeSequences
from anee_core.errors import CheckpointError, InputError
from anee_core.files import allocate, write_whole, writing
from anee_core.interfaces.formulas import unit_norm
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.policy.shortcuts import ShortcutWeights

logger = logging.getLogger(__name__)

_STATE = "state.json"
"""Says that a fit can go on, and where."""
_FIRST = 4
"""Positions left out at the start of each sequence: their hidden states are outliers in norm."""


@dataclass(frozen=True)
class Fitted:
    """Shortcuts and a gate that were fitted together; the gate has no budgets yet, see `GateWeights`."""

    shortcuts: ShortcutWeights
    """Weights of the shortcuts."""
    weight: Tensor
    """[L, D] weight of the gate's scores."""
    bias: Tensor
    """[L] bias of the scores."""
    mean: Tensor
    """[L] mean of the scores on the text of the fit."""
    spread: Tensor
    """[L] their standard deviation."""


def fit(
    model: AdaptiveModel, blocks: Tensor, folder: str | Path, options: FitOptions | None = None, progress: bool = True
) -> Fitted:
    """Fit every layer of a model, one after the other.

    Hidden states are kept on disk, in ``folder``, so memory does not grow with the text; what is fitted is kept there
    too, and an interrupted fit goes on with the layer where it stopped.

    Args:
        model: what to fit for.
        blocks: token ids [N, T].
        folder: for what is kept meanwhile.
        options: how to fit.
        progress: whether to show a bar.

    Raises:
        InputError: sequences are too short.
        CheckpointError: the folder holds another fit.
    """
    options = options or FitOptions()
    if blocks.shape[1] <= _FIRST:
        raise InputError(f"sequences of more than {_FIRST} tokens are needed; got {blocks.shape[1]}")
    layers = len(model.parts.layers)
    with torch.no_grad(), progress_bar(progress) as bar:
        run = _Fit(model, blocks, Path(folder), options)
        task = bar.add_task("fitting shortcuts and gate", total=layers, completed=run.done)
        while run.done < layers:
            run.layer()
            bar.update(task, completed=run.done)
    return run.result()


def relative_error(added: Tensor, estimate: Tensor) -> Tensor:
    """Return how far estimates [..., D] are off, relative to what was really added [..., D]: [...], at least 1e-6."""
    return ((added - estimate).norm(dim=-1) / added.norm(dim=-1).clamp(min=1e-12)).clamp(min=1e-6)


def disk_space(shape: tuple[int, ...]) -> int:
    """Return the bytes that the hidden states [N, T, D] of a fit take on disk."""
    return 2 * math.prod(shape) * np.dtype(np.float32).itemsize


def started(folder: Path) -> bool:
    """Return whether a folder holds a fit that can go on."""
    return (folder / _STATE).exists()


def discard(folder: Path) -> None:
    """Remove what a fit kept on disk; what says that it can go on goes first, if something comes between."""
    (folder / _STATE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _states(folder: Path) -> list[Path]:
    """Return the places of the hidden states: two, so that what a layer reads stays as it is until it is done."""
    return [folder / f"states-{i}.npy" for i in (0, 1)]


def _new_states(folder: Path, shape: tuple[int, ...]) -> list[np.memmap[Any, Any]]:
    """Make files of hidden states, whose space is taken now.

    Raises:
        OutputError: the disk has too little.
    """
    made: list[np.memmap[Any, Any]] = []
    with writing(folder, disk_space(shape)):
        try:
            for path in _states(folder):
                made.append(np.lib.format.open_memmap(path, "w+", np.float32, shape))
                allocate(path, path.stat().st_size)
        except OSError:
            made.clear()  # what is mapped takes its space even without a name
            for path in _states(folder):
                path.unlink(missing_ok=True)
            raise
    return made


class _Fit:
    """A fit in progress: hidden states on disk in front of layer ``done``, and what was fitted for those before."""

    def __init__(self, model: AdaptiveModel, blocks: Tensor, folder: Path, options: FitOptions) -> None:
        self._model, self._blocks, self._folder, self._options = model, blocks, folder, options
        self._identity = {
            "model": fingerprint(model),
            "tokens": digest_of(blocks),
            **asdict(options),
        }
        folder.mkdir(parents=True, exist_ok=True)
        new = not started(folder)
        self.done = 0
        self._fitted: dict[str, Tensor] = {}
        if new:
            self._states = _new_states(folder, (*blocks.shape, model.config.hidden_size))
            for rows in self._rows():
                embedded = WholeSequences(model.adapter, model.parts, blocks[rows].to(model.device)).embedded
                self._states[0][rows] = embedded.float().cpu().numpy()
            self._keep()
        else:
            self._resume()

    def layer(self) -> None:
        """Fit one layer, and move the hidden states past it."""
        model, options, layer_idx = self._model, self._options, self.done
        before, after = self._states[layer_idx % 2], self._states[(layer_idx + 1) % 2]
        width = before.shape[-1]
        moments = Moments(width, width)
        for rows in self._rows():
            sequences = WholeSequences(model.adapter, model.parts, self._blocks[rows].to(model.device))
            hidden_states = self._load(before, rows)
            output = sequences.layer(layer_idx, hidden_states).float().cpu()
            hidden_states = hidden_states.float().cpu()
            pairs = unit_norm(hidden_states)[:, _FIRST:], (output - hidden_states)[:, _FIRST:]
            moments.add(*(pair.flatten(0, 1) for pair in pairs))
            after[rows] = output.numpy()
        down, up, bias = (part.float() for part in moments.reduced(options.rank, options.ridge))
        errors = moments.with_outputs(1)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + layer_idx)
        for rows in self._rows():
            hidden_states, output = torch.from_numpy(before[rows]), torch.from_numpy(after[rows])
            skipped = torch.rand(output.shape[:2], generator=generator) < options.skipped
            skipped[:, :_FIRST] = False
            unit = unit_norm(hidden_states)
            estimate = unit @ down.T @ up.T + bias
            error = relative_error(output - hidden_states, estimate)[:, _FIRST:].log()
            errors.add_outputs(unit[:, _FIRST:].flatten(0, 1), error.flatten(0, 1)[:, None])
            after[rows] = torch.where(skipped[..., None], hidden_states + estimate, output).numpy()
        weight, offset, covariance = errors.solve(options.ridge)
        weight, mean = weight[:, 0], errors.y[0] / errors.count
        spread = (weight @ covariance @ weight).clamp(min=1e-12).sqrt()
        gate = {"weight": weight, "offset": offset[0], "mean": mean, "spread": spread}
        for name, part in {"down": down, "up": up, "bias": bias, **gate}.items():
            part = part.float()
            self._fitted[f"{name}.{layer_idx}"] = part.contiguous()
        self.done += 1
        self._keep()

    def result(self) -> Fitted:
        """Return what was fitted for all layers."""
        names = {name.partition(".")[0] for name in self._fitted}
        all_layers = {name: torch.stack([self._fitted[f"{name}.{i}"] for i in range(self.done)]) for name in names}
        shortcuts = ShortcutWeights(all_layers["down"], all_layers["up"], all_layers["bias"], self._identity)
        return Fitted(shortcuts, *(all_layers[name] for name in ("weight", "offset", "mean", "spread")))

    def _rows(self) -> Iterator[slice]:
        for start in range(0, len(self._blocks), self._options.batch):
            yield slice(start, min(start + self._options.batch, len(self._blocks)))

    def _load(self, states: Any, rows: slice) -> Tensor:
        return torch.from_numpy(states[rows]).to(self._model.device, self._model.dtype)

    def _keep(self) -> None:
        for states in self._states:
            states.flush()
        write_whole(self._folder / "fitted.safetensors", lambda path: save_file(self._fitted, path))
        write_whole(self._folder / _STATE, json.dumps({"done": self.done, "identity": self._identity}))

    def _resume(self) -> None:
        try:
            state = json.loads((self._folder / _STATE).read_text())
            self._fitted = load_file(self._folder / "fitted.safetensors")
            identity, self.done = state["identity"], int(state["done"])
            self._states = [np.lib.format.open_memmap(path, "r+") for path in _states(self._folder)]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"the fit in {self._folder} cannot be continued ({error}); choose another folder"
            ) from error
        if identity != self._identity:
            raise CheckpointError(f"{self._folder} holds the fit of another model, text or options; choose another")
        logger.info("going on from layer %d of the fit in %s", self.done, self._folder)

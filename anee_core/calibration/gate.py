"""Make shortcuts and a gate for a model without training, by fitting them in closed form."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anee_core.calibration.closed_form import discard, disk_space, fit, started
from anee_core.calibration.early_scores import expecting_early_scores
from anee_core.calibration.fingerprint import fingerprint
from anee_core.calibration.options import FitOptions, GateCalibration
from anee_core.calibration.samples import own_samples, samples_of_file
from anee_core.calibration.shares import from_one_score
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.display import progress_bar
from anee_core.engine.engine import Engine
from anee_core.errors import CheckpointError
from anee_core.files import cache_folder, only_one, writable_folder, write_whole
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.policy.policy import Policy
from anee_core.policy.shortcuts import LowRankShortcut

logger = logging.getLogger(__name__)

_TOKENS = "tokens.safetensors"


def calibrated_folder(model: AdaptiveModel, text: str | Path | None = None) -> Path:
    """Return where the calibration of a model, on its own samples or on a text, is kept if nobody says otherwise."""
    source = "" if text is None else "-" + hashlib.sha256(Path(text).read_bytes()).hexdigest()[:16]
    return cache_folder() / f"gate-{fingerprint(model)}{source}"


def fitted_for(model: AdaptiveModel, text: str | Path | None = None) -> Path:
    """Return the folder with what is fitted for a model; fit it now if that was not done before.

    Raises:
        InputError, CheckpointError: see `calibrate_gate`.
    """
    folder = calibrated_folder(model, text)
    with only_one(folder):
        if not (folder / "gate.json").exists():
            logger.info("fitting gate and shortcuts for this model, once: minutes; 'anee train supervised' does better")
            # On a narrow model a wider shortcut would cost as much as the layer.
            rank = max(min(128, model.config.hidden_size // 4), 1)
            _fit(model, folder, GateCalibration(text, sequences=16, length=256, fit=FitOptions(rank=rank)), None)
    return folder


def calibrate_gate(
    model: AdaptiveModel, folder: Path, options: GateCalibration | None = None, tokens: Tensor | None = None
) -> Path:
    """Write shortcuts and a gate for a model into a folder, and return it. An interrupted calibration goes on.

    ``tokens`` [N, T] are read, if given, in the place of a text.

    Raises:
        InputError: the text is too short, or the sizes do not fit the model.
        CheckpointError: the folder holds another calibration.
        OutputError: the folder cannot be written.
    """
    with only_one(folder):
        return _fit(model, folder, options or GateCalibration(), tokens)


def _fit(model: AdaptiveModel, folder: Path, options: GateCalibration, tokens: Tensor | None) -> Path:
    """Do what `calibrate_gate` says, while nobody else writes the folder."""
    limit = model.adapter.max_positions(model.config)
    length = min(options.length, limit or options.length)
    work, shape = folder / "work", (options.sequences, length, model.config.hidden_size)
    writable_folder(folder, 0 if started(work) else disk_space(shape))
    with torch.no_grad():
        blocks = _tokens(model, options, length, work) if tokens is None else tokens.to(model.device)
    fitted = fit(model, blocks, work, options.fit, options.progress)
    fitted.shortcuts.save(folder)
    nothing = torch.empty(0)
    source = "own samples" if options.text is None else Path(options.text).name
    facts = {"text": source if tokens is None else "tokens given", **asdict(options.fit)}
    gate = GateWeights(fitted.weight, fitted.bias, fitted.mean, fitted.spread, nothing, nothing, facts)
    shortcut = LowRankShortcut.of(fitted.shortcuts)
    costs = Engine(model.adapter, model.parts, Policy(shortcut=shortcut)).costs
    solved = from_one_score(gate, costs, GateController().protected(costs.num_layers))
    policy = Policy(GateController.of(solved), shortcut=shortcut)
    expecting_early_scores(solved, model, policy, blocks).save(folder)
    discard(work)
    logger.info("wrote %s", folder)
    return folder


def _tokens(model: AdaptiveModel, options: GateCalibration, length: int, work: Path) -> Tensor:
    """Return token ids [N, T], drawn once."""
    if options.text is not None:
        return samples_of_file(model, Path(options.text), options.sequences, length)
    kept, name = work / _TOKENS, f"of {fingerprint(model)}, seed {options.fit.seed}"
    if kept.exists():
        try:
            known: Tensor | None = load_file(kept).get(name)
        except Exception as error:
            raise CheckpointError(f"{kept} cannot be read ({error}); remove {work}") from error
        if known is not None and known.shape == (options.sequences, length):
            return known
    with progress_bar(options.progress) as bar:
        task = bar.add_task("the model's own samples", total=length)
        engine = Engine(model.adapter, model.parts, Policy())
        drawn = own_samples(model, engine, options.sequences, length, options.fit.seed, lambda: bar.advance(task))
    work.mkdir(parents=True, exist_ok=True)
    write_whole(kept, lambda draft: save_file({name: drawn.cpu()}, draft))
    return drawn.cpu()

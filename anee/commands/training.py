"""Commands that train policies, or fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anee.commands.options import Length, Model

Text = Annotated[list[Path], typer.Option("--text", "-t", help="Training text, UTF-8; may be repeated.")]
Folder = Annotated[Path, typer.Option("--folder", "-f", help="For checkpoints, logs and the result.")]
Valid = Annotated[Path | None, typer.Option("--valid", help="Validation text. Default: cut from the text.")]
Least = Annotated[float, typer.Option("--least", help="Smallest budget that is trained for.")]
Rank = Annotated[int, typer.Option("--rank", help="Width of the shortcuts.")]
Batch = Annotated[int, typer.Option("--batch", help="Blocks per batch and process.")]
Accumulate = Annotated[int, typer.Option("--accumulate", help="Batches per step.")]
Precision = Annotated[str, typer.Option("--precision", help="no, bf16 or fp16 (mixed).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Of the model: float32 or bfloat16.")]
CalibrationSequences = Annotated[int, typer.Option("--calibration-sequences", help="Pieces for the fit.")]
Start = Annotated[str | None, typer.Option("--start", metavar="<path>", help="Folder with weights to start from.")]
ValidBlocks = Annotated[int, typer.Option("--valid-blocks", help="Blocks to validate on.")]
ValidateEvery = Annotated[int, typer.Option("--validate-every", help="Steps between validations.")]
SaveEvery = Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]

train = typer.Typer(help="Train a policy for a model.", no_args_is_help=True)


@train.callback()
def options() -> None:
    """Train a policy for a model."""


@train.command()
def asa(
    model: Model,
    text: Text,
    folder: Folder,
    valid: Valid = None,
    gamma: Annotated[float, typer.Option("--gamma", "-g", help="Weight of the share of context kept.")] = 0.3,
    target: Annotated[
        float | None, typer.Option("--target", help="Share of context to drop; gamma then adapts until it is met.")
    ] = None,
    backbone: Annotated[str, typer.Option("--backbone", help="frozen, lora or full.")] = "frozen",
    rank: Annotated[int, typer.Option("--rank", help="Width of the interaction projections.")] = 64,
    alpha: Annotated[str | None, typer.Option("--alpha", help="Schedule of alpha, like 'cosine_2_8_400'.")] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="First bias. Default: nothing is dropped.")] = None,
    start: Start = None,
    distil: Annotated[
        bool | None, typer.Option("--distil/--no-distil", help="Learn from the dense model, or from the text.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.")] = 500,
    length: Length = 512,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate of the interactions.")] = 1e-3,
    backbone_rate: Annotated[float, typer.Option("--backbone-rate", help="Learning rate of the model.")] = 1e-4,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps until the learning rates are reached.")] = 20,
    lora_rank: Annotated[int, typer.Option("--lora-rank", help="Rank of the low-rank updates.")] = 16,
    precision: Precision = "no",
    dtype: Dtype = "float32",
    valid_blocks: ValidBlocks = 8,
    validate_every: ValidateEvery = 100,
    save_every: SaveEvery = 50,
    seed: Seed = 0,
) -> None:
    """Train adaptively sparse attention; use it with --policy asa:FOLDER.

    A run that was interrupted goes on when the same command is given again. Several processes:
    'accelerate launch -m anee train asa ...'.
    """
    from anee_core.load import load
    from anee_core.training.asa_run import AsaOptions, train_asa
    from anee_core.training.run_options import RunOptions

    chosen = AsaOptions(
        backbone=backbone,  # type: ignore[arg-type]
        gamma=gamma,
        target=target,
        rank=rank,
        alpha=alpha,
        beta=beta,
        start=start,
        distil=distil,
        length=length,
        batch=batch,
        rate=rate,
        backbone_rate=backbone_rate,
        warmup=warmup,
        lora_rank=lora_rank,
        valid_blocks=valid_blocks,
    )
    run = RunOptions(
        folder,
        steps,
        accumulate=accumulate,
        precision=precision,
        seed=seed,
        validate_every=validate_every,
        save_every=save_every,
    )
    history = train_asa(load(model, dtype=dtype), text, run, chosen, valid)
    _show(history)


@train.command()
def supervised(
    model: Model,
    text: Text,
    folder: Folder,
    valid: Valid = None,
    least: Least = 0.5,
    rank: Rank = 128,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.")] = 300,
    length: Length = 256,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    rate: Annotated[float, typer.Option("--rate", help="Factor on the learning rates.")] = 1.0,
    precision: Precision = "no",
    dtype: Dtype = "float32",
    calibration_sequences: CalibrationSequences = 32,
    start: Start = None,
    valid_blocks: ValidBlocks = 8,
    validate_every: ValidateEvery = 100,
    save_every: SaveEvery = 50,
    seed: Seed = 0,
) -> None:
    """Train a gate and shortcuts against the dense model; use them with --policy gate:FOLDER+shortcuts:FOLDER.

    Starts from a closed-form fit (anee calibrate), which it makes first, or from --start; with --steps 0 only the
    budgets are solved for, on --valid. A run that was interrupted goes on when the same command is given again.
    """
    from anee_core.load import load
    from anee_core.training.gate import GateOptions
    from anee_core.training.gate_run import GateTraining, train_gate
    from anee_core.training.run_options import RunOptions

    chosen = GateTraining(
        GateOptions(least=least),
        rank=rank,
        length=length,
        batch=batch,
        rate=rate,
        valid_blocks=valid_blocks,
        calibration_sequences=calibration_sequences,
        start=start,
    )
    run = RunOptions(
        folder,
        steps,
        accumulate=accumulate,
        precision=precision,
        seed=seed,
        validate_every=validate_every,
        save_every=save_every,
    )
    history = train_gate(load(model, dtype=dtype), text, run, chosen, valid)
    _show(history)


@train.command()
def rl(
    model: Model,
    text: Text,
    folder: Folder,
    valid: Valid = None,
    least: Least = 0.5,
    rank: Rank = 128,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps of the supervised stage.")] = 300,
    reinforce_steps: Annotated[int, typer.Option("--reinforce-steps", help="Steps of REINFORCE after it.")] = 100,
    rollouts: Annotated[int, typer.Option("--rollouts", help="Drawn for each text.")] = 4,
    samples: Annotated[int, typer.Option("--samples", help="Texts of its own that the second stage reads too.")] = 32,
    hard: Annotated[float, typer.Option("--hard", help="Share of the texts under a hard budget in REINFORCE.")] = 0.5,
    length: Length = 256,
    batch: Batch = 4,
    precision: Precision = "no",
    dtype: Dtype = "float32",
    calibration_sequences: CalibrationSequences = 32,
    start: Start = None,
    valid_blocks: ValidBlocks = 8,
    validate_every: ValidateEvery = 100,
    save_every: SaveEvery = 50,
    seed: Seed = 0,
) -> None:
    """Train a gate and shortcuts against the dense model, then REINFORCE; use them with --policy rl:folder=FOLDER.

    The better of both stages is kept; both are reported. A run that was interrupted goes on when the same command is
    given again.
    """
    from anee_core.load import load
    from anee_core.training.gate import GateOptions
    from anee_core.training.gate_run import GateTraining
    from anee_core.training.reinforce import ReinforceOptions
    from anee_core.training.rl_run import RlTraining, train_rl
    from anee_core.training.run_options import RunOptions

    shared = GateTraining(
        GateOptions(least=least),
        rank=rank,
        length=length,
        batch=batch,
        valid_blocks=valid_blocks,
        calibration_sequences=calibration_sequences,
        start=start,
    )
    reinforce = ReinforceOptions(rollouts=rollouts, hard=hard)
    chosen = RlTraining(shared, reinforce, steps=reinforce_steps, samples=samples)
    run = RunOptions(
        folder, steps, precision=precision, seed=seed, validate_every=validate_every, save_every=save_every
    )
    found = train_rl(load(model, dtype=dtype), text, run, chosen, valid)
    table = Table("budget", *(f"KL to dense, {stage}" for stage in found))
    for budget in next(iter(found.values()), {}):
        table.add_row(f"{budget:.2f}", *(f"{figures[budget]:.4f}" for figures in found.values()))
    Console(stderr=True).print(table)


def _show(history: list[dict[str, float]]) -> None:
    """Print the figures of every validation."""
    names = list(history[-1] if history else ())
    table = Table(*names)
    for figures in history:
        table.add_row(*(f"{figures[name]:.4g}" if name in figures else "" for name in names))
    Console(stderr=True).print(table)


def calibrate(
    model: Model,
    text: Annotated[Path | None, typer.Option("--text", "-t", help="Text, UTF-8. Default: the model's own.")] = None,
    folder: Annotated[Path | None, typer.Option("--folder", "-f", help="Default: in the cache folder.")] = None,
    rank: Rank = 128,
    skipped: Annotated[float, typer.Option("--skipped", help="Share of pairs that skip during the fit.")] = 0.25,
    sequences: Annotated[int, typer.Option("--sequences", help="Pieces of text.")] = 32,
    length: Annotated[int, typer.Option("--length", help="Tokens of each.")] = 512,
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Fit shortcuts and a gate for a model, in closed form; use them with --policy gate:FOLDER+shortcuts:FOLDER.

    A calibration that was interrupted goes on when the same command is given again.
    """
    from anee_core.calibration import GateCalibration, calibrate_gate
    from anee_core.calibration.closed_form import FitOptions
    from anee_core.calibration.gate import calibrated_folder
    from anee_core.load import load

    options = GateCalibration(text, sequences, length, fit=FitOptions(rank=rank, skipped=skipped, seed=seed))
    loaded = load(model, dtype=dtype)
    made = calibrate_gate(loaded, folder or calibrated_folder(loaded, text), options)
    Console(stderr=True).print(f"wrote {made}; use it with: --policy gate:{made}+shortcuts:{made}", soft_wrap=True)

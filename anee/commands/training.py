"""Commands that train policies, or fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from anee.commands.flags import Flags, flat
from anee.commands.options import Model
from anee_core.calibration.options import GateCalibration
from anee_core.training.options import AsaOptions, GateTraining, RlTraining
from anee_core.training.run_options import RunOptions

Text = Annotated[list[Path], typer.Option("--text", "-t", help="Training text, UTF-8; may be repeated.")]
Valid = Annotated[Path | None, typer.Option("--valid", help="Validation text. Default: cut from the text.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the model: float32 or bfloat16.")]
_SHORT = {"folder": "-f"}

train = typer.Typer(help="Train a policy for a model.", no_args_is_help=True)


@train.callback()
def options() -> None:
    """Train a policy for a model."""


@train.command()
@flat
def asa(
    model: Model,
    text: Text,
    run: Annotated[RunOptions, Flags(hide=frozenset({"progress"}), short=_SHORT, defaults={"steps": 500})],
    chosen: Annotated[AsaOptions, Flags(short={"gamma": "-g"})],
    valid: Valid = None,
    dtype: Dtype = "float32",
) -> None:
    """Train adaptively sparse attention; use it with --policy asa:FOLDER.

    A run that was interrupted goes on when the same command is given again. Several processes:
    'accelerate launch -m anee train asa ...'.
    """
    from anee_core.load import load
    from anee_core.training.asa_run import train_asa

    _show(train_asa(load(model, dtype=dtype), text, run, chosen, valid))


@train.command()
@flat
def supervised(
    model: Model,
    text: Text,
    run: Annotated[RunOptions, Flags(hide=frozenset({"progress"}), short=_SHORT, defaults={"steps": 300})],
    chosen: Annotated[GateTraining, Flags(hide=frozenset({"protect", "first"}))],
    valid: Valid = None,
    dtype: Dtype = "float32",
) -> None:
    """Train a gate and shortcuts against the dense model; use them with --policy gate:FOLDER+shortcuts:FOLDER.

    Starts from a closed-form fit (anee calibrate), which it makes first, or from --start; with --steps 0 only the
    budgets are solved for, on --valid. A run that was interrupted goes on when the same command is given again.
    """
    from anee_core.load import load
    from anee_core.training.gate_run import train_gate

    _show(train_gate(load(model, dtype=dtype), text, run, chosen, valid))


_OF_ONE_STAGE = frozenset(
    {
        "rate", "supervised.rate", "supervised.protect", "supervised.first", "supervised.gate.temperature",
        "reinforce.temperature", "reinforce.steps",
    }
)  # fmt: skip
"""Fields of "rl" that both stages have under one name, and which keep their defaults."""


@train.command()
@flat
def rl(
    model: Model,
    text: Text,
    run: Annotated[RunOptions, Flags(hide=frozenset({"progress"}), short=_SHORT, defaults={"steps": 300})],
    chosen: Annotated[RlTraining, Flags(hide=_OF_ONE_STAGE, rename={"steps": "reinforce_steps"})],
    valid: Valid = None,
    dtype: Dtype = "float32",
) -> None:
    """Train a gate and shortcuts against the dense model, then REINFORCE; use them with --policy rl:folder=FOLDER.

    The better of both stages is kept; both are reported. A run that was interrupted goes on when the same command is
    given again.
    """
    from anee_core.load import load
    from anee_core.training.rl_run import train_rl

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


@flat
def calibrate(
    model: Model,
    chosen: Annotated[GateCalibration, Flags(hide=frozenset({"progress"}), short={"text": "-t"})],
    folder: Annotated[Path | None, typer.Option("--folder", "-f", help="Default: in the cache folder.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the model. Default: as stored.")] = None,
) -> None:
    """Fit shortcuts and a gate for a model, in closed form; use them with --policy gate:FOLDER+shortcuts:FOLDER.

    A calibration that was interrupted goes on when the same command is given again.
    """
    from anee_core.calibration.gate import calibrate_gate, calibrated_folder
    from anee_core.load import load

    loaded = load(model, dtype=dtype)
    made = calibrate_gate(loaded, folder or calibrated_folder(loaded, chosen.text), chosen)
    Console(stderr=True).print(f"wrote {made}; use it with: --policy gate:{made}+shortcuts:{made}", soft_wrap=True)

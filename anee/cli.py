"""The command line."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anee.commands.bench import bench
from anee.commands.develop import conformance, new_adapter
from anee.commands.evaluation import evaluate, publish, report, sweep
from anee.commands.options import (
    Budget,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    PolicyString,
    Prompt,
    Sample,
    SampleSeed,
    Weights,
)
from anee.commands.training import calibrate, train
from anee_core.errors import AneeError

app = typer.Typer(
    help="Run pretrained Transformers with adaptive computation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and log more.")] = False,
) -> None:
    """Run pretrained Transformers with adaptive computation."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


@app.command()
def generate(
    model: Model,
    prompt: Prompt,
    policy: PolicyString = "dense",
    budget: Budget = None,
    max_new_tokens: MaxNewTokens = 50,
    hard: Annotated[bool, typer.Option("--hard", help="Let no token exceed the budget.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    weights: Weights = None,
    prefill: Annotated[str, typer.Option("--prefill", help="auto, adaptive or dense.")] = "auto",
    sample: Sample = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature of sampling.")] = 1.0,
    seed: SampleSeed = None,
    calibration_text: Annotated[
        str | None, typer.Option("--calibration-text", help="Calibrate on this file, not on the model's own samples.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    picture: Annotated[bool, typer.Option("--picture", help="Draw which layers ran for which token.")] = False,
) -> None:
    """Continue a prompt, and say what ran."""
    from transformers import TextStreamer  # heavy: imported where used, so that help and listings are instant

    from anee_core.calibration import CalibrationOptions
    from anee_core.load import load

    adaptive = load(
        model,
        policy,
        budget,
        hard=hard,
        dtype=dtype,
        device=device,
        weights=weights,
        prefill=prefill,  # type: ignore[arg-type]
        calibration=CalibrationOptions(text=calibration_text),
    )
    show_stream = stream and not as_json
    extra: dict[str, Any] = (
        {"streamer": TextStreamer(adaptive.tokenizer, skip_special_tokens=True)} if show_stream else {}
    )
    result = adaptive.generate(
        prompt, max_new_tokens=max_new_tokens, do_sample=sample, temperature=temperature, seed=seed, **extra
    )
    if as_json:
        report = {
            "model": model,
            "policy": str(adaptive.policy),
            "budget": adaptive.budget,
            "text": result.text,
            "completion": result.completion,
            "new_tokens": result.new_tokens[0],
            "tokens_per_second": result.tokens_per_second,
            "trace": result.trace.to_dict(),
        }
        print(json.dumps(report))
        return
    if not show_stream:
        print(result.text)
    console = Console(stderr=True, highlight=False)
    console.print(f"\n[bold]{escape(str(adaptive.policy))}[/bold], budget {adaptive.budget or 'none'}", markup=True)
    console.print(str(result.trace), markup=False)
    console.print(f"{result.tokens_per_second:.1f} tokens/s", markup=False)
    if picture:
        console.print(result.trace.draw(), markup=False)


@app.command()
def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List what is installed: name, distribution, version and what each plugin provides."""
    from anee_core.plugins import Plugins

    logging.getLogger("anee_core.plugins").setLevel(logging.ERROR)  # the problems are listed below
    found = Plugins.discover()
    if as_json:
        print(json.dumps([{**vars(info), "provides": dict(info.provides)} for info in found.infos]))
        return
    table = Table("plugin", "distribution", "version", "provides")
    for info in found.infos:
        lines = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in info.provides.items()]
        cells = (info.name, info.distribution, info.version, info.problem or "\n".join(lines))
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table)
    for problem in found.problems():
        print(problem, file=sys.stderr)


app.command()(conformance)
app.command()(new_adapter)
app.command()(calibrate)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(sweep)
app.command()(report)
app.command()(publish)
app.add_typer(train, name="train")


def main() -> None:
    """Run the command line; an expected failure is one line and exit code 2."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:  # accepted anywhere on the line
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        app(args=arguments)
    except AneeError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

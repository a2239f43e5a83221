"""The command line."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anee.commands.bench import bench
from anee.commands.develop import conformance, new_adapter
from anee.commands.evaluation import evaluate, publish, report, sweep
from anee.commands.flags import Flags, flat
from anee.commands.options import Continuation, Loading, Model, Prompt
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


@dataclass(frozen=True)
class GenerateLoading(Loading):
    """How a model is loaded to generate."""

    hard: bool = False
    """Let no token exceed the budget."""
    weights: str | None = None
    """Quantise the layers' weights: int8 or int4."""
    prefill: str = "auto"
    """How the prompt is read: auto, adaptive or dense."""
    calibration_text: str | None = None
    """Calibrate on this file, not on the model's own samples."""

    def load(self, model: str, **options: Any) -> Any:
        """Return the model under the policy."""
        from anee_core.calibration.options import CalibrationOptions

        calibration = CalibrationOptions(text=self.calibration_text)
        own = {"hard": self.hard, "weights": self.weights, "prefill": self.prefill, "calibration": calibration}
        return super().load(model, **own, **options)


@dataclass(frozen=True)
class Shown:
    """What is shown of a continuation."""

    stream: bool = False
    """Print tokens as they come."""
    as_json: bool = False
    """Print one JSON object."""
    picture: bool = False
    """Draw which layers ran for which token."""


@app.command()
@flat
def generate(
    model: Model,
    prompt: Prompt,
    loading: Annotated[GenerateLoading, Flags(short={"policy": "-p", "budget": "-b"})],
    continuation: Annotated[Continuation, Flags(short={"max_new_tokens": "-n"})],
    shown: Annotated[Shown, Flags(rename={"as_json": "json"})],
) -> None:
    """Continue a prompt, and say what ran."""
    from transformers import TextStreamer  # heavy: imported where used, so that help and listings are instant

    adaptive = loading.load(model)
    show_stream = shown.stream and not shown.as_json
    extra: dict[str, Any] = (
        {"streamer": TextStreamer(adaptive.tokenizer, skip_special_tokens=True)} if show_stream else {}
    )
    result = continuation.of(adaptive, prompt, **extra)
    if shown.as_json:
        report = {
            "model": model,
            "policy": adaptive.policy.title,
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
    console.print(f"\n[bold]{escape(adaptive.policy.title)}[/bold], budget {adaptive.budget or 'none'}", markup=True)
    console.print(str(result.trace), markup=False)
    console.print(f"{result.tokens_per_second:.1f} tokens/s", markup=False)
    if shown.picture:
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

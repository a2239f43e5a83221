"""The command line."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from anee.commands.bench import bench
from anee.commands.develop import conformance, new_adapter
from anee.commands.evaluation import evaluate, publish, report, sweep
from anee.commands.generation import generate
from anee.commands.installed import plugins
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


app.command()(generate)
app.command()(plugins)
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

"""The command line."""

from __future__ import annotations

import io
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from anee.commands.bench import bench
from anee.commands.develop import conformance, new_adapter
from anee.commands.evaluation import evaluate, publish, report, sweep
from anee.commands.generation import generate
from anee.commands.installed import plugins
from anee.commands.training import calibrate, train
from anee_core.errors import AneeError

_RESUMED = frozenset({"calibrate", "train", "sweep", "bench"})
"""Commands that go on where they were stopped."""


class _Commands(TyperGroup):
    """The commands; one that is stopped says in a line how to go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            resumed = ctx.invoked_subcommand in _RESUMED
            how = ": what is done is kept, and the same command goes on from there" if resumed else ""
            print(f"interrupted{how}", file=sys.stderr)
            number = stop.args[0] if stop.args else signal.SIGINT
            raise typer.Exit(128 + number) from stop


app = typer.Typer(
    cls=_Commands,
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
    """Run the command line; an expected failure is one line, and exit code 2, or 1 if the system made it."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:  # accepted anywhere on the line
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        with _terminated_as_interrupted():
            try:
                app(args=arguments)
            finally:
                sys.stdout.flush()  # not as late as at exit, where a full disk is a traceback
    except AneeError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except OSError as error:
        if debug:
            raise
        sys.stdout = io.StringIO()  # what could not be written is not tried again
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let a request to end the process be met like Ctrl-C: files are closed, and there is a word of how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Numeric options of every command: one out of range is one line that names it, before anything is loaded."""

import inspect
import typing

import pytest

from anee.cli import app

WORDS = {"tasks": "lambada", "to": "x", "folder": "x", "policy": "dense", "out": "x", "text": "a=x"}
"""Something for what has to be given; no model is called "x"."""


def commands(group, before=()):
    """Yield the words of each command, and its parameters: name, type, what typer was told, whether it is needed."""
    for command in group.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        yield (*before, name), [each for each in map(described, parameters(command.callback)) if each]
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*before, inner.name))


def parameters(callback):
    hints = typing.get_type_hints(callback, include_extras=True)
    signature = inspect.signature(callback).parameters.values()
    return [each.replace(annotation=hints.get(each.name, each.annotation)) for each in signature]


def described(parameter):
    kind, told = typing.get_args(parameter.annotation)[:2]
    needed = parameter.default is inspect.Parameter.empty or parameter.name == "models"
    return parameter.name, str(kind), told, needed


def spelled(told):
    """Return an option's long name; inside Annotated, typer takes the first for a default."""
    return next(name for name in (told.default, *told.param_decls) if str(name).startswith("--"))


COMMANDS = dict(commands(app))
CASES = [
    (words, spelled(told), "int" if "int" in kind else "float")
    for words, parameters in COMMANDS.items()
    for _, kind, told, _ in parameters
    if type(told).__name__ == "OptionInfo" and ("int" in kind or "float" in kind)
]


def needed(words):
    """Return the least that has to stand on the line for a command."""
    line = []
    for name, _, told, is_needed in COMMANDS[words]:
        if is_needed and type(told).__name__ == "ArgumentInfo":
            line.append("x")
        elif is_needed:
            line += [f"--{name}", WORDS[name]]
    return line


def test_there_are_options_to_try():
    assert len(CASES) > 60
    assert {words[0] for words, _, _ in CASES} >= {"generate", "calibrate", "train", "bench", "sweep", "eval", "report"}


@pytest.mark.parametrize(("words", "option", "kind"), CASES, ids=[" ".join((*w, o)) for w, o, _ in CASES])
def test_numbers_out_of_range_are_one_line_that_names_the_option(words, option, kind, run_anee):
    huge = 10**20
    values = (-huge, huge) if kind == "int" else ("nan", "inf", "1e300", "-1e300")
    for value in values:
        extra = ["--policy", "dense"] if words == ("conformance",) else needed(words)
        found = run_anee(*words, *extra, f"{option}={value}")
        assert found.code == 2
        assert "Traceback" not in found.err
        name = option.lstrip("-")
        assert [line for line in found.errors if name in line or name.replace("-", "_") in line], found.err
        assert len(found.errors) == 1, found.err
        assert " is a " in found.errors[0]

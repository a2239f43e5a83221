"""Options of a command from the fields of dataclasses, where names, types, defaults and help are written once."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import typer

from anee_core.ranges import check_values


@dataclass(frozen=True)
class Flags:
    """How the fields of a dataclass become options, where it is not by their own names.

    A field of a dataclass inside it is called ``outer.inner``.
    """

    hide: frozenset[str] = frozenset()
    """Fields that are no options; they keep their defaults."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Names of options by field."""
    short: Mapping[str, str] = field(default_factory=dict)
    """One-letter options by field, like ``-f``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults by field, in the place of the dataclass's; MISSING for an option that has to be given."""

    def inside(self, name: str) -> Flags:
        """Return the flags of a field that is a dataclass itself."""
        start = f"{name}."

        def inner(of: Mapping[str, Any]) -> dict[str, Any]:
            return {path.removeprefix(start): value for path, value in of.items() if path.startswith(start)}

        hide = frozenset(path.removeprefix(start) for path in self.hide if path.startswith(start))
        return Flags(hide, inner(self.rename), inner(self.short), inner(self.defaults))


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the fields of its dataclass parameters as options.

    A parameter is such a one if it is annotated with a dataclass, alone or with `Flags`. A field that is a dataclass
    itself is taken apart in the same way. What an option says of itself is the docstring behind its field.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, _Group] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, flags = _split(hints[name])
        if dataclasses.is_dataclass(kind):
            groups[name] = _Group(kind, flags)
            parameters += groups[name].parameters()
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @functools.wraps(command)
    def taken(**given: Any) -> None:
        made = {name: group.make(given) for name, group in groups.items()}
        command(**given, **made)

    # Those without a default come first, as in any signature.
    ordered = sorted(parameters, key=lambda each: each.default is not inspect.Parameter.empty)
    made: Any = taken
    made.__signature__ = inspect.Signature(
        [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in ordered], return_annotation=None
    )
    made.__annotations__ = {each.name: each.annotation for each in ordered} | {"return": None}
    del made.__wrapped__
    return taken


class _Group:
    """The options of one dataclass."""

    def __init__(self, kind: Any, flags: Flags) -> None:
        self._kind, self._flags = kind, flags
        hints, told = typing.get_type_hints(kind), _told(kind)
        self._options: dict[str, inspect.Parameter] = {}
        self._groups: dict[str, _Group] = {}
        for item in dataclasses.fields(kind):
            if item.name in flags.hide:
                continue
            if dataclasses.is_dataclass(hints[item.name]):
                self._groups[item.name] = _Group(hints[item.name], flags.inside(item.name))
                continue
            self._options[item.name] = self._option(item, hints[item.name], told[item.name])

    def _option(self, item: dataclasses.Field[Any], hint: Any, told: str) -> inspect.Parameter:
        name = self._flags.rename.get(item.name, item.name)
        spelled = f"--{name.replace('_', '-')}"
        default = self._flags.defaults.get(item.name, item.default)
        negatable = bool in _kinds(hint) and default is not False
        names = [f"{spelled}/--no-{spelled[2:]}" if negatable else spelled]
        if item.name in self._flags.short:
            names.append(self._flags.short[item.name])
        if isinstance(default, tuple):
            default = list(default)
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
            annotation=Annotated[_taken(hint), typer.Option(*names, help=told)],
        )

    def parameters(self) -> list[inspect.Parameter]:
        """Return the options as parameters of a command."""
        return [*self._options.values(), *(p for group in self._groups.values() for p in group.parameters())]

    def make(self, given: dict[str, Any]) -> Any:
        """Return the dataclass made of what was given, which is taken out of it."""
        values = {name: given.pop(parameter.name) for name, parameter in self._options.items()}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        check_values(self._kind, values, lambda name: f"--{self._options[name].name.replace('_', '-')}")
        return self._kind(**values, **{name: group.make(given) for name, group in self._groups.items()})


def _split(hint: Any) -> tuple[Any, Flags]:
    """Return the type of an annotation, and how its fields become options."""
    if typing.get_origin(hint) is not Annotated:
        return hint, Flags()
    kind, *extras = typing.get_args(hint)
    return kind, next((extra for extra in extras if isinstance(extra, Flags)), Flags())


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _taken(hint: Any) -> Any:
    """Return the type that the command line reads for a field: text for a choice of words, a list for a tuple."""
    kinds = _kinds(hint)
    plain = [kind for kind in kinds if kind is not type(None)]
    if str in plain:
        kind: Any = str
    else:
        kind = plain[0]
    if typing.get_origin(kind) is Literal:
        kind = str
    if typing.get_origin(kind) is tuple:
        kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
    return kind | None if type(None) in kinds else kind


def _told(kind: type) -> dict[str, str]:
    """Return what a dataclass, and those that it is derived from, say of each field in the docstring behind it."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for item, behind in itertools.pairwise(body.body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(behind, ast.Expr):
                said = " ".join(str(ast.literal_eval(behind.value)).split())
                found[item.target.id] = said.replace("``", "'").replace("`", "'")
    return found

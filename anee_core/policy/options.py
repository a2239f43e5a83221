"""Options as text: from a policy string to the fields of a dataclass, and back."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from anee_core.errors import PolicyError, suggestion
from anee_core.interfaces.configurable import Configurable


def raw_options(name: str, text: str, positional: str | None = None) -> dict[str, str]:
    """Return the options in a part of a policy string as text, by name; ``positional`` may stand without its name.

    Raises:
        PolicyError: something is no option, or is given twice.
    """
    if positional is not None and os.path.isdir(text.strip()):
        return {positional: text.strip()}  # whatever its name looks like
    options: dict[str, str] = {}
    for i, item in enumerate(filter(None, (piece.strip() for piece in text.split(",")))):
        key, equals, value = item.partition("=")
        if not equals and positional is not None and i == 0:
            options[positional] = item
            continue
        if not equals:
            raise PolicyError(
                f"{name}: '{item}' is no option; write option=value, separated by commas, "
                "and several numbers of one option separated by spaces, as in 'skip=5 14'"
            )
        if key.strip() in options:
            raise PolicyError(f"{name}: option '{key.strip()}' is given twice")
        options[key.strip()] = value.strip()
    return options


def configure(factory: type[Configurable], name: str, text: str) -> Any:
    """Return a part of a policy with the options that a policy string gives it.

    Raises:
        PolicyError: an option is unknown, or its value of another type.
    """
    hints = typing.get_type_hints(factory)
    known = factory.option_names()
    values = {}
    for key, value in raw_options(name, text, factory.positional).items():
        if key not in known:
            raise PolicyError(f"{name}: unknown option '{key}'; {suggestion(key, known)}")
        values[key] = _convert(value, hints[key], f"{name}: {key}")
    try:
        return factory(**values)
    except TypeError as error:
        raise PolicyError(f"{name}: {error}; its options are: {', '.join(known) or 'none'}") from error


def _convert(text: str, hint: Any, what: str) -> Any:
    """Read ``text`` as the annotated type of an option: number, bool, str, tuple of numbers, or None if allowed."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    kind = next(k for k in kinds if k is not type(None))
    readers: Mapping[Any, tuple[Any, str]] = {
        int: (int, "a whole number"),
        float: (float, "a number"),
        str: (str, "text"),
        bool: (lambda t: {"true": True, "false": False}[t.lower()], "true or false"),
        tuple[int, ...]: (lambda t: tuple(int(i) for i in t.split()), "whole numbers separated by spaces"),
        tuple[float, ...]: (lambda t: tuple(float(i) for i in t.split()), "numbers separated by spaces"),
    }
    if kind not in readers:
        raise PolicyError(f"{what} cannot be set in a policy string (it is of type {kind}); build the policy in Python")
    read, wanted = readers[kind]
    try:
        value = read(text)
    except (ValueError, KeyError) as error:
        raise PolicyError(f"{what} takes {wanted}; got '{text}'") from error
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        raise PolicyError(f"{what} takes a finite number; got '{text}'")
    if any(isinstance(n, int) and abs(n) >= 1 << 63 for n in numbers):
        raise PolicyError(f"{what} takes whole numbers of 64 bits; got '{text}'")
    return value


def spell(part: Configurable) -> str:
    """Return the string that makes one policy part."""
    options = []
    defaults = {f.name: f.default for f in fields(part)}  # type: ignore[arg-type]
    for key, value in part.options().items():
        if value != defaults[key]:
            options.append(f"{key}={' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    name = part.name
    return name + (":" + ",".join(options) if options else "")

"""The bundle of a layer policy, shortcuts and a token policy: from a string, to a folder and back."""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from anee_core.cache_policies.full import FullCachePolicy
from anee_core.checkpoint import CheckpointFormat
from anee_core.controllers.dense import DenseController
from anee_core.errors import CheckpointError, PolicyError, suggestion
from anee_core.hub import fetch, is_repository
from anee_core.interfaces import CachePolicy, Calibration, Configurable, Controller, Profiler, Shortcut
from anee_core.ledger import check_budget
from anee_core.plugins import Plugins, Registry
from anee_core.profiler import SignalProfiler

_FORMAT = CheckpointFormat(
    name="policy",
    what="policy",
    missing="a policy folder has policy.json and policy.safetensors",
    remedy="save it again",
    renew="save the policy with this version",
)
_PLURALS = {"controller": "layer policies", "cache_policy": "token policies", "shortcut": "shortcuts"}


@dataclass(frozen=True)
class Policy:
    """What decides: a controller for layers, a cache policy for tokens, and the profiler that serves them.

    ``shortcut`` is what tokens get in the place of a layer that they skip, if anything. ``calibration`` is what the
    controller was bound with, ``budget`` and ``hard`` what it was bound to, if they came with the policy.
    """

    controller: Controller = field(default_factory=DenseController)
    cache_policy: CachePolicy = field(default_factory=FullCachePolicy)
    profiler: Profiler = field(default_factory=SignalProfiler)
    calibration: Calibration | None = None
    budget: float | None = None
    hard: bool = False
    shortcut: Shortcut | None = None

    @property
    def feeds_back(self) -> bool:
        """Whether a token's decisions depend on the model's output for earlier tokens."""
        return any(name in self.profiler.feedback for name in self.controller.signals)

    def __str__(self) -> str:
        """Return the policy string that makes this policy."""
        parts = (self.controller, self.shortcut, self.cache_policy)
        return "+".join(_spell(part) for part in parts if part is not None and not isinstance(part, FullCachePolicy))

    def with_trained(self, folders: Mapping[str, Path]) -> Policy:
        """Return the policy with its trained parts' folders filled in where they name none, by the part's name."""
        return self._with_folders(lambda name, folder: folder or folders.get(name, ""))

    def untrained(self) -> frozenset[str]:
        """Return the names of the parts that need trained weights and name no folder with any."""
        parts = (self.controller, self.cache_policy, self.shortcut)
        trained = [part for part in parts if part is not None and part.checkpoint is not None]
        return frozenset(part.name for part in trained if not part.options()["folder"] and not part.holds_weights)

    def enclosed(self) -> Policy:
        """Return the policy as a saved one holds it: with its trained parts' folders inside its own."""
        return self._with_folders(lambda name, folder: name)

    def _with_folders(self, place: Callable[[str, str], str | Path]) -> Policy:
        """Return the policy with its trained parts' folders moved: ``place`` gets a part's name and its folder."""

        def moved(part: Any) -> Any:
            trained = part is not None and part.checkpoint is not None and not part.holds_weights
            return replace(part, folder=str(place(part.name, part.folder))) if trained else part

        parts = {name: moved(getattr(self, name)) for name in ("controller", "cache_policy", "shortcut")}
        return replace(self, **parts)

    def save(self, folder: str | Path) -> None:
        """Write the policy as JSON plus safetensors; what was trained for it is copied into folders beside.

        Raises:
            CheckpointError: the folder cannot be written, or the policy has what no file holds: a profiler other than
                the standard one, or weights in memory.
        """
        if type(self.profiler) is not SignalProfiler:
            raise CheckpointError(
                f"a policy with its own profiler ({type(self.profiler).__name__}) cannot be saved: its folder holds "
                "layer and token policy only"
            )
        for part in (self.controller, self.cache_policy, self.shortcut):
            if part is not None and part.holds_weights:
                raise CheckpointError(
                    f"{part.name} has weights in memory: save those to a folder, and name it in the policy"
                )
            if part is not None and part.checkpoint is not None:
                part.checkpoint.copy(part.options()["folder"], Path(folder) / part.name)
        inside = self.enclosed()
        header: dict[str, Any] = {"layers": _spell(inside.controller), "tokens": _spell(inside.cache_policy)}
        header.update(budget=self.budget, hard=self.hard)
        if inside.shortcut is not None:
            header["shortcut"] = _spell(inside.shortcut)
        tensors = {}
        if self.calibration is not None:
            header["calibration"] = {"fingerprint": self.calibration.fingerprint, "source": self.calibration.source}
            tensors = {"importance": self.calibration.importance, "confidence": self.calibration.confidence}
        _FORMAT.write(folder, header, tensors)

    @classmethod
    def load(cls, folder: str | Path, plugins: Plugins) -> Policy:
        """Read what `save` wrote; nothing missing, nothing extra.

        Raises:
            CheckpointError: a file is missing, corrupt or of another schema.
        """
        path = Path(folder)
        header, tensors = _FORMAT.read(path)
        wanted = {"importance", "confidence"} if "calibration" in header else set()
        optional = {"calibration", "shortcut"} & set(header)
        expected = {"layers", "tokens", "budget", "hard"} | optional
        if set(tensors) != wanted or set(header) != expected:
            raise CheckpointError(
                f"the policy in {path} has keys {sorted(header)} and tensors {sorted(tensors)}, "
                f"expected {sorted(expected)} and {sorted(wanted)}"
            )
        try:
            shortcut = f"+{header['shortcut']}" if "shortcut" in header else ""
            policy = parse_policy(f"{header['layers']}+{header['tokens']}{shortcut}", plugins)
        except PolicyError as error:
            raise CheckpointError(f"the policy in {path} cannot be made here: {error}") from error
        policy = policy._with_folders(lambda name, inside: path / inside)
        budget, hard = header["budget"], header["hard"]
        if budget is not None:
            check_budget(budget)
        if not isinstance(hard, bool):
            raise CheckpointError(f"'hard' of the policy in {path} is neither true nor false; save it again")
        if not wanted:
            return replace(policy, budget=budget, hard=hard)
        origin = header["calibration"]
        if not isinstance(origin, dict) or set(origin) != {"fingerprint", "source"}:
            raise CheckpointError(f"the policy in {path} does not say what its calibration is of; save it again")
        for name, tensor in tensors.items():
            if tensor.dim() != 1 or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise CheckpointError(f"'{name}' of the policy in {path} is no list of finite numbers; save it again")
        calibration = Calibration(tensors["importance"], tensors["confidence"], **origin)
        return replace(policy, calibration=calibration, budget=budget, hard=hard)


def make_policy(given: str | Path | Policy | Controller | CachePolicy | None, plugins: Plugins) -> Policy:
    """Return a policy from whatever a user may pass: a string, a folder, a policy or one of its parts."""
    match given:
        case None:
            return Policy()
        case Policy():
            return given
        case Controller():
            return Policy(controller=given)
        case CachePolicy():
            return Policy(cache_policy=given)
        case str():
            return parse_policy(given, plugins)
        case Path():
            return Policy.load(given, plugins)
    got = f"the class {given.__name__}: pass an instance" if isinstance(given, type) else type(given).__name__
    raise PolicyError(f"a policy is a string, a folder, a Policy, a Controller or a CachePolicy; got {got}")


def parse_policy(text: str, plugins: Plugins) -> Policy:
    """Read a policy string: ``name[:option=value,...]``, a layer policy, shortcuts and a token policy joined by ``+``.

    A string that names a folder with a saved policy loads it, and so does one that names a repository on the hub.

    Raises:
        PolicyError: unknown name or option, wrong value, two policies of one kind, or shortcuts with nothing to skip.
        CheckpointError: the folder's policy cannot be read.
    """
    if os.path.isfile(os.path.join(text, _FORMAT.header)):  # unlike Path.is_file, False for a name that is too long
        return Policy.load(text, plugins)
    found: dict[str, Any] = {}
    # A plus that joins stands before a name; that of a number like 1e+3 does not.
    parts = _joined_folders(re.split(r"\+(?!\d)", text))
    for piece in parts:
        name, _, options = piece.partition(":")
        name = name.strip()
        if not name:
            raise PolicyError(f"'{text}' has an empty part; a policy string is like 'heuristic' or 'static:skip=5 14'")
        registry = plugins.policy_part(name)
        if registry is None and os.path.isdir(text):
            raise CheckpointError(f"the folder '{text}' holds no saved policy: it has no {_FORMAT.header}")
        if registry is None and is_repository(text):
            return Policy.load(fetch(text), plugins)
        if registry is None:
            known = [*plugins.policies, *plugins.controllers, *plugins.cache_policies, *plugins.shortcuts]
            raise PolicyError(f"unknown policy '{name}'; {suggestion(name, known)}")
        if registry is plugins.policies and len(parts) == 1:
            return _bundle(registry[name], name, options)
        for kind, part in _parts(registry, name, options, plugins).items():
            if kind in found:
                raise PolicyError(f"'{text}' names two {_PLURALS[kind]}; join one layer policy and one token policy")
            found[kind] = part
    if "shortcut" in found and found.get("controller", DenseController()).runs_all:
        raise PolicyError(
            f"'{text}' has shortcuts but skips no layer: join them with a layer policy, as in 'random:p=0.3+shortcuts'"
        )
    return Policy(**found)


def _joined_folders(pieces: list[str]) -> list[str]:
    """Join again what was a folder with a plus in its name."""
    found: list[str] = []
    for piece in pieces:
        if found and ":" in found[-1] and os.path.isdir(f"{found[-1]}+{piece}".partition(":")[2]):
            found[-1] += f"+{piece}"
        else:
            found.append(piece)
    return found


def _parts(registry: Registry, name: str, options: str, plugins: Plugins) -> dict[str, Any]:
    """Return what one part of a policy string brings, by field of `Policy`."""
    if registry is plugins.controllers:
        return {"controller": _configure(registry[name], name, options)}
    if registry is plugins.cache_policies:
        return {"cache_policy": _configure(registry[name], name, options)}
    if registry is plugins.shortcuts:
        return {"shortcut": _configure(registry[name], name, options)}
    whole = _bundle(registry[name], name, options)
    parts: dict[str, Any] = {}
    if not isinstance(whole.controller, DenseController):
        parts["controller"] = whole.controller
    if not whole.cache_policy.keeps_all:
        parts["cache_policy"] = whole.cache_policy
    if whole.shortcut is not None:
        parts["shortcut"] = whole.shortcut
    return parts


def _bundle(factory: Any, name: str, options: str) -> Policy:
    try:
        return typing.cast(Policy, factory(**_raw_options(name, options)))
    except TypeError as error:
        raise PolicyError(f"{name}: {error}") from error


def _raw_options(name: str, text: str, positional: str | None = None) -> dict[str, str]:
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


def _configure(factory: type[Configurable], name: str, text: str) -> Any:
    hints = typing.get_type_hints(factory)
    known = factory.option_names()
    values = {}
    for key, value in _raw_options(name, text, factory.positional).items():
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
    return value


def _spell(part: Configurable) -> str:
    """Return the string that makes one policy part."""
    options = []
    defaults = {f.name: f.default for f in fields(part)}  # type: ignore[arg-type]
    for key, value in part.options().items():
        if value != defaults[key]:
            options.append(f"{key}={' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    name: str = part.name  # type: ignore[attr-defined]
    return name + (":" + ",".join(options) if options else "")

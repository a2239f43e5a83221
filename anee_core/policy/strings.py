"""Policy strings, and whatever else a user may pass as a policy."""

from __future__ import annotations

import logging
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from anee_core.accounting.budget import SLACK, check_budget
from anee_core.controllers.dense import DenseController
from anee_core.errors import CheckpointError, PolicyError, suggestion
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.interfaces.setting import Calibration
from anee_core.plugins import Plugins, Registry
from anee_core.policy.hub import fetch, is_address
from anee_core.policy.options import configure, raw_options
from anee_core.policy.policy import POLICY_FORMAT, Policy
from anee_core.policy.profiler import STANDARD, SignalProfiler

logger = logging.getLogger(__name__)

_LONGEST = 10_000
"""Most characters of a policy string: folders may have long names, and models many layers."""
_PLURALS = {"controller": "layer policies", "cache_policy": "token policies", "shortcut": "shortcuts"}


def make_policy(given: str | Path | Policy | Controller | CachePolicy | None, plugins: Plugins) -> Policy:
    """Return a policy from whatever a user may pass: a string, a folder, a policy or one of its parts."""
    match given:
        case None:
            return Policy(asked="dense")
        case Policy():
            return _profiled(given, plugins)
        case Controller():
            return _profiled(Policy(controller=given), plugins)
        case CachePolicy():
            return Policy(cache_policy=given)
        case str():
            return parse_policy(given, plugins)
        case Path():
            return load_policy(given, plugins)
    got = f"the class {given.__name__}: pass an instance" if isinstance(given, type) else type(given).__name__
    raise PolicyError(f"a policy is a string, a folder, a Policy, a Controller or a CachePolicy; got {got}")


def parse_policy(text: str, plugins: Plugins) -> Policy:
    """Read a policy string: ``name[:option=value,...]``, a layer policy, shortcuts and a token policy joined by ``+``.

    A string that names a folder with a saved policy loads it, and so does one that names a repository on the hub,
    ``OWNER/NAME`` or ``OWNER/NAME@REVISION``. One that begins with the name of an installed policy is never a folder.

    Raises:
        PolicyError: unknown name or option, wrong value, two policies of one kind, or shortcuts with nothing to skip.
        CheckpointError: the folder's policy cannot be read.
    """
    # Unlike Path.is_file, this is False for a name that is too long.
    saved = os.path.isfile(os.path.join(text, POLICY_FORMAT.header))
    begin = re.split(r"[:+]", text)[0].strip()
    if plugins.policy_part(begin) is not None:
        if saved:
            logger.warning("'%s' is the installed policy; the one in the folder of that name is './%s'", text, text)
        return _joined(text, plugins)
    if saved:
        return load_policy(text, plugins)
    if os.path.isdir(text):
        raise CheckpointError(f"the folder '{text}' holds no saved policy: it has no {POLICY_FORMAT.header}")
    return load_policy(fetch(text), plugins) if is_address(text) else _joined(text, plugins)


def _joined(text: str, plugins: Plugins) -> Policy:
    """Return the policy whose parts a policy string names."""
    if len(text) > _LONGEST or not text.isprintable():
        raise PolicyError(
            f"a policy string has at most {_LONGEST:,} characters, all printable; got {len(text):,}: {text[:60]!r}..."
        )
    found: dict[str, Any] = {}
    # A plus that joins stands before a name; that of a number like 1e+3 does not.
    parts = _joined_folders(re.split(r"\+(?!\d)", text))
    for piece in parts:
        name, _, options = piece.partition(":")
        name = name.strip()
        if not name:
            raise PolicyError(f"'{text}' has an empty part; a policy string is like 'heuristic' or 'static:skip=5 14'")
        registry = plugins.policy_part(name)
        if registry is None:
            known = [*plugins.policies, *plugins.controllers, *plugins.cache_policies, *plugins.shortcuts]
            raise PolicyError(f"unknown policy '{name}'; {suggestion(name, known)}")
        if registry is plugins.policies and len(parts) == 1:
            return _profiled(replace(_bundle(registry[name], name, options), asked=text.strip()), plugins)
        for kind, part in _parts(registry, name, options, plugins).items():
            if kind in found:
                raise PolicyError(f"'{text}' names two {_PLURALS[kind]}; join one layer policy and one token policy")
            found[kind] = part
    if "shortcut" in found and found.get("controller", DenseController()).runs_all:
        raise PolicyError(
            f"'{text}' has shortcuts but skips no layer: join them with a layer policy, as in 'random:p=0.3+shortcuts'"
        )
    return _profiled(Policy(**found, asked=text.strip()), plugins)


def _profiled(policy: Policy, plugins: Plugins) -> Policy:
    """Return the policy with the profiler that its controller names, unless it brings one of its own.

    Raises:
        PolicyError: no such profiler is installed, or it does not know a signal that the controller wants.
    """
    name, wanted = policy.controller.profiler, policy.controller.signals
    if name == STANDARD or type(policy.profiler) is not SignalProfiler:
        return policy
    profiler = plugins.profilers.require(name, PolicyError, "profiler")()
    unknown = [signal for signal in wanted if signal not in profiler.names]
    if unknown:
        raise PolicyError(
            f"{policy.controller.name}: the profiler '{name}' knows no signal '{unknown[0]}'; "
            f"{suggestion(unknown[0], profiler.names)}"
        )
    return replace(policy, profiler=profiler)


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
        return {"controller": configure(registry[name], name, options)}
    if registry is plugins.cache_policies:
        return {"cache_policy": configure(registry[name], name, options)}
    if registry is plugins.shortcuts:
        return {"shortcut": configure(registry[name], name, options)}
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
        return typing.cast(Policy, factory(**raw_options(name, options)))
    except TypeError as error:
        raise PolicyError(f"{name}: {error}") from error


def load_policy(folder: str | Path, plugins: Plugins) -> Policy:
    """Read what `Policy.save` wrote; nothing missing, nothing extra.

    Raises:
        CheckpointError: a file is missing, corrupt or of another schema.
    """
    path = Path(folder)
    header, tensors = POLICY_FORMAT.read(path)
    wanted = {"importance", "confidence"} if "calibration" in header else set()
    optional = {"calibration", "shortcut"} & set(header)
    expected = {"layers", "tokens", "budget", "hard", "trained"} | optional
    if set(tensors) != wanted or set(header) != expected:
        raise CheckpointError(
            f"the policy in {path} has keys {sorted(header)!s:.300} and tensors {sorted(tensors)!s:.300}, "
            f"expected {sorted(expected)} and {sorted(wanted)}"
        )
    spelled = [header[key] for key in ("layers", "shortcut", "tokens") if key in header]
    budget, hard, trained = header["budget"], header["hard"], header["trained"]
    if not all(isinstance(part, str) for part in spelled) or not isinstance(trained, dict):
        raise CheckpointError(f"the policy in {path} does not say what it is made of; save it again")
    try:
        policy = _joined("+".join(spelled), plugins)
        if budget is not None:
            check_budget(budget)
    except PolicyError as error:
        raise CheckpointError(f"the policy in {path} cannot be made here: {error!s:.500}") from error
    if not isinstance(hard, bool):
        raise CheckpointError(f"'hard' of the policy in {path} is neither true nor false; save it again")
    for part in (policy.controller, policy.cache_policy, policy.shortcut):
        if part is None or part.checkpoint is None:
            continue
        named = part.options()["folder"]
        if named != part.name:
            raise CheckpointError(f"the policy in {path} reaches outside its folder ('{named}'); do not use it")
        if part.checkpoint.checksum_of(path / named) != trained.get(named):
            raise CheckpointError(f"the {part.checkpoint.what} in {path} is not the one saved there; save it again")
    # It is known by what it does, and not by where it was found.
    policy = replace(policy.with_folders(lambda name, inside: path / inside), asked="", budget=budget, hard=hard)
    return replace(policy, calibration=_calibration(path, header["calibration"], tensors)) if wanted else policy


def _calibration(path: Path, origin: Any, tensors: Mapping[str, Tensor]) -> Calibration:
    """Return the calibration that a saved policy brings.

    Raises:
        CheckpointError: it makes no sense.
    """
    texts = isinstance(origin, dict) and all(isinstance(text, str) for text in origin.values())
    if not texts or set(origin) != {"fingerprint", "source"}:
        raise CheckpointError(f"the policy in {path} does not say what its calibration is of; save it again")
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or not tensor.numel():
            raise CheckpointError(f"'{name}' of the policy in {path} is no list of numbers; save it again")
    quantiles = tensors["confidence"].float()
    # Interpolation may leave two of them out of order by a rounding.
    if quantiles.min() < 0 or quantiles.max() > 1 + SLACK or (quantiles.diff() < -SLACK).any():
        raise CheckpointError(f"'confidence' of the policy in {path} are no rising probabilities; save it again")
    return Calibration(tensors["importance"], tensors["confidence"], **origin)

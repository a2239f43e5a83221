"""The built-in profiler and policies, entered through the same hooks as everyone else's."""

from __future__ import annotations

from collections.abc import Callable

from anee_core.cache_policies.asa import AsaCachePolicy
from anee_core.cache_policies.full import FullCachePolicy
from anee_core.cache_policies.h2o import H2OCachePolicy
from anee_core.cache_policies.knorm import KeyNormCachePolicy
from anee_core.cache_policies.random_tokens import RandomTokensCachePolicy
from anee_core.cache_policies.snapkv import SnapKVCachePolicy
from anee_core.cache_policies.tova import TovaCachePolicy
from anee_core.cache_policies.window import WindowCachePolicy
from anee_core.controllers.dense import DenseController
from anee_core.controllers.gate import GateController
from anee_core.controllers.heuristic import HeuristicController
from anee_core.controllers.random import RandomController
from anee_core.controllers.static import StaticController
from anee_core.hookspecs import hookimpl
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.interfaces.profiler import Profiler
from anee_core.interfaces.shortcut import Shortcut
from anee_core.policy.policy import Policy
from anee_core.policy.profiler import STANDARD, SignalProfiler
from anee_core.policy.shortcuts import LowRankShortcut


@hookimpl
def anee_profilers() -> dict[str, type[Profiler]]:
    """Return the standard profiler."""
    return {STANDARD: SignalProfiler}


@hookimpl
def anee_controllers() -> dict[str, type[Controller]]:
    """Return the layer policies."""
    known = (DenseController, StaticController, RandomController, HeuristicController, GateController)
    return {c.name: c for c in known}


@hookimpl
def anee_cache_policies() -> dict[str, type[CachePolicy]]:
    """Return the token policies."""
    scored = (H2OCachePolicy, TovaCachePolicy, KeyNormCachePolicy, SnapKVCachePolicy, RandomTokensCachePolicy)
    return {p.name: p for p in (FullCachePolicy, WindowCachePolicy, *scored, AsaCachePolicy)}


def learned_depth(folder: str = "") -> Policy:
    """Return the policy "rl": a gate and shortcuts that were trained together, or fitted on first use.

    Args:
        folder: holds both. Default: what is installed for the model, or else fitted for it.
    """
    return Policy(GateController(folder), shortcut=LowRankShortcut(folder))


@hookimpl
def anee_policies() -> dict[str, Callable[..., Policy]]:
    """Return whole policies."""
    return {"rl": learned_depth}


@hookimpl
def anee_shortcuts() -> dict[str, type[Shortcut]]:
    """Return the fitted shortcuts."""
    return {LowRankShortcut.name: LowRankShortcut}

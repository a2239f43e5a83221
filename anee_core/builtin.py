"""The built-in profiler and policies, entered through the same hooks as everyone else's."""

from __future__ import annotations

from collections.abc import Callable

from anee_core.cache_policies import (
    AsaCachePolicy,
    FullCachePolicy,
    H2OCachePolicy,
    KeyNormCachePolicy,
    RandomTokensCachePolicy,
    SnapKVCachePolicy,
    TovaCachePolicy,
    WindowCachePolicy,
)
from anee_core.controllers import (
    DenseController,
    GateController,
    HeuristicController,
    RandomController,
    StaticController,
)
from anee_core.hookspecs import hookimpl
from anee_core.interfaces import CachePolicy, Controller, Profiler, Shortcut
from anee_core.policy import Policy
from anee_core.profiler import SignalProfiler
from anee_core.shortcuts import LowRankShortcut


@hookimpl
def anee_profilers() -> dict[str, type[Profiler]]:
    """Return the standard profiler."""
    return {"signals": SignalProfiler}


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
        folder: with both. Default: what is installed for the model, or else fitted for it.
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

"""The hooks through which everything enters ANEE, the built-in parts included.

A plugin is a module (or object) named by an entry point of the group ``anee``. It implements any of these hooks with
`hookimpl`; each returns a mapping from a name to what provides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
import torch

from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.interfaces.profiler import Profiler
from anee_core.interfaces.shortcut import Shortcut

PROJECT = "anee"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class SourceRequest:
    """What a model source is asked for."""

    dtype: torch.dtype | None
    """Floating-point type that the model is to have; None for as stored."""
    device: str | torch.device | None
    """Device that the model is to be on; None to leave that to the source."""


ModelSource = Callable[[SourceRequest], tuple[Any, Any]]
"""A function that returns a loaded causal LM and its tokenizer (or None)."""


class Hooks:
    """All hook specifications."""

    @hookspec
    def anee_adapters(self) -> Mapping[str, ModelAdapter]:  # type: ignore[empty-body]
        """Return adapters by the ``model_type`` of the transformers configs they serve."""

    @hookspec
    def anee_profilers(self) -> Mapping[str, type[Profiler]]:  # type: ignore[empty-body]
        """Return profilers by name."""

    @hookspec
    def anee_controllers(self) -> Mapping[str, type[Controller]]:  # type: ignore[empty-body]
        """Return layer policies by the name that a policy string uses; their fields are the options."""

    @hookspec
    def anee_cache_policies(self) -> Mapping[str, type[CachePolicy]]:  # type: ignore[empty-body]
        """Return token policies by the name that a policy string uses; their fields are the options."""

    @hookspec
    def anee_shortcuts(self) -> Mapping[str, type[Shortcut]]:  # type: ignore[empty-body]
        """Return shortcuts of skipped layers by the name that a policy string uses; their fields are the options."""

    @hookspec
    def anee_policies(self) -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]
        """Return factories of whole policies by name; the options of the string arrive as keyword strings."""

    @hookspec
    def anee_model_sources(self) -> Mapping[str, ModelSource]:  # type: ignore[empty-body]
        """Return loaders of models by the name that `anee.load` takes."""

    @hookspec
    def anee_trained_policies(self) -> Mapping[str, Path]:  # type: ignore[empty-body]
        """Return folders with what was trained for a model, by ``MODEL/POLICY``.

        MODEL is what the model's config says under ``anee_backbone``, POLICY the name that a policy string uses.
        """

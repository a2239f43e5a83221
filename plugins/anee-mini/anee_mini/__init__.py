"""A small GPT-2 as a named model source of ANEE, and what was trained for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from anee_core.hookspecs import ModelSource, hookimpl


@hookimpl
def anee_model_sources() -> Mapping[str, ModelSource]:
    """Return the source by its name."""
    from anee_mini.source import load_mini

    return {"mini": load_mini}


@hookimpl
def anee_trained_policies() -> Mapping[str, Path]:
    """Return the folders with weights of policies; the model's config has the same name."""
    here, model = Path(__file__).parent, "anee-mini-1"
    return {f"{model}/asa": here / "asa", f"{model}/gate": here / "rl", f"{model}/shortcuts": here / "rl"}

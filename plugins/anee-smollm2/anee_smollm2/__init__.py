"""SmolLM2-135M-Instruct as a named model source of ANEE, and what was trained for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from anee_core.hookspecs import ModelSource, hookimpl


@hookimpl
def anee_model_sources() -> Mapping[str, ModelSource]:
    """Return the sources by their names."""
    from anee_smollm2.source import load_smollm2, load_smollm2_asa

    return {"smollm2": load_smollm2, "smollm2-asa": load_smollm2_asa}


@hookimpl
def anee_trained_policies() -> Mapping[str, Path]:
    """Return the folders with weights of policies; the sources give the model's config the same names."""
    here, model = Path(__file__).parent, "smollm2-135m-instruct"
    return {
        f"{model}/asa": here / "asa",
        f"{model}/gate": here / "rl",
        f"{model}/shortcuts": here / "rl",
        f"{model}-asa/asa": here / "adapter",
    }

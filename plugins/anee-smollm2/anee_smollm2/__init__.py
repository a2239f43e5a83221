"""SmolLM2-135M-Instruct as a named model source of ANEE."""

from __future__ import annotations

from collections.abc import Mapping

from anee_core.hookspecs import ModelSource, hookimpl


@hookimpl
def anee_model_sources() -> Mapping[str, ModelSource]:
    """Return the source by its name."""
    from anee_smollm2.source import load_smollm2

    return {"smollm2": load_smollm2}

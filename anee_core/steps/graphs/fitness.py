"""Whether a model's layers can be captured."""

from __future__ import annotations

from dataclasses import dataclass

from anee_core.adapter.instrumentation import hooked
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.steps.reference import devices_of


@dataclass(frozen=True)
class CapturedModel:
    """Whether a model's layers can be captured, and where their weights lie."""

    unfit: str | None
    """Why they cannot be captured; None if they can."""
    addresses: tuple[int, ...]
    """Address of each of their parameters."""

    @classmethod
    def of(cls, adapter: ModelAdapter, parts: Parts) -> CapturedModel:
        """Look at a model as it is now."""
        layers, recipe = parts.layers, adapter.recipe(parts.config)
        unfit = None
        if recipe is None or type(layers[0]).__name__ not in recipe.layers:
            unfit = f"there is no recipe for a {type(layers[0]).__name__}"
        elif len(set(devices_of(parts))) > 1:
            unfit = "its layers lie on several devices"
        elif any(hooked(module) for layer in layers for module in layer.modules()):
            unfit = "some of its modules are hooked"
        elif any(layer.training for layer in layers):
            unfit = "it is in training mode"
        return cls(unfit, tuple(p.data_ptr() for layer in layers for p in layer.parameters()))

"""The fast layer step, in C++ for the CPU."""

from anee_core.adapter import ModelAdapter
from anee_core.deferral import DeferredStep
from anee_core.layer_step import LayerStep, ReferenceStep
from anee_core.layout import Parts
from anee_core.native.step import NativeStep


def step_for(adapter: ModelAdapter, parts: Parts, fast: bool) -> LayerStep:
    """Return how layers are run: as fast as possible, or by the model's own modules."""
    return DeferredStep(NativeStep(adapter, parts)) if fast else ReferenceStep(adapter, parts)

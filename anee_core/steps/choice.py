"""Which layer step is the fast one for a model."""

from __future__ import annotations

import torch

from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.steps.deferred import DeferredStep
from anee_core.steps.graphs.graph_step import GraphStep
from anee_core.steps.layer_step import LayerStep
from anee_core.steps.native.step import NativeStep
from anee_core.steps.reference import ReferenceStep

_WORTH_DEFERRING = 1 << 20
"""Bytes of a layer's key and value projections: below it, reading them is over sooner than keeping accounts."""


def step_for(adapter: ModelAdapter, parts: Parts, fast: bool) -> LayerStep:
    """Return how layers are run: as fast as possible, or by the model's own modules.

    The native step takes blocks on the CPU, graphs take them on a GPU; both leave the rest to the model's modules.
    """
    if not fast:
        return ReferenceStep(adapter, parts)
    step: LayerStep = NativeStep(adapter, parts)
    size = 2 * adapter.kv_width(parts.config) * parts.config.hidden_size * parts.model.dtype.itemsize
    if size >= _WORTH_DEFERRING:
        step = DeferredStep(step)
    return GraphStep(step, adapter, parts) if torch.cuda.is_available() else step

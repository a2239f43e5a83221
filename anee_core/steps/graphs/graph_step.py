"""Decoding on a GPU by captured graphs: a layer's kernels are launched together, and Python is out of their way.

A graph repeats what was captured, on the same addresses. So whatever changes from token to token lies in buffers that
stay: hidden states, positions, rotary angles, masks over all the slots there is room for, the slot of the new token.
The layers' graphs hand the hidden states on in one of them, and a layer that a token skips has a graph of its own: a
forward is a choice of graphs, launched one after the other, without a question to the device in between. Where a
linear gate decides, one graph holds all layers, each under a condition.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anee_core.accounting.token_state import TokenState
from anee_core.adapter.instrumentation import undisturbed
from anee_core.adapter.layer_call import LayerCall
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.interfaces.shortcut import Shortcut
from anee_core.steps.calls import GateCall, LayerInput, Stack
from anee_core.steps.graphs.buffers import Graphs, SlotWriter
from anee_core.steps.graphs.capture import Capture, CudaCapture
from anee_core.steps.graphs.fitness import CapturedModel
from anee_core.steps.graphs.workspace import Workspace
from anee_core.steps.layer_step import LayerStep, StepAround

logger = logging.getLogger(__name__)


class GraphStep(StepAround):
    """Replay graphs of layers where that is possible, and leave everything else to another step.

    It is possible for one new token per row, without gradients, if the whole batch runs or skips a layer and all
    layers hold the same slots, for families with a `Recipe`: their layers ask the device no questions. Graphs are
    captured for a cache from its second token on, and hold as long as its storage stays where it is.

    Args:
        step: does what is not captured.
        adapter: knows the model's family.
        parts: the model's modules.
        capture: captures work; None for CUDA graphs.
        device: type of the devices on which it captures.
    """

    def __init__(
        self,
        step: LayerStep,
        adapter: ModelAdapter,
        parts: Parts,
        capture: Capture | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__(step)
        self._adapter, self._parts, self._device = adapter, parts, device
        self._capture = capture or CudaCapture()
        self._own = Workspace()
        self._model = CapturedModel(None, ())
        self._failed: str | None = None
        self._undivided: str | None = None
        """Why a gate cannot decide within a graph, if it cannot."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes a copy, which captures its own model."""
        capture = None if isinstance(self._capture, CudaCapture) else self._capture
        return type(self), (self._step, self._adapter, self._parts, capture, self._device)

    @property
    def slow_because(self) -> str | None:
        """Why nothing is captured where it might be; elsewhere what the other step says."""
        captures = self._parts.embedding.weight.device.type == self._device
        return (self._failed or self._model.unfit) if captures else super().slow_because

    @property
    def takes_all(self) -> bool:
        """Whether graphs stand ready for the block, or the other step takes it."""
        return self._own.graphs is not None or super().takes_all

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Look at a block [B, T, D], and find the graphs that were captured for its cache."""
        super().begin(hidden_states, cache)
        own, length = self._own, hidden_states.shape[1]
        own.graphs = None
        if self._failed or hidden_states.device.type != self._device or not undisturbed(hidden_states.device):
            return
        # Nobody changes a model between the tokens of a generation.
        if cache.seen == 0 or length > 1 or not self._model.addresses:
            self._model = CapturedModel.of(self._adapter, self._parts)
        if length > 1 or self._model.unfit is not None:
            return
        stores = [(layer.keys, layer.values) for layer in cache.layers]
        alike = all(slots is cache.slots[0] for slots in cache.slots)
        if not alike or stores[0][0] is None:
            return
        addresses = tuple(tensor.data_ptr() for pair in stores for tensor in pair)
        key = self._model.addresses, addresses, stores[0][0].shape, hidden_states.dtype
        own.graphs = own.find(key, hidden_states, stores[0][0].shape[2])
        if own.graphs is not None:
            cache.settle_all()
            own.graphs.begin(*cache.span(0))

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Launch one graph per layer, if the batch is of one mind about each."""
        graphs = self._own.graphs
        if graphs is None:
            return super().all_layers(hidden_states, stack, cache)
        first = stack.states[:, :1]
        if stack.dropping is not None or not bool(((stack.states == first) & (first >= TokenState.SKIPPED)).all()):
            return None
        if stack.gate is not None:
            return self._gated(graphs, hidden_states, stack, stack.gate, cache)
        graphs.states.copy_(hidden_states)
        for layer_idx, state in enumerate(first.flatten().tolist()):
            if state == TokenState.RUNS:
                self._run(graphs, layer_idx, stack.call, stack.masks[layer_idx], cache)
            else:
                self._skip(graphs, layer_idx, stack.call, stack.shortcut, cache)
        return graphs.states.clone()

    def run(self, given: LayerInput, mask: Tensor | None) -> Tensor:
        """Launch a layer's graph for a whole batch."""
        graphs = self._own.graphs
        if graphs is None or given.places is not None:
            return super().run(given, mask)
        graphs.states.copy_(given.hidden_states)
        self._run(graphs, given.layer_idx, given.call, mask, given.cache)
        return graphs.states.clone()

    def propagate(self, given: LayerInput) -> None:
        """Launch the graph of a layer that a whole batch skips."""
        graphs = self._own.graphs
        if graphs is None or given.places is not None:
            return super().propagate(given)
        graphs.states.copy_(given.hidden_states)
        return self._skip(graphs, given.layer_idx, given.call, None, given.cache)

    def _gated(
        self, graphs: Graphs, hidden_states: Tensor, stack: Stack, call: GateCall, cache: AdaptiveCache
    ) -> Tensor | None:
        """Launch one graph of all layers, in which a gate decides; None if there cannot be such a graph."""
        if self._undivided is not None:
            return None
        graphs.states.copy_(hidden_states)
        gate, shortcut, layers = graphs.gate(call), stack.shortcut, len(self._parts.layers)
        place, held_call = graphs.calls.assign(stack.call)
        masks = [graphs.masks.assign(mask) for mask in stack.masks]
        writers = [SlotWriter(cache, layer_idx, graphs.slot) for layer_idx in range(layers)]

        def run(layer_idx: int, runs: Tensor) -> None:
            # A row that skips the layer gets the same keys and values from it.
            mask, writer = masks[layer_idx][1], writers[layer_idx]
            output = self._adapter.run(self._parts, layer_idx, graphs.states, held_call.with_mask(mask), writer)
            graphs.states.copy_(output.where(runs[:, None, None], _shortened(shortcut, layer_idx, graphs.states)))

        def skip(layer_idx: int) -> None:
            self._project(layer_idx, graphs.states, held_call, writers[layer_idx])
            graphs.states.copy_(_shortened(shortcut, layer_idx, graphs.states))

        def work() -> None:
            wanted = gate.wanted
            for layer_idx in range(layers):
                runs, wanted = gate.decide(layer_idx, graphs.states, wanted)
                if gate.always[layer_idx]:
                    run(layer_idx, runs)
                    continue
                somebody = runs.any()
                nobody = ~somebody
                self._capture.only_if(somebody, partial(run, layer_idx, runs))
                self._capture.only_if(nobody, partial(skip, layer_idx))

        key = "gate", id(gate), place, tuple(which for which, _ in masks), id(shortcut)
        try:
            graphs.launch(key, work, self._capture, keep=(gate, shortcut))
        except RuntimeError as error:
            self._undivided = str(error)
            logger.warning("the gate of %s asks the host at each layer: %s", type(self._parts.model).__name__, error)
            return None
        gate.record(call)
        stack.states.copy_(gate.runs[..., None].to(torch.uint8) + TokenState.SKIPPED)  # the one host read
        return graphs.states.clone()

    def _run(self, graphs: Graphs, layer_idx: int, call: LayerCall, mask: Tensor | None, cache: AdaptiveCache) -> None:
        place, held_call = graphs.calls.assign(call)
        which, seen = graphs.masks.assign(mask)
        writer = SlotWriter(cache, layer_idx, graphs.slot)

        def work() -> None:
            output = self._adapter.run(self._parts, layer_idx, graphs.states, held_call.with_mask(seen), writer)
            graphs.states.copy_(output)

        self._launch(graphs, ("run", layer_idx, place, which), work)

    def _skip(
        self, graphs: Graphs, layer_idx: int, call: LayerCall, shortcut: Shortcut | None, cache: AdaptiveCache
    ) -> None:
        place, held_call = graphs.calls.assign(call)
        writer = SlotWriter(cache, layer_idx, graphs.slot)

        def work() -> None:
            self._project(layer_idx, graphs.states, held_call, writer)
            graphs.states.copy_(_shortened(shortcut, layer_idx, graphs.states))

        self._launch(graphs, ("skip", layer_idx, place, id(shortcut)), work, keep=shortcut)

    def _project(self, layer_idx: int, hidden_states: Tensor, call: LayerCall, writer: SlotWriter) -> None:
        writer.update(*self._adapter.project_kv(self._parts, layer_idx, hidden_states, call), layer_idx)

    def _launch(self, graphs: Graphs, key: Hashable, work: Callable[[], None], keep: object = None) -> None:
        if self._failed is None:
            try:
                return graphs.launch(key, work, self._capture, keep)
            except RuntimeError as error:
                self._failed = f"a layer could not be captured: {error}"
                logger.warning("%s runs by its own modules: %s", type(self._parts.model).__name__, self._failed)
        return work()


def _shortened(shortcut: Shortcut | None, layer_idx: int, hidden_states: Tensor) -> Tensor:
    """Return what a token that skips the layer goes on with, [B, 1, D]."""
    return hidden_states if shortcut is None else hidden_states + shortcut.estimate(layer_idx, hidden_states)

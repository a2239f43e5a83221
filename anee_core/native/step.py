"""The native layer step: a few tokens through one decoder layer in one call, on the model's own weights."""

from __future__ import annotations

import logging
from ctypes import CDLL, addressof
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from anee_core.adapter import LayerCall, ModelAdapter
from anee_core.cache import AdaptiveCache
from anee_core.layer_step import Places, ReferenceStep
from anee_core.layout import Parts
from anee_core.native.build import NoLibraryError, library
from anee_core.native.layers import NativeLayer
from anee_core.native.pointers import Pointers, UnfitError
from anee_core.native.structs import Tokens

logger = logging.getLogger(__name__)

MAX_TOKENS = 32
"""Blocks of more tokens are left to the model's own modules: their matrix products keep the processor busy."""
_BYTES_PER_THREAD = 1 << 18
"""Weights of a layer that are worth a thread of their own."""


class NativeStep:
    """Runs layers in C++ where that is possible, and by `ReferenceStep` elsewhere.

    It is possible on the CPU, for blocks of at most `MAX_TOKENS` tokens, in float32 and bfloat16, without gradients,
    for families with a `Recipe` whose modules are plain: neither quantised, nor wrapped, nor hooked. Weights are read
    where they are, so nothing is copied, and a change of a weight is seen at once.
    """

    def __init__(self, adapter: ModelAdapter, parts: Parts) -> None:
        self._adapter, self._parts = adapter, parts
        self._reference = ReferenceStep(adapter, parts)
        self._library: CDLL | None = None
        self._layers: list[NativeLayer] = []
        self._head: _Head | None = None
        self._scratch = torch.empty(0)
        self._whole: dict[tuple[int, int], _Where] = {}
        self._turned: tuple[LayerCall, tuple[Tensor, Tensor] | None] | None = None
        self._usable = False
        self.reason: str | None = None
        """Why layers run by their own modules, if they do; known after the first forward."""

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Look at a block [B, T, D] before its layers run."""
        count = hidden_states.shape[0] * hidden_states.shape[1]
        self._usable = count <= MAX_TOKENS and _undisturbed(hidden_states)
        if self._usable and (not self._layers or cache.seen == 0 or count > 1) and not self._current():
            self._read_model()
        self._usable = self._usable and bool(self._layers) and hidden_states.dtype == self._layers[0].pointers.dtype

    def run(
        self,
        layer_idx: int,
        hidden_states: Tensor,
        call: LayerCall,
        cache: AdaptiveCache,
        places: Places | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Run a layer; see `LayerStep.run`."""
        if not self._usable:
            return self._reference.run(layer_idx, hidden_states, call, cache, places, mask)
        tokens, keep = self._tokens(layer_idx, hidden_states, call, cache, self._at(hidden_states, places))
        if mask is not None:
            keep.append(mask := mask.to(hidden_states.dtype).contiguous())
            tokens.mask, tokens.mask_stride = mask.data_ptr(), mask.shape[-1]
        columns = hidden_states.shape[:2] if places is None else places[1].shape
        result = hidden_states.new_empty(*columns, hidden_states.shape[-1])
        tokens.result = result.data_ptr()
        assert self._library is not None
        self._library.anee_run(self._layers[layer_idx].address, addressof(tokens))
        return result

    def propagate(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, places: Places | None
    ) -> None:
        """Write keys and values; see `LayerStep.propagate`."""
        if not self._usable:
            return self._reference.propagate(layer_idx, hidden_states, call, cache, places)
        tokens, _keep = self._tokens(layer_idx, hidden_states, call, cache, self._at(hidden_states, places))
        assert self._library is not None
        return self._library.anee_project(self._layers[layer_idx].address, addressof(tokens))

    def settle(
        self, layer_idx: int, hidden_states: Tensor, call: LayerCall, cache: AdaptiveCache, slots: Tensor
    ) -> None:
        """Write keys and values; see `LayerStep.settle`."""
        if not self._usable:
            return self._reference.settle(layer_idx, hidden_states, call, cache, slots)
        batch, length = hidden_states.shape[:2]
        here = self._where(batch, length)
        there = _Where(here.place, here.row, slots.repeat(batch))
        tokens, _keep = self._tokens(layer_idx, hidden_states, call, cache, there, start=0)
        assert self._library is not None
        return self._library.anee_project(self._layers[layer_idx].address, addressof(tokens))

    def head(self, hidden_states: Tensor) -> Any:
        """Return what to apply to normed hidden states [B, T, D] as the model's head."""
        usable = hidden_states.shape[0] * hidden_states.shape[1] <= MAX_TOKENS and _undisturbed(hidden_states)
        if not usable or self._head is None or not self._head.pointers.current:
            return self._parts.head
        return self._head

    def _current(self) -> bool:
        return bool(self._layers) and all(layer.current for layer in self._layers)

    def _read_model(self) -> None:
        """Point to the model's weights as they are now, or find out why that cannot be."""
        before, self.reason = self.reason, None
        self._layers, self._head = [], None
        parts = self._parts
        recipe = self._adapter.recipe(parts.config)
        try:
            if recipe is None:
                raise UnfitError(f"{type(self._adapter).__name__} has no recipe for it")
            if any(layer.training for layer in parts.layers):
                raise UnfitError("it is in training mode")
            layers = [NativeLayer(self._adapter, parts, i, recipe) for i in range(len(parts.layers))]
            self._library = library()
            self._head = _Head(self._library, parts, layers[0].pointers.dtype)
            self._layers = layers
        except (UnfitError, NoLibraryError) as error:
            self.reason = str(error)
            if self.reason != before:
                logger.info("%s runs by its own modules: %s", type(parts.model).__name__, self.reason)

    def _tokens(
        self,
        layer_idx: int,
        hidden_states: Tensor,
        call: LayerCall,
        cache: AdaptiveCache,
        where: _Where,
        start: int | None = None,
    ) -> tuple[Tokens, list[Any]]:
        """Return the struct for some tokens of [B, T, D], and what must outlive the call."""
        layer = self._layers[layer_idx]
        states = hidden_states.contiguous()
        keys, values = cache.storage(layer_idx, layer.struct.kv_heads, layer.struct.head_dim, states)
        first, used = cache.span(layer_idx)
        threads = max(1, min(torch.get_num_threads(), layer.pointers.nbytes // _BYTES_PER_THREAD))
        needed = self._library.anee_scratch(layer.address, where.count, used, threads)  # type: ignore[union-attr]
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(2 * needed)
        keep: list[Any] = [states, where, keys, values]
        tokens = Tokens(
            states=states.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            place=where.place.data_ptr(),
            row=where.row.data_ptr(),
            column=where.column.data_ptr(),
            scratch=self._scratch.data_ptr(),
            row_stride=keys.stride(0),
            head_stride=keys.stride(1),
            start=first if start is None else start,
            count=where.count,
            used=used,
            threads=threads,
        )
        angles = self._angles(call, states.shape[0], states.dtype)
        if angles is not None:
            tokens.cos, tokens.sin = angles[0].data_ptr(), angles[1].data_ptr()
        return tokens, keep

    def _angles(self, call: LayerCall, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return the rotary angles of a call, as they lie in memory; layers that share a call share them."""
        if self._turned is None or self._turned[0] is not call:
            angles = self._adapter.angles(self._parts, call)
            if angles is not None:
                cos, sin = (angle.expand(batch, -1, -1).to(dtype).contiguous() for angle in angles)
                angles = cos, sin
            self._turned = call, angles
        return self._turned[1]

    def _at(self, hidden_states: Tensor, places: Places | None) -> _Where:
        batch, length = hidden_states.shape[:2]
        return self._where(batch, length) if places is None else _Where.at(places, length)

    def _where(self, batch: int, length: int) -> _Where:
        """Return where the tokens of a whole block are."""
        if (batch, length) not in self._whole:
            rows, columns = torch.arange(batch)[:, None], torch.arange(length)[None]
            self._whole[batch, length] = _Where.at((rows, columns.expand(batch, -1)), length)
        return self._whole[batch, length]


class _Where:
    """Where some tokens of a block are: numbers for each, in memory."""

    def __init__(self, place: Tensor, row: Tensor, column: Tensor) -> None:
        self.place, self.row, self.column, self.count = place, row, column, place.numel()

    @classmethod
    def at(cls, places: Places, length: int) -> _Where:
        rows, columns = places
        rows = rows.expand_as(columns)
        return cls((rows * length + columns).contiguous(), rows.contiguous(), columns.contiguous())


class _Head:
    """The language-model head as a function of normed hidden states."""

    def __init__(self, native: CDLL, parts: Parts, dtype: torch.dtype) -> None:
        head: nn.Module = parts.head
        self.pointers = Pointers(dtype)
        self._library, self._matrix = native, self.pointers.matrix(head)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return logits [B, T, V] of [B, T, D]."""
        states, matrix = hidden_states.contiguous(), self._matrix
        tokens = states.shape[0] * states.shape[1]
        logits = states.new_empty(*states.shape[:2], matrix.outputs)
        scratch = torch.empty(tokens * (matrix.inputs + matrix.outputs))
        self._library.anee_linear(
            addressof(matrix), states.data_ptr(), logits.data_ptr(), tokens, self.pointers.kind, scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return logits


def _undisturbed(hidden_states: Tensor) -> bool:
    """Whether nobody wants to see what happens inside a layer: no gradients, no counters, no autocast, no tracing."""
    return (
        hidden_states.device.type == "cpu"
        and not torch.is_grad_enabled()
        and _get_current_dispatch_mode() is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

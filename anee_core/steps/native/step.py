"""The native layer step: a few tokens through one decoder layer in one call, on the model's own weights."""

from __future__ import annotations

import logging
from ctypes import CDLL, addressof
from typing import Any, TypeGuard

import torch
from torch import Tensor

from anee_core.accounting.token_state import TokenState
from anee_core.adapter.instrumentation import undisturbed
from anee_core.adapter.layer_call import LayerCall
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.recipe import Recipe
from anee_core.cache.adaptive_cache import AdaptiveCache
from anee_core.steps.calls import LayerInput, Stack
from anee_core.steps.native.build import NoLibraryError, library
from anee_core.steps.native.head import NativeHead, NativeNorm
from anee_core.steps.native.layers import NativeLayer
from anee_core.steps.native.pointers import UnfitError
from anee_core.steps.native.stack import NativeStack
from anee_core.steps.native.structs import LANES, PORTION, QUERIES, Seconds
from anee_core.steps.native.workspace import Angles, TokenPlaces, Workspace
from anee_core.steps.reference import ReferenceStep

logger = logging.getLogger(__name__)

MAX_TOKENS = 128
"""Blocks of more tokens are left to the model's own modules, whose matrix products keep the processor busy."""
MAX_MULTIPLIED = 32
"""The same limit in bfloat16, on a processor that multiplies such numbers by itself."""
MAX_SKIPPING = 256
"""The same limit if some of the tokens skip layers: picking them out for the modules takes time that is saved here."""
_KEPT_PLACES = 64
"""Shapes of blocks whose places are kept for the next block of the same shape."""


class NativeStep:
    """Run layers in C++ where that is possible, and by `ReferenceStep` elsewhere.

    It is possible on the CPU, in float32 and bfloat16, without gradients, for families with a `Recipe` whose modules
    are plain: neither quantised, nor wrapped, nor hooked; for blocks of few tokens, or of any number in bfloat16 on a
    processor that does not multiply such numbers by itself, where modules are slow. Weights are read where they are,
    so nothing is copied, and a change of a weight is seen at once.
    """

    def __init__(self, adapter: ModelAdapter, parts: Parts) -> None:
        self._adapter, self._parts = adapter, parts
        self._reference = ReferenceStep(adapter, parts)
        self._library: CDLL | None = None
        self._layers: list[NativeLayer] | None = None
        """Structs of the layers; None before the model was looked at, empty if it does not fit."""
        self._recipe: Recipe | None = None
        self._norm: NativeNorm | None = None
        self._head: NativeHead | None = None
        self._own = Workspace()
        self.slow_because: str | None = "nothing has been run"
        """Why layers run by their own modules, if they do."""
        self.seconds: Seconds | None = None
        """What attention and decisions take within the library is added to this, if it is there."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes a copy, which looks at its own model and has memory and threads of its own."""
        return type(self), (self._adapter, self._parts)

    @property
    def takes_all(self) -> bool:
        """Whether the block goes through the library."""
        return bool(self._own.layers)

    def begin(self, hidden_states: Tensor, cache: AdaptiveCache) -> None:
        """Look at a block [B, T, D] before its layers run."""
        own, length = self._own, hidden_states.shape[1]
        own.layers, own.threads = [], torch.get_num_threads()
        own.possible = hidden_states.device.type == "cpu" and undisturbed(hidden_states.device)
        if not own.possible:
            return
        # Nobody changes a model between the tokens of a generation.
        goes_on = cache.seen > 0 and length == 1
        if self._layers is None or not (goes_on or self._current()):
            self._read_model()
        if own.following is None or not goes_on:
            own.following = [part for part in (self._norm, self._head) if part is not None and part.current]
        if self._layers and hidden_states.dtype == self._layers[0].pointers.dtype:
            own.layers, own.few = self._layers, self._few(hidden_states)

    def all_layers(self, hidden_states: Tensor, stack: Stack, cache: AdaptiveCache) -> Tensor | None:
        """Take all layers in one call; see `LayerStep.all_layers`."""
        own = self._own
        if not own.few and not self._worth_it(stack, hidden_states):
            return None
        if own.stack is None or own.stack.made_for != (own.layers, own.threads):
            own.stack = NativeStack(own.layers, own.threads)
        possible = own.stack.set_shortcut(stack.shortcut, hidden_states.dtype)
        if not possible or not own.stack.set_interaction(stack.dropping, cache, hidden_states):
            return None
        result = hidden_states.clone(memory_format=torch.contiguous_format)
        room = torch.empty_like(result)
        own.stack.set_storage(cache, result)
        own.stack.set_gate(stack.gate)
        own.stack.struct.states = stack.states.data_ptr()
        own.stack.struct.inputs = None if stack.inputs is None else stack.inputs.data_ptr()
        places = self._whole_block(*result.shape[:2])
        masks = own.stack.set_masks(stack.masks, result.dtype)
        used = max(layer.slots.used for layer in cache.layers)
        self._fill(result, stack.call, places, (cache.span(0)[0], used), room)
        at_once = places.count if stack.dropping is not None else min(places.count, PORTION)
        self._take_scratch(own.stack.threads, at_once * own.stack.floats, used)
        own.tokens.mask_stride = used
        assert self._library is not None
        self._library.anee_stack(own.stack.address, own.address)
        del masks
        return result

    def run(self, given: LayerInput, mask: Tensor | None) -> Tensor:
        """Run a layer; see `LayerStep.run`."""
        if not self._by_layer:
            return self._reference.run(given, mask)
        places = self._places_of(given)
        result = given.hidden_states.new_empty(*places.shape, given.hidden_states.shape[-1])
        self._call("anee_run", given, places, mask=mask, result=result)
        return result

    def propagate(self, given: LayerInput) -> None:
        """Write keys and values; see `LayerStep.propagate`."""
        if not self._by_layer:
            return self._reference.propagate(given)
        return self._call("anee_project", given, self._places_of(given))

    def settle(self, given: LayerInput, slots: Tensor) -> None:
        """Write keys and values; see `LayerStep.settle`."""
        if not self._by_layer:
            return self._reference.settle(given, slots)
        batch, length = given.hidden_states.shape[:2]
        here = self._whole_block(batch, length)
        there = TokenPlaces(here.place, here.row, slots.repeat(batch), here.shape)
        return self._call("anee_project", given, there, start=0)

    def norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm to what the layers gave, [B, T, D]."""
        norm = self._norm
        result: Tensor = (norm if self._usable(norm, hidden_states) else self._parts.final_norm)(hidden_states)
        return result

    def head(self, hidden_states: Tensor) -> Any:
        """Return what to apply to normed hidden states [B, T, D] as the model's head."""
        return self._head if self._usable(self._head, hidden_states) else self._parts.head

    def _usable(self, following: NativeNorm | NativeHead | None, hidden_states: Tensor) -> TypeGuard[Any]:
        """Whether what follows the layers can be applied to states [B, T, D] of the block that was begun."""
        own = self._own
        if not own.possible or not own.following or following not in own.following:
            return False
        return hidden_states.is_cpu and not torch.is_grad_enabled() and self._few(hidden_states)

    @property
    def _by_layer(self) -> bool:
        """Whether the block goes through the library layer by layer."""
        return bool(self._own.layers) and self._own.few

    def _worth_it(self, stack: Stack, hidden_states: Tensor) -> bool:
        """Whether many tokens [B, T, D] are done sooner here than by the model's modules."""
        if hidden_states.dtype == torch.bfloat16 and not self._multiplies_bf16:
            return True
        few = hidden_states.shape[0] * hidden_states.shape[1] <= MAX_SKIPPING
        return few and (stack.gate is not None or bool((stack.states == TokenState.SKIPPED).any()))

    def _few(self, hidden_states: Tensor) -> bool:
        """Whether states [B, T, D] are so few that the library is always sooner done."""
        multiplied = hidden_states.dtype == torch.bfloat16 and self._multiplies_bf16
        return hidden_states.shape[0] * hidden_states.shape[1] <= (MAX_MULTIPLIED if multiplied else MAX_TOKENS)

    @property
    def _multiplies_bf16(self) -> bool:
        """Whether the processor multiplies bfloat16 by itself, which is what makes the modules fast at it."""
        return self._library is not None and bool(self._library.anee_multiplies_bf16())

    def _current(self) -> bool:
        same = self._recipe == self._adapter.recipe(self._parts.config)
        return same and bool(self._layers) and all(layer.current for layer in self._layers or ())

    def _read_model(self) -> None:
        """Point to the model's weights as they are now, or find out why that cannot be."""
        before, self.slow_because = self.slow_because, None
        parts = self._parts
        self._recipe = recipe = self._adapter.recipe(parts.config)
        try:
            if recipe is None:
                raise UnfitError(f"there is no recipe for a {type(parts.layers[0]).__name__}")
            if any(layer.training for layer in parts.layers):
                raise UnfitError("it is in training mode")
            layers = [NativeLayer(self._adapter, parts, i, recipe) for i in range(len(parts.layers))]
            self._library = library()
            dtype = layers[0].pointers.dtype
            self._norm, self._head = NativeNorm.of(self._library, parts, dtype), NativeHead(self._library, parts, dtype)
            self._layers = layers
        except (UnfitError, NoLibraryError) as error:
            self._layers, self._norm, self._head, self.slow_because = [], None, None, str(error)
            if self.slow_because != before:
                logger.info("%s runs by its own modules: %s", type(parts.model).__name__, self.slow_because)

    def _call(
        self,
        function: str,
        given: LayerInput,
        places: TokenPlaces,
        *,
        start: int | None = None,
        mask: Tensor | None = None,
        result: Tensor | None = None,
    ) -> None:
        """Call a function of the library for some tokens of a layer's input.

        Their keys and values go into slots from ``start`` on; by default from that of the block's first token.
        """
        own, cache = self._own, given.cache
        layer, tokens = own.layers[given.layer_idx], own.tokens
        states = given.hidden_states.contiguous()
        keys, values = cache.layers[given.layer_idx].storage(layer.kv_heads, layer.head_dim, states)
        first, used = cache.span(given.layer_idx)
        self._fill(states, given.call, places, (first if start is None else start, used), result)
        self._take_scratch(min(own.threads, layer.threads), places.count * layer.floats, used)
        if mask is not None:
            mask = mask.to(states.dtype).contiguous()
            tokens.mask_stride = mask.shape[-1]
        tokens.mask = None if mask is None else mask.data_ptr()
        tokens.keys, tokens.values = keys.data_ptr(), values.data_ptr()
        tokens.row_stride, tokens.head_stride = keys.stride()[:2]
        getattr(self._library, function)(layer.address, own.address)

    def _fill(
        self, states: Tensor, call: LayerCall, places: TokenPlaces, span: tuple[int, int], result: Tensor | None
    ) -> None:
        """Say which tokens of [B, T, D] are meant, and what they need but for masks, keys, values and scratch.

        ``span`` is the slot of the block's first token and the number of slots handed out.
        """
        tokens = self._own.tokens
        angles = self._angles(call, states.shape[0], states.dtype)
        tokens.states, tokens.result = states.data_ptr(), None if result is None else result.data_ptr()
        tokens.cos, tokens.sin = (None, None) if angles is None else angles[2:]
        tokens.place, tokens.row, tokens.column = places.pointers
        tokens.seconds = None if self.seconds is None else addressof(self.seconds)
        tokens.start, tokens.used = span
        tokens.count = places.count

    def _take_scratch(self, threads: int, floats: int, used: int) -> None:
        """Give the tokens ``floats`` of scratch, and each thread room for its attention over ``used`` slots."""
        own = self._own
        needed = floats + threads * QUERIES * (used + LANES)
        if own.scratch.numel() < needed:
            own.scratch = torch.empty(2 * needed)
        own.tokens.scratch, own.tokens.threads = own.scratch.data_ptr(), threads

    def _angles(self, call: LayerCall, batch: int, dtype: torch.dtype) -> Angles | None:
        """Return the rotary angles of a call and where they lie; layers that share a call share them."""
        own = self._own
        if own.turned is None or own.turned[0] is not call:
            angles = self._adapter.angles(self._parts, call)
            placed = None
            if angles is not None:
                cos, sin = (angle.expand(batch, -1, -1).to(dtype).contiguous() for angle in angles)
                placed = cos, sin, cos.data_ptr(), sin.data_ptr()
            own.turned = call, placed
        return own.turned[1]

    def _places_of(self, given: LayerInput) -> TokenPlaces:
        batch, length = given.hidden_states.shape[:2]
        return self._whole_block(batch, length) if given.places is None else TokenPlaces.of(given.places, length)

    def _whole_block(self, batch: int, length: int) -> TokenPlaces:
        """Return where the tokens of a whole block are."""
        whole = self._own.whole
        if (batch, length) not in whole:
            if len(whole) == _KEPT_PLACES:
                whole.clear()
            rows, columns = torch.arange(batch)[:, None], torch.arange(length)[None]
            whole[batch, length] = TokenPlaces.of((rows, columns.expand(batch, -1)), length)
        return whole[batch, length]

"""From the modules of a decoder layer to the struct that ``cpp/layer.h`` reads."""

from __future__ import annotations

from ctypes import addressof
from typing import NamedTuple

from torch import nn

from anee_core.adapter.instrumentation import hooked
from anee_core.adapter.layout import Parts, find
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.recipe import Recipe
from anee_core.steps.native.pointers import Pointers, UnfitError
from anee_core.steps.native.structs import LANES, Activation, Layer, Matrix, NormWeights, Residual, Rotary

_ACTIVATIONS = {
    "silu": Activation.SILU, "swish": Activation.SILU, "gelu": Activation.GELU, "relu": Activation.RELU,
    "gelu_new": Activation.GELU_TANH, "gelu_pytorch_tanh": Activation.GELU_TANH, "gelu_fast": Activation.GELU_TANH,
}  # fmt: skip


_BYTES_PER_THREAD = 1 << 18
"""Bytes of weights that keep a thread busy for long enough."""


class NativeLayer:
    """One decoder layer as a struct.

    Raises:
        UnfitError: something in it is not what the recipe says, or not plain weights in the CPU's memory.
    """

    def __init__(self, adapter: ModelAdapter, parts: Parts, layer_idx: int, recipe: Recipe) -> None:
        layer, config, layout = parts.layers[layer_idx], parts.config, parts.layout
        kind = type(layer)
        if kind.__name__ not in recipe.layers or not kind.__module__.startswith("transformers."):
            raise UnfitError(f"there is no recipe for a {kind.__name__}")
        self._layer, self._modules = layer, tuple(layer.modules())
        if any(hooked(module) for module in self._modules):
            raise UnfitError(f"a module in its {kind.__name__} is hooked")
        activation = getattr(config, recipe.activation)
        if activation not in _ACTIVATIONS:
            raise UnfitError(f"its activation is '{activation}'")
        self.pointers = pointers = Pointers(parts.model.dtype)
        head_dim = adapter.head_dim(config)
        queries, keys = adapter.attention_width(config), adapter.kv_width(config)
        query, key, value = _attention_inputs(pointers, layer, parts, recipe, _Widths(queries, keys, head_dim))
        gate, up = _mlp_inputs(pointers, layer, recipe)
        _, call = adapter.probe(parts, layer_idx)
        angles = adapter.angles(parts, call)
        rotary = Rotary.PAIRS if recipe.rotary_pairs else Rotary.HALVES
        beside = Residual.PARALLEL_TWO_NORMS if recipe.mlp_norm else Residual.PARALLEL_ONE_NORM
        self.struct = Layer(
            input_norm=_norm(pointers, layer, layout.input_norm),
            mlp_norm=_norm(pointers, layer, recipe.mlp_norm),
            query_norm=_norm(pointers, layer, recipe.query_norm),
            key_norm=_norm(pointers, layer, layout.key_norm),
            attended_norm=_norm(pointers, layer, recipe.attended_norm),
            changed_norm=_norm(pointers, layer, recipe.changed_norm),
            query=query,
            key=key,
            value=value,
            output=pointers.matrix(find(layer, recipe.output)),
            gate=gate,
            up=up,
            down=pointers.matrix(find(layer, recipe.down)),
            kind=pointers.kind,
            width=config.hidden_size,
            heads=queries // head_dim,
            kv_heads=keys // head_dim,
            head_dim=head_dim,
            rotary=Rotary.NONE if angles is None else rotary,
            rotary_width=0 if angles is None else angles[0].shape[-1],
            activation=_ACTIVATIONS[activation],
            residual=beside if recipe.parallel else Residual.SEQUENTIAL,
            scale=getattr(find(layer, layout.attention), "scaling", head_dim**-0.5),
            cap=0.0 if recipe.cap is None else getattr(config, recipe.cap) or 0.0,
        )
        self.address = addressof(self.struct)
        self.kv_heads, self.head_dim = self.struct.kv_heads, head_dim
        self.floats = 3 * config.hidden_size + 2 * (queries + keys) + 2 * up.outputs + 9 * LANES
        """Numbers of scratch that a token needs, beside room for each thread's attention scores."""
        self.threads = max(1, pointers.nbytes // _BYTES_PER_THREAD)
        """Largest number of threads that are worth their trouble."""

    @property
    def current(self) -> bool:
        """Whether the struct still says what the layer computes."""
        modules = tuple(self._layer.modules())
        if self._layer.training or len(modules) != len(self._modules):
            return False
        same = all(now is then for now, then in zip(modules, self._modules, strict=True))
        return same and not any(hooked(module) for module in modules) and self.pointers.current


def _norm(pointers: Pointers, layer: nn.Module, path: str | None) -> NormWeights:
    return NormWeights() if path is None else pointers.norm(find(layer, path))


class _Widths(NamedTuple):
    """How many numbers attention projects for a token."""

    queries: int
    """Width of all its queries together."""
    keys: int
    """Width of all its keys together."""
    head_dim: int
    """Width of one head."""


def _attention_inputs(
    pointers: Pointers, layer: nn.Module, parts: Parts, recipe: Recipe, widths: _Widths
) -> tuple[Matrix, Matrix, Matrix]:
    (queries, keys, head_dim), layout = widths, parts.layout
    if recipe.interleaved is not None:
        whole = find(layer, recipe.interleaved)
        firsts = ((0, queries), (head_dim, keys), (2 * head_dim, keys))
    elif layout.fused is not None:
        whole = find(layer, layout.fused)
        firsts = ((0, queries), (queries, keys), (queries + keys, keys))
    elif recipe.query is None or layout.key is None or layout.value is None:
        raise UnfitError("its projections of queries, keys and values are not known")
    else:
        one, two, three = (pointers.matrix(find(layer, path)) for path in (recipe.query, layout.key, layout.value))
        return one, two, three
    query, key, value = (pointers.part(whole, first, count) for first, count in firsts)
    if recipe.interleaved is not None:
        for part in (query, key, value):
            part.group, part.group_stride = head_dim, 3 * head_dim
    return query, key, value


def _mlp_inputs(pointers: Pointers, layer: nn.Module, recipe: Recipe) -> tuple[Matrix, Matrix]:
    if recipe.gate_up is not None:
        whole = find(layer, recipe.gate_up)
        inner = pointers.matrix(whole).outputs // 2
        return pointers.part(whole, 0, inner), pointers.part(whole, inner, inner)
    if recipe.up is None:
        raise UnfitError("its MLP is not known")
    gate = Matrix() if recipe.gate is None else pointers.matrix(find(layer, recipe.gate))
    return gate, pointers.matrix(find(layer, recipe.up))

"""What ANEE has to know about a model family: a table of names, and defaults that need nothing more.

Shapes in this package: B batch, T new tokens, S slots, D width, H heads, Dh head width, L layers, F features.
"""

from __future__ import annotations

import inspect
from abc import ABC
from typing import Any, cast

import torch
from torch import Tensor, nn

from anee_core.accounting.costs import CostModel
from anee_core.accounting.work import Work, executed_work, layer_work, leaves, module_work
from anee_core.adapter.cache_names import LAYER_ARGUMENTS, layer_argument
from anee_core.adapter.fused_projection import sliceable, tail, tail_work
from anee_core.adapter.layer_call import LayerCall
from anee_core.adapter.layout import Layout, Parts, find, layers_of
from anee_core.adapter.recipe import Recipe
from anee_core.adapter.refusals import unservable
from anee_core.adapter.rotary import length_limit, rotate
from anee_core.errors import AdapterError, ModelError


class ModelAdapter(ABC):
    """What ANEE knows of one model family. It is stateless: one instance serves many models.

    A subclass states ``layout``; every method below is a default that can be overridden where a family differs.
    """

    layout: Layout
    """Where the parts of the family are."""

    def refuse(self, config: Any) -> str | None:
        """Return why a config of this family cannot be run exactly, or None if it can."""
        return unservable(config) or self._unseen_window(config)

    def _unseen_window(self, config: Any) -> str | None:
        """Return why a config has a window of which the adapter knows nothing, or None if it has none."""
        width = getattr(config, "sliding_window", None)
        # Any config may hold it; only of a family whose config declares it may layers have it.
        declared = "sliding_window" in inspect.signature(type(config)).parameters
        unused = getattr(config, "use_sliding_window", None) is False
        if not width or not declared or unused or self.layout_for(config).windows is not None:
            return None
        if any(self.window(config, layer_idx) is not None for layer_idx in range(config.num_hidden_layers)):
            return None
        return (
            f"sliding_window={width}, but {type(self).__name__} gives no layer a window: "
            "name its layers in Layout.windows, or override window"
        )

    def layout_for(self, config: Any) -> Layout:
        """Return the layout of a config; ``layout``, unless the family has several."""
        return self.layout

    def parts(self, model: nn.Module) -> Parts:
        """Find the modules named by the layout.

        Raises:
            AdapterError: a path does not exist; the message names it and what exists there.
        """
        config = cast(Any, model).config
        layout = self.layout_for(config)
        layers = find(model, layout.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise AdapterError(f"{type(self).__name__}: '{layout.layers}' is no list of decoder layers")
        for layer in layers:
            for path in layout.in_layer.values():
                find(layer, path)
        cache_argument = layout.cache_argument or layer_argument(layers[0])
        if cache_argument is None:
            raise AdapterError(
                f"{type(self).__name__}: {type(layers[0]).__name__} takes none of {', '.join(LAYER_ARGUMENTS)}; "
                "name the argument that carries the cache in Layout.cache_argument"
            )
        return Parts(
            model=model,
            layout=layout,
            embedding=cast(Any, model).get_input_embeddings(),
            layers=layers_of(model, layout),
            final_norm=nn.Identity() if layout.final_norm is None else find(model, layout.final_norm),
            head=cast(Any, model).get_output_embeddings(),
            rotary=None if layout.rotary is None else find(model, layout.rotary),
            learned_positions=None if layout.learned_positions is None else find(model, layout.learned_positions),
            embedding_dropout=(
                nn.Identity() if layout.embedding_dropout is None else find(model, layout.embedding_dropout)
            ),
            cache_argument=cache_argument,
        )

    def embed(self, parts: Parts, token_embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Turn token embeddings [B, T, D] into the first layer's input [B, T, D]."""
        states, multiplier = token_embeddings, parts.layout.embedding_multiplier
        if multiplier is not None:
            states = states * getattr(parts.config, multiplier)
        if parts.learned_positions is not None:
            states = states + parts.learned_positions(position_ids).to(states.device)
        return cast(Tensor, parts.embedding_dropout(states))

    def begin(self, parts: Parts, hidden_states: Tensor, position_ids: Tensor) -> tuple[LayerCall, ...]:
        """Build what each layer receives for these tokens ([B, T, D] and [B, T]); layers alike share one call."""
        if parts.rotary is None:
            return (LayerCall(position_ids),) * len(parts.layers)
        given = getattr(parts.config, "layer_types", None) if parts.turned_by_type else None
        kinds = given[: len(parts.layers)] if given else (None,) * len(parts.layers)
        calls = {}
        for kind in dict.fromkeys(kinds):
            chosen = {} if kind is None else {"layer_type": kind}
            embeddings = parts.rotary(hidden_states, position_ids=position_ids, **chosen)
            if not (isinstance(embeddings, tuple) and len(embeddings) == 2):
                raise AdapterError(
                    f"{type(parts.rotary).__name__} gives a {type(embeddings).__name__}, not (cos, sin): override begin"
                )
            calls[kind] = LayerCall(position_ids, embeddings)
        return tuple(calls[kind] for kind in kinds)

    def layer_arguments(self, parts: Parts, call: LayerCall, layer_cache: Any) -> dict[str, Any]:
        """Return the keyword arguments of one layer call."""
        arguments = {
            "attention_mask": call.attention_mask,
            "position_ids": call.position_ids,
            "use_cache": True,
            parts.cache_argument: layer_cache,
        }
        if call.position_embeddings is not None:
            arguments["position_embeddings"] = call.position_embeddings
        return arguments

    def run(self, parts: Parts, layer_idx: int, hidden_states: Tensor, call: LayerCall, layer_cache: Any) -> Tensor:
        """Run one decoder layer, unchanged. [B, T, D] to [B, T, D]."""
        output = parts.layers[layer_idx](hidden_states, **self.layer_arguments(parts, call, layer_cache))
        return output[0] if isinstance(output, tuple) else output

    def attention_input(self, parts: Parts, layer_idx: int, hidden_states: Tensor) -> Tensor:
        """Return what a layer's attention is given for hidden states [B, T, D]: normed, if the layout names a norm."""
        norm = parts.layout.input_norm
        return hidden_states if norm is None else find(parts.layers[layer_idx], norm)(hidden_states)

    def project_kv(self, parts: Parts, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, H, T, Dh] that a layer would cache for these hidden states.

        Where the layout names the projections, only those run; otherwise `capture_kv`, which needs no knowledge of
        the layer. An override must return what `capture_kv` returns.
        """
        layer, layout = parts.layers[layer_idx], parts.layout
        fused = None if layout.fused is None else find(layer, layout.fused)
        if (layout.key is None or layout.value is None) and (fused is None or not sliceable(fused)):
            return self.capture_kv(parts, layer_idx, hidden_states, call)
        normed = self.attention_input(parts, layer_idx, hidden_states)
        shape = (*normed.shape[:-1], -1, self.head_dim(parts.config))
        if fused is not None:
            keys, values = tail(fused, normed, 2 * self.kv_width(parts.config)).chunk(2, dim=-1)
        else:
            keys, values = find(layer, cast(str, layout.key))(normed), find(layer, cast(str, layout.value))(normed)
        keys, values = keys.view(shape), values.view(shape).transpose(1, 2)
        if layout.key_norm is not None:
            keys = find(layer, layout.key_norm)(keys)
        keys = keys.transpose(1, 2)
        if call.position_embeddings is not None:
            keys = rotate(keys, *call.position_embeddings)
        return keys, values

    def capture_kv(self, parts: Parts, layer_idx: int, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Call a layer with a stand-in cache that takes the keys and values [B, H, T, Dh] and ends the call.

        Right for any QKV layout, rotary style and head broadcast; the oracle of every faster way.
        """
        capture = _Capture()
        try:
            self.run(parts, layer_idx, hidden_states, call, capture)
        except _CapturedError:
            return capture.keys, capture.values
        raise AdapterError(
            f"{type(self).__name__}: {type(parts.layers[layer_idx]).__name__} never updated its cache through "
            f"'{parts.cache_argument}'; name the argument that carries the cache in Layout.cache_argument"
        )

    def recipe(self, config: Any) -> Recipe | None:
        """Return what the family's layers compute, for steps that do it without calling them; None if no recipe says.

        The class names in a recipe keep it from being used for other layers than those it was written for.
        """
        return None

    def angles(self, parts: Parts, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """Return (cos, sin), [B, T, R] each, by which a layer with a recipe turns its first R numbers of each head."""
        return call.position_embeddings

    def layer_work(self, parts: Parts, layer_idx: int) -> Work:
        """Return what one run of a layer executes per token, attention's pairs apart."""
        return layer_work(parts.layers[layer_idx], parts.layout.experts, parts.config)

    def kv_work(self, parts: Parts, layer_idx: int) -> Work:
        """Return what `project_kv` executes per token, found by running it once on one token."""
        layer, layout = parts.layers[layer_idx], parts.layout
        fused = None if layout.fused is None else find(layer, layout.fused)
        if fused is None or not sliceable(fused):
            hidden_states, call = self.probe(parts, layer_idx)
            return executed_work(layer, lambda: self.project_kv(parts, layer_idx, hidden_states, call))
        # A slice is multiplied without calling its module, so hooks would not notice it.
        norms = [module_work(find(layer, path)) for path in (layout.input_norm, layout.key_norm) if path is not None]
        return sum(norms, tail_work(fused, 2 * self.kv_width(parts.config)))

    def probe(self, parts: Parts, layer_idx: int) -> tuple[Tensor, LayerCall]:
        """Return one token of zeros [1, 1, D] and its call, on the device and in the dtype of a layer."""
        device = next(parts.layers[layer_idx].parameters()).device
        hidden_states = torch.zeros(1, 1, parts.config.hidden_size, dtype=parts.model.dtype, device=device)
        position_ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        return hidden_states, self.begin(parts, hidden_states, position_ids)[layer_idx].to(device)

    def head_dim(self, config: Any) -> int:
        """Return the width of one attention head."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def kv_width(self, config: Any) -> int:
        """Return the width of a layer's keys, and of its values: heads x head width."""
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return heads * self.head_dim(config)

    def attention_width(self, config: Any) -> int:
        """Return query heads x head width: one query-key pair costs 4 times this in FLOPs."""
        heads: int = config.num_attention_heads
        return heads * self.head_dim(config)

    def slot_flops(self, parts: Parts) -> int:
        """Return the FLOPs that a call of a layer adds for each slot of a row, to make keys and values of it."""
        return 0

    def window(self, config: Any, layer_idx: int) -> int | None:
        """Return how many positions back layer ``layer_idx`` sees, itself included, or None for all."""
        windows = self.layout_for(config).windows
        if windows is None or (windows == "by type" and config.layer_types[layer_idx] != "sliding_attention"):
            return None
        return config.sliding_window

    def max_positions(self, config: Any) -> int | None:
        """Return the longest sequence that the model is made for, or None if it has no limit."""
        limits = (getattr(config, "max_position_embeddings", None), length_limit(config))
        return min((limit for limit in limits if limit is not None), default=None)

    def position_limit(self, parts: Parts) -> int | None:
        """Return the number of positions beyond which the model cannot place a token as it placed those before.

        That is the end of a table of positions, or where rotary frequencies change with the sequence's length. Rotary
        positions otherwise have no such end.
        """
        bounded = parts.rotary is None or length_limit(parts.config) is not None
        return self.max_positions(parts.config) if bounded else None

    def logits(self, parts: Parts, hidden_states: Tensor) -> Tensor:
        """Map final, normed hidden states [B, T, D] to logits [B, T, V]."""
        logits, layout, config = parts.head(hidden_states), parts.layout, parts.config
        if layout.logits_multiplier is not None:
            logits = logits * getattr(config, layout.logits_multiplier)
        if layout.logits_divisor is not None:
            logits = logits / getattr(config, layout.logits_divisor)
        cap = None if layout.logits_cap is None else getattr(config, layout.logits_cap)
        return logits if cap is None else torch.tanh(logits / cap) * cap


class _CapturedError(Exception):
    """What ends a layer call once its keys and values are known."""


class _Capture:
    """A cache that takes one update and stops the layer."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        self.keys, self.values = keys, values
        raise _CapturedError


def cost_model(adapter: ModelAdapter, parts: Parts) -> CostModel:
    """Return what each part of a model costs.

    Raises:
        ModelError: a layer does nothing that can be counted.
    """
    layers = range(len(parts.layers))
    token = parts.embedding.weight
    states = torch.zeros(1, 1, token.shape[-1], dtype=parts.model.dtype, device=token.device)
    position = torch.zeros(1, 1, dtype=torch.long, device=token.device)
    last, _ = adapter.probe(parts, layers[-1])
    # Dropout draws, while training: what comes after is not to depend on whether costs were asked for.
    with torch.no_grad(), torch.random.fork_rng([token.device] if token.is_cuda else []):
        entry = executed_work(parts.model, lambda: adapter.embed(parts, states, position))
        leaving = executed_work(parts.model, lambda: parts.final_norm(last))
        propagate = tuple(adapter.kv_work(parts, i) for i in layers)
    run = tuple(adapter.layer_work(parts, i) for i in layers)
    for i, work in enumerate(run):
        if not work.flops:
            kinds = sorted({type(leaf).__name__ for leaf in leaves(parts.layers[i])})
            raise ModelError(
                f"layer {i} has no matrix product that can be counted, so no share of it can be spent: it is made of "
                f"{', '.join(kinds)}; load the model unquantised, or quantised by another library"
            )
    return CostModel(
        run=run,
        propagate=propagate,
        pair_flops=4 * adapter.attention_width(parts.config),
        slot_flops=adapter.slot_flops(parts),
        head=module_work(parts.head),
        embedding=module_work(parts.embedding) + entry + leaving,
    )

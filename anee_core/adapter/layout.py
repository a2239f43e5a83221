"""Where the parts of a model family are: a validated table of names, and the modules found by it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, cast

from torch import nn

from anee_core.errors import AdapterError, ModelError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a model family are, as dotted paths, and how its decoder layer is called.

    The first group of paths starts at the causal LM, the second at one decoder layer; then come numbers of the config.
    None means that the family has no such part, or that its adapter does not need it: only ``layers`` and ``attention``
    are always needed.
    """

    layers: str
    """List of the decoder layers."""
    final_norm: str | None = None
    """Norm behind the last layer."""
    rotary: str | None = None
    """Module that maps (hidden states, position ids) to the (cos, sin) every layer receives."""
    learned_positions: str | None = None
    """Embedding of positions, which is added to the token embedding."""
    embedding_dropout: str | None = None
    """Dropout of the first layer's input, which works in training only."""

    attention: str
    """Attention of a layer."""
    mlp: str | None = None
    """MLP of a layer."""
    experts: str | None = None
    """Module in which the stacked weights of a mixture of experts lie; layers without one are dense."""
    input_norm: str | None = None
    """Norm in front of the key and value projections."""
    key: str | None = None
    """Key projection, if it is separate. With it and ``value`` a skipped layer computes no queries."""
    value: str | None = None
    """Value projection, if it is separate."""
    fused: str | None = None
    """Instead of ``key`` and ``value``: one projection whose outputs end with all keys and then all values."""
    key_norm: str | None = None
    """Norm over each head's keys, before rotary."""

    embedding_multiplier: str | None = None
    """Attribute of the config by which the model multiplies token embeddings."""
    logits_multiplier: str | None = None
    """Attribute of the config by which the model multiplies what its head gives."""
    logits_divisor: str | None = None
    """Attribute of the config by which the model divides what its head gives."""
    logits_cap: str | None = None
    """Attribute of the config that holds the soft cap on logits, if any (arXiv:2408.00118)."""

    windows: Literal["all", "by type"] | None = None
    """Which layers have the config's ``sliding_window``: all, or those that its ``layer_types`` say."""
    cache_argument: str | None = None
    """Argument of a layer that carries the cache; None to find it by the names that transformers uses."""
    always_masked: bool = False
    """Whether the layer wants a mask even where every slot is visible."""

    def __post_init__(self) -> None:
        if (self.key is None) != (self.value is None):
            raise AdapterError("a Layout names both key and value projections, or neither")
        if self.key is not None and self.fused is not None:
            raise AdapterError("a Layout names separate key and value projections or a fused one, not both")
        if self.windows not in (None, "all", "by type"):
            raise AdapterError(f"Layout.windows is 'all', 'by type' or None; got '{self.windows}'")
        for item in fields(self):
            path = getattr(self, item.name)
            if isinstance(path, str) and not path:
                raise AdapterError(f"Layout.{item.name} is an empty path")

    @property
    def in_layer(self) -> dict[str, str]:
        """The paths that every decoder layer has, by field."""
        names = ("attention", "mlp", "input_norm", "key", "value", "fused", "key_norm")
        return {name: path for name in names if (path := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Parts:
    """The modules of one model that the engine calls, found by a `Layout`."""

    # torch types whatever a Module returns or holds as "Tensor or Module"; Any says "a module, called as one".
    model: Any
    """The causal LM."""
    layout: Layout
    """The layout by which its modules were found."""
    embedding: Any
    """Embedding of tokens."""
    layers: tuple[nn.Module, ...]
    """Decoder layers that the model runs, in their order."""
    final_norm: Any
    """Norm behind the last layer; an identity if the layout names none."""
    head: Any
    """Language-model head; None if the model has none."""
    rotary: Any
    """Module that maps (hidden states, position ids) to (cos, sin); None if the layout names none."""
    learned_positions: Any
    """Embedding of positions; None if the layout names none."""
    embedding_dropout: Any
    """Dropout of the first layer's input; an identity if the layout names none."""
    cache_argument: str
    """Argument of a layer that carries the cache."""

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.model.config

    @cached_property
    def turned_by_type(self) -> bool:
        """Whether the rotary module wants to know the kind of a layer: it turns those with a window by other angles."""
        return self.rotary is not None and "layer_type" in inspect.signature(self.rotary.forward).parameters

    @property
    def checkpoints_gradients(self) -> bool:
        """Whether layers would run again in a backward pass: transformers calls such layers without a cache."""
        return any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self.layers)


def found_by(model: nn.Module, layout: Layout) -> tuple[Any, ...]:
    """Return the modules that a layout finds in a causal LM now: PEFT, resizing and pruning put others in their place.

    Raises:
        AdapterError: a path does not exist.
    """
    lm = cast(Any, model)
    paths = (layout.final_norm, layout.rotary, layout.learned_positions, layout.embedding_dropout)
    named = (find(model, path) for path in paths if path is not None)
    return lm.get_input_embeddings(), lm.get_output_embeddings(), *named, *layers_of(model, layout)


def layers_of(model: nn.Module, layout: Layout) -> tuple[nn.Module, ...]:
    """Return the decoder layers that a causal LM runs: as many as its config says.

    Raises:
        AdapterError: the path does not exist.
    """
    # Families of the LLaMA kind run no more than that, however many are stored.
    layers = tuple(cast(nn.ModuleList, find(model, layout.layers)))  # a layer that is run twice counts twice
    return layers[: getattr(cast(Any, model).config, "num_hidden_layers", len(layers))]


def find(module: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path.

    Raises:
        AdapterError: it does not exist; the message names the part that failed and what exists there.
    """
    found = module
    for name in path.split("."):
        children = found._modules
        if children.get(name) is None:
            raise AdapterError(
                f"no '{name}' (of path '{path}') in {type(found).__name__}; it has: {', '.join(children) or 'no parts'}"
            )
        found = children[name]  # type: ignore[assignment]
    return found


def attention_backend(config: Any) -> str:
    """Return how a model's layers attend, "eager" or "sdpa".

    Raises:
        ModelError: it is another way, which takes no mask for each token.
    """
    backend: str = config._attn_implementation
    if backend not in ("eager", "sdpa"):
        raise ModelError(
            f"attention backend '{backend}' cannot express per-token masks; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    return backend

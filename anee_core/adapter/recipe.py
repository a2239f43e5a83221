"""What a family's decoder layer computes, for steps that do it without calling the layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A decoder layer of attention and MLP, each behind a norm, as dotted paths from the layer.

    Its input norm and its projections of keys and values are those of the family's `Layout`. Whoever names a path here
    says that the layer does with it what all others with a recipe do.
    """

    layers: frozenset[str]
    """Class names of the decoder layers that compute so; any other is called as it is."""
    output: str
    """Projection of what attention gives."""
    query: str | None = None
    """Query projection; None if it is part of the layout's fused one, or of ``interleaved``."""
    interleaved: str | None = None
    """One projection whose outputs are query, key and value of each head in turn."""
    query_norm: str | None = None
    """Norm over each head's queries, if there is one; that of the keys is the layout's."""
    mlp_norm: str | None = None
    """Norm in front of the MLP; None if the MLP gets what attention gets."""
    attended_norm: str | None = None
    """Norm over what attention gives, before it is added; None for none."""
    changed_norm: str | None = None
    """Norm over what the MLP gives, before it is added; None for none."""
    gate: str | None = None
    """The MLP's gate projection; None if it has none, or if it is part of ``gate_up``."""
    up: str | None = None
    """The MLP's up projection; None if it is part of ``gate_up``."""
    gate_up: str | None = None
    """Instead of ``gate`` and ``up``: one projection whose outputs are all gates and then all ups."""
    down: str
    """The MLP's down projection."""
    activation: str
    """Attribute of the config that names the MLP's activation."""
    cap: str | None = None
    """Attribute of the config that names the soft cap on attention scores, if there is one."""
    parallel: bool = False
    """Whether the MLP stands beside attention and not behind it."""
    rotary_pairs: bool = False
    """Whether rotary positions turn neighbours, and not numbers half a width apart."""

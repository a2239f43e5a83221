"""FLOPs of matrix products and bytes of weights, counted from the modules that ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from anee_core.errors import AdapterError


@dataclass(frozen=True)
class Work:
    """FLOPs per token, and bytes of weights."""

    flops: int = 0
    """FLOPs per token, 2 for each multiply-add."""
    weight_bytes: int = 0
    """Bytes of weights that a call reads, however many tokens it has."""
    token_bytes: int = 0
    """Bytes that each token reads for itself: rows of a table, or experts that it is routed to."""
    table_bytes: int = 0
    """Bytes of all these rows or experts together, beyond which no call reads."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def read(self, tokens: int) -> int:
        """Return the bytes of weights that one call with this many tokens reads, at most."""
        return self.weight_bytes + min(tokens * self.token_bytes, self.table_bytes) if tokens else 0


def module_work(module: Any) -> Work:
    """Return the work of one leaf module: its matrix product, if it has one, and its stored bytes."""
    stored = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
    size = sum(stored_bytes(p) for p in stored)
    if isinstance(module, nn.Embedding):
        return Work(0, 0, stored_bytes(module.weight) // module.num_embeddings, size)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return Work(2 * int(module.in_features) * int(module.out_features), size)
    return Work(_own_product(module), size)


def _own_product(module: nn.Module) -> int:
    """Return the FLOPs of a matrix called ``weight``, whichever way round it is stored; 0 if there is none.

    GPT-2's projections and routers of experts have one. One norm per head is a matrix too, but is not multiplied with.
    """
    weight = module._parameters.get("weight")
    matrix = weight is not None and weight.dim() == 2 and "norm" not in type(module).__name__.lower()
    return 2 * weight.numel() if weight is not None and matrix else 0


def experts_work(module: nn.Module, config: Any) -> Work:
    """Return the work of stacked experts [experts, ...], of which each token runs ``num_experts_per_tok``.

    Raises:
        AdapterError: the config calls that number something else.
    """
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        raise AdapterError(
            f"{type(config).__name__} has no num_experts_per_tok: override layer_work to say what a token runs"
        )
    flops = table = token = 0
    for weight in module._parameters.values():
        if weight is not None:
            experts = weight.shape[0]
            flops += 2 * weight.numel() * chosen // experts if weight.dim() == 3 else 0
            table += stored_bytes(weight)
            token += stored_bytes(weight) * chosen // experts
    return Work(flops, 0, token, table)


def layer_work(layer: nn.Module, experts: str | None, config: Any) -> Work:
    """Return the work of everything inside a layer, each module run once; its experts lie at the path ``experts``.

    Raises:
        AdapterError: the layer holds stacked weights that no path names.
    """
    work = Work()
    for path, module in layer.named_modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        stacked = any(parameter.dim() > 2 for parameter in own)
        if stacked and experts is not None and f"{path}.".startswith(f"{experts}."):
            work = work + experts_work(module, config)
        elif stacked:
            raise AdapterError(
                f"'{path}' of {type(layer).__name__} holds stacked weights, as a mixture of experts does; "
                f"name it in Layout.experts (now {experts!r})"
            )
        elif not module._modules:
            work = work + module_work(module)
        else:
            work = work + Work(_own_product(module), sum(stored_bytes(parameter) for parameter in own))
    return work


def leaves(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside ``module`` that contain no others."""
    return [m for m in module.modules() if not m._modules]


def executed_work(module: nn.Module, run: Callable[[], Any]) -> Work:
    """Return the work of the leaves of ``module`` that ``run()`` really calls."""
    called: dict[int, nn.Module] = {}

    def note(leaf: nn.Module, *_: Any) -> None:
        called[id(leaf)] = leaf

    handles = [leaf.register_forward_hook(note) for leaf in leaves(module)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sum((module_work(leaf) for leaf in called.values()), Work())


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes a tensor holds, looking inside wrapper tensors such as quantised weights."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()

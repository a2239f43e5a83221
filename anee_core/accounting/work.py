"""FLOPs of matrix products and bytes of weights, counted from the modules that ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from anee_core.errors import AdapterError, ModelError


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
    """Return the work of one of `leaves`: its matrix product, if it has one, and its stored bytes."""
    stored = [*module.parameters(), *module.buffers()]
    if callable(getattr(module, "weight", None)):  # torch.ao's modules pack weight and bias, and return them
        stored += [tensor for tensor in (module.weight(), module.bias()) if tensor is not None]
    size = sum(stored_bytes(p) for p in stored)
    if isinstance(module, nn.Embedding):
        return Work(0, 0, stored_bytes(module.weight) // module.num_embeddings, size)
    if _is_linear(module):
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
        ModelError: the layer holds packed weights of a kind that does not say how large its product is.
    """
    work, whole = Work(), set(leaves(layer))
    inside = {id(part) for leaf in whole for part in leaf.modules() if part is not leaf}
    for path, module in layer.named_modules():
        if id(module) in inside:
            continue
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        stacked = any(parameter.dim() > 2 for parameter in own)
        if stacked and experts is not None and f"{path}.".startswith(f"{experts}."):
            work = work + experts_work(module, config)
        elif stacked:
            raise AdapterError(
                f"'{path}' of {type(layer).__name__} holds stacked weights, as a mixture of experts does; "
                f"name it in Layout.experts (now {experts!r})"
            )
        elif module in whole:
            own_work = module_work(module)
            if not own_work.flops and any(_is_packed(tensor) for tensor in (*own, *module._buffers.values())):
                raise ModelError(
                    f"'{path}' of {type(layer).__name__} is a {type(module).__name__} of packed weights that does not "
                    "say its in_features and out_features, so its FLOPs cannot be counted: load the model unquantised, "
                    "or quantised by another library"
                )
            work = work + own_work
        else:
            work = work + Work(_own_product(module), sum(stored_bytes(parameter) for parameter in own))
    return work


def leaves(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside ``module`` that are counted as one.

    They contain no others, or are linear maps that keep what they are made of in parts of their own.
    """
    if not module._modules or _keeps_parts(module):
        return [module]
    found = [leaf for child in module.children() for leaf in leaves(child)]
    return list(dict.fromkeys(found))


def _keeps_parts(module: nn.Module) -> bool:
    """Whether a module is a linear map by itself, not one around another as PEFT's are."""
    parts = (part for part in module.modules() if part is not module)
    return _is_linear(module) and not any(_is_linear(part) or _own_product(part) for part in parts)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module says, as linear maps do, what it maps from and to."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _is_packed(tensor: Tensor | None) -> bool:
    """Whether a tensor is a matrix of integers, in which quantised weights are kept."""
    return tensor is not None and tensor.dim() > 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool


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

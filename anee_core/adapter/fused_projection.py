"""Part of a fused projection: keys and values without the queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anee_core.accounting.work import Work
from anee_core.adapter.instrumentation import hooked

_TRANSPOSED = "Conv1D"  # the linear layer of GPT-2, whose weight is [in, out]
_KNOWN = ("Linear", "FalconLinear", _TRANSPOSED)


def sliceable(fused: nn.Module) -> bool:
    """Whether a projection's weight may be sliced: if quantised, wrapped or hooked, only calling it is right."""
    weight = fused._parameters.get("weight")
    return (
        type(fused).__name__ in _KNOWN
        and type(weight) is nn.Parameter
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and not hooked(fused)
    )


def tail(fused: Any, states: Tensor, width: int) -> Tensor:
    """Return the last ``width`` outputs of a `sliceable` projection of ``states`` [B, T, D], [B, T, width]."""
    if type(fused).__name__ != _TRANSPOSED:
        bias = None if fused.bias is None else fused.bias[-width:]
        return nn.functional.linear(states, fused.weight[-width:], bias)
    flat = torch.addmm(fused.bias[-width:], states.view(-1, states.shape[-1]), fused.weight[:, -width:])
    return flat.view(*states.shape[:-1], width)


def tail_work(fused: Any, width: int) -> Work:
    """Return the work of `tail`."""
    rows, columns = fused.weight.shape
    inputs = rows if type(fused).__name__ == _TRANSPOSED else columns
    bias = 0 if fused.bias is None else width
    return Work(2 * inputs * width, (inputs * width + bias) * fused.weight.element_size())

"""Weight-only quantisation to int8, one scale for each output."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anee_core.adapter import ModelAdapter
from anee_core.errors import InputError, ModelError
from anee_core.layout import Parts
from anee_core.projection import sliceable

WEIGHTS = ("int8",)
"""What weights can be quantised to."""


class Int8Linear(nn.Module):
    """A linear map whose weight is stored as int8 [out, in], times one float32 scale for each output.

    Values are rounded to the nearest of 255 steps between plus and minus the largest of their row.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float().contiguous()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        product = nn.functional.linear(states, self.weight.to(states.dtype)) * self.scale.to(states.dtype)
        return product if self.bias is None else product + self.bias


def quantise(adapter: ModelAdapter, model: nn.Module, weights: str) -> None:
    """Quantise the linear maps of a model's decoder layers, in place; embedding and head stay as they are.

    Raises:
        InputError: there is no such quantisation.
        ModelError: the layers hold something else than plain linear maps, or are on another device than the CPU.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights can be quantised to {', '.join(WEIGHTS)}; got '{weights}'")
    parts: Parts = adapter.parts(model)
    if parts.layout.experts is not None:
        raise ModelError("weights='int8' does not know mixtures of experts; leave it out")
    for layer in parts.layers:
        if next(layer.parameters()).device.type != "cpu":
            raise ModelError("weights='int8' is for the CPU; on a GPU, load the model quantised by torchao")
        for path, module in list(layer.named_modules()):
            if sliceable(module):
                above, _, name = path.rpartition(".")
                setattr(layer.get_submodule(above), name, _quantised(module))


def _quantised(module: nn.Module) -> Int8Linear:
    weight = cast(Tensor, module.weight)
    stored = weight.T if type(module).__name__ == "Conv1D" else weight
    return Int8Linear(stored, cast("nn.Parameter | None", module.bias))

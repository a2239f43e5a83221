"""Weight-only quantisation: int8 with a scale for each output, int4 with a scale and an offset for each 32 weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anee_core.adapter.fused_projection import sliceable
from anee_core.adapter.layout import Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.errors import InputError, ModelError

_GROUP = 32
"""Weights that share a scale and an offset in int4."""


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


class Int4Linear(nn.Module):
    """A linear map whose weight is stored as 4-bit numbers, times a scale, plus an offset, of every 32 inputs.

    ``weight`` [out, in / 2] uint8 holds of each 32 numbers the first 16 in the lower halves of 16 bytes and the others
    in the upper ones; ``scale`` [out, in / 32, 2] fp32 the scales and offsets. Values are rounded to the nearest of 16
    steps from the smallest to the largest of the 32; GGUF's Q4_1 does the same, so that such weights stay as they are.

    Raises:
        ModelError: the number of inputs is no multiple of 32.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if self.in_features % _GROUP:
            raise ModelError(f"int4 takes weights with a multiple of {_GROUP} inputs; got {self.in_features}; use int8")
        groups = weight.detach().float().reshape(self.out_features, -1, _GROUP)
        least, most = groups.aminmax(dim=-1, keepdim=True)
        scale = (most - least).clamp(min=1e-12) / 15
        steps = ((groups - least) / scale).round().clamp(0, 15).to(torch.uint8)
        low, high = steps.chunk(2, dim=-1)
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", (low | high << 4).flatten(1).contiguous())
        self.register_buffer("scale", torch.cat((scale, least), dim=-1))
        self.bias = bias

    def dequantised(self) -> Tensor:
        """Return the weight [out, in] in fp32."""
        packed = self.weight.view(self.out_features, -1, _GROUP // 2)
        steps = torch.cat((packed & 15, packed >> 4), dim=-1)
        scale, least = self.scale.chunk(2, dim=-1)
        return (steps * scale + least).flatten(1)

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        return nn.functional.linear(states, self.dequantised().to(states.dtype), self.bias)


QUANTISED: dict[str, type[Int8Linear | Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}
"""What weights can be quantised to."""


def quantise(adapter: ModelAdapter, model: nn.Module, weights: str) -> None:
    """Quantise the linear maps of a model's decoder layers, in place; embedding and head stay as they are.

    Raises:
        InputError: there is no such quantisation.
        ModelError: the layers hold something else than plain linear maps, or are on another device than the CPU.
    """
    if weights not in QUANTISED:
        raise InputError(f"weights can be quantised to {', '.join(QUANTISED)}; got '{weights}'")
    parts: Parts = adapter.parts(model)
    if parts.layout.experts is not None:
        raise ModelError(f"weights='{weights}' does not know mixtures of experts; leave it out")
    made = []
    for layer in parts.layers:
        if next(layer.parameters()).device.type != "cpu":
            raise ModelError(f"weights='{weights}' is for the CPU; on a GPU, load the model quantised by torchao")
        for path, module in layer.named_modules():
            if not _is_matrix(module):
                continue
            if not sliceable(module):
                raise ModelError(
                    f"weights='{weights}' takes plain linear maps, and '{path}' is a {type(module).__name__} that is "
                    "quantised, wrapped or hooked already; leave it out"
                )
            made.append((layer, path, _quantised(module, QUANTISED[weights])))
    if not made:
        raise ModelError(f"weights='{weights}' takes plain linear maps, and the layers hold none; leave it out")
    # Once all are made, so that an error leaves the model as it was.
    for layer, path, module in made:
        above, _, name = path.rpartition(".")
        setattr(layer.get_submodule(above), name, module)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own."""
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    return weight is not None and weight.dim() == 2


def _quantised(module: nn.Module, kind: type[Int8Linear | Int4Linear]) -> nn.Module:
    weight = cast(Tensor, module.weight)
    stored = weight.T if type(module).__name__ == "Conv1D" else weight
    return kind(stored, cast("nn.Parameter | None", module.bias))

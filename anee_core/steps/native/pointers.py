"""Structs that point into the memory of modules, and whether that memory is still theirs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from anee_core.adapter.fused_projection import sliceable
from anee_core.adapter.instrumentation import hooked
from anee_core.steps.native.structs import Kind, Matrix, Norm, NormWeights
from anee_core.steps.quantised import Int4Linear, Int8Linear

KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16}
_STORED = {Int8Linear: (Kind.INT8, torch.int8), Int4Linear: (Kind.INT4, torch.uint8)}
"""Kind of each quantised map, and the type of its weights."""
_RMS_FAMILIES = "Ernie4_5 Glm Glm4 Helium Llama Ministral Mistral Phi3 Qwen2 Qwen3 SeedOss"
_RMS_NORMS = frozenset(f"{family}RMSNorm" for family in _RMS_FAMILIES.split())
_FROM_ONE = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"})


class UnfitError(Exception):
    """A module that the native step cannot compute, and the message says why."""


class Pointers:
    """Maker of structs for modules whose parameters have one dtype; it remembers where those are."""

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in KINDS:
            raise UnfitError(f"its weights are {dtype}")
        self.dtype, self.kind = dtype, KINDS[dtype]
        self._sources: list[tuple[nn.Module, str, Tensor | None, int]] = []
        # Aliases, so that no memory is freed under a pointer when a parameter is given another.
        self._kept: list[Tensor] = []

    @property
    def current(self) -> bool:
        """Whether the modules still hold what the structs point to."""
        for module, name, tensor, pointer in self._sources:
            now = _tensor(module, name)
            if now is not tensor or (now is not None and now.data_ptr() != pointer):
                return False
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the weights pointed to."""
        return sum(tensor.nbytes for tensor in self._kept)

    def matrix(self, module: nn.Module) -> Matrix:
        """Return the struct of a linear map.

        Raises:
            UnfitError: it is not a plain one in the CPU's memory.
        """
        kind, stored = _STORED.get(type(module), (self.kind, self.dtype))
        quantised = kind != self.kind
        if hooked(module) or not (quantised or sliceable(module)):
            raise UnfitError(f"a {type(module).__name__} is quantised, wrapped or hooked")
        weight = cast(Tensor, self._take(module, "weight", stored))
        scale = self._take(module, "scale", torch.float32) if quantised else None
        bias = self._take(module, "bias", self.dtype)
        transposed = type(module).__name__ == "Conv1D"
        outputs, inputs = reversed(weight.shape) if transposed else weight.shape
        if kind == Kind.INT4:
            inputs *= 2
        return Matrix(
            weight=weight.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            scale=None if scale is None else scale.data_ptr(),
            stride=weight.stride(0),
            outputs=outputs,
            inputs=inputs,
            group=outputs,
            transposed=transposed,
            kind=kind,
        )

    def part(self, module: nn.Module, first: int, count: int) -> Matrix:
        """Return the struct of ``count`` outputs of a linear map, from output ``first`` on."""
        part = self.matrix(module)
        size = self.dtype.itemsize
        part.weight += first * (1 if part.transposed else part.stride) * (size if part.kind == self.kind else 1)
        if part.bias:
            part.bias += first * size
        if part.scale:
            scale = cast(Tensor, _tensor(module, "scale"))
            part.scale += first * scale.stride(0) * scale.dtype.itemsize
        part.outputs = part.group = count
        return part

    def norm(self, module: nn.Module) -> NormWeights:
        """Return the struct of a norm.

        Raises:
            UnfitError: it is of no known kind.
        """
        known: Any = module
        name = type(module).__name__
        if name == "LayerNorm" and known.weight is not None:
            kind, eps = Norm.LAYER, known.eps
        elif name in _RMS_NORMS:
            kind, eps = Norm.RMS, known.variance_epsilon
        elif name in _FROM_ONE:
            kind, eps = Norm.RMS_FROM_ONE, known.eps
        else:
            raise UnfitError(f"its norm is a {name}")
        if hooked(module):
            raise UnfitError(f"its {name} is hooked")
        weight, bias = cast(Tensor, self._take(module, "weight", self.dtype)), self._take(module, "bias", self.dtype)
        return NormWeights(weight.data_ptr(), None if bias is None else bias.data_ptr(), eps, kind)

    def _take(self, module: nn.Module, name: str, dtype: torch.dtype) -> Tensor | None:
        tensor = _tensor(module, name)
        if tensor is not None:
            if tensor.dtype != dtype:
                raise UnfitError(f"it has weights of {tensor.dtype} beside those of {dtype}")
            if tensor.device.type != "cpu" or tensor.stride(-1) != 1:
                raise UnfitError("its weights do not lie in plain order in the CPU's memory")
            self._kept.append(tensor.detach())
        self._sources.append((module, name, tensor, 0 if tensor is None else tensor.data_ptr()))
        return tensor


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name, module._buffers.get(name))

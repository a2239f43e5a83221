"""A transformers model as OpenVINO reads it: keys and values are its state, which grows with each call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anee_core.adapter.cache_names import CACHE
from anee_core.errors import MissingPackageError, ModelError


def write_openvino(network: Any, path: Path) -> str:
    """Write a causal LM in float32 to ``path`` (.xml, and .bin beside it).

    Return what OpenVINO calls the dtype that the model is in, and so is to be computed in.

    What is written takes ``input_ids`` and ``position_ids`` [B, T], and in ``beam_idx`` [B] which row of the state each
    row goes on with. It returns the logits [B, 1, V] of the last tokens.

    Raises:
        MissingPackageError: openvino is not installed.
        ModelError: the model sees a window of the past only, or cannot be converted, or OpenVINO does not compute in
            its dtype on this processor.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError("it needs openvino: pip install 'anee[peers]'") from error
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(network.dtype)
    if precision is None or precision.upper() not in _computed(openvino):
        raise ModelError(f"it does not compute in {str(network.dtype).removeprefix('torch.')} on this processor")
    config = network.config
    if getattr(config, "sliding_window", None) or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError("the model that it is given would know of no windows in attention")
    whole = network if network.dtype == torch.float32 else copy.deepcopy(network).float()
    with torch.no_grad():
        layers = whole(torch.zeros(1, 3, dtype=torch.long), use_cache=True)[CACHE].layers
        past = [part for layer in layers for part in (layer.keys, layer.values)]
        example = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[3, 4]]), *past
        try:
            with _logging_kept():
                model = openvino.convert_model(_Flat(whole).eval(), example_input=example)
        except Exception as error:  # both the trace and the conversion fail in ways of their own
            raise ModelError(f"it cannot convert a {type(network).__name__}: {' '.join(str(error).split())}") from error
    _hold_states(model, [part.shape for part in past])
    openvino.save_model(model, path, compress_to_fp16=False)
    return precision


def _computed(openvino: Any) -> set[str]:
    """Return the dtypes that OpenVINO computes in on this processor, by its names."""
    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {{"FP32": "F32"}.get(name, name) for name in known}


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Put the root logger back: the converter sets it up for itself, and leaves it so where it fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


class _Past:
    """A cache whose tensors come from outside, as a trace needs them."""

    is_compileable = False

    def __init__(self, parts: tuple[Tensor, ...]) -> None:
        self.pairs = list(zip(parts[::2], parts[1::2], strict=True))

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        old = self.pairs[layer_idx]
        self.pairs[layer_idx] = torch.cat((old[0], keys), dim=2), torch.cat((old[1], values), dim=2)
        return self.pairs[layer_idx]

    def get_seq_length(self, *_: Any) -> int:
        return self.pairs[0][0].shape[2]


class _Flat(nn.Module):
    """The model as a function of tensors alone: keys and values go in one by one, and come out longer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = _Past(past)
        slots = torch.arange(past[0].shape[2] + input_ids.shape[1])
        visible = (slots <= position_ids[..., None])[:, None]
        logits = self.network(
            input_ids, attention_mask=visible, position_ids=position_ids, use_cache=True, logits_to_keep=1,
            **{CACHE: cache},
        ).logits  # fmt: skip
        return logits, *(part for pair in cache.pairs for part in pair)


def _hold_states(model: Any, shapes: list[torch.Size]) -> None:
    """Make a converted model's keys and values [B, H, S, Dh] its state, which is empty at first."""
    from openvino import PartialShape, Type, opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    names = [f"past.{i}" for i in range(len(shapes))]
    for port, name in zip(model.inputs, ["input_ids", "position_ids", *names], strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ["logits", *(f"new {name}" for name in names)], strict=True):
        port.get_tensor().set_names({name})
    parts = [PartialShape([-1, heads, -1, width]) for _, heads, _, width in shapes]
    model.reshape(dict(zip(model.inputs, [PartialShape([-1, -1])] * 2 + parts, strict=True)))
    # The plugin knows attention over a state by this choice of rows in front of it.
    rows = opset13.parameter(PartialShape([-1]), Type.i32, "beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([rows])
    for name in names:
        past = model.input(name)
        readers = past.get_target_inputs()
        chosen = opset13.gather(past, rows, opset13.constant(np.int64(0)))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: f"new {name}" for name in names})
    shape = opset13.shape_of(model.input("input_ids"), "i64")
    batch = opset13.gather(shape, opset13.constant(np.array([0])), opset13.constant(np.int64(0)))
    for state in [op for op in model.get_ops() if op.get_type_name() == "ReadValue"]:
        _, heads, _, width = (dimension.get_min_length() for dimension in state.get_output_partial_shape(0))
        empty = opset13.concat([batch, opset13.constant(np.array([heads, 0, width]))], axis=0)
        state.set_arguments([opset13.broadcast(opset13.constant(np.float32(0)), empty).output(0)])
    model.validate_nodes_and_infer_types()

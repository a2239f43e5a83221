"""A short hash that tells models apart."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from anee_core.model.adaptive_model import AdaptiveModel


def fingerprint(model: AdaptiveModel) -> str:
    """Return a short hash that tells models apart: of the config's sizes, and of a few numbers of every weight."""
    digest = hashlib.sha256()
    config = model.config
    digest.update(f"{config.model_type} {len(model.parts.layers)} {model.dtype}".encode())
    network = model.parts.model
    # Quantised weights are buffers.
    saved = network.state_dict()
    buffers = ((name, buffer) for name, buffer in network.named_buffers() if name in saved)
    for name, weight in (*network.named_parameters(), *buffers):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        for tensor in _stored(weight.detach()):
            few = tensor.flatten()[:: max(tensor.numel() // 4, 1)][:4]
            digest.update(json.dumps(few.double().tolist()).encode())
    return digest.hexdigest()[:16]


def _stored(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is made of: itself, or the parts of a quantised weight."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _stored(getattr(tensor, name))]

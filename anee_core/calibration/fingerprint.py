"""Short hashes that tell models, and token ids, apart."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from anee_core.model.adaptive_model import AdaptiveModel


def fingerprint(model: AdaptiveModel) -> str:
    """Return a short hash that tells models apart: of the config's sizes, and of every number of every weight."""
    digest = hashlib.sha256()
    config = model.config
    digest.update(f"{config.model_type} {len(model.parts.layers)} {model.dtype}".encode())
    network = model.parts.model
    # Quantised weights are buffers.
    saved = network.state_dict()
    buffers = ((name, buffer) for name, buffer in network.named_buffers() if name in saved)
    weights = [*network.named_parameters(), *buffers]
    with ThreadPoolExecutor() as pool:  # hashing lets others run
        for (name, weight), found in zip(weights, pool.map(_digest_of_all, (w for _, w in weights)), strict=True):
            digest.update(f"{name} {tuple(weight.shape)}".encode() + found)
    return digest.hexdigest()[:16]


def digest_of(tensor: Tensor) -> str:
    """Return a short hash of a plain tensor's shape, type and numbers, in their order."""
    return hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + _digest(tensor)).hexdigest()[:16]


def _digest_of_all(weight: Tensor) -> bytes:
    return b"".join(map(_digest, _stored(weight.detach())))


def _digest(tensor: Tensor) -> bytes:
    stored: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(stored).digest()


def _stored(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is made of: itself, or the parts of a quantised weight."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _stored(getattr(tensor, name))]

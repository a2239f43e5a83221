"""Shortcuts: what a skipped layer would have added to the hidden state, estimated by a low-rank linear map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from anee_core.accounting.work import Work, stored_bytes
from anee_core.checkpoint import CheckpointFormat
from anee_core.errors import PolicyError
from anee_core.interfaces.configurable import weights_for
from anee_core.interfaces.formulas import unit_norm
from anee_core.interfaces.setting import Setting
from anee_core.interfaces.shortcut import Shortcut

_FORMAT = CheckpointFormat(
    name="shortcuts",
    what="shortcuts",
    missing="'anee calibrate MODEL --folder FOLDER' makes such a folder",
    remedy="fit or copy them again",
    renew="fit them with this version",
    shapes={"down": ("layers", "rank", "width"), "up": ("layers", "width", "rank"), "bias": ("layers", "width")},
    facts=frozenset({"facts"}),
)


@dataclass(frozen=True)
class ShortcutWeights:
    """What is fitted: ``down`` [L, r, D], ``up`` [L, D, r] and ``bias`` [L, D]; ``facts`` says how."""

    down: Tensor
    up: Tensor
    bias: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Number of layers and width."""
        return self.bias.shape[0], self.bias.shape[1]

    def save(self, folder: str | Path) -> None:
        """Write shortcuts.json and shortcuts.safetensors into a folder.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        _FORMAT.write(folder, {"facts": dict(self.facts)}, {"down": self.down, "up": self.up, "bias": self.bias})

    @classmethod
    def load(cls, folder: str | Path) -> ShortcutWeights:
        """Read what `save` wrote.

        Raises:
            CheckpointError: see `CheckpointFormat.read`.
        """
        header, tensors = _FORMAT.read(folder)
        return cls(**{**header, **tensors})


@dataclass(frozen=True)
class LowRankShortcut(Shortcut):
    """Adds ``up @ down @ n(h) + bias`` to the hidden state h of a token that skips a layer; n scales h to unit norm.

    Options:
        folder: what ``anee calibrate`` wrote; may stand first, without its name. Default: what is installed for the
            model.
    """

    name: ClassVar[str] = "shortcuts"
    positional: ClassVar[str | None] = "folder"
    checkpoint: ClassVar[CheckpointFormat | None] = _FORMAT

    folder: str = ""
    _weights: ShortcutWeights | None = field(default=None, init=False, compare=False, repr=False)

    @property
    def holds_weights(self) -> bool:
        """Whether its weights belong to no folder."""
        return self._weights is not None and not self.folder

    @classmethod
    def of(cls, weights: ShortcutWeights) -> LowRankShortcut:
        """Return shortcuts with weights in memory, not yet bound."""
        shortcut = cls()
        object.__setattr__(shortcut, "_weights", weights)
        return shortcut

    def bind(self, setting: Setting) -> Shortcut:
        """Load the weights.

        Raises:
            PolicyError: there are none for this model, or they are of another shape.
        """
        weights = weights_for(self, ShortcutWeights.load, setting, "anee calibrate", self._weights)
        down, up, bias = (w.to(setting.device, setting.dtype) for w in (weights.down, weights.up, weights.bias))
        bound = replace(self)
        object.__setattr__(bound, "_weights", ShortcutWeights(down, up, bias, weights.facts))
        return bound

    @property
    def weights(self) -> ShortcutWeights:
        """The weights, once bound."""
        if self._weights is None:
            raise PolicyError("shortcuts: they are not bound to a model")
        return self._weights

    def work(self, layer_idx: int) -> Work:
        """Return the work of both maps."""
        _, rank, width = self.weights.down.shape
        stored = sum(stored_bytes(w[layer_idx]) for w in (self.weights.down, self.weights.up, self.weights.bias))
        return Work(4 * rank * width, stored)

    def estimate(self, layer_idx: int, hidden_states: Tensor) -> Tensor:
        """Return what the layer would add to hidden states [..., D], of the same shape."""
        down, up, bias = (
            w[layer_idx].to(hidden_states) for w in (self.weights.down, self.weights.up, self.weights.bias)
        )
        return torch.nn.functional.linear(unit_norm(hidden_states) @ down.T, up, bias)

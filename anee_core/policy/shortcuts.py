"""Shortcuts: what a skipped layer would have added to the hidden state, estimated by a low-rank linear map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from anee_core.accounting.work import Work, stored_bytes
from anee_core.checkpoint import CheckpointFormat
from anee_core.interfaces.configurable import Trained, TrainedWeights
from anee_core.interfaces.formulas import LowRankMap
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
class ShortcutWeights(TrainedWeights):
    """Weights of shortcuts that were fitted or trained."""

    format: ClassVar[CheckpointFormat] = _FORMAT

    down: Tensor
    """[L, r, D] maps from a hidden state to r numbers."""
    up: Tensor
    """[L, D, r] maps from those to the estimates."""
    bias: Tensor
    """[L, D] biases of the estimates."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How they were found."""


@dataclass(frozen=True)
class LowRankShortcut(Trained[ShortcutWeights], Shortcut):
    """Add ``up @ down @ n(h) + bias`` to the hidden state h of a token that skips a layer; n scales h to unit norm.

    Options:
        folder: what ``anee calibrate`` wrote; may stand first, without its name. Default: what is installed for the
            model.
    """

    name: ClassVar[str] = "shortcuts"
    checkpoint: ClassVar[CheckpointFormat | None] = _FORMAT
    weights_class: ClassVar[type[TrainedWeights]] = ShortcutWeights
    command: ClassVar[str] = "anee calibrate"

    folder: str = ""
    _weights: ShortcutWeights | None = field(default=None, compare=False, repr=False)

    def bind(self, setting: Setting) -> Shortcut:
        """Load the weights.

        Raises:
            PolicyError: there are none for this model, or they are of another shape.
        """
        weights = self.weights_for(setting)
        there = {name: tensor.to(setting.device, setting.dtype) for name, tensor in weights.tensors.items()}
        return replace(self, _weights=replace(weights, **there))

    @property
    def low_rank(self) -> LowRankMap | None:
        """The formula of its estimates, once bound; None for derived shortcuts, which may compute something else."""
        return self._map if type(self) is LowRankShortcut else None

    @cached_property
    def _map(self) -> LowRankMap:
        return LowRankMap(self.weights.down, self.weights.up, self.weights.bias)

    def work(self, layer_idx: int) -> Work:
        """Return the work of both maps."""
        _, rank, width = self.weights.down.shape
        return Work(4 * rank * width, sum(stored_bytes(part[layer_idx]) for part in self.weights.tensors.values()))

    def estimate(self, layer_idx: int, hidden_states: Tensor) -> Tensor:
        """Return what the layer would add to hidden states [..., D], of the same shape."""
        return self._map.estimate(layer_idx, hidden_states)

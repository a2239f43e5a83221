"""Adaptively sparse attention: each token decides which earlier ones the layer may forget.

The method is that of Anagnostidis et al., 2023 (arXiv:2305.15805).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from anee_core.checkpoint import CheckpointFormat
from anee_core.errors import PolicyError
from anee_core.interfaces.cache_policy import CachePolicy, CacheView, Wants
from anee_core.interfaces.configurable import Trained, TrainedWeights
from anee_core.interfaces.formulas import LinearInteraction
from anee_core.interfaces.setting import Setting
from anee_core.ranges import Number

_FORMAT = CheckpointFormat(
    name="asa",
    what="asa checkpoint",
    missing="'anee train asa MODEL --folder FOLDER' makes such a folder",
    remedy="train or copy it again",
    renew="train with this version",
    shapes={"query": ("layers", "rank", "width"), "key": ("layers", "rank", "width"), "beta": ("layers",)},
    facts=frozenset({"backbone", "facts"}),
)
_KEY = "interaction_key"


@dataclass(frozen=True)
class AsaWeights(TrainedWeights):
    """Interaction projections and biases that were trained for one model."""

    format: ClassVar[CheckpointFormat] = _FORMAT

    query: Tensor
    """[L, r, D] projections of the token that decides."""
    key: Tensor
    """[L, r, D] projections of the tokens that it keeps or drops."""
    beta: Tensor
    """[L] bias of each layer."""
    backbone: str | None = None
    """Name of the model that was trained together with them, as its config has it under ``anee_backbone``; None if the
    model stayed as it was.
    """
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the training wants to be known: figures, settings."""


@dataclass(frozen=True)
class AsaCachePolicy(Trained[AsaWeights], CachePolicy):
    """Drop what trained interaction projections say: token i keeps slot j while q_i . k_j / sqrt(r) + beta > 0.

    What a token drops is hidden from its own attention already. A token that skips the layer drops nothing, but gets
    its interaction key there.

    Options:
        folder: what ``anee train asa`` wrote; may stand first, without its name. Default: what is installed for the
            model.
        shift: added to beta; above 0 keeps more, below less.
    """

    name: ClassVar[str] = "asa"
    wants: ClassVar[Wants] = frozenset({"states"})
    before_attention: ClassVar[bool] = True
    checkpoint: ClassVar[CheckpointFormat | None] = _FORMAT
    weights_class: ClassVar[type[TrainedWeights]] = AsaWeights
    command: ClassVar[str] = "anee train asa"

    folder: str = ""
    shift: Number = 0.0
    _weights: AsaWeights | None = field(default=None, compare=False, repr=False)
    _interaction: LinearInteraction | None = field(default=None, compare=False, repr=False)

    def bind(self, setting: Setting) -> CachePolicy:
        """Load the weights.

        Raises:
            PolicyError: there are none for this model, or they are of another shape, or trained with other weights.
        """
        weights = self.weights_for(setting)
        if weights.backbone is not None and weights.backbone != setting.backbone:
            raise PolicyError(
                f"asa: the weights in {self.folder} were trained together with their model; load that one "
                f"('{Path(self.folder) / 'model'}'), or train with the model frozen"
            )
        query, key = (w.to(setting.device, setting.dtype) for w in (weights.query, weights.key))
        ready = replace(weights, query=query, key=key, beta=weights.beta.to(setting.device))
        interaction = LinearInteraction(query, key, ready.beta.float() + self.shift, _KEY)
        return replace(self, _weights=ready, _interaction=interaction)

    @property
    def interaction(self) -> LinearInteraction | None:
        """The formula of its decisions, once bound; None for derived policies, which may compute something else."""
        return self._interaction if type(self) is AsaCachePolicy else None

    def work(self, layer_idx: int) -> tuple[int, int]:
        """Return the FLOPs of both projections, and of one interaction."""
        _, rank, width = self.weights.query.shape
        return 4 * rank * width, 2 * rank

    def remember(self, view: CacheView) -> Mapping[str, Tensor]:
        """Store interaction keys [B, T, r]."""
        return {_KEY: self._project(self.weights.key, view)}

    def retain(self, view: CacheView) -> Tensor:
        """Return which slots each new token keeps, [B, T, S]."""
        queries = self._project(self.weights.query, view)
        scores = (queries @ view.state[_KEY].transpose(1, 2)).float() * self.weights.query.shape[1] ** -0.5
        keep = scores + (self.weights.beta[view.layer_idx].to(scores.device) + self.shift) > 0
        return keep | ~view.ran[:, :, None]

    def _project(self, weight: Tensor, view: CacheView) -> Tensor:
        states = view.states
        assert states is not None
        # Converted already, unless layers are on several devices.
        return states @ weight[view.layer_idx].to(states.device, states.dtype).T

"""What the adapter checks look at: one adapter, one small config, and seeded models made from it."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.errors import AdapterError, InputError
from anee_core.interfaces.setting import Calibration
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.plugins import Plugins
from anee_core.policy.policy import Policy
from anee_core.policy.shortcuts import LowRankShortcut, ShortcutWeights
from anee_core.policy.strings import make_policy

_GAIN = 0.45
"""Standard deviation of weights times the square root of their width: every layer matters, none explodes."""
CLOSE = (5e-5, 1e-3)
"""Absolute and relative tolerance in fp32 where sums may be taken in another order."""
LOOSE = (0.15, 0.05)
"""Absolute and relative tolerance in bf16."""


@dataclass
class Subject:
    """An adapter and a config of its family, small enough to build again and again."""

    adapter: ModelAdapter
    """The adapter to check."""
    config: Any
    """A small config of its family."""
    name: str = "config"
    """Name of the config in reports."""
    refused: tuple[Any, ...] = ()
    """Configs of the family that the adapter must refuse."""
    plugins: Plugins = field(default_factory=Plugins.discover)
    """What is installed."""
    _built: dict[tuple[torch.dtype, str | None], nn.Module] = field(default_factory=dict)
    """Models that all checks share, by dtype and attention backend."""
    _pristine: dict[str, Any] = field(default_factory=dict)
    """See `pristine`; empty before the first model is built."""

    def __post_init__(self) -> None:
        least = {"num_hidden_layers": 4, "max_position_embeddings": 64, "vocab_size": 32}
        for name, size in least.items():
            given = getattr(self.config, name, None)
            if given is not None and given < size:
                raise InputError(f"the config '{self.name}' has {name}={given}; the checks need at least {size}")
        self.config = copy.deepcopy(self.config)
        self.config.use_cache = True  # checkpoints saved after training often say otherwise

    def build(
        self, dtype: torch.dtype = torch.float32, attention: str | None = None, seed: int = 0, config: Any = None
    ) -> Any:
        """Return a new transformers model with seeded weights, in ``attention`` or its default backend."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                chosen = {} if attention is None else {"attn_implementation": attention}
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config or self.config), **chosen)
            except ValueError as error:
                raise AdapterError(
                    f"transformers makes no causal LM of {type(self.config).__name__}: {error}"
                ) from error
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1 and parameter.std() > 1e-4:
                        parameter.mul_(_GAIN / parameter.shape[-1] ** 0.5 / parameter.std())
                    else:  # norms and biases: not all alike, so that leaving one out shows
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if not self._pristine:  # before the adapter has seen any model
            self._pristine.update(code_of(model))
        return model.to(dtype).eval()

    @property
    def pristine(self) -> dict[str, Any]:
        """The code of transformers that a model of this family runs, as it was before the adapter was used."""
        return self._pristine

    def model(self, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
        """Return the transformers model that all checks share; they leave it as it is."""
        if (dtype, attention) not in self._built:
            self._built[dtype, attention] = self.build(dtype, attention)
        return self._built[dtype, attention]

    def adaptive(
        self,
        policy: str | Policy = "dense",
        budget: float | None = None,
        hard: bool = False,
        model: Any = None,
        fast: bool = False,
    ) -> AdaptiveModel:
        """Return a model under a policy, with a made-up calibration, and made-up shortcuts where it names no folder."""
        model = self.model() if model is None else model
        adaptive = AdaptiveModel(model, self.adapter, fast=fast)
        layers = len(adaptive.parts.layers)
        calibration = Calibration(torch.linspace(1, 0, layers), torch.linspace(0, 1, 101), "made up", "made up")
        made = make_policy(policy, self.plugins)
        if isinstance(made.shortcut, LowRankShortcut) and not made.shortcut.folder:
            made = replace(made, shortcut=LowRankShortcut.of(self.shortcuts))
        return adaptive.set_policy(made, budget, hard, calibration)

    @property
    def shortcuts(self) -> ShortcutWeights:
        """Shortcuts of rank 4 that change a hidden state about as much as a layer does."""
        generator = torch.Generator().manual_seed(4)
        layers, width, rank = self.layers, int(self.config.hidden_size), 4
        down = torch.randn(layers, rank, width, generator=generator) / width
        up, bias = (torch.randn(layers, width, n, generator=generator) * 0.3 for n in (rank, 1))
        return ShortcutWeights(down, up, bias[..., 0])

    @property
    def backends(self) -> tuple[str, ...]:
        """The attention backends that the family has, of those that can follow an adaptive cache."""
        return ("eager", "sdpa") if self.model()._supports_sdpa else ("eager",)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def windowed(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(self.adapter.window(self.config, i) is not None for i in range(self.layers))

    @property
    def routed(self) -> bool:
        """Whether tokens are routed to experts, which then compute those of all rows together."""
        return self.adapter.layout_for(self.config).experts is not None

    def tokens(self, batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
        """Return random token ids [B, T] without the first few, which may be special."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, int(self.config.vocab_size), (batch, length), generator=generator)

    @property
    def far(self) -> Tensor:
        """One sequence [1, T] that reaches as far as the model does, up to 128 tokens."""
        return self.tokens(1, min(self.adapter.max_positions(self.config) or 128, 128), seed=11)

    def ragged(self, lengths: tuple[int, ...], side: str, extra: int = 2) -> tuple[Tensor, Tensor]:
        """Return ids and mask [B, T] of rows with these lengths, padded on one side, by ``extra`` more than needed."""
        width = max(lengths) + extra
        ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
        for row, length in enumerate(lengths):
            at = slice(width - length, width) if side == "left" else slice(0, length)
            ids[row, at] = self.tokens(1, length, seed=row + 1)[0]
            mask[row, at] = 1
        return ids, mask


def code_of(model: nn.Module) -> dict[str, Any]:
    """Return what a model's classes and their modules define, by name: whoever patches transformers changes it."""
    kinds = {type(module) for module in model.modules()} | set(type(model).__mro__)
    kinds = {kind for kind in kinds if kind.__module__.startswith("transformers.")}
    found: dict[str, Any] = {"attention functions": dict(ALL_ATTENTION_FUNCTIONS)}
    for kind in kinds:
        found[f"class {kind.__name__}"] = {k: v for k, v in vars(kind).items() if callable(v)}
        module = sys.modules[kind.__module__]
        found[f"module {kind.__module__}"] = {k: v for k, v in vars(module).items() if callable(v)}
    return found


def positions_of(mask: Tensor) -> Tensor:
    """Return the positions [B, T] of a padded batch."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def stepwise(model: Any, ids: Tensor) -> Tensor:
    """Return logits [B, T, V] of decoding a sequence one token at a time."""
    cache, parts = model.new_cache(), []
    for t in range(ids.shape[1]):
        parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


def without_layers(model: Any, path: str, removed: set[int]) -> Any:
    """Return a copy of a transformers model from which decoder layers have been taken out."""
    smaller = copy.deepcopy(model)
    above, _, name = path.rpartition(".")
    parent = smaller.get_submodule(above)
    kept = [layer for i, layer in enumerate(getattr(parent, name)) if i not in removed]
    for i, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    setattr(parent, name, nn.ModuleList(kept))
    shorter = shortened(smaller.config, removed)
    for module in smaller.modules():  # each holds the same config
        if hasattr(module, "config"):
            module.config = shorter
    return smaller


def shortened(config: Any, removed: set[int]) -> Any:
    """Return a copy of a config without some of its decoder layers."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = config.num_hidden_layers - len(removed)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        shorter.layer_types = [kind for i, kind in enumerate(kinds) if i not in removed]
    return shorter

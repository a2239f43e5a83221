"""What generation asks of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from anee_core.accounting.trace import Trace
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.cache.adaptive_cache import AdaptiveCache


class Decodable(Protocol):
    """A model that reads tokens into a cache and says what may come next."""

    adapter: ModelAdapter
    """Adapter of the model's family."""
    config: Any
    """The model's transformers config."""
    generation_config: Any
    """The model's transformers generation config."""
    tokenizer: Any
    """Tokenizer of the model; None if it has none."""
    last_trace: Trace | None
    """Record of the last call; None before the first."""
    last_ends: list[int] | None
    """Tokens of each row when it ended, in the last call of `generate`; None if that is not known."""

    @property
    def device(self) -> torch.device:
        """Device where inputs go."""
        ...

    def new_cache(self, capacity: int | None = None) -> AdaptiveCache:
        """Return an empty cache with room for ``capacity`` tokens."""
        ...

    def check_fits(self, length: int) -> None:
        """Raise `InputError` if the model has no position for the last token of a row of ``length``."""
        ...

    def recording(self, cache: AdaptiveCache, prompt: int) -> AbstractContextManager[Trace]:
        """Gather all forwards on a cache in one trace; ``prompt`` tokens are read first."""
        ...

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor | None, cache: AdaptiveCache) -> Tensor:
        """Return the logits [B, 1, V] after each row's last real token of [B, T]."""
        ...

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers does."""
        ...

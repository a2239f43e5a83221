"""Keep every token: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from anee_core.interfaces.cache_policy import CachePolicy, CacheView


@dataclass(frozen=True)
class FullCachePolicy(CachePolicy):
    """Keep every token."""

    name: ClassVar[str] = "full"

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped: yes."""
        return True

    def retain(self, view: CacheView) -> Tensor:
        """Return the valid slots."""
        return view.valid[:, None]

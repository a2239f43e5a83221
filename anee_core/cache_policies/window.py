"""Keep the first tokens and the most recent ones (StreamingLLM; Xiao et al., 2023, arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from anee_core.errors import PolicyError
from anee_core.interfaces import CachePolicy, CacheView


@dataclass(frozen=True)
class WindowCachePolicy(CachePolicy):
    """Keep attention sinks and a recent window. Tokens keep the positions they were read at.

    Options:
        sinks: how many first tokens of the sequence to keep.
        recent: how many most recent tokens to keep, the current one included.
    """

    name: ClassVar[str] = "window"

    sinks: int = 4
    recent: int = 256

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise PolicyError(f"window: sinks >= 0 and recent >= 1 are needed; got {self.sinks} and {self.recent}")

    def keep(self, view: CacheView) -> Tensor:
        """Return the slots of the sinks and of the window."""
        recent = view.position_ids > view.query_position[:, None] - self.recent
        return view.valid & (recent | (view.position_ids < self.sinks))

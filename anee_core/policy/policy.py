"""The bundle of a layer policy, shortcuts and a token policy, and how it is saved."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anee_core.cache_policies.full import FullCachePolicy
from anee_core.checkpoint import CheckpointFormat
from anee_core.controllers.dense import DenseController
from anee_core.errors import CheckpointError
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.interfaces.profiler import Profiler
from anee_core.interfaces.setting import Calibration
from anee_core.interfaces.shortcut import Shortcut
from anee_core.policy.options import spell
from anee_core.policy.profiler import STANDARD, SignalProfiler

POLICY_FORMAT = CheckpointFormat(
    name="policy",
    what="policy",
    missing="a policy folder has policy.json and policy.safetensors",
    remedy="save it again",
    renew="save the policy with this version",
)


@dataclass(frozen=True)
class Policy:
    """What decides: a controller for layers, a cache policy for tokens, and what serves them."""

    controller: Controller = field(default_factory=DenseController)
    """Layer policy: decides which layers a token runs."""
    cache_policy: CachePolicy = field(default_factory=FullCachePolicy)
    """Token policy: decides which tokens a layer keeps."""
    profiler: Profiler = field(default_factory=SignalProfiler)
    """Profiler that measures the signals of the controller."""
    calibration: Calibration | None = None
    """What the controller was bound with, if it came with the policy."""
    budget: float | None = None
    """Budget that the controller was bound to, if it came with the policy."""
    hard: bool = False
    """Whether no token may exceed that budget."""
    shortcut: Shortcut | None = None
    """What tokens get in the place of a layer that they skip; None for nothing."""
    asked: str = field(default="", compare=False)
    """String by which the policy was asked for; empty if it was not."""

    @property
    def feeds_back(self) -> bool:
        """Whether a token's decisions depend on the model's output for earlier tokens."""
        return any(name in self.profiler.feedback for name in self.controller.signals)

    def __str__(self) -> str:
        """Return the string by which the policy was asked for, or else the one that makes it."""
        return self.asked or self.spelled

    @property
    def title(self) -> str:
        """The policy's name for others to read: as it was asked for, with the last part of local paths alone."""
        pieces = re.split(r"([:=,+\s])", str(self))
        return "".join(os.path.basename(p) if os.path.isabs(p) or os.path.exists(p) else p for p in pieces)

    @property
    def spelled(self) -> str:
        """The policy string that makes this policy, with all options that are not the default."""
        parts = (self.controller, self.shortcut, self.cache_policy)
        return "+".join(spell(part) for part in parts if part is not None and not isinstance(part, FullCachePolicy))

    def with_trained(self, folders: Mapping[str, Path]) -> Policy:
        """Return the policy with its trained parts' folders filled in where they name none, by the part's name."""
        return self.with_folders(lambda name, folder: folder or folders.get(name, ""))

    def untrained(self) -> frozenset[str]:
        """Return the names of the parts that need trained weights and name no folder with any."""
        parts = (self.controller, self.cache_policy, self.shortcut)
        trained = [part for part in parts if part is not None and part.checkpoint is not None]
        return frozenset(part.name for part in trained if not part.options()["folder"] and not part.holds_weights)

    def enclosed(self) -> Policy:
        """Return the policy as a saved one holds it: with its trained parts' folders inside its own."""
        return self.with_folders(lambda name, folder: name)

    def with_folders(self, place: Callable[[str, str], str | Path]) -> Policy:
        """Return the policy with its trained parts' folders moved: ``place`` gets a part's name and its folder."""

        def moved(part: Any) -> Any:
            trained = part is not None and part.checkpoint is not None and not part.holds_weights
            return replace(part, folder=str(place(part.name, part.folder))) if trained else part

        parts = {name: moved(getattr(self, name)) for name in ("controller", "cache_policy", "shortcut")}
        return replace(self, **parts)

    def save(self, folder: str | Path) -> None:
        """Write the policy as JSON plus safetensors; what was trained for it is copied into folders beside.

        Raises:
            CheckpointError: the policy has what no file holds: a profiler other than the standard one, or weights in
                memory.
            OutputError: the folder cannot be written.
        """
        if type(self.profiler) is not SignalProfiler and self.controller.profiler == STANDARD:
            raise CheckpointError(
                f"a policy with its own profiler ({type(self.profiler).__name__}) cannot be saved: its folder holds "
                "layer and token policy only"
            )
        trained = {}
        for part in (self.controller, self.cache_policy, self.shortcut):
            if part is not None and part.holds_weights:
                raise CheckpointError(
                    f"{part.name} has weights in memory: save those to a folder, and name it in the policy"
                )
            if part is not None and part.checkpoint is not None:
                trained[part.name] = part.checkpoint.copy(part.options()["folder"], Path(folder) / part.name)
        inside = self.enclosed()
        header: dict[str, Any] = {"layers": spell(inside.controller), "tokens": spell(inside.cache_policy)}
        header.update(budget=self.budget, hard=self.hard, trained=trained)
        if inside.shortcut is not None:
            header["shortcut"] = spell(inside.shortcut)
        tensors = {}
        if self.calibration is not None:
            header["calibration"] = {"fingerprint": self.calibration.fingerprint, "source": self.calibration.source}
            tensors = {"importance": self.calibration.importance, "confidence": self.calibration.confidence}
        POLICY_FORMAT.write(folder, header, tensors)


def budget_of(policy: Policy, budget: float | None) -> float | None:
    """Return the budget in force: the one asked for, the one that came with the policy, or the controller's own."""
    for given in (budget, policy.budget):
        if given is not None:
            return given
    return policy.controller.default_budget

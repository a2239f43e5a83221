"""What the policy checks look at: one policy, and small models of several families to run it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anee_core.conformance.subject import Subject
from anee_core.conformance.tiny import small_config
from anee_core.hookspecs import hookimpl
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.plugins import Plugins
from anee_core.policy.policy import Policy
from anee_core.policy.strings import make_policy

FAMILIES = {"gpt2": 9, "llama": 6, "mistral": 4}
"""Number of layers, by family. They have learned positions, rotary ones with grouped queries, and a sliding window."""


@dataclass
class PolicySubject:
    """A policy to check, and the budget that it runs under."""

    policy: str | Policy | Controller | CachePolicy
    """A policy string, a policy, or one of its parts."""
    budget: float | None = None
    """Budget that it is to run under; None if it needs none."""
    plugins: Plugins = field(default_factory=Plugins.discover)
    """What is installed."""
    _models: dict[str, Subject] = field(default_factory=dict)
    """Models of each family, shared by all checks."""

    def __post_init__(self) -> None:
        made = self.made
        for part, kind in ((made.controller, "controllers"), (made.cache_policy, "cache_policies")):
            if part.name not in getattr(self.plugins, kind):
                self.plugins.register(_plugin_of(part, kind), part.name, "unregistered", "0")

    @property
    def made(self) -> Policy:
        """A new policy, unbound."""
        return make_policy(self.policy, self.plugins)

    @property
    def text(self) -> str:
        """The string that makes the policy."""
        return str(self.made)

    @property
    def decides(self) -> bool:
        """Whether it is a layer policy (perhaps with a token policy beside it)."""
        return not self.made.controller.runs_all

    def subject(self, family: str) -> Subject:
        """Return the models of a family, shared by all checks."""
        if family not in self._models:
            self._models[family] = Subject(
                self.plugins.adapters[family],
                small_config(family, num_hidden_layers=FAMILIES[family]),
                family,
                plugins=self.plugins,
            )
        return self._models[family]

    def adaptive(
        self, family: str, hard: bool = False, budget: float | None = None, model: Any = None
    ) -> AdaptiveModel:
        """Return a model under the policy."""
        return self.subject(family).adaptive(self.made, self.budget if budget is None else budget, hard, model)


def _plugin_of(part: Any, kind: str) -> Any:
    """Return a plugin with one policy: what has not been installed yet can be checked all the same."""

    def provide() -> dict[str, type]:
        return {part.name: type(part)}

    provide.__name__ = f"anee_{kind}"
    holder = type("Unregistered", (), {f"anee_{kind}": staticmethod(hookimpl(provide))})
    return holder()

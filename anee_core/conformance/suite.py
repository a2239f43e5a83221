"""The lists of checks, and the pytest classes that run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.conformance import cost, dense, fast, lifecycle, purity, skipping
from anee_core.conformance.check import Check
from anee_core.conformance.policies import POLICY_CHECKS
from anee_core.conformance.policy_subject import PolicySubject
from anee_core.conformance.subject import Subject

ADAPTER_CHECKS: tuple[Check[Subject], ...] = (
    dense.paths,
    dense.layer_arguments,
    dense.window,
    dense.layer_output,
    dense.dense_sequence,
    dense.dense_decode,
    dense.padding,
    purity.attention_input,
    purity.inputs,
    purity.gradients,
    skipping.keys_and_values,
    skipping.skip,
    skipping.leave,
    skipping.parallel,
    skipping.rows,
    skipping.causal_effect,
    fast.fast_step,
    fast.fast_cache,
    cost.cost_model,
    cost.budget,
    lifecycle.rollback,
    lifecycle.reorder,
    lifecycle.generate,
    lifecycle.save_and_load,
    lifecycle.hygiene,
    lifecycle.refusal,
)


class AdapterConformance:
    """Subclass it as ``Test...`` and name an adapter and small configs: pytest runs every check on every config."""

    adapter: ClassVar[ModelAdapter]
    """The adapter to check."""
    configs: ClassVar[Mapping[str, Any]]
    """Small configs of its family, by name."""
    refused: ClassVar[tuple[Any, ...]] = ()
    """Configs of the family that the adapter must refuse."""
    _last: ClassVar[Subject | None] = None
    """What was checked last; its models serve the next check."""

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make one test of each config and check (called by pytest)."""
        if "anee_check" in metafunc.fixturenames:
            metafunc.parametrize("anee_config", list(self.configs), scope="class")
            metafunc.parametrize("anee_check", ADAPTER_CHECKS, ids=[check.name for check in ADAPTER_CHECKS])

    def test_conformance(self, anee_config: str, anee_check: Check[Subject]) -> None:
        """Run one check on one config."""
        failure = anee_check.failure(self._subject(anee_config))
        assert failure is None, failure

    @classmethod
    def _subject(cls, name: str) -> Subject:
        """Return what is checked; the models of the last config are kept for its next check."""
        last: Subject | None = vars(cls).get("_last")
        if last is None or last.name != name:
            last = Subject(cls.adapter, cls.configs[name], name, tuple(cls.refused))
            cls._last = last
        return last


class PolicyConformance:
    """Subclass it as ``Test...`` and name policies: pytest runs every check on each of them."""

    policies: ClassVar[Mapping[str, tuple[Any, float | None]]]
    """Pairs of a policy string or object and a budget or None, by name."""
    _last: ClassVar[tuple[str, PolicySubject] | None] = None
    """Name of the policy that was checked last, and its models, which serve the next check."""

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make one test of each policy and check (called by pytest)."""
        if "anee_check" in metafunc.fixturenames:
            metafunc.parametrize("anee_policy", list(self.policies), scope="class")
            metafunc.parametrize("anee_check", POLICY_CHECKS, ids=[check.name for check in POLICY_CHECKS])

    def test_conformance(self, anee_policy: str, anee_check: Check[PolicySubject]) -> None:
        """Run one check on one policy."""
        failure = anee_check.failure(self._subject(anee_policy))
        assert failure is None, failure

    @classmethod
    def _subject(cls, name: str) -> PolicySubject:
        """Return what is checked; the models of the last policy are kept for its next check."""
        last: tuple[str, PolicySubject] | None = vars(cls).get("_last")
        if last is None or last[0] != name:
            last = name, PolicySubject(*cls.policies[name])
            cls._last = last
        return last[1]

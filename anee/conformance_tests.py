"""The conformance tests of the adapter that was named on pytest's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anee_core.conformance.check import Check
from anee_core.conformance.subject import Subject
from anee_core.conformance.suite import ADAPTER_CHECKS
from anee_core.conformance.target import subjects
from anee_core.errors import AneeError
from anee_core.plugins import Plugins


def pytest_generate_tests(metafunc: Any) -> None:
    """Make one test of each config and check."""
    option = metafunc.config.getoption
    paths = [Path(path) for path in option("--anee-config")]
    try:
        found = subjects(option("--anee-adapter"), paths, option("--anee-model-type"), Plugins.discover())
    except AneeError as error:
        raise pytest.UsageError(str(error)) from error
    metafunc.parametrize("subject", [subject for *_, subject in found], ids=[name for name, *_ in found])
    metafunc.parametrize("check", ADAPTER_CHECKS, ids=[check.name for check in ADAPTER_CHECKS])


def test_conformance(subject: Subject, check: Check[Subject]) -> None:
    """Run one check on one config."""
    failure = check.failure(subject)
    assert failure is None, failure

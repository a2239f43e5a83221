"""For pytest: ``pytest --anee-adapter my_package:MyAdapter`` runs the conformance suite on an adapter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Loaded by every pytest in an environment with ANEE: it imports nothing heavy.


def pytest_addoption(parser: Any) -> None:
    """Add ANEE's options."""
    group = parser.getgroup("anee", "conformance of ANEE adapters")
    group.addoption("--anee-adapter", metavar="MODULE:ADAPTER", help="check this adapter, or a registered family's")
    group.addoption("--anee-model-type", metavar="FAMILY", help="family of an adapter that is not registered")
    group.addoption(
        "--anee-config", metavar="FILE", action="append", default=[], help="a small config as JSON, or a folder of them"
    )


def pytest_configure(config: Any) -> None:
    """Collect the conformance tests, alone unless tests are named as well."""
    options = ("--anee-adapter", "--anee-config", "--anee-model-type")
    if hasattr(config, "workerinput") or not any(config.getoption(option) for option in options):
        return  # with xdist the workers are told by the first process
    spec = find_spec("anee")
    assert spec is not None
    assert spec.origin is not None
    tests = str(Path(spec.origin).with_name("conformance_tests.py"))
    named = config.args if config.args_source.name == "ARGS" else []
    config.args[:] = [*named, tests]

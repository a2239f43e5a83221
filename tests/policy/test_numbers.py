"""Numbers in policies: each works, or is refused in one line that names the option."""

import typing

import pytest
import torch
from tiny import PLUGINS, adaptive, shared, tokens

from anee_core.errors import AneeError
from anee_core.policy.options import configure
from anee_core.policy.strings import parse_policy

EXTREMES = ("0", "-1", "1", "1e-300", "1e-9", "1e30", str(2**31 - 1), str(2**63), str(10**20), "nan", "inf", "1e400")
ASIDE = {"random": "p=0.2,"}
"""What policies need beside the option that is tried; p given twice is refused by its name too."""
REGISTRIES = (PLUGINS.controllers, PLUGINS.cache_policies, PLUGINS.shortcuts)


def numeric(part):
    """Return the options of a part of a policy that take numbers."""
    hints = typing.get_type_hints(part)
    return [name for name in part.option_names() if "int" in str(hints[name]) or "float" in str(hints[name])]


CASES = [
    (name, option) for registry in REGISTRIES for name, part in sorted(registry.items()) for option in numeric(part)
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "option"), CASES)
def test_a_number_works_or_is_refused_by_the_name_of_its_option(name, option):
    network, ids = shared("llama"), tokens(1, 24)
    trained = any(name in registry and registry[name].checkpoint is not None for registry in REGISTRIES)
    refusals = []
    for value in EXTREMES:
        try:
            if trained:
                part = next(registry[name] for registry in REGISTRIES if name in registry)
                configure(part, name, f"{option}={value}")
                continue
            model = adaptive(network, f"{name}:{ASIDE.get(name, '')}{option}={value}")
            output = model(ids)
            output = model(ids[:, :1], past_key_values=output.past_key_values)
            assert output.logits.isfinite().all()
        except AneeError as error:
            refusals.append(str(error))
    assert len(refusals) >= 2  # what is no finite number, at least
    assert [text for text in refusals if option not in text or "\n" in text] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window:recent=9223372036854775808", "window: recent takes whole numbers of 64 bits; got '922"),
        (f"window:recent={2**31}", "window: recent is a whole number, at least 1 and at most 2,147,483,647; got 2147"),
        ("window:keep=1e30", "window: keep is a share in .0, 1. or a whole number of tokens above 1, at most 2,147"),
        (f"snapkv:every={10**20}", "snapkv: every takes whole numbers of 64 bits; got '1000"),
        ("random:seed=-1", "random: seed is a whole number, at least 0 and at most 2,147,483,647; got -1"),
    ],
)
def test_the_message_names_the_range(text, message):
    with pytest.raises(AneeError, match=message):
        parse_policy(text, PLUGINS)


@pytest.mark.parametrize("value", [True, "4", 2.5, None, [1], 10**400])
def test_values_of_other_types_are_refused_in_python(value):
    with pytest.raises(AneeError, match="window: recent is a whole number"):
        PLUGINS.cache_policies["window"](recent=value)

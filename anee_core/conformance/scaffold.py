"""The start of an adapter plugin, with a table of names found in a small model of the family."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from anee_core.adapter.guessed import guess_layout
from anee_core.conformance.tiny import small_config
from anee_core.errors import AdapterError, InputError
from anee_core.files import write_folder

_PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "anee-{name}"
version = "0.1.0"
description = "{family} for ANEE"
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["anee"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.anee]
{name} = "anee_{name}"

[tool.setuptools]
packages = ["anee_{name}"]
"""

_README = """# anee-{name}

An adapter that lets [ANEE](https://pypi.org/project/anee) run {family} models.

    pip install anee-{name}
    anee generate FOLDER_OR_HUB_ID "Once upon a time" --policy static:skip=3

Its tests are ANEE's conformance suite: `pytest`, or `anee conformance anee_{name}:{Family}Adapter`.
"""

_PACKAGE = '''"""{family} for ANEE."""

from anee_core.hookspecs import hookimpl
from anee_core.adapter.layout import Layout
from anee_core.adapter.model_adapter import ModelAdapter


class {Family}Adapter(ModelAdapter):
    """{family}. Found by looking at a small model; the conformance suite says whether it is right."""

    layout = Layout(
{layout}
    )


@hookimpl
def anee_adapters():
    """Return the adapter by the model type it serves."""
    return {{"{model_type}": {Family}Adapter()}}
'''

_TEST = '''"""The adapter keeps ANEE's promises."""

from anee_{name} import {Family}Adapter

from anee_core.conformance import AdapterConformance
from anee_core.adapter.refusals import keeps_state
from anee_core.conformance.tiny import small_config


class Test{Family}(AdapterConformance):
    adapter = {Family}Adapter()
    configs = {{"default": small_config("{model_type}")}}  # add the variants that your users have
'''


def write_plugin(model_type: str, output: Path) -> Path:
    """Write ``output/anee-<model_type>`` and return it.

    Raises:
        InputError: transformers has no such family, ANEE cannot run it, or the folder exists.
        OutputError: the folder cannot be written.
    """
    layout = found_layout(model_type)
    name = re.sub(r"\W", "_", model_type.lower())
    folder = output / f"anee-{name.replace('_', '-')}"
    if folder.exists():
        raise InputError(f"'{folder}' exists already; remove it or choose another --output")
    words = {
        "name": name,
        "model_type": model_type,
        "family": model_type,
        "Family": "".join(part.capitalize() for part in name.split("_")),
        "layout": "\n".join(f"        {key}={value!r}," for key, value in layout.items()).replace("'", '"'),
    }
    write_folder(folder, lambda draft: _fill(draft, words))
    return folder


def _fill(folder: Path, words: dict[str, str]) -> None:
    for path, text in (
        ("pyproject.toml", _PYPROJECT),
        ("README.md", _README),
        (f"anee_{words['name']}/__init__.py", _PACKAGE),
        ("tests/test_conformance.py", _TEST),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text.format(**words), encoding="utf-8")


def found_layout(model_type: str) -> dict[str, Any]:
    """Return the fields of a `Layout` as a small model of the family has them; only those that are needed.

    Raises:
        InputError: transformers has no such family, or ANEE cannot run it.
    """
    config = small_config(model_type)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"transformers has no causal LM of the family '{model_type}'")
    try:
        model = AutoModelForCausalLM.from_config(config).eval()
        _check_causal(model)
        layout = guess_layout(model)
    except InputError:
        raise
    except AdapterError as error:
        raise InputError(str(error)) from error
    except Exception as error:  # each family fails in its own way on sizes that it does not expect
        raise InputError(
            f"a small {type(config).__name__} cannot be run ({' '.join(str(error).split())}): "
            "start from another family's adapter and name the paths by hand"
        ) from error
    return {item.name: value for item in fields(layout) if (value := getattr(layout, item.name)) != item.default}


def _check_causal(model: Any) -> None:
    """Raise `InputError` if a token changes what comes before it."""
    ids = torch.arange(3, 9)[None]
    changed = ids.clone()
    changed[0, -1] = 20
    with torch.no_grad():
        first, second = model(ids).logits, model(changed).logits
    if not torch.allclose(first[:, :-1], second[:, :-1], atol=1e-5):
        raise InputError(f"{type(model).__name__} lets tokens see the future: ANEE runs causal models")

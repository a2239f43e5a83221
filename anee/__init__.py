"""ANEE runs pretrained autoregressive Transformers with adaptive computation.

>>> import anee
>>> model = anee.load("gpt2-large", policy="heuristic", budget=0.7)
>>> print(model.generate("The future of AI", max_new_tokens=30).text)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from anee.config import ANEEConfig
from anee_core.errors import AneeError

if TYPE_CHECKING:
    from anee_core.accounting import Trace
    from anee_core.load import load
    from anee_core.model import AdaptiveModel
    from anee_core.policy import Policy

__all__ = ["ANEEConfig", "AdaptiveModel", "AneeError", "Policy", "Trace", "__version__", "load"]

# torch and transformers take seconds to import: only what needs them pays.
_WHERE = {
    "load": "anee_core.load",
    "AdaptiveModel": "anee_core.model.adaptive_model",
    "Policy": "anee_core.policy.policy",
    "Trace": "anee_core.accounting.trace",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("anee")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'anee' has no attribute '{name}'")

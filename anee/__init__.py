"""ANEE runs pretrained autoregressive Transformers with adaptive computation.

>>> import anee
>>> model = anee.load("gpt2-large", policy="heuristic", budget=0.7)
>>> print(model.generate("The future of AI", max_new_tokens=30).text)
"""

from importlib.metadata import version as _version

from anee.config import ANEEConfig
from anee_core.errors import AneeError
from anee_core.load import load
from anee_core.model import AdaptiveModel
from anee_core.policy import Policy
from anee_core.trace import Trace

__version__ = _version("anee")
__all__ = ["ANEEConfig", "AdaptiveModel", "AneeError", "Policy", "Trace", "__version__", "load"]

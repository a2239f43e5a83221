"""What plugins implement and are given: adapters, profilers, controllers, cache policies and shortcuts.

Policies see tensors, never modules, so none of them can depend on a model.
"""

from anee_core.accounting.costs import CostModel
from anee_core.accounting.work import Work
from anee_core.adapter.layer_call import LayerCall
from anee_core.adapter.layout import Layout, Parts
from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.adapter.recipe import Recipe
from anee_core.adapter.rotary import rotate, rotate_interleaved
from anee_core.interfaces.cache_policy import CachePolicy, CacheView, Wants
from anee_core.interfaces.configurable import Configurable
from anee_core.interfaces.controller import Action, Controller, DecisionContext, protect_ends
from anee_core.interfaces.formulas import LinearGate, LinearInteraction, LowRankMap
from anee_core.interfaces.hashed_random import uniform
from anee_core.interfaces.profiler import Observation, Profiler
from anee_core.interfaces.setting import Calibration, Setting
from anee_core.interfaces.shortcut import Shortcut

__all__ = [
    "Action",
    "CachePolicy",
    "CacheView",
    "Calibration",
    "Configurable",
    "Controller",
    "CostModel",
    "DecisionContext",
    "LayerCall",
    "Layout",
    "LinearGate",
    "LinearInteraction",
    "LowRankMap",
    "ModelAdapter",
    "Observation",
    "Parts",
    "Profiler",
    "Recipe",
    "Setting",
    "Shortcut",
    "Wants",
    "Work",
    "protect_ends",
    "rotate",
    "rotate_interleaved",
    "uniform",
]

"""Layer policies, one method per file."""

from anee_core.controllers.dense import DenseController
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.controllers.heuristic import HeuristicController
from anee_core.controllers.random import RandomController
from anee_core.controllers.static import StaticController

__all__ = [
    "DenseController",
    "GateController",
    "GateWeights",
    "HeuristicController",
    "RandomController",
    "StaticController",
]

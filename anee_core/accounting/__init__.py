"""What layers cost, what a token may spend, and what was spent."""

from anee_core.accounting.budget import Budget
from anee_core.accounting.costs import CostModel
from anee_core.accounting.meter import Meter, Spent
from anee_core.accounting.token_state import TokenState
from anee_core.accounting.trace import Step, Trace
from anee_core.accounting.work import Work

__all__ = ["Budget", "CostModel", "Meter", "Spent", "Step", "TokenState", "Trace", "Work"]

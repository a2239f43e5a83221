"""What users hold: a causal LM whose layers run where a policy says so."""

from anee_core.model.adaptive_model import AdaptiveModel

__all__ = ["AdaptiveModel"]

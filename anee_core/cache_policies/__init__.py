"""Token policies, one method per file."""

from anee_core.cache_policies.asa import AsaCachePolicy, AsaWeights
from anee_core.cache_policies.budget import BudgetedCachePolicy
from anee_core.cache_policies.full import FullCachePolicy
from anee_core.cache_policies.h2o import H2OCachePolicy
from anee_core.cache_policies.knorm import KeyNormCachePolicy
from anee_core.cache_policies.random_tokens import RandomTokensCachePolicy
from anee_core.cache_policies.scoring import AttentionCachePolicy, ScoringCachePolicy
from anee_core.cache_policies.snapkv import SnapKVCachePolicy
from anee_core.cache_policies.tova import TovaCachePolicy
from anee_core.cache_policies.window import WindowCachePolicy

__all__ = [
    "AsaCachePolicy",
    "AsaWeights",
    "AttentionCachePolicy",
    "BudgetedCachePolicy",
    "FullCachePolicy",
    "H2OCachePolicy",
    "KeyNormCachePolicy",
    "RandomTokensCachePolicy",
    "ScoringCachePolicy",
    "SnapKVCachePolicy",
    "TovaCachePolicy",
    "WindowCachePolicy",
]

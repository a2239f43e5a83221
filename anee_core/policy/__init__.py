"""The bundle that decides: its parts, its strings and its folders."""

from anee_core.policy.policy import Policy
from anee_core.policy.profiler import SignalProfiler
from anee_core.policy.shortcuts import LowRankShortcut, ShortcutWeights
from anee_core.policy.strings import load_policy, make_policy, parse_policy

__all__ = [
    "LowRankShortcut",
    "Policy",
    "ShortcutWeights",
    "SignalProfiler",
    "load_policy",
    "make_policy",
    "parse_policy",
]

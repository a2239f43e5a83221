"""Checks that an adapter or a policy keeps ANEE's promises, for use by third parties.

Three ways in: subclass `AdapterConformance` or `PolicyConformance` in a pytest file, run
``pytest --anee-adapter my_package:MyAdapter``, or run ``anee conformance my_package:MyAdapter``.
"""

from anee_core.conformance.check import Check, MismatchError
from anee_core.conformance.policies import POLICY_CHECKS
from anee_core.conformance.policy_subject import PolicySubject
from anee_core.conformance.report import Report, Result, run_checks
from anee_core.conformance.subject import Subject
from anee_core.conformance.suite import ADAPTER_CHECKS, AdapterConformance, PolicyConformance

__all__ = [
    "ADAPTER_CHECKS",
    "POLICY_CHECKS",
    "AdapterConformance",
    "Check",
    "MismatchError",
    "PolicyConformance",
    "PolicySubject",
    "Report",
    "Result",
    "Subject",
    "run_checks",
]

"""Ten thousand histories of a cache against its reference twin; the default tests try sixty others."""

import pytest
from cache_machine import CacheMachine
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

HISTORIES = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_no_history_tells_the_cache_from_its_twin(campaign):
    for number in campaign.trials("cache histories", short=0, long=10_000, each=100):
        machine = seed(number)(type("SeededMachine", (CacheMachine,), {}))
        try:
            run_state_machine_as_test(machine, settings=HISTORIES)
        except (Exception, pytest.fail.Exception) as error:
            campaign.fault(f"seed {number}: {error!r}")

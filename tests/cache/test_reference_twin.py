"""The cache against its reference twin, under anything that can be done to it in any order."""

import torch
from cache_machine import CacheMachine
from filled_cache import HEADS, WIDTH, some
from hypothesis import HealthCheck, settings
from reference_cache import ReferenceCache

CacheMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestCacheAgainstItsTwin = CacheMachine.TestCase


def test_the_twin_is_told_apart_by_a_single_missing_token():
    # The comparison above would be worthless if the twin forgave a difference.
    twin = ReferenceCache(1)
    twin.begin([[0, 1, 2]], [[False, True, True]])
    for column in range(3):
        twin.write(0, 0, column, *some(2, HEADS, WIDTH, seed=column))
    twin.commit()
    query = some(HEADS, WIDTH)
    assert [t.position for t in twin.held(0, 0)] == [1, 2]
    both = twin.attend(0, 0, query, 2)
    assert not torch.allclose(both, twin.attend(0, 0, query, 1))
    twin.evict(0, 0, {1})
    torch.testing.assert_close(twin.attend(0, 0, query, 2), twin.held(0, 0)[0].value)
    assert not torch.allclose(both, twin.attend(0, 0, query, 2))
    assert twin.attend(0, 0, query, 1) is None

"""What the cache remembers for controllers of its last outcomes, against a naive log."""

import pytest
import torch

from anee_core.cache.token_logs import UNKNOWN, FeedbackLog


def naive_log(start, budget, blocks):
    """Return one row's feedback entries: after ``start`` tokens, blocks of (costs, distribution, real)."""
    entries = {start: [*UNKNOWN, budget * start]}
    index = start
    for costs, distribution, real in blocks:
        carried, spent = entries[index][:2], entries[index][2]
        for cost, is_real in zip(costs, real, strict=True):
            index += 1
            spent += cost if is_real else 0.0
            entries[index] = [*UNKNOWN, spent]
        entries[index][:2] = distribution if any(real) else carried
    return entries


def test_feedback_is_what_a_naive_log_holds():
    generator = torch.Generator().manual_seed(0)
    log = FeedbackLog(3, torch.device("cpu"), 4, 0.5)
    blocks, index = [], 4
    for count in [3, 1, 1, 2, 1, 5] + [1] * 80 + [200]:
        spent, drawn = torch.rand(3, count, generator=generator), torch.rand(3, 2, generator=generator)
        real = torch.rand(3, count, generator=generator) < 0.6 if len(blocks) % 3 else None
        log.record(index, spent, drawn, real)
        index += count
        blocks.append((spent, drawn, torch.ones(3, count, dtype=torch.bool) if real is None else real))
    for row in range(3):
        wanted = naive_log(4, 0.5, [tuple(part[row].tolist() for part in block) for block in blocks])
        for at, entry in wanted.items():
            assert log.entry(at)[row, 0].tolist() == pytest.approx(entry, abs=1e-3)


def test_a_row_of_padding_keeps_what_it_had():
    log = FeedbackLog(2, torch.device("cpu"), 0, 1.0)
    log.record(0, torch.ones(2, 2), torch.tensor([[0.1, 0.9], [0.2, 0.8]]), None)
    log.record(2, torch.ones(2, 1), torch.tensor([[0.3, 0.7], [0.4, 0.6]]), torch.tensor([[True], [False]]))
    assert log.entry(3)[:, 0].tolist() == [pytest.approx([0.3, 0.7, 3.0]), pytest.approx([0.2, 0.8, 2.0])]


def test_tokens_seen_before_the_log_count_as_having_cost_the_budget():
    log = FeedbackLog(1, torch.device("cpu"), 4, 0.5)
    assert [log.entry(index)[0, 0].tolist() for index in range(5)] == [[*UNKNOWN, 0.5 * index] for index in range(5)]


def test_feedback_grows_seldom():
    log = FeedbackLog(1, torch.device("cpu"), 0, 1.0)
    places = set()
    for index in range(1000):
        log.record(index, torch.ones(1, 1), torch.ones(1, 2), None)
        places.add(log._entries.shape[1])
    assert len(places) <= 6
    assert log.entry(1000)[0, 0, 2] == 1000


def test_feedback_noted_again_after_a_rollback_replaces_the_old():
    log = FeedbackLog(1, torch.device("cpu"), 0, 1.0)
    for cost in (0.5, 0.25):
        log.record(0, torch.full((1, 3), cost), torch.full((1, 2), cost), None)
    assert [log.entry(i)[0, 0, 2].item() for i in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert log.entry(3)[0, 0, :2].tolist() == [0.25, 0.25]


def test_feedback_follows_rows_and_copies_go_their_own_way():
    log = FeedbackLog(2, torch.device("cpu"), 0, 1.0)
    log.record(0, torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), None)
    log.reorder(torch.tensor([1, 1, 0]))
    log.record(1, torch.tensor([[1.0], [10.0], [100.0]]), torch.ones(3, 2), None)
    assert log.entry(1)[:, 0, 2].tolist() == [2.0, 2.0, 1.0]
    assert log.entry(2)[:, 0, 2].tolist() == [3.0, 12.0, 101.0]


@pytest.mark.parametrize("change", ["nothing", "growth", "a reordering"])
def test_feedback_of_inference_mode_goes_on_outside(change):
    with torch.inference_mode():
        log = FeedbackLog(2, torch.device("cpu"), 3, 1.0)
        if change == "growth":
            log.record(3, torch.ones(2, 1), torch.ones(2, 2), None)
        elif change == "a reordering":
            log.reorder(torch.tensor([1, 0]))
    log.record(2, torch.ones(2, 1), torch.ones(2, 2), None)
    assert log.entry(3)[:, 0].tolist() == [[1.0, 1.0, 3.0]] * 2


def test_feedback_keeps_no_graph():
    log = FeedbackLog(2, torch.device("cpu"), 0, 1.0)
    log.record(0, torch.ones(2, 1), torch.rand(2, 2, requires_grad=True) * 2, None)
    assert not log.entry(1).requires_grad

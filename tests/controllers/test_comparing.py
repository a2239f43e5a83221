"""Controllers that compare tokens with earlier ones: against counts by hand, and through every promise of a policy."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import adaptive, build, ragged, tokens

import anee
from anee_core.cache.token_logs import ScoreLog, compared
from anee_core.conformance.suite import PolicyConformance
from anee_core.interfaces import Action, Controller


@dataclass(frozen=True)
class LouderController(Controller):
    """Skip a layer for tokens whose norm there is below that of most of the four tokens before them."""

    name: ClassVar[str] = "louder"
    signals: ClassVar[tuple[str, ...]] = ("norm",)
    compares: ClassVar[int] = 4

    def score(self, signals, context):
        return (signals[..., 0] * 1024).round()  # so that a tie is one however the norm was taken

    def decide(self, signals, context):
        quieter = context.lower * 2 < context.compared
        return torch.where(quieter, Action.SKIP, Action.PROCESS).to(torch.uint8)[None]


class TestLouder(PolicyConformance):
    policies = {"louder": (LouderController(), None)}


def by_hand(scores, window):
    """Return how many of the last tokens that count are lower, and how many there are, for one row."""
    found = []
    for t, score in enumerate(scores):
        earlier = [s for s in scores[:t] if s == s][-window:]
        found.append((sum(s < score for s in earlier), len(earlier)))
    return found


@pytest.mark.parametrize("window", [1, 3, 100])
def test_counts_are_those_of_the_tokens_before(window, monkeypatch):
    monkeypatch.setattr("anee_core.cache.token_logs._PIECE", 5)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 17, generator=generator)
    scores[torch.rand(3, 17, generator=generator) < 0.3] = torch.nan
    lower, among = compared(scores, scores, window)
    for row in range(3):
        assert list(zip(lower[row].tolist(), among[row].tolist(), strict=True)) == by_hand(scores[row].tolist(), window)
    log = ScoreLog(3, 1, torch.device("cpu"), 0)
    for t in range(17):
        one, few = log.compare(t, 0, scores[:, t : t + 1], None, window)
        assert torch.equal(one[:, 0], lower[:, t])
        assert torch.equal(few[:, 0], among[:, t])


def test_decisions_compare_tokens_of_one_row():
    lengths = (9, 4, 7)
    model = adaptive(build("llama"), LouderController())
    rows, mask = ragged(lengths, "left")
    with torch.no_grad():
        model(rows, attention_mask=mask)
        ran = model.last_trace.ran
        for row, length in enumerate(lengths):
            states = model(rows[row : row + 1, -length:], output_hidden_states=True).hidden_states
            for layer_idx in range(6):
                norms = (states[layer_idx][0].norm(dim=-1).log1p() * 1024).round().tolist()
                for t, (lower, among) in enumerate(by_hand(norms, 4)):
                    assert ran[layer_idx, row, t - length] == (2 * lower >= among)


def test_nothing_is_compared_with_prompts_read_densely():
    model = anee.load(build("llama").eval(), LouderController(), prefill="dense")
    trace = model.decode(tokens(1, 8), max_new_tokens=4).trace
    assert trace.steps[0].dense
    assert trace.steps[1].ran.all()


def test_rolled_back_tokens_are_compared_again():
    log = ScoreLog(batch=2, layers=1, device=torch.device("cpu"), start=3)
    scores = torch.tensor([[1.0, 2.0, 4.0], [30.0, 20.0, 10.0]])
    assert log.compare(3, 0, scores, None, 9)[0].tolist() == [[0, 1, 2], [0, 0, 0]]
    real = torch.tensor([[True], [False]])
    assert log.compare(5, 0, scores[:, :1], real, 9)[1].tolist() == [[2], [2]]
    assert log.compare(6, 0, scores[:, :1], None, 9)[1].tolist() == [[3], [2]]
    log.skip(5, 2)
    assert log.compare(7, 0, scores[:, 2:], None, 9)[0].tolist() == [[2], [0]]
    log.reorder(torch.tensor([1, 1]))
    assert log.compare(5, 0, scores[:, 2:], None, 9)[0].tolist() == [[0], [0]]


def test_a_controller_that_compares_has_to_say_by_what():
    @dataclass(frozen=True)
    class Forgetful(LouderController):
        name: ClassVar[str] = "forgetful"
        score = Controller.score

    with pytest.raises(NotImplementedError, match="has to implement score"):
        adaptive(build("llama"), Forgetful())(tokens())

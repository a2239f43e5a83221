"""What a controller counts over a sequence: against sums by hand, and through every promise of a policy."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import adaptive, build, ragged, tokens

import anee
from anee_core.conformance import PolicyConformance
from anee_core.interfaces import Action, Controller
from anee_core.tally import TallyLog


@dataclass(frozen=True)
class LouderController(Controller):
    """Skip a layer for tokens whose norm there is below the mean of the tokens before them."""

    name: ClassVar[str] = "louder"
    signals: ClassVar[tuple[str, ...]] = ("norm",)
    tallies: ClassVar[int] = 2

    def tally(self, signals, context):
        return torch.cat((signals, torch.ones_like(signals)), dim=-1)

    def decide(self, signals, context):
        total, count = context.totals.unbind(-1)
        # Rounded, so that a tie is one however the sums were taken.
        below = (signals[..., 0] * 1024).round() < (total / count.clamp(min=1) * 1024).round()
        return torch.where(below, Action.SKIP, Action.PROCESS).to(torch.uint8)[None]


class TestLouder(PolicyConformance):
    policies = {"louder": (LouderController(), None)}


def test_sums_are_those_of_the_tokens_before_in_the_row():
    lengths = (9, 4, 7)
    model = adaptive(build("llama"), LouderController())
    rows, mask = ragged(lengths, "left")
    with torch.no_grad():
        model(rows, attention_mask=mask)
        ran = model.last_trace.ran
        for row, length in enumerate(lengths):
            states = model(rows[row : row + 1, -length:], output_hidden_states=True).hidden_states
            for layer_idx in range(6):
                norms = states[layer_idx][0].norm(dim=-1).log1p().double()
                for t in range(length):
                    mean = norms[:t].mean() if t else torch.zeros(())
                    wanted = bool((norms[t] * 1024).round() >= (mean * 1024).round())
                    assert ran[layer_idx, row, t - length] == wanted


def test_prompts_read_densely_count_nothing():
    model = anee.load(build("llama").eval(), LouderController(), prefill="dense")
    prompt = tokens(1, 8)
    with torch.no_grad():
        cache = model.decode(prompt, max_new_tokens=4)
        assert cache.trace.steps[0].dense
    # The first token after it has nothing to be compared with.
    first = cache.trace.steps[1].ran
    assert first.all()


def test_rolled_back_tokens_are_counted_again():
    log = TallyLog(batch=2, layers=1, width=1, device=torch.device("cpu"), start=3)
    amounts = torch.tensor([[[1.0], [2.0], [4.0]], [[10.0], [20.0], [40.0]]])
    assert log.before(3, 0, amounts, None)[..., 0].tolist() == [[0, 1, 3], [0, 10, 30]]
    real = torch.tensor([[True], [False]])
    assert log.before(5, 0, amounts[:, :1], real)[..., 0].tolist() == [[3], [30]]
    assert log.before(6, 0, amounts[:, :1], None)[..., 0].tolist() == [[4], [30]]
    log.carry(5, 2)
    assert log.before(7, 0, amounts[:, :1], None)[..., 0].tolist() == [[3], [30]]
    log.reorder(torch.tensor([1, 1]))
    assert log.before(5, 0, amounts[:, :1], None)[..., 0].tolist() == [[30], [30]]


def test_a_controller_that_counts_has_to_say_what():
    @dataclass(frozen=True)
    class Forgetful(LouderController):
        name: ClassVar[str] = "forgetful"
        tally = Controller.tally

    with pytest.raises(NotImplementedError, match="has to implement tally"):
        adaptive(build("llama"), Forgetful())(tokens())

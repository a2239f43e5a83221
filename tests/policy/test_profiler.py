"""The signals, against their definitions; and that they are the same however tokens arrive."""

import math

import pytest
import torch
from tiny import adaptive, build, tokens

from anee_core.errors import PolicyError
from anee_core.interfaces import Action, Controller, Observation
from anee_core.policy import SignalProfiler
from anee_core.policy.profiler import distribution_signals


def observe(*names, **changes):
    hidden_states, previous = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    values = {
        "hidden_states": hidden_states,
        "previous": previous,
        "layer_idx": 2,
        "num_layers": 5,
        "spent": torch.full((2, 3), 0.25),
        "seen": torch.tensor([[0, 1, 2], [5, 6, 7]]),
        "budget": 0.7,
        "feedback": torch.rand(2, 3, 3),
        **changes,
    }
    observation = Observation(**values)
    return observation, SignalProfiler().observe(observation, names)


def test_signals_of_the_hidden_state():
    seen, signals = observe("norm", "delta_norm", "variance")
    h, p = seen.hidden_states, seen.previous
    torch.testing.assert_close(signals[..., 0], torch.log(1 + (h**2).sum(-1).sqrt()))
    torch.testing.assert_close(signals[..., 1], torch.log(1 + ((h - p) ** 2).sum(-1).sqrt()))
    torch.testing.assert_close(signals[..., 2], torch.log(1 + ((h - h.mean(-1, keepdim=True)) ** 2).mean(-1)))


def test_signals_of_budget_and_depth():
    seen, signals = observe("token_budget", "remaining_budget", "depth")
    torch.testing.assert_close(signals[..., 0], torch.full((2, 3), 0.45))
    torch.testing.assert_close(signals[..., 1], 0.7 * (seen.seen + 1) - seen.feedback[..., 2] - 0.25)
    torch.testing.assert_close(signals[..., 2], torch.full((2, 3), 0.5))


def test_signals_of_the_last_distribution():
    logits = torch.randn(2, 3, 11)
    signals = distribution_signals(logits)
    p = logits.softmax(-1)
    torch.testing.assert_close(signals[..., 0], -(p * p.log()).sum(-1) / math.log(11))
    torch.testing.assert_close(signals[..., 1], p.max(-1).values)
    uniform = distribution_signals(torch.zeros(1, 11))
    torch.testing.assert_close(uniform, torch.tensor([[1.0, 1 / 11]]))


def test_signals_come_in_the_order_asked_for_in_fp32():
    hidden_states = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    _, signals = observe("depth", "norm", hidden_states=hidden_states, previous=hidden_states)
    assert signals.shape == (2, 3, 2)
    assert signals.dtype == torch.float32
    torch.testing.assert_close(signals[..., 0], torch.full((2, 3), 0.5))
    _, none = observe()
    assert none.shape == (2, 3, 0)


def test_unknown_signal_names_those_there_are():
    with pytest.raises(PolicyError, match="did you mean 'entropy'"):
        observe("entrpy")


class Watcher(Controller):
    """Sees every signal at every layer and skips some layers for some tokens."""

    name = "watcher"
    signals = SignalProfiler.names

    def __init__(self):
        self.seen = {}

    @classmethod
    def option_names(cls):
        return ()

    def decide(self, signals, context):
        for row in range(signals.shape[0]):
            for t in range(signals.shape[1]):
                key = (context.layer_idx, row, int(context.position_ids[row, t]))
                self.seen[key] = signals[row, t].clone()
        skip = ((context.position_ids + context.layer_idx) % 3 == 0)[None]
        return skip.to(torch.uint8) * int(Action.SKIP)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_signals_are_the_same_whole_in_chunks_and_while_generating(family):
    model = build(family)
    watchers = [Watcher() for _ in range(3)]
    ids = tokens(1, 5)
    generated = adaptive(model, watchers[0], prefill="adaptive").generate(ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        adaptive(model, watchers[1])(generated[:, :-1])
        chunked, cache = adaptive(model, watchers[2]), None
        for part in generated[:, :-1].split([4, 3, 2], dim=1):
            cache = chunked(part, past_key_values=cache).past_key_values
    for other in watchers[1:]:
        assert set(watchers[0].seen) == set(other.seen)
        for key, signals in watchers[0].seen.items():
            torch.testing.assert_close(signals, other.seen[key], atol=1e-4, rtol=1e-3)


def test_delta_norm_is_zero_behind_a_skipped_layer_and_only_there():
    watcher = Watcher()
    with torch.no_grad():
        adaptive(build("llama"), watcher)(tokens(1, 7))
    delta = SignalProfiler.names.index("delta_norm")
    for (layer, _, position), signals in watcher.seen.items():
        behind_a_skip = layer > 0 and (position + layer - 1) % 3 == 0
        assert (signals[delta] == 0) == (layer == 0 or behind_a_skip)

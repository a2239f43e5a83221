"""What a plugin returns in another shape, type or range is one clear error that names it."""

import pytest
import torch
from tiny import adaptive, build, tokens

from anee_core.errors import PolicyError
from anee_core.interfaces import CachePolicy, Controller
from anee_core.policy import Policy
from anee_core.policy.profiler import SignalProfiler


class Deciding(Controller):
    """A controller that returns what it is told to."""

    name = "deciding"
    signals = ("norm", "depth")
    returned = None

    def decide(self, signals, context):
        return self.returned(*context.position_ids.shape)


class Keeping(CachePolicy):
    """A token policy that returns what it is told to."""

    name = "keeping"
    kept = remembered = None

    def remember(self, view):
        return {} if self.remembered is None else {"score": self.remembered(view)}

    def retain(self, view):
        return view.valid[:, None] if self.kept is None else self.kept(view)


ACTIONS = {
    "a float": (lambda b, t: torch.zeros(6, b, t), r"tensor of uint8; it returned float32 \[6, 2, 9\]"),
    "bools": (lambda b, t: torch.zeros(6, b, t, dtype=torch.bool), r"tensor of uint8; it returned bool \[6, 2, 9\]"),
    "no tensor": (lambda b, t: [0, 1], "tensor of uint8; it returned list"),
    "no layers": (lambda b, t: torch.zeros(b, t, dtype=torch.uint8), r"for 1 to 6 layers; it returned uint8 \[2, 9\]"),
    "too many layers": (lambda b, t: torch.zeros(7, b, t, dtype=torch.uint8), r"it returned uint8 \[7, 2, 9\]"),
    "one for all rows": (lambda b, t: torch.zeros(6, 1, t, dtype=torch.uint8), r"it returned uint8 \[6, 1, 9\]"),
    "unknown ones": (lambda b, t: torch.full((6, b, t), 3, dtype=torch.uint8), "returned the action 3; actions are 0"),
}
KEPT = {
    "numbers": (lambda view: view.valid[:, None].float(), r"by a bool tensor .* it returned float32 \[2, 1, 9\]"),
    "a rank too few": (lambda view: view.valid, r"broadcasts to \[2, 9, 9\]; it returned bool \[2, 9\]"),
    "other slots": (lambda view: view.valid[:, None, :-1], r"broadcasts to \[2, 9, 9\]; it returned bool \[2, 1, 8\]"),
}


@pytest.mark.parametrize("wrong", ACTIONS)
def test_wrong_actions(wrong):
    controller = Deciding()
    model = adaptive(build("llama"), Policy(controller))
    model.policy.controller.returned, message = ACTIONS[wrong]
    with pytest.raises(PolicyError, match=f"policy 'deciding' .*{message}"):
        model(tokens(2, 9))
    model.policy.controller.returned = lambda b, t: torch.ones(6, b, t, dtype=torch.int64)
    assert not model(tokens(2, 9)).logits.isnan().any()


@pytest.mark.parametrize("wrong", KEPT)
def test_wrong_things_to_keep(wrong):
    model = adaptive(build("llama"), Policy(cache_policy=Keeping()))
    model.policy.cache_policy.kept, message = KEPT[wrong]
    with pytest.raises(PolicyError, match=f"policy 'keeping' .*{message}"):
        model(tokens(2, 9))


def test_wrong_things_to_remember():
    model = adaptive(build("llama"), Policy(cache_policy=Keeping()))
    model.policy.cache_policy.remembered = lambda view: view.valid[:, :3].float()
    with pytest.raises(PolicyError, match=r"policy 'keeping' remembers 'score' as \[2, 9, ...\]; it returned float32"):
        model(tokens(2, 9))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda b, t: torch.zeros(b, t), r"observes \[2, 9, F\]; it returned float32 \[2, 9\]"),
        (lambda b, t: torch.zeros(b, t, 1), "returned 1 columns for the signals norm, depth, at least one each"),
    ],
)
def test_wrong_signals(found, message, monkeypatch):
    model = adaptive(build("llama"), Policy(Deciding()))
    monkeypatch.setattr(SignalProfiler, "observe", lambda self, seen, names: found(*seen.hidden_states.shape[:2]))
    with pytest.raises(PolicyError, match=f"the profiler SignalProfiler {message}"):
        model(tokens(2, 9))

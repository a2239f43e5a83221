"""The conformance suite catches wrong policies: for every check something broken fails it."""

from dataclasses import dataclass, field

import pytest
import torch

from anee_core.conformance.policies import POLICY_CHECKS
from anee_core.conformance.policy_subject import PolicySubject
from anee_core.interfaces import Action, CachePolicy, Controller


def skipping(decide):
    """Return a layer policy class that decides all layers at once."""

    @dataclass(frozen=True)
    class Skipping(Controller):
        name = "broken"

        def decide(self, signals, context):
            layers = torch.arange(context.layer_idx, context.num_layers)[:, None, None]
            skip = decide(layers, context).expand(len(layers), *context.position_ids.shape)
            return torch.where(skip, Action.SKIP, Action.PROCESS).to(torch.uint8)

    return Skipping


def keeping(keep, *wants):
    """Return a token policy class."""
    needed = frozenset(wants)

    @dataclass(frozen=True)
    class Keeping(CachePolicy):
        name = "broken"
        wants = needed

        def retain(self, view):
            return keep(view)

    return Keeping


class AnyOption(Controller):
    """Takes an option and loses it."""

    name = "broken"

    def __init__(self, no_such_option: int = 0):
        pass

    @classmethod
    def option_names(cls):
        return ("no_such_option",)

    def options(self):
        return {}

    def decide(self, signals, context):
        return torch.zeros(1, *context.position_ids.shape, dtype=torch.uint8)


@dataclass(frozen=True)
class Booleans(Controller):
    name = "broken"

    def decide(self, signals, context):
        return torch.zeros(1, *context.position_ids.shape, dtype=torch.bool)


@dataclass
class Counts(Controller):
    """Skips on every other call, whoever asks."""

    name = "broken"

    def __post_init__(self):
        self.calls = 0

    def decide(self, signals, context):
        if context.layer_idx == 0:
            self.calls += 1
        action = Action.SKIP if self.calls % 2 and context.layer_idx == 2 else Action.PROCESS
        return torch.full((1, *context.position_ids.shape), action, dtype=torch.uint8)


@dataclass(frozen=True)
class Multiplies(Controller):
    """Does work that it does not report."""

    name = "broken"

    def decide(self, signals, context):
        torch.ones(8, 8) @ torch.ones(8, 8)
        return torch.zeros(1, *context.position_ids.shape, dtype=torch.uint8)


@dataclass(frozen=True)
class Overspends(Controller):
    """Asks for more than it was given, where nothing stops it: without a hard budget."""

    name = "broken"
    default_budget = 0.5

    def decide(self, signals, context):
        return torch.zeros(1, *context.position_ids.shape, dtype=torch.uint8)


@dataclass
class WeightOutsideOptions(Controller):
    """Draws what it skips when it is made."""

    name = "broken"

    def __post_init__(self):
        self.skipped = next(_draws)

    def decide(self, signals, context):
        layers = torch.arange(context.layer_idx, context.num_layers)[:, None, None]
        return (layers == self.skipped).expand(-1, *context.position_ids.shape).to(torch.uint8)


_draws = iter(range(1000))


def of_all_rows(layers, context):
    return (layers == 2) & (context.position_ids.float().mean() > 3)


def of_the_last(layers, context):
    """The block's last token decides for all."""
    return (layers == 2) & (context.position_ids[:, -1:] % 2 == 0)


def not_alone(layers, context):
    """Works for several tokens at once only."""
    return (layers == 2) & (context.position_ids[:, 1:2] > 0)


def of_64(view):
    """Knows 64 slots."""
    return torch.ones(64, dtype=torch.bool)[: view.valid.shape[1]].expand(view.valid.shape)[:, None]


def in_single_precision(view):
    return (view.keys @ torch.ones(view.keys.shape[-1])).sum(1)[:, None] > 0


def looks_ahead(view):
    """The block's last token decides for all."""
    return view.position_ids[:, None] > view.query_position[:, -1:, None] - 4


@dataclass(frozen=True)
class LosesItsNotes(CachePolicy):
    """Counts what it sees in a place that a rollback does not reach."""

    name = "broken"

    def remember(self, view):
        return {"note": view.query_position.float()}

    def retain(self, view):
        return view.valid[:, None]

    def decide(self, view):
        return self.retain(view), {"note": view.state["note"] + 1}


@dataclass(frozen=True)
class SaysAlike(CachePolicy):
    """Keeps all in the first layer only."""

    name = "broken"
    alike = True

    def retain(self, view):
        return view.valid[:, None] & (view.layer_idx == 0)


@dataclass(frozen=True)
class LooksAlike(CachePolicy):
    """Says that positions alone decide, and wants keys."""

    name = "broken"
    alike = True
    wants = frozenset({"keys"})

    def retain(self, view):
        return view.valid[:, None]


@dataclass(frozen=True)
class Unwritable(Controller):
    """Has an option that no string can set."""

    name = "broken"
    layers: list = field(default_factory=list)

    def decide(self, signals, context):
        return torch.zeros(1, *context.position_ids.shape, dtype=torch.uint8)


@dataclass
class BindsItself(Controller):
    """Takes on the last model it was bound to."""

    name = "broken"

    def bind(self, setting):
        self.middle = setting.num_layers // 2
        return self

    def decide(self, signals, context):
        layers = torch.arange(context.layer_idx, context.num_layers)[:, None, None]
        return (layers == self.middle).expand(-1, *context.position_ids.shape).to(torch.uint8)


@dataclass(frozen=True)
class SeedsTheWorld(Controller):
    name = "broken"

    def decide(self, signals, context):
        torch.manual_seed(0)
        return torch.zeros(1, *context.position_ids.shape, dtype=torch.uint8)


@dataclass(frozen=True)
class NeedsIds(Controller):
    name = "broken"

    def decide(self, signals, context):
        return (context.input_ids % 2)[None].to(torch.uint8)


def sees_far_ahead(layers, context):
    """Later tokens decide, once there are many."""
    many = context.position_ids.shape[1] > 12
    return (layers == 2) & (context.position_ids[:, -1:] % 2 == 1) & many


def erase(view):
    view.keys.zero_()
    return view.valid[:, None]


@dataclass(frozen=True)
class RemembersOnItself(Controller):
    """Skips what it did not skip for the token before, whoever asked for that."""

    name = "broken"
    last: list = field(default_factory=lambda: [False], compare=False)

    @classmethod
    def option_names(cls):
        return ()

    def options(self):
        return {}

    def decide(self, signals, context):
        layers, (batch, tokens) = context.num_layers - context.layer_idx, context.position_ids.shape
        actions = torch.zeros(layers, batch, tokens, dtype=torch.uint8)
        if tokens == 1 and int(context.position_ids.min()) > 0:
            self.last[0] = not self.last[0]
            actions[layers // 2] = int(Action.SKIP) * self.last[0]
        return actions


@dataclass(frozen=True)
class KeepsByAgeOnItself(CachePolicy):
    """Counts the tokens that it has seen, of all conversations."""

    name = "broken"
    seen: list = field(default_factory=lambda: [0], compare=False)

    @classmethod
    def option_names(cls):
        return ()

    def options(self):
        return {}

    def retain(self, view):
        if int(view.query_position.min()) == 0:
            self.seen[0] = 0
        self.seen[0] += view.query_position.shape[1]
        return (view.position_ids > self.seen[0] - 6)[:, None]


def of_long_blocks(layers, context):
    return (layers == 2) & torch.tensor(context.position_ids.shape[1] > 64)


BROKEN_POLICIES = [
    ("spelling", Unwritable()),
    ("answers", NeedsIds()),
    ("answers", keeping(erase, "keys")()),
    ("answers", keeping(lambda view: view.valid)()),
    ("answers", LosesItsNotes()),
    ("answers", SaysAlike()),
    ("answers", LooksAlike()),
    ("parallel equals stepwise", keeping(looks_ahead)()),
    ("parallel equals stepwise", skipping(sees_far_ahead)()),
    ("parallel equals stepwise", skipping(lambda layers, context: layers[:6] == 2)()),
    ("parallel equals stepwise", skipping(of_long_blocks)()),
    ("conversations", RemembersOnItself()),
    ("conversations", KeepsByAgeOnItself()),
    ("repeatable", BindsItself()),
    ("repeatable", SeedsTheWorld()),
    ("spelling", AnyOption()),
    ("answers", Booleans()),
    ("answers", keeping(lambda view: view.valid[:, None].float())()),
    ("parallel equals stepwise", skipping(of_the_last)()),
    ("rows", skipping(of_all_rows)()),
    ("rows", keeping(lambda view: view.position_ids[:, None] > view.query_position.amax(0)[None, :, None] - 4)()),
    ("budget", Overspends()),
    ("cost", Multiplies()),
    ("repeatable", Counts()),
    ("combines", Counts()),
    ("generation", skipping(not_alone)()),
    ("memory", keeping(of_64)()),
    ("save and load", WeightOutsideOptions()),
    ("half precision", keeping(in_single_precision, "keys")()),
]


def test_something_broken_is_tried_with_every_check():
    assert {name for name, _ in BROKEN_POLICIES} == {check.name for check in POLICY_CHECKS}


@pytest.mark.parametrize(
    ("name", "policy"), BROKEN_POLICIES, ids=[f"{n} {i}" for i, (n, _) in enumerate(BROKEN_POLICIES)]
)
def test_broken_policy_fails_the_check(name, policy):
    check = next(check for check in POLICY_CHECKS if check.name == name)
    failure = check.failure(PolicySubject(policy))
    assert failure is not None
    assert "; look at " in failure
    assert "\n" not in failure


def test_sound_policy_that_is_not_installed_passes_every_check():
    subject = PolicySubject(skipping(lambda layers, context: (layers + context.position_ids) % 3 == 0)())
    assert [check.failure(subject) for check in POLICY_CHECKS] == [None] * len(POLICY_CHECKS)

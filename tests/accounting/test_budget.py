"""The budget is a share of the dense decoder-layer FLOPs, and it is kept."""

import re

import pytest
import torch
from tiny import FEW, adaptive, build, pairwise, ragged, shared, tokens

from anee_core.accounting import Budget
from anee_core.engine.ledger import Ledger
from anee_core.errors import BudgetError, PolicyError
from anee_core.interfaces import Action, Controller, DecisionContext

SPENDTHRIFT = "random:p=0,protect=1 1"


def shares_of_tokens(model):
    """Return what each real token spent, from what ran and what layers cost at its position."""
    trace = model.last_trace
    positions = (trace.real.cumsum(1) - 1).clamp(min=0)
    run, skip = model.engine.costs.token_shares(positions)
    return torch.where(trace.ran, run, skip).sum(0)[trace.real]


@pytest.mark.parametrize(
    ("family", "budget", "policy"),
    pairwise(FEW, (0.5, 0.62, 0.9, 1.0), (SPENDTHRIFT, "random:p=0.4,protect=1 1", "heuristic:protect=1 1,spread=0.3")),
)
def test_hard_budget_is_exceeded_by_no_token(family, budget, policy):
    model = adaptive(shared(family), policy, budget, hard=True)
    ids, mask = ragged([5, 20, 13], "left")
    model(ids, attention_mask=mask)
    assert shares_of_tokens(model).max() <= budget + 1e-6
    assert model.last_trace.budget_spent <= budget + 1e-6
    # A policy that wants every layer gets as many as the budget pays for.
    if policy == SPENDTHRIFT:
        dearest = model.engine.costs.token_shares(torch.arange(20))[0].max()
        assert shares_of_tokens(model).min() > budget - dearest


@pytest.mark.parametrize("family", FEW)
def test_the_least_budget_may_be_kept_in_single_precision(family):
    costs = adaptive(shared(family)).engine.costs
    for protected in ((), (0,), (0, 1), (0, 2, 3)):
        least = costs.least_share(protected)
        below = torch.tensor(least).nextafter(torch.tensor(0.0)).item()
        assert below < least
        assert Budget(costs, frozenset(protected), below, hard=False).limit == below
        with pytest.raises(BudgetError, match="cannot be met"):
            Budget(costs, frozenset(protected), least - 1e-4, hard=False)


@pytest.mark.parametrize(
    ("family", "budget", "policy"),
    pairwise(
        ("gpt2", "llama"), (0.6, 0.75, 0.9), ("heuristic:protect=1 1", "heuristic:protect=0 0,spread=0.3,exit=0.9")
    ),
)
def test_heuristic_meets_the_budget_on_average_on_new_text(family, budget, policy):
    model = adaptive(shared(family), policy, budget)
    with torch.no_grad():
        model(tokens(batch=2, length=100))
    assert shares_of_tokens(model).mean().item() == pytest.approx(budget, abs=0.01)
    # A whole sequence in one forward charges every query for every slot, so the executed share may be a little less.
    assert budget - 0.02 < model.last_trace.budget_spent < budget + 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_random_meets_the_budget_on_average(family):
    model = adaptive(build(family), "random:protect=1 1", 0.7)
    with torch.no_grad():
        model(torch.randint(2, 97, (40, 100), generator=torch.Generator().manual_seed(1)))
    assert shares_of_tokens(model).mean().item() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("family", FEW)
def test_calibrated_static_set_is_the_largest_that_fits(family):
    model = adaptive(build(family), "static:protect=1 1", 0.7)
    model(tokens())
    share = shares_of_tokens(model).max().item()
    assert 0.7 - max(model.engine.costs.run_shares) < share <= 0.7 + 1e-6


def test_calibrated_static_set_skips_the_least_important_layers():
    model = adaptive(build("llama"), "static:protect=1 1", 0.7)
    model(tokens())
    ran = model.last_trace.ran[:, 0, 0]
    importance = model.policy.calibration.importance
    inner = torch.tensor([False, True, True, True, True, False])
    assert importance[inner & ran].min() > importance[inner & ~ran].max()
    assert ran[[0, 5]].all()


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan")])
def test_budget_outside_its_range_is_refused(budget):
    with pytest.raises(BudgetError, match=r"lies in \(0, 1\]"):
        adaptive(build("llama"), "random", budget)


def test_budget_below_the_least_possible_names_it():
    model = build("gpt2")
    least = adaptive(model).engine.costs.least_share([0, 5])
    with pytest.raises(BudgetError, match=r"the least possible is 0\.") as error:
        adaptive(model, "heuristic:protect=1 1", 0.2)
    named = float(re.search(r"least possible is (0\.\d+)", str(error.value)).group(1))
    assert least <= named < least + 0.001
    assert adaptive(model, "heuristic:protect=1 1", named).budget == named  # what is named can be had


@pytest.mark.parametrize("policy", ["dense", "window:recent=4"])
def test_budget_of_a_policy_that_runs_everything_is_refused(policy):
    with pytest.raises(BudgetError, match=r"runs every layer, so it cannot keep a budget of 0\.5"):
        adaptive(build("llama"), policy, 0.5)
    assert adaptive(build("llama"), policy, 1.0).budget == 1.0


def test_given_set_that_spends_more_than_the_budget_is_refused():
    with pytest.raises(BudgetError, match=r"spends 0\.8"):
        adaptive(build("llama"), "static:skip=2", 0.5)


@pytest.mark.parametrize("policy", ["random", "static"])
def test_policy_without_budget_or_amount_is_refused(policy):
    with pytest.raises(PolicyError, match="budget"):
        adaptive(build("llama"), policy)


def test_overridden_actions_are_charged_as_what_is_executed():
    """A layer that is protected costs a run although SKIP was decided; one after an exit costs a skip."""
    costs = adaptive(build("gpt2")).engine.costs
    ledger = Ledger(Budget(costs, frozenset({0, 5}), None, False), torch.zeros(1, 2, dtype=torch.long))
    first, second = [Action.SKIP] * 6, [Action.PROCESS, Action.EXIT, *[Action.PROCESS] * 4]
    actions = torch.tensor([first, second], dtype=torch.uint8).T[:, None, :]
    run = ledger.admit(actions, 0)
    assert run[:, 0, 0].tolist() == [True, False, False, False, False, True]
    assert run[:, 0, 1].tolist() == [True, False, False, False, False, True]
    run_shares, skip_shares = costs.token_shares(torch.tensor(0))
    torch.testing.assert_close(ledger.spent, (2 * run_shares[0] + 4 * skip_shares[0]).expand(1, 2))


def test_exit_carries_over_to_later_decisions():
    """A controller that decides layer by layer may say EXIT once and anything afterwards."""

    class LeaveAtTwo(Controller):
        name = "leave"

        @classmethod
        def option_names(cls):
            return ()

        def decide(self, signals, context: DecisionContext):
            action = Action.EXIT if context.layer_idx == 2 else Action.PROCESS
            return torch.full((1, *signals.shape[:2]), action, dtype=torch.uint8)

    model = adaptive(build("llama"), LeaveAtTwo())
    model(tokens())
    assert model.last_trace.ran[:, 0, 0].tolist() == [True, True, False, False, False, False]

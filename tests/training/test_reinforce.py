"""REINFORCE: rollouts against the deployed policy, the estimate against the exact gradient, and that it learns."""

import pytest
import torch
from tiny import build, gated, tokens

from anee_core.errors import InputError
from anee_core.training.options import ReinforceOptions
from anee_core.training.reinforce import Reinforce


def frozen(network):
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


SOFT = torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("hard", [False, True])
def test_rollouts_without_chance_are_the_deployed_decisions(tmp_path, hard):
    trained, deployed = gated(frozen(build("llama")), tmp_path)
    soft = deployed(tokens(3, 18)).logits
    deployed.set_policy(deployed.policy, 0.7, hard=hard)
    objective = Reinforce(trained, ReinforceOptions(temperature=1e-6)).eval()
    ids = tokens(3, 18)
    with torch.no_grad():
        logits, spent, log_chance, entropy = objective.rollout(ids, torch.full((3,), 0.7), torch.full((3,), hard))
        torch.testing.assert_close(logits, deployed(ids).logits, atol=5e-5, rtol=1e-3)
    run, skip = deployed.engine.costs.token_shares(torch.arange(18))
    torch.testing.assert_close(spent, torch.where(deployed.last_trace.ran, run[:, None], skip[:, None]).sum(0))
    torch.testing.assert_close(log_chance, torch.zeros(3, 18), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropy, torch.zeros(3, 18), atol=1e-3, rtol=0)
    assert torch.allclose(logits, soft, atol=1e-3) != hard
    assert (spent.max() <= 0.7 + 1e-6) == hard


def test_what_a_hard_budget_takes_was_nobodys_decision(tmp_path):
    trained, _ = gated(frozen(build("llama")), tmp_path)
    with torch.no_grad():
        trained.thresholds.fill_(0.0)
    objective = Reinforce(trained, ReinforceOptions(temperature=1.0)).eval()
    ids, budgets = tokens(2, 18), torch.full((2,), 0.7)
    with torch.no_grad():
        torch.manual_seed(5)
        _, _, free_chance, free_entropy = objective.rollout(ids, budgets, torch.tensor([False, False]))
        torch.manual_seed(5)
        _, spent, chance, entropy = objective.rollout(ids, budgets, torch.tensor([False, True]))
    torch.testing.assert_close(chance[0], free_chance[0])
    assert (spent[0] > 0.7).any()
    assert (spent[1] <= 0.7 + 1e-6).all()
    late = slice(trained.first, None)
    assert (entropy[1, late] < free_entropy[1, late] - 0.1).any()
    assert (entropy[:, : trained.first] == 0).all()


def test_decisions_are_made_in_full_precision(tmp_path):
    trained, _ = gated(build("llama"), tmp_path, least=0.4, knots=4)
    objective = Reinforce(trained, ReinforceOptions())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(tokens(2, 18))
        _, _, log_chance, _ = objective.rollout(tokens(2, 18), torch.tensor([0.6, 0.8]), SOFT)
    assert loss.isfinite()
    assert log_chance.dtype == torch.float32


def test_the_estimate_is_the_gradient_of_the_expected_reward(tmp_path):
    trained, _ = gated(frozen(build("llama")), tmp_path)
    trained.free = [i == 2 for i in range(6)]  # one decision: the fifth token at layer 2
    objective = Reinforce(trained, ReinforceOptions(rollouts=400, temperature=1.0, entropy=0.0, hard=0.0)).eval()
    ids, budget = tokens(1, 5), torch.tensor([0.8])
    trained.draw_budgets = lambda input_ids: budget
    price = float(trained.near(budget) @ objective.price)
    torch.manual_seed(1)
    loss, _ = objective(ids)
    loss.backward()
    estimate = trained.bias.grad[2]
    # By hand: both outcomes, and the chance of each.
    with torch.no_grad():
        wanted = trained.dense(ids).log_softmax(-1)
        outcomes = {}
        while len(outcomes) < 2:
            logits, spent, log_chance, _ = objective.rollout(ids, budget, SOFT)
            apart = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)[0, 4]
            over = spent[0, 4] - budget[0]
            counted = over if over > 0 or apart < 0.1 else torch.zeros(())
            outcomes[bool(spent[0, 4] > 0.95)] = (float(-apart - price * counted), float(log_chance[0, 4].exp()))
    (kept, chance), (skipped, rest) = outcomes[True], outcomes[False]
    assert chance + rest == pytest.approx(1, abs=1e-5)
    with torch.enable_grad():
        logit = torch.tensor(chance).logit().requires_grad_()
        expected = logit.sigmoid() * kept + (1 - logit.sigmoid()) * skipped
        (slope,) = torch.autograd.grad(expected, logit)
    # The bias moves the logit by the inverse of the running spread.
    nudged = 1e-3
    with torch.no_grad():
        trained.bias[2] += nudged
        again = {}
        while True not in again:
            _, spent, log_chance, _ = objective.rollout(ids, budget, SOFT)
            again[bool(spent[0, 4] > 0.95)] = float(log_chance[0, 4].exp())
        steepness = (torch.tensor(again[True]).logit() - torch.tensor(chance).logit()) / nudged
    wanted_gradient = -float(slope * steepness) / 5  # the loss is a mean over five tokens
    assert estimate == pytest.approx(wanted_gradient, rel=0.2)


def test_it_learns_which_layer_not_to_skip(tmp_path):
    torch.manual_seed(0)
    trained, _ = gated(frozen(build("llama")), tmp_path, least=0.6, knots=3)
    with torch.no_grad():
        trained.up.mul_(0.0)
        trained.shortcut_bias.mul_(0.0)
        trained.shortcut_bias[2] = 3.0  # to skip this one ruins the token
        trained.weight.mul_(0.0)
        trained.bias.copy_(trained.mean)
        trained.thresholds.fill_(0.0)  # a coin for each
    objective = Reinforce(trained, ReinforceOptions(rollouts=4, temperature=1.0, steps=40))
    optimizer = torch.optim.Adam([trained.bias, trained.thresholds], lr=3e-2)
    ids = tokens(8, 24)
    for step in range(40):
        objective.begin(step)
        loss, _ = objective(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = (trained.bias - trained.mean).detach()[:, None] - trained.thresholds.detach().T
    keeps = logits.mean(1)
    assert keeps[2] > max(float(keeps[i]) for i in (1, 3, 4)) + 0.2
    assert all(getattr(trained, name).grad is None for name in ("down", "up", "shortcut_bias"))


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match="rollouts is a whole number, at least 2"):
        ReinforceOptions(rollouts=1)
    with pytest.raises(InputError, match="temperature is a number, above 0"):
        ReinforceOptions(temperature=0.0)
    with pytest.raises(InputError, match="hard is a number, at least 0 and at most 1"):
        ReinforceOptions(hard=1.5)

"""All layers in one native call: the same numbers and decisions as layer by layer, and when it is not done."""

import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import FEW, adaptive, build, gate_weights, ragged, stepwise, tokens

from anee_core.policy import LowRankShortcut, Policy
from anee_core.steps.deferred import DeferredStep
from anee_core.steps.native.build import library
from anee_core.steps.native.step import MAX_SKIPPING, NativeStep

RANDOM = "random:p=0.4,protect=0 0"


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Return the policy string of a made-up gate with shortcuts."""
    folder = tmp_path_factory.mktemp("learned")
    for part in gate_weights():
        part.save(folder)
    return f"gate:{folder},protect=1 1+shortcuts:{folder}"


@pytest.fixture
def taken(note_stacks):
    """Return a list that grows with each block that goes through all layers at once."""
    return note_stacks()


def decoded(model, ids, mask=None, new=9, **options):
    generation = model.decode(ids, mask, max_new_tokens=new, eos_token_id=[], **options)
    return generation.sequences, generation.trace


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("policy", ["dense", RANDOM, "learned", "learned, hard"])
def test_it_decodes_as_the_modules_do(family, policy, learned, taken):
    network = build(family)
    budget = 0.7 if "learned" in policy else None
    options = {"budget": budget, "hard": "hard" in policy}
    policy = learned if "learned" in policy else policy
    fast, slow = adaptive(network, policy, **options), adaptive(network, policy, fast=False, **options)
    ids, mask = ragged((9, 5, 7), "left")
    for inputs in ((tokens(3, 9), None), (ids, mask)):
        found, wanted = decoded(fast, *inputs), decoded(slow, *inputs)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1].ran, wanted[1].ran)
        assert torch.equal(found[1].held, wanted[1].held)
        # The modules compute rows of equal length, so some tokens twice.
        assert found[1].spent().share <= wanted[1].spent().share
    steps = [length for length in taken if length == 1]
    assert len(steps) == 16
    if budget:
        assert 0.2 < found[1].ran[:, :, 9:].float().mean() < 0.98


@pytest.mark.parametrize("policy", [RANDOM, "learned"])
def test_logits_of_blocks(policy, learned, taken):
    network = build("llama")
    chosen = learned if policy == "learned" else policy
    fast, slow = (adaptive(network, chosen, 0.7 if policy == "learned" else None, fast=fast) for fast in (True, False))
    ids, mask = ragged((6, 4), "right")
    with torch.no_grad():
        for inputs in ((ids, None), (ids, mask)):
            found, wanted = (model(*inputs).logits[mask.bool()] for model in (fast, slow))
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
            assert torch.equal(fast.last_trace.ran, slow.last_trace.ran)
    assert taken == [6, 6]


@pytest.mark.parametrize("policy", [RANDOM, "learned", "learned, hard"])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_blocks_that_skip_layers(policy, threads, learned, taken, monkeypatch):
    monkeypatch.setattr("anee_core.steps.native.layers._BYTES_PER_THREAD", 1)
    network = build("llama")
    options = {"budget": None if policy == RANDOM else 0.7, "hard": "hard" in policy}
    chosen = RANDOM if policy == RANDOM else learned
    fast, slow = (adaptive(network, chosen, fast=fast, **options) for fast in (True, False))
    ids, mask = ragged((125, 70), "left")
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for inputs in ((tokens(2, 125), None), (ids, mask)):
                found, real = [], torch.ones(2, 125) if inputs[1] is None else mask
                for model in (fast, slow):
                    cache = model.new_cache()
                    one = model(*inputs, past_key_values=cache).logits[real.bool()]
                    more = model(tokens(2, 90, seed=5), past_key_values=cache).logits.flatten(0, 1)
                    found.append(torch.cat((one, more)))
                torch.testing.assert_close(*found, atol=5e-5, rtol=1e-3)
                assert torch.equal(fast.last_trace.ran, slow.last_trace.ran)
                assert torch.equal(fast.last_trace.held, slow.last_trace.held)
    finally:
        torch.set_num_threads(1)
    assert taken == [125, 90] * 2


def test_blocks_of_so_many_that_the_modules_are_sooner_done(learned, taken):
    network = build("llama")
    fast, slow = (adaptive(network, learned, 0.7, fast=fast) for fast in (True, False))
    ids = tokens(1, MAX_SKIPPING + 1)
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, slow(ids).logits)
    assert taken == [None]


@pytest.mark.parametrize("multiplies", [False, True])
def test_long_blocks_in_bfloat16_where_the_processor_has_no_such_numbers(multiplies, taken, monkeypatch):
    network = build("llama", dtype=torch.bfloat16)
    fast, slow = (adaptive(network, fast=fast) for fast in (True, False))
    ids, mask = ragged((150, 70), "left")
    monkeypatch.setattr(library(), "anee_multiplies_bf16", lambda: int(multiplies))
    with torch.no_grad():
        for inputs in ((tokens(2, 150), None), (ids, mask)):
            real = torch.ones(2, 150) if inputs[1] is None else mask
            found, wanted = (model(*inputs).logits[real.bool()].float() for model in (fast, slow))
            torch.testing.assert_close(found, wanted, atol=0.06, rtol=0.02)
    assert taken == [None if multiplies else 150] * 2


def test_bfloat16(learned):
    network = build("gpt2", dtype=torch.bfloat16)
    shortcuts = learned.split("+")[1]
    fast, slow = (adaptive(network, f"static:skip=2 4+{shortcuts}", fast=fast) for fast in (True, False))
    with torch.no_grad():
        found, wanted = (stepwise(model, tokens(2, 6)).float() for model in (fast, slow))
    torch.testing.assert_close(found, wanted, atol=0.06, rtol=0.02)


def test_a_gate_remembers_what_it_has_seen(learned):
    network = build("llama")
    fast, slow = (adaptive(network, learned, 0.7, fast=fast) for fast in (True, False))
    ids, found = tokens(2, 12), []
    with torch.no_grad():
        for model in (fast, slow):
            cache = model.new_cache()
            for t in range(8):
                model(ids[:, t : t + 1], past_key_values=cache)
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([1, 1]))
            for t in range(5, 12):
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits
            found.append((logits, cache.scores.entries(12)[:, 5:12]))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["static:skip=1 2 3 5", RANDOM, "static:skip=1 2 4+shortcuts", "learned"])
def test_keys_and_values_may_come_later(policy, learned, taken):
    network = build("gpt2")
    policy, budget = (learned, 0.7) if policy == "learned" else (policy, None)
    policy = policy.replace("+shortcuts", f"+{learned.split('+')[1]}") if budget is None else policy
    slow, fast = adaptive(network, policy, budget, fast=False), adaptive(network, policy, budget)
    step = DeferredStep(NativeStep(fast.adapter, fast.parts))
    fast.use_step(step)
    ids, found = tokens(2, 9), []
    with torch.no_grad():
        for model in (fast, slow):
            cache = model.new_cache()
            for t in range(9):
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits
            owed = [cache.debts.count(i) for i in cache.debts.layers()]
            found.append((logits, [cache.keys_values(i) for i in range(6)]))
            if model is fast:
                assert taken == [1] * 9
                assert bool(owed) == (budget is None)
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


LATER = [
    "static:exit=3",
    "random:p=0.4,exit=0.2,protect=0 0",
    "static:skip=1 2 4+window:sinks=1,recent=4",
    "static:skip=1 2 4+tova:keep=5",
    "random:p=0.6,protect=0 0+knorm:keep=0.4,least=1",
]


@pytest.mark.parametrize("policy", LATER)
def test_keys_and_values_may_come_later_with_exit_padding_dropping_and_beams(policy):
    network = build("llama")
    slow, fast = adaptive(network, policy, fast=False), adaptive(network, policy)
    fast.use_step(DeferredStep(NativeStep(fast.adapter, fast.parts)))
    ids, mask = ragged((9, 5), "left")
    new, logits, most = tokens(2, 40, seed=7), [], 0
    with torch.no_grad():
        for model in (fast, slow):
            cache = model.new_cache()
            steps = [model(ids, mask, past_key_values=cache).logits[:, -1:]]
            for t in range(40):
                steps.append(model(new[:, t : t + 1], past_key_values=cache).logits)
                most = max(most, sum(map(cache.debts.count, range(len(cache.layers)))))
            logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(*logits, atol=5e-5, rtol=1e-3)
    # Who looks at keys has to have them at once.
    assert (most > 0) == ("tova" not in policy and "knorm" not in policy)
    options = {"num_beams": 3, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(model.generate(tokens(2, 6), **options) for model in (fast, slow)))


def test_beams_are_followed(learned):
    network = build("llama")
    ids, options = tokens(2, 6), {"num_beams": 3, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    found = [adaptive(network, learned, 0.7, fast=fast).generate(ids, **options) for fast in (True, False)]
    assert torch.equal(*found)


def test_states_of_each_layer_and_dropping_go_layer_by_layer(taken):
    network = build("llama")
    with torch.no_grad():
        adaptive(network)(tokens(1, 4), output_hidden_states=True)
        adaptive(network, "tova:keep=3")(tokens(1, 4))
    assert not taken


@dataclass(frozen=True)
class Doubled(LowRankShortcut):
    """A shortcut of somebody else's, which the library does not know."""

    name: ClassVar[str] = "doubled"

    def estimate(self, layer_idx, hidden_states):
        """Return twice the estimate."""
        return 2 * super().estimate(layer_idx, hidden_states)


def test_other_shortcuts_go_layer_by_layer(learned, taken):
    network = build("llama")
    _, weights = gate_weights()
    made = []
    for fast in (True, False):
        model = adaptive(network, learned, 0.7, fast=fast)
        model.set_policy(Policy(model.policy.controller, shortcut=Doubled.of(weights)), 0.7)
        made.append(decoded(model, tokens(2, 5)))
    assert torch.equal(made[0][0], made[1][0])
    assert set(taken) == {None}


def test_nothing_of_a_generation_is_kept():
    model = adaptive(build("llama"))
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens(1, 3), past_key_values=cache)
    storage = weakref.ref(cache.layers[0].keys)
    del cache
    model.last_trace = None
    gc.collect()
    assert storage() is None


def test_another_number_of_threads_is_seen():
    model, ids = adaptive(build("llama")), tokens(2, 4)
    before, threads = decoded(model, ids), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        after = decoded(model, ids)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before[0], after[0])

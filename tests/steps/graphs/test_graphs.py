"""Decoding by captured graphs, with a stand-in on the CPU that repeats the recorded operations on the same tensors, as
a GPU repeats kernels on the same addresses: what Python did while it was recorded is not done again.
"""

import gc
import weakref

import pytest
import torch
from tiny import FEW, adaptive, build, gate_weights, ragged, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anee_core.steps.choice import step_for
from anee_core.steps.graphs.graph_step import GraphStep
from anee_core.steps.reference import ReferenceStep

RANDOM = "random:p=0.4,protect=0 0"


class Recorder(TorchDispatchMode):
    """Writes down each operation, the tensors it got and those it returned."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        """Do it all again, on the same tensors, into the same tensors; where there is a condition, only if it holds."""
        for function, args, kwargs, result in self.operations:
            if isinstance(function, Recorder):
                if args[0]:
                    function.replay()
                continue
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Captures:
    """Captures work on the CPU, and counts."""

    def __init__(self):
        self.count = self.replays = 0
        self._recorder = None

    def __call__(self, work):
        self.count += 1
        work()
        recorder = self._recorder = Recorder()
        with recorder:
            work()
        self._recorder = None
        return _Counted(self, recorder)

    def only_if(self, flag, work):
        outer, inner = self._recorder, Recorder()
        if outer is None:
            work()
            return
        before = len(outer.operations)
        with inner:
            work()
        del outer.operations[before:]  # they reach both
        outer.operations.append((inner, (flag,), {}, None))


class _Counted:
    def __init__(self, captures, recorder):
        self._captures, self._recorder = captures, recorder

    def replay(self):
        self._captures.replays += 1
        self._recorder.replay()


def captured(network, policy="dense", budget=None, **options):
    """Return a model whose layers are captured on the CPU, and what counts them."""
    model = adaptive(network, policy, budget, fast=False, **options)
    captures = Captures()
    step = GraphStep(ReferenceStep(model.adapter, model.parts), model.adapter, model.parts, captures, "cpu")
    model.use_step(step)
    return model, captures


def decoded(model, ids, mask=None, new=9, **options):
    generation = model.decode(ids, mask, max_new_tokens=new, eos_token_id=[], **options)
    return generation.sequences, generation.trace


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("policy", ["dense", "static:skip=1 2", RANDOM])
def test_graphs_decode_as_the_modules_do(family, policy):
    network = build(family)
    slow = adaptive(network, policy, fast=False)
    for inputs in ((tokens(3, 9), None), ragged((9, 5, 7), "left")):
        fast, captures = captured(network, policy)
        found, wanted = decoded(fast, *inputs), decoded(slow, *inputs)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1].ran, wanted[1].ran)
        assert torch.equal(found[1].held, wanted[1].held)
        assert captures.replays > 0
        assert fast.slow_because is None


@pytest.mark.parametrize("family", FEW)
def test_logits_and_cache_after_each_token(family):
    network = build(family)
    slow, (fast, captures) = adaptive(network, RANDOM, fast=False), captured(network, RANDOM)
    ids, more = tokens(1, 7), tokens(1, 12, seed=3)
    caches = [model.new_cache(64) for model in (slow, fast)]
    with torch.no_grad():
        for model, cache in zip((slow, fast), caches, strict=True):
            model(ids, past_key_values=cache)
        for t in range(12):
            wanted, found = (
                model(more[:, t : t + 1], past_key_values=cache).logits
                for model, cache in zip((slow, fast), caches, strict=True)
            )
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
        for layer_idx in range(len(slow.parts.layers)):
            for ours, theirs in zip(caches[1].keys_values(layer_idx), caches[0].keys_values(layer_idx), strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    layers = len(slow.parts.layers)
    assert captures.count <= 4 * layers
    assert captures.replays == 11 * layers  # the first token finds out where the cache lies


GATED = "gate:{},protect={},first=2,window=8"


@pytest.fixture
def fitted(tmp_path):
    """Return the folder of a gate and shortcuts."""
    for part in gate_weights():
        part.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize(
    ("batch", "hard", "more"),
    [(1, False, ""), (1, True, "+shortcuts:{}"), (3, True, "+window:sinks=1,recent=6"), (3, False, "+shortcuts:{}")],
)
def test_a_gate_decides_within_one_graph(fitted, family, batch, hard, more):
    network = build(family)
    policy = GATED.format(fitted, "1 1") + more.format(fitted)
    slow = adaptive(network, policy, 0.6, hard=hard, fast=False)
    fast, captures = captured(network, policy, 0.6, hard=hard)
    found, wanted = decoded(fast, tokens(batch, 5), new=10), decoded(slow, tokens(batch, 5), new=10)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].ran, wanted[1].ran)
    assert torch.equal(found[1].held, wanted[1].held)
    assert found[1].flops == wanted[1].flops
    assert 0.2 < wanted[1].ran[1:-1].float().mean() < 0.9
    assert captures.count <= (2 if "window" in more else 1)  # a cache that drops comes to lie elsewhere
    assert captures.replays == 9 - captures.count  # the first token in each place finds out that it is there


def test_keys_and_values_are_there_whether_a_row_or_nobody_runs_a_layer(fitted):
    network, policy = build("llama"), GATED.format(fitted, "0 0") + f"+shortcuts:{fitted}"
    slow, (fast, captures) = adaptive(network, policy, 0.4, fast=False), captured(network, policy, 0.4)
    ids, caches, ran = tokens(2, 30), [], []
    for model in (slow, fast):
        caches.append(cache := model.new_cache(64))
        with torch.no_grad():
            for token in ids.split(1, dim=1):
                model(token, past_key_values=cache)
                ran.append(model.last_trace.ran.sum(1).flatten())
    assert torch.equal(torch.stack(ran[30:]), torch.stack(ran[:30]))
    assert {0, 1, 2} == set(torch.stack(ran).flatten().tolist())
    assert captures.replays == 28
    for layer_idx in range(len(slow.parts.layers)):
        for ours, theirs in zip(caches[1].keys_values(layer_idx), caches[0].keys_values(layer_idx), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_each_gate_is_captured_by_itself(fitted):
    network = build("llama")
    slow, (fast, captures) = adaptive(network, fast=False), captured(network)
    ids, cache, twin = tokens(1, 40), fast.new_cache(64), slow.new_cache(64)
    with torch.no_grad():
        for t, token in enumerate(ids.split(1, dim=1)):
            if t % 10 == 0:
                policy = adaptive(network, GATED.format(fitted, "1 1" if t % 20 == 0 else "2 0"), 0.6).policy
                fast.set_policy(policy, 0.6)
                slow.set_policy(policy, 0.6)
            found, wanted = fast(token, past_key_values=cache).logits, slow(token, past_key_values=twin).logits
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert captures.count == 4
    assert captures.replays == 38


def test_a_gate_asks_the_host_where_no_graph_knows_conditions(fitted, caplog):
    network, policy = build("llama"), GATED.format(fitted, "1 1") + f"+shortcuts:{fitted}"
    slow, (fast, captures) = adaptive(network, policy, 0.7, fast=False), captured(network, policy, 0.7)

    def refuse(flag, work):
        raise RuntimeError("this torch has no conditional nodes")

    captures.only_if = refuse
    found, wanted = decoded(fast, tokens(1, 9), new=16), decoded(slow, tokens(1, 9), new=16)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].ran, wanted[1].ran)
    assert captures.replays == 14 * len(slow.parts.layers)
    assert "conditional nodes" in caplog.text
    assert len(caplog.records) == 1
    assert fast.slow_because is None


def test_shortcuts_are_part_of_a_graph(tmp_path):
    for part in gate_weights():
        part.save(tmp_path)
    network, policy = build("llama"), f"static:skip=1 2+shortcuts:{tmp_path}"
    slow, (fast, captures) = adaptive(network, policy, fast=False), captured(network, policy)
    for inputs in ((tokens(1, 9), None), (tokens(2, 9), None)):
        assert torch.equal(decoded(fast, *inputs)[0], decoded(slow, *inputs)[0])
    assert captures.count == 2 * len(slow.parts.layers)


@pytest.mark.parametrize(
    ("policy", "alike"), [("window:sinks=1,recent=4", True), (f"{RANDOM}+tova:keep=6", False), ("knorm:keep=6", False)]
)
def test_layers_that_drop_are_captured_if_they_drop_the_same_tokens(policy, alike):
    network = build("llama")
    slow, (fast, captures) = adaptive(network, policy, fast=False), captured(network, policy)
    found, wanted = decoded(fast, tokens(2, 9), new=30), decoded(slow, tokens(2, 9), new=30)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].held, wanted[1].held)
    assert (captures.replays > 0) == alike


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_beams_and_samples(options):
    network = build("llama")
    slow, (fast, _) = adaptive(network, RANDOM, fast=False), captured(network, RANDOM)
    outcomes = []
    for model in (slow, fast):
        torch.manual_seed(0)
        outcomes.append(model.generate(tokens(2, 6), max_new_tokens=8, **options))
    assert torch.equal(*outcomes)


def test_rollback_and_growth():
    network = build("gpt2")
    slow, (fast, captures) = adaptive(network, fast=False), captured(network)
    ids, more, outcomes = tokens(2, 5), tokens(2, 80, seed=1), []
    for model in (slow, fast):
        cache = model.new_cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            for t in range(30):
                model(more[:, t : t + 1], past_key_values=cache)
            cache.rollback(4)
            outcomes.append([model(more[:, t : t + 1], past_key_values=cache).logits for t in range(26, 80)])
    for wanted, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert captures.count <= 3 * len(slow.parts.layers)


def test_two_caches_take_turns():
    network = build("llama")
    slow, (fast, captures) = adaptive(network, fast=False), captured(network)
    prompts, more, outcomes = (tokens(1, 6), tokens(1, 8, seed=1)), tokens(1, 6, seed=2), []
    for model in (slow, fast):
        caches = [model.new_cache(32) for _ in prompts]
        with torch.no_grad():
            for ids, cache in zip(prompts, caches, strict=True):
                model(ids, past_key_values=cache)
            outcomes.append([model(more[:, t : t + 1], past_key_values=c).logits for t in range(6) for c in caches])
    for wanted, found in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert captures.count == 2 * len(slow.parts.layers)


def test_new_weights_are_seen():
    network = build("llama")
    fast, _ = captured(network)
    before = decoded(fast, tokens(1, 6))[0]
    with torch.no_grad():
        for layer in network.model.layers:
            layer.mlp.down_proj.weight = torch.nn.Parameter(-3 * layer.mlp.down_proj.weight)
    after = decoded(fast, tokens(1, 6))[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, decoded(adaptive(network, fast=False), tokens(1, 6))[0])


@pytest.mark.parametrize("disturbance", ["hook", "training", "no recipe"])
def test_what_cannot_be_captured_is_said_and_runs_by_the_modules(disturbance):
    network = build("falcon-grouped" if disturbance == "no recipe" else "llama")
    fast, captures = captured(network)
    calls = []
    if disturbance == "hook":
        network.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    if disturbance == "training":
        network.model.layers[1].train()
    wanted = decoded(adaptive(network, fast=False), tokens(1, 6))[0]
    calls.clear()
    assert torch.equal(decoded(fast, tokens(1, 6))[0], wanted)
    assert captures.count == 0
    assert fast.slow_because
    assert len(calls) == (9 if disturbance == "hook" else 0)


def test_a_layer_that_cannot_be_captured_runs_by_its_modules(caplog):
    def refuse(work):
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    model = adaptive(build("llama"), RANDOM, fast=False)
    step = GraphStep(ReferenceStep(model.adapter, model.parts), model.adapter, model.parts, refuse, "cpu")
    wanted = decoded(model, tokens(2, 6))[0]
    model.use_step(step)
    assert torch.equal(decoded(model, tokens(2, 6))[0], wanted)
    assert torch.equal(decoded(model, tokens(2, 6))[0], wanted)
    assert "not permitted" in model.slow_because
    assert len(caplog.records) == 1


def test_gradients_go_through_the_modules():
    network = build("llama")
    fast, captures = captured(network)
    cache = fast.new_cache()
    with torch.no_grad():
        fast(tokens(1, 6), past_key_values=cache)
        for t in range(3):
            fast(tokens(1, 3, seed=1)[:, t : t + 1], past_key_values=cache)
    count = captures.replays
    embeddings = torch.randn(1, 1, network.config.hidden_size, requires_grad=True)
    fast(inputs_embeds=embeddings, past_key_values=cache).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert captures.replays == count


def test_the_step_follows_the_device(monkeypatch):
    network = build("llama")
    model = adaptive(network)
    assert not isinstance(model.engine.step, GraphStep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    step = step_for(model.adapter, model.parts, fast=True)
    assert isinstance(step, GraphStep)
    model.use_step(step)
    wanted = decoded(adaptive(network), tokens(1, 6))[0]
    assert torch.equal(decoded(model, tokens(1, 6))[0], wanted)  # on the CPU it leaves blocks to the native step
    assert step.slow_because is None
    assert isinstance(step_for(model.adapter, model.parts, fast=False), ReferenceStep)


def test_a_graph_keeps_no_storage_alive():
    class Nothing:
        def __init__(self, work):
            work()

        def replay(self):
            pass

    model = adaptive(build("llama"), fast=False)
    step = GraphStep(ReferenceStep(model.adapter, model.parts), model.adapter, model.parts, Nothing, "cpu")
    model.use_step(step)
    cache = model.new_cache(32)
    with torch.no_grad():
        for ids in tokens(1, 4).split(1, dim=1):
            model(ids, past_key_values=cache)
    keys = weakref.ref(cache.layers[0].keys)
    del cache
    model.last_trace = None
    gc.collect()
    assert keys() is None

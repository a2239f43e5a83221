"""Dropping in the engine: memory, pieces, second generations, rollback of what policies remember."""

from dataclasses import dataclass

import pytest
import torch
from tiny import FEW, adaptive, build, pairwise, ragged, shared, stepwise, tokens

from anee_core.cache_policies.window import WindowCachePolicy
from anee_core.errors import CacheError
from anee_core.interfaces import CachePolicy
from anee_core.policy import Policy

CLOSE = {"atol": 5e-5, "rtol": 1e-3}
SCORING = [
    "h2o:keep=0.4,least=1",
    "tova:keep=5",
    "knorm:keep=0.4,least=1",
    "snapkv:keep=0.4,least=1,every=4,window=2,pool=3",
]


@pytest.mark.parametrize(
    "policy", [*SCORING, "window:sinks=1,recent=6", "random:p=0.5,protect=0 0+tova:keep=0.4,least=1"]
)
@pytest.mark.parametrize("family", FEW)
def test_a_prompt_read_in_pieces_of_any_size_is_the_same(family, policy):
    ids, mask = ragged([15, 9], "left")
    with torch.no_grad():
        whole = adaptive(shared(family), policy)(ids, attention_mask=mask).logits
        for chunk in (1, 4, 7):
            pieces = adaptive(shared(family), policy, prefill_chunk=chunk)(ids, attention_mask=mask).logits
            torch.testing.assert_close(pieces[mask.bool()], whole[mask.bool()], **CLOSE)


@pytest.mark.parametrize("policy", [*SCORING, "window:keep=0.4,least=1"])
def test_memory_while_reading_is_bounded_by_the_chunk_and_what_is_kept(policy):
    length, chunk = 120, 16
    model = adaptive(build("llama"), policy, prefill_chunk=chunk)
    with torch.no_grad():
        model(tokens(2, length))
        dense = adaptive(build("llama"))
        dense(tokens(2, length))
    trace = model.last_trace
    assert trace.held.shape == (6, 2, length)
    assert trace.kv_bytes_by_step.shape == (8, 6)
    assert trace.held[:, :, -1].equal(trace.kept)
    kept = trace.held[:, :, [*range(chunk - 1, length, chunk), -1]].permute(2, 0, 1)
    assert kept[-1].max() <= max(0.4 * length + 1, 4)
    per_slot = dense.last_trace.kv_bytes / 6 / length
    for step, (held, allocated) in enumerate(zip(kept, trace.kv_bytes_by_step, strict=True)):
        # Slack of the storage: a tenth, and room to grow into.
        room = 1.1 * (held.amax(1) + 20)
        assert (allocated <= per_slot * 1.1 * room + 1).all(), step
    assert trace.kv_bytes < dense.last_trace.kv_bytes


def test_allocated_bytes_fall_and_stay_low_while_generating():
    model = adaptive(build("gpt2"), "tova:keep=8")
    trace = model.decode(tokens(2, 60), max_new_tokens=40, eos_token_id=[]).trace
    assert (trace.held[:, 0, 8:] == 8).all()
    assert trace.context_dropped > 0.8
    after_prompt, end = trace.kv_bytes_by_step[0].sum(), trace.kv_bytes_by_step[-1].sum()
    assert end == after_prompt
    dense = adaptive(build("gpt2")).decode(tokens(2, 60), max_new_tokens=40, eos_token_id=[]).trace
    assert end < 0.35 * dense.kv_bytes_by_step[-1].sum()


@pytest.mark.parametrize("policy", SCORING)
def test_a_second_generation_on_the_same_cache_goes_on(policy):
    model, ids = adaptive(build("llama"), policy), tokens(2, 30)
    with torch.no_grad():
        whole = stepwise(model, ids)
        cache = model(ids[:, :12]).past_key_values
        first = model(ids[:, 12:20], past_key_values=cache).logits
        second = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole[:, 12:], **CLOSE)


@pytest.mark.parametrize("policy", SCORING)
def test_rollback_restores_what_a_policy_remembers(policy):
    model, ids = adaptive(build("llama"), policy), tokens(2, 24)
    with torch.no_grad():
        wanted = stepwise(model, ids)
        cache = model(ids[:, :12]).past_key_values
        cache.activate_past_recording()
        for wrong in (tokens(2, 5, seed=8), tokens(2, 3, seed=9)):
            model(wrong, past_key_values=cache)
            cache.rollback(wrong.shape[1])
        part = model(ids[:, 12:17], past_key_values=cache).logits
        cache.rollback(2)
        rest = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((part[:, :3], rest), dim=1), wanted[:, 12:], **CLOSE)


def test_rollback_of_rewritten_scores_is_refused_unless_recorded():
    model, ids = adaptive(build("llama"), "h2o:keep=0.9,least=1"), tokens(2, 12)
    with torch.no_grad():
        cache = model(ids).past_key_values
        with pytest.raises(CacheError, match="activate_past_recording"):
            cache.rollback(1)


@pytest.mark.parametrize("policy", SCORING)
def test_assisted_decoding_gives_what_plain_decoding_gives(policy):
    model, draft = adaptive(build("llama"), policy), build("llama")
    ids = tokens(1, 9)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    helped = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, assistant_model=draft)
    assert torch.equal(plain, helped)


@pytest.mark.parametrize("policy", SCORING)
def test_beams_follow_their_rows(policy):
    """A beam's score is that of its tokens under the policy."""
    model, ids = adaptive(build("llama"), policy), tokens(2, 9)
    beams = model.generate(
        ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = stepwise(model, beams.sequences)[:, 8:-1].log_softmax(-1)
    scores = logits.gather(2, beams.sequences[:, 9:, None])[..., 0].sum(1) / 6
    torch.testing.assert_close(scores, beams.sequences_scores, **CLOSE)


def test_tokens_leave_a_layer_only_once():
    """What is dropped stays dropped, however a policy changes its mind."""

    @dataclass(frozen=True)
    class Fickle(CachePolicy):
        name = "fickle"

        def retain(self, view):
            parity = view.query_position[:, :, None] % 2
            return (view.position_ids[:, None] % 2 == parity) | (view.position_ids[:, None] < 0)

    model, ids = adaptive(build("llama"), Fickle()), tokens(1, 9)
    with torch.no_grad():
        out = model(ids)
        torch.testing.assert_close(out.logits, stepwise(model, ids), **CLOSE)
    assert out.past_key_values.kept().tolist() == [[1]] * 6


class EachLayer(WindowCachePolicy):
    """The same, decided for each layer by itself."""

    alike = False


RECENT, SHARE = (("sinks", 1), ("recent", 5)), (("sinks", 2), ("keep", (0.4,)), ("least", 3))


@pytest.mark.parametrize(
    ("family", "layers", "options"), pairwise(FEW, ("dense", "random:p=0.5,protect=0 0"), (RECENT, SHARE))
)
def test_layers_that_keep_the_same_are_decided_for_at_once(family, layers, options, note_stacks):
    taken = note_stacks()
    network, new, found = shared(family), tokens(2, 30, seed=4), []
    for cache_policy in (WindowCachePolicy(**dict(options)), EachLayer(**dict(options))):
        policy = adaptive(network, layers).policy
        model = adaptive(network, Policy(policy.controller, cache_policy), prefill_chunk=7)
        logits, cache = [], model.new_cache()
        with torch.no_grad(), model.recording(cache) as trace:
            logits.append(model(*ragged([21, 13], "left"), past_key_values=cache).logits[:, -1:])
            logits += [model(new[:, t : t + 1], past_key_values=cache).logits for t in range(24)]
            cache.activate_past_recording()
            logits.append(model(new[:, 24:29], past_key_values=cache).logits)
            cache.rollback(3)
            cache.reorder_cache(torch.tensor([1, 1]))
            logits.append(model(new[:, 27:], past_key_values=cache).logits)
        assert cache.alike == cache_policy.alike
        found.append((torch.cat(logits, dim=1), trace.held, cache.kept(), trace.kv_bytes_by_step))
    torch.testing.assert_close(*found, **CLOSE)
    assert len(taken) >= 24
    assert None not in taken

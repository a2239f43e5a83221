"""Checks of a policy: on small models of several families it keeps the promises that every policy makes."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import torch
from torch import Tensor

from anee_core.accounting.budget import SLACK
from anee_core.adapter.cache_names import CACHE
from anee_core.conformance.check import Check, check, expect, expect_same
from anee_core.conformance.cost import expect_counted, spent_by_token
from anee_core.conformance.policy_answers import answers
from anee_core.conformance.policy_subject import FAMILIES, PolicySubject
from anee_core.conformance.skipping import expect_rows_alone
from anee_core.conformance.subject import CLOSE, stepwise
from anee_core.errors import BudgetError, PolicyError
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.policy.strings import parse_policy

_LAYERS, _TOKENS = "random:p=0.5,protect=0 0", "window:sinks=1,recent=4"


@check("spelling", look="the dataclass fields of the policy: they are its options")
def spelling(subject: PolicySubject) -> None:
    """The string of a policy makes the same policy again, and a wrong option is refused."""
    made = subject.made
    again = parse_policy(subject.text, subject.plugins)
    for name in ("controller", "cache_policy"):
        mine, other = getattr(made, name), getattr(again, name)
        expect(
            type(mine) is type(other),
            f"a {type(mine).__name__} from '{subject.text}'",
            type(other).__name__,
            spelling.look,
        )
        expect(mine.options() == other.options(), f"options {mine.options()}", other.options(), spelling.look)
        for option, value in mine.options().items():
            # Whatever cannot be written in a string cannot be saved either.
            written = " ".join(map(str, value)) if isinstance(value, tuple) else value
            parse_policy(f"{mine.name}:{option}={written}", subject.plugins)
        try:
            parse_policy(f"{mine.name}:no_such_option=1", subject.plugins)
        except PolicyError:
            continue
        expect(False, f"'{mine.name}:no_such_option=1' to be refused", "no error", spelling.look)


@check("parallel equals stepwise", look="decide and retain: only the token's own path and earlier tokens may matter")
def parallel(subject: PolicySubject) -> None:
    """A whole sequence in one forward gives the logits of decoding it token by token."""
    for family in FAMILIES:
        model = subject.adaptive(family)
        ids = subject.subject(family).tokens(length=80 if family == "llama" else 11)
        with torch.no_grad():
            whole, ran = model(ids).logits, model.last_trace.ran  # type: ignore[union-attr]
            steps = stepwise(model, ids)
            prefix = model(ids[:, :6])
        expect_same(whole, steps, f"logits ({family})", parallel.look, CLOSE)
        expect_same(prefix.logits, whole[:, :6], f"logits of the first 6 tokens alone ({family})", parallel.look, CLOSE)
        alone = model.last_trace.ran  # type: ignore[union-attr]
        expect(torch.equal(alone, ran[:, :, :6]), "the same layers for a prefix", "others", parallel.look)


@check("rows", look="decide and retain: a row may depend on no other, nor on padding")
def rows(subject: PolicySubject) -> None:
    """Each row of a ragged batch, padded on either side, gets what it gets alone."""
    for family in FAMILIES:
        expect_rows_alone(subject.subject(family), subject.adaptive(family), f"({family})", rows.look)


@check(
    "conversations", look="decide and retain: what is known of a sequence is in the context or the view, not on self"
)
def conversations(subject: PolicySubject) -> None:
    """Conversations that take turns under one policy get what each gets alone, and so do rows that change places."""
    for family in FAMILIES:
        model, at = subject.adaptive(family), subject.subject(family)
        both = [at.tokens(2, 9, seed=seed) for seed in (5, 6)]
        with torch.no_grad():
            wanted = [stepwise(subject.adaptive(family), ids) for ids in both]
            caches = model.new_cache(), model.new_cache()
            found: tuple[list[Tensor], ...] = ([], [])
            for t in range(9):
                for each, cache, ids in zip(found, caches, both, strict=True):
                    each.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
            for each, logits in zip(found, wanted, strict=True):
                expect_same(
                    torch.cat(each, dim=1), logits, f"logits beside another ({family})", conversations.look, CLOSE
                )
            cache, ids = model.new_cache(), both[0]
            model(ids[:, :6], past_key_values=cache)
            cache.reorder(torch.tensor([1, 0]))
            swapped = [model(ids[:, t : t + 1].flip(0), past_key_values=cache).logits for t in range(6, 9)]
        expect_same(
            torch.cat(swapped, dim=1).flip(0), wanted[0][:, 6:], f"logits of rows that have changed places ({family})",
            conversations.look, CLOSE,
        )  # fmt: skip


@check("budget", look="decide: what it may spend is in the context and in the signal 'remaining'")
def budget(subject: PolicySubject) -> None:
    """A hard budget is exceeded by no token, whatever it is; the given one, if not hard, not on average."""
    for family in FAMILIES:
        limit = subject.adaptive(family).budget
        for hard in dict.fromkeys((limit, 0.7, 0.9)):
            if hard is None:
                continue
            try:
                worst = _spent(subject, family, True, hard).max().item()
            except BudgetError:
                continue  # a given set of layers that costs more says so
            expect(
                worst <= hard + SLACK, f"no token above the hard budget {hard} ({family})", f"{worst:.4f}", budget.look
            )
        if limit is not None:
            mean = _spent(subject, family, False, limit).mean().item()
            expect(mean <= limit + 0.03, f"at most {limit} on average ({family})", f"{mean:.4f}", budget.look)


def _spent(subject: PolicySubject, family: str, hard: bool, limit: float) -> Tensor:
    """Return what each token of a batch spent under a budget, [B, T]."""
    return spent_by_token(subject.adaptive(family, hard, limit), subject.subject(family).tokens(4, 60))


@check("cost", look="decide: it may run no part of the model")
def cost(subject: PolicySubject) -> None:
    """Reported FLOPs equal a counter on the executed operations."""
    for family in FAMILIES:
        model, ids = subject.adaptive(family), subject.subject(family).tokens(2, 9)
        for what, run in (
            ("a sequence", lambda model=model, ids=ids: model(ids)),
            ("a generation", lambda model=model, ids=ids: model.decode(ids, max_new_tokens=6)),
        ):
            expect_counted(model, run, f"{what} ({family})", cost.look)


@check("repeatable", look="bind: it returns a copy for one model; random choices come from positions and token ids")
def repeatable(subject: PolicySubject) -> None:
    """The same tokens get the same again, whatever other model the policy is bound to in between."""
    made = subject.made
    before = made.controller.options(), made.cache_policy.options(), str(made)
    for family in FAMILIES:
        model, ids = subject.adaptive(family), subject.subject(family).tokens(seed=3)
        state = torch.get_rng_state()
        with torch.no_grad():
            first = model(ids).logits
            other = subject.adaptive("llama" if family != "llama" else "gpt2")
            other(subject.subject("llama").tokens(3, 5))
            for _ in range(2):
                expect_same(model(ids).logits, first, f"the same logits again ({family})", repeatable.look)
        expect(torch.equal(torch.get_rng_state(), state), "torch's random state as it was", "another", repeatable.look)
    after = made.controller.options(), made.cache_policy.options(), str(made)
    expect(after == before, f"the policy still to be '{before[-1]}'", after[-1], repeatable.look)


@check("combines", look="decide and retain: neither kind may count on the other's absence")
def combines(subject: PolicySubject) -> None:
    """Together with a policy of the other kind, parallel still equals stepwise."""
    made = subject.made
    if subject.decides and not made.cache_policy.keeps_all:
        return  # it is such a pair itself
    if made.cache_policy.keeps_all:
        pair = replace(made, cache_policy=parse_policy(_TOKENS, subject.plugins).cache_policy)
    else:
        pair = replace(made, controller=parse_policy(_LAYERS, subject.plugins).controller)
    for family in FAMILIES:
        model = subject.subject(family).adaptive(pair, subject.budget)
        ids = subject.subject(family).tokens()
        with torch.no_grad():
            whole, steps = model(ids).logits, stepwise(model, ids)
        expect_same(whole, steps, f"logits under '{pair}' ({family})", combines.look, CLOSE)


@check("generation", look="decide: its phases, and retain: the newest token")
def generation(subject: PolicySubject) -> None:
    """Transformers' generate and the lean loop give the same ids, and one token at a time is enough to go on."""
    for family in FAMILIES:
        model = subject.adaptive(family)
        ids, mask = subject.subject(family).ragged((5, 8), "left")
        lean = model.decode(ids, mask, max_new_tokens=8, pad_token_id=0).sequences
        theirs = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        expect_same(theirs, lean, f"generated ids ({family})", generation.look)
        beams = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=0)
        expect(beams.shape[0] == 2, f"two rows from a beam search ({family})", list(beams.shape), generation.look)


@check("memory", look="retain: it returns False for what is to be dropped")
def memory(subject: PolicySubject) -> None:
    """Allocated bytes follow the slots that are kept, the newest token's among them."""
    made = subject.made
    for family in FAMILIES:
        model, length = subject.adaptive(family), 80
        with torch.no_grad():
            cache = model(subject.subject(family).tokens(2, length))[CACHE]
        kept = cache.kept()
        expect(
            int(kept.min()) >= 1, f"at least the newest token in every layer ({family})", int(kept.min()), memory.look
        )
        newest = cache.next_positions().flatten().tolist()
        expect(newest == [length] * 2, f"position {length} to come next ({family})", newest, memory.look)
        per_slot = cache.nbytes() / sum(layer.keys.shape[2] for layer in cache.layers)
        # What is held fills at least nine tenths of what was not grown by doubling; a little slack is for growing into.
        allowed = sum(max(int(k) / 0.9 + 32, 2 * int(k)) for k in kept.amax(1)) * per_slot
        if not made.cache_policy.keeps_all:
            expect(cache.nbytes() <= allowed, f"at most {allowed:.0f} bytes ({family})", cache.nbytes(), memory.look)


@check("save and load", look="the dataclass fields of the policy: all that matters is in its options")
def save_and_load(subject: PolicySubject) -> None:
    """A saved and loaded policy gives the same logits."""
    model, ids = subject.adaptive("llama"), subject.subject("llama").tokens()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        wanted = model(ids).logits
        model.policy.save(folder)
        loaded = AdaptiveModel(subject.subject("llama").model(), model.adapter)
        loaded.set_policy(parse_policy(folder, subject.plugins))
        expect_same(loaded(ids).logits, wanted, "logits under the loaded policy", save_and_load.look)


@check("half precision", look="decide and retain: thresholds in the dtype they are compared in")
def half_precision(subject: PolicySubject) -> None:
    """In bf16 logits are finite and of that type."""
    for family in FAMILIES:
        at = subject.subject(family)
        model = subject.adaptive(family, model=at.model(torch.bfloat16))
        with torch.no_grad():
            logits = model(at.tokens()).logits
        expect(logits.dtype == torch.bfloat16, "bf16 logits", logits.dtype, half_precision.look)
        expect(bool(logits.isfinite().all()), f"finite logits ({family})", "NaN or infinity", half_precision.look)


POLICY_CHECKS: tuple[Check[PolicySubject], ...] = (
    spelling,
    answers,
    parallel,
    rows,
    conversations,
    budget,
    cost,
    repeatable,
    combines,
    generation,
    memory,
    save_and_load,
    half_precision,
)

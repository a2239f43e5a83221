"""Checks that costs are those of what is executed: budgets and reported FLOPs against a counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from anee_core.accounting.budget import SLACK
from anee_core.accounting.trace import Trace
from anee_core.adapter.layout import Parts
from anee_core.conformance.check import check, expect
from anee_core.conformance.subject import Subject
from anee_core.model.adaptive_model import AdaptiveModel


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the fused attention kernel of CPUs as torch counts those of GPUs."""
    return sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]


def _grouped_flops(states: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Count the product of states [N, in], each with the expert it is sorted to, of [experts, in, out]."""
    return 2 * states[0] * weight[1] * weight[2]


def counted(run: Callable[[], Any], parts: Parts | None = None) -> int:
    """Return the FLOPs of the matrix products that ``run`` executes with a model, as torch's own counter sees them.

    Those of the model's rotary module are left out: older versions of transformers compute its angles as a product.
    """
    rotary = None if parts is None else parts.rotary
    # The counter stumbles over modules that are passed views of weights which want gradients, as DBRX's experts are.
    trained = [] if parts is None else [weight for weight in parts.model.parameters() if weight.requires_grad]
    # What the counter does not know by itself: attention on CPUs, and the ways in which experts are run.
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._grouped_mm: _grouped_flops,
    }
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if fallback is not None:
        mapping[fallback] = _grouped_flops
    aside = 0

    def enter(*_: Any) -> None:
        nonlocal aside
        aside -= counter.get_total_flops()

    def leave(*_: Any) -> None:
        nonlocal aside
        aside += counter.get_total_flops()

    handles = [] if rotary is None else [rotary.register_forward_pre_hook(enter), rotary.register_forward_hook(leave)]
    try:
        for weight in trained:
            weight.requires_grad = False
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            run()
    finally:
        for weight in trained:
            weight.requires_grad = True
        for handle in handles:
            handle.remove()
    return int(counter.get_total_flops()) - aside


def expect_counted(model: AdaptiveModel, run: Callable[[], Any], what: str, look: str) -> None:
    """Raise `MismatchError` unless the FLOPs that a model reports for ``run`` are those that a counter sees."""
    executed = counted(run, model.parts)
    reported = cast(Trace, model.last_trace).flops["spent"]
    expect(reported == executed, f"{executed} FLOPs of {what}", reported, look)


def spent_by_token(model: AdaptiveModel, ids: Tensor) -> Tensor:
    """Run unpadded ``ids`` [B, T] and return what each token spent of a dense token's layer FLOPs, [B, T]."""
    with torch.no_grad():
        model(ids)
    run, skip = model.engine.costs.token_shares(torch.arange(ids.shape[1]).expand_as(ids))
    return torch.where(cast(Trace, model.last_trace).ran, run, skip).sum(0)


@check("cost model", look="ModelAdapter.layer_work, kv_work and attention_width")
def cost_model(subject: Subject) -> None:
    """Reported FLOPs equal a counter on the executed operations, dense, skipping and generating."""
    ids = subject.tokens(3, 12)
    for attention in subject.backends:
        model = subject.model(attention=attention)
        for policy in ("dense", "random:p=0.5,protect=0 0+shortcuts", "static:exit=2"):
            adaptive = subject.adaptive(policy, model=model)
            what = f"a sequence under '{policy}' ({attention})"
            expect_counted(adaptive, lambda adaptive=adaptive: adaptive(ids), what, cost_model.look)  # type: ignore[misc]
    _check_bytes(subject)
    adaptive = subject.adaptive("random:p=0.5,protect=0 0")
    expect_counted(adaptive, lambda: adaptive.decode(ids, max_new_tokens=5), "a generation", cost_model.look)
    dense = subject.adaptive("static:skip=1")
    with_counter = counted(lambda: subject.model()(ids), dense.parts)
    dense(ids)
    reported = cast(Trace, dense.last_trace).flops["dense"]
    expect(reported == with_counter, f"{with_counter} FLOPs of the dense model", reported, cost_model.look)


def _check_bytes(subject: Subject) -> None:
    """Raise unless a run layer is charged the bytes that it holds, and a skipped one no more than that."""
    adaptive = subject.adaptive()
    for i, layer in enumerate(adaptive.parts.layers):
        work = adaptive.engine.costs.run[i]
        held = sum(p.numel() * p.element_size() for p in layer.parameters())
        beside = sum(b.numel() * b.element_size() for b in layer.buffers())
        charged = work.weight_bytes + work.table_bytes
        expect(held <= charged <= held + beside, f"{held} bytes of weights in layer {i}", charged, cost_model.look)
        projected = adaptive.engine.costs.propagate[i].read(1)
        expect(0 < projected < charged, f"fewer bytes for keys and values in layer {i}", projected, cost_model.look)


@check("budget", look="ModelAdapter.layer_work and kv_work: a skipped layer costs what its keys and values cost")
def budget(subject: Subject) -> None:
    """No token spends more than a hard budget, by a counter on the executed operations."""
    # 32 rows of one token: the layers' own FLOPs, with next to no attention in them.
    ids = subject.tokens(32, 1)
    dense = subject.adaptive()
    everything, shares = counted(lambda: dense(ids), dense.parts), dense.engine.costs
    outside = ids.numel() * (shares.head.flops + shares.embedding.flops)
    for limit in (0.5, 0.75, 0.95):
        adaptive = subject.adaptive("random:p=0,protect=0 0", limit, hard=True)
        executed = counted(lambda adaptive=adaptive: adaptive(ids), adaptive.parts)  # type: ignore[misc]
        spent = (executed - outside) / (everything - outside)
        expect(spent <= limit + SLACK, f"at most {limit} of the dense layers' FLOPs", f"{spent:.4f}", budget.look)
        dearest = max(shares.run_shares)
        expect(spent > limit - dearest - 0.02, f"as many layers as {limit} pays for", f"{spent:.4f}", budget.look)
    adaptive = subject.adaptive("random:p=0.1,protect=0 0", 0.7, hard=True)
    dearest_token = spent_by_token(adaptive, subject.tokens(2, 20)).max().item()
    expect(dearest_token <= 0.7 + SLACK, "no token of a sequence above 0.7", f"{dearest_token:.4f}", budget.look)

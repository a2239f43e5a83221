"""Looking into a layer's attention while it runs, whatever the family, without changing how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from anee_core.errors import ModelError

Answer = Callable[[Callable[[], Tensor]], "Tensor | None"]
"""A function that is given another, which returns attention logits [R, H, C, S] in fp32; it returns the additive mask
to use, [R, 1, C, S], or None for the layer's own.
"""


class AttentionTap(TorchFunctionMode):
    """While entered, hand the logits of one layer's attention to ``answer`` and apply the mask that it returns.

    Fused attention stays fused: its queries and keys are multiplied once more, on the side, if the logits are wanted;
    ``flops`` says what that took. Where a family computes its attention by hand, the logits are what goes into its
    softmax, the layer's own mask added.
    """

    def __init__(self, rows: int, tokens: int, slots: int, answer: Answer) -> None:
        super().__init__()
        self.flops = 0
        self._rows, self._tokens, self._slots, self._answer = rows, tokens, slots, answer
        self._answered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let every call pass, but for the first that is the attention."""
        kwargs = kwargs or {}
        if not self._answered:
            if func is functional.scaled_dot_product_attention:
                self._answered = True
                return self._fused(*args, **kwargs)
            if func is functional.softmax or func is Tensor.softmax or func is torch.softmax:
                scores = args[0]
                if scores.dim() > 2 and scores.shape[-2:] == (self._tokens, self._slots):
                    self._answered = True
                    # Some families fold heads into rows.
                    by_head = scores.reshape(self._rows, -1, *scores.shape[-2:])
                    mask = self._answer(by_head.float)
                    if mask is not None:
                        scores = (by_head + mask.to(scores.dtype)).reshape(scores.shape)
                    return func(scores, *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Stand in for `scaled_dot_product_attention`; it takes many parameters because that does."""

        def logits() -> Tensor:
            groups = query.shape[1] // key.shape[1]
            keys = key if groups == 1 else key.repeat_interleave(groups, dim=1)
            self.flops = 2 * query.numel() * key.shape[2]
            product = query.float() @ keys.float().transpose(-1, -2)
            # The query heads of a single token may come folded into the length: one place per head that shares a key.
            product = product.reshape(product.shape[0], -1, self._tokens, self._slots)
            return product * (query.shape[-1] ** -0.5 if scale is None else scale)

        mask = self._answer(logits)
        if mask is not None:
            attn_mask, is_causal = mask.to(query.dtype), False
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def __exit__(self, *error: Any) -> None:
        """Leave, and see that there was an attention at all."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if not self._answered and error[0] is None:
            raise ModelError(
                "a layer's attention calls neither scaled_dot_product_attention nor softmax over its slots: "
                "a token policy that needs attention weights cannot see them in this family"
            )

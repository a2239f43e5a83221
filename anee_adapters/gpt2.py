"""GPT-2: learned positions, one fused projection for queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anee_core.accounting import Work, module_work
from anee_core.interfaces import LayerCall, Layout, ModelAdapter, Parts


class GPT2Adapter(ModelAdapter):
    """GPT-2 of any size."""

    layout: ClassVar[Layout] = Layout(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        learned_positions="transformer.wpe",
        attention="attn",
        mlp="mlp",
        input_norm="ln_1",
    )

    def refuse(self, config: Any) -> str | None:
        """Refuse encoder-decoder use."""
        if config.add_cross_attention:
            return "add_cross_attention=True needs an encoder's states; ANEE runs decoder-only models"
        return None

    def project_kv(self, layer: Any, hidden_states: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return keys and values from the last two thirds of the fused weights: the default would compute the queries
        as well, which is half as much again.
        """
        fused = layer.attn.c_attn
        if not _plain(fused):
            return self.capture_kv(layer, hidden_states, call)
        width = fused.nf // 3
        normed = layer.ln_1(hidden_states)
        flat = torch.addmm(fused.bias[width:], normed.view(-1, normed.shape[-1]), fused.weight[:, width:])
        keys, values = flat.view(*normed.shape[:-1], 2, -1, layer.attn.head_dim).unbind(-3)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def kv_work(self, parts: Parts, layer_idx: int) -> Work:
        """Return two thirds of the fused projection, and the norm."""
        layer: Any = parts.layers[layer_idx]
        if not _plain(layer.attn.c_attn):
            return super().kv_work(parts, layer_idx)
        fused = module_work(layer.attn.c_attn)
        return module_work(layer.ln_1) + Work(fused.flops * 2 // 3, fused.weight_bytes * 2 // 3)


def _plain(fused: nn.Module) -> bool:
    """Whether the weights may be sliced: if quantised, wrapped or hooked, only calling the module is right."""
    return (
        type(fused).__name__ == "Conv1D"
        and type(fused.weight) is nn.Parameter
        and fused.weight.is_floating_point()
        and not fused._forward_hooks
        and not fused._forward_pre_hooks
        and "forward" not in vars(fused)
    )

"""Whether somebody watches or changes what happens inside a model, which a faster way of computing would pass by."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

_CAPTURING = "transformers.utils.output_capturing"


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says.

    What transformers hangs on modules to return hidden states, and leaves there, does nothing unless transformers calls
    the model.
    """
    hooks = [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", None) != _CAPTURING]
    return bool(hooks or module._forward_pre_hooks or "forward" in vars(module))


def undisturbed(device: torch.device) -> bool:
    """Whether nobody wants to see what happens inside a layer: no gradients, no counters, no autocast, no tracing."""
    return (
        not torch.is_grad_enabled()
        and _get_current_dispatch_mode() is None
        and not torch.is_autocast_enabled(device.type)
        and not torch.compiler.is_compiling()
    )

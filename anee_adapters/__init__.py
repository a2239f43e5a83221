"""One model family per file. Each states what ANEE has to know about it."""

from anee_adapters.gpt2 import GPT2Adapter
from anee_adapters.llama import LlamaAdapter
from anee_core.hookspecs import hookimpl
from anee_core.interfaces import ModelAdapter

__all__ = ["GPT2Adapter", "LlamaAdapter", "anee_adapters"]


@hookimpl
def anee_adapters() -> dict[str, ModelAdapter]:
    """Return the built-in adapters by model type."""
    llama = LlamaAdapter()
    return {"gpt2": GPT2Adapter(), "llama": llama, "qwen2": llama}

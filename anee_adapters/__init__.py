"""The built-in model families. Each adapter states what ANEE has to know about one."""

from anee_adapters.falcon import FalconAdapter
from anee_adapters.gemma import Gemma2Adapter, Gemma3Adapter, GemmaAdapter
from anee_adapters.gpt2 import GPT2Adapter
from anee_adapters.gpt_neox import GPTNeoXAdapter
from anee_adapters.gptj import GPTJAdapter
from anee_adapters.llama import LlamaAdapter
from anee_adapters.mistral import MistralAdapter, MixtralAdapter
from anee_adapters.opt import OPTAdapter
from anee_adapters.phi3 import Phi3Adapter
from anee_adapters.qwen import Qwen2Adapter, Qwen3Adapter, Qwen3MoeAdapter
from anee_core.hookspecs import hookimpl
from anee_core.interfaces import ModelAdapter

__all__ = [
    "FalconAdapter",
    "GPT2Adapter",
    "GPTJAdapter",
    "GPTNeoXAdapter",
    "Gemma2Adapter",
    "Gemma3Adapter",
    "GemmaAdapter",
    "LlamaAdapter",
    "MistralAdapter",
    "MixtralAdapter",
    "OPTAdapter",
    "Phi3Adapter",
    "Qwen2Adapter",
    "Qwen3Adapter",
    "Qwen3MoeAdapter",
    "anee_adapters",
]


@hookimpl
def anee_adapters() -> dict[str, ModelAdapter]:
    """Return the built-in adapters by model type."""
    return {
        "falcon": FalconAdapter(),
        "gemma": GemmaAdapter(),
        "gemma2": Gemma2Adapter(),
        "gemma3_text": Gemma3Adapter(),
        "gpt2": GPT2Adapter(),
        "gpt_neox": GPTNeoXAdapter(),
        "gptj": GPTJAdapter(),
        "llama": LlamaAdapter(),
        "mistral": MistralAdapter(),
        "mixtral": MixtralAdapter(),
        "opt": OPTAdapter(),
        "phi3": Phi3Adapter(),
        "qwen2": Qwen2Adapter(),
        "qwen3": Qwen3Adapter(),
        "qwen3_moe": Qwen3MoeAdapter(),
    }

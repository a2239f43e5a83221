"""The built-in model families. Each adapter states what ANEE has to know about one."""

from anee_adapters.dbrx import DbrxAdapter
from anee_adapters.deepseek import DeepseekV3Adapter
from anee_adapters.falcon import FalconAdapter
from anee_adapters.gemma import Gemma2Adapter, Gemma3Adapter, GemmaAdapter
from anee_adapters.gpt2 import GPT2Adapter
from anee_adapters.gpt_bigcode import GPTBigCodeAdapter
from anee_adapters.gpt_neox import GPTNeoXAdapter
from anee_adapters.gptj import CodeGenAdapter, GPTJAdapter
from anee_adapters.granite_hybrid import GraniteHybridAdapter
from anee_adapters.layer_norms import PhiAdapter, StableLmAdapter, Starcoder2Adapter
from anee_adapters.llama import LlamaAdapter
from anee_adapters.llama_kin import llama_kin
from anee_adapters.mistral import MistralAdapter, MixtralAdapter
from anee_adapters.mixtures import mixtures
from anee_adapters.neighbours import NeighboursAdapter
from anee_adapters.opt import OPTAdapter
from anee_adapters.phi3 import Phi3Adapter
from anee_adapters.position_tables import BioGptAdapter, XGLMAdapter
from anee_adapters.qwen import Qwen2Adapter, Qwen3Adapter, Qwen3MoeAdapter
from anee_adapters.table import TableAdapter
from anee_core.hookspecs import hookimpl
from anee_core.interfaces import ModelAdapter

__all__ = [
    "BioGptAdapter",
    "CodeGenAdapter",
    "DbrxAdapter",
    "DeepseekV3Adapter",
    "FalconAdapter",
    "GPT2Adapter",
    "GPTBigCodeAdapter",
    "GPTJAdapter",
    "GPTNeoXAdapter",
    "Gemma2Adapter",
    "Gemma3Adapter",
    "GemmaAdapter",
    "GraniteHybridAdapter",
    "LlamaAdapter",
    "MistralAdapter",
    "MixtralAdapter",
    "NeighboursAdapter",
    "OPTAdapter",
    "Phi3Adapter",
    "PhiAdapter",
    "Qwen2Adapter",
    "Qwen3Adapter",
    "Qwen3MoeAdapter",
    "StableLmAdapter",
    "Starcoder2Adapter",
    "TableAdapter",
    "XGLMAdapter",
    "anee_adapters",
]


@hookimpl
def anee_adapters() -> dict[str, ModelAdapter]:
    """Return the built-in adapters by model type."""
    return {
        "biogpt": BioGptAdapter(),
        "codegen": CodeGenAdapter(),
        "dbrx": DbrxAdapter(),
        "deepseek_v3": DeepseekV3Adapter(),
        "falcon": FalconAdapter(),
        "gemma": GemmaAdapter(),
        "gemma2": Gemma2Adapter(),
        "gemma3_text": Gemma3Adapter(),
        "gpt2": GPT2Adapter(),
        "gpt_bigcode": GPTBigCodeAdapter(),
        "gpt_neox": GPTNeoXAdapter(),
        "gptj": GPTJAdapter(),
        "granitemoehybrid": GraniteHybridAdapter(),
        "llama": LlamaAdapter(),
        "mistral": MistralAdapter(),
        "mixtral": MixtralAdapter(),
        "opt": OPTAdapter(),
        "phi": PhiAdapter(),
        "phi3": Phi3Adapter(),
        "qwen2": Qwen2Adapter(),
        "qwen3": Qwen3Adapter(),
        "qwen3_moe": Qwen3MoeAdapter(),
        "stablelm": StableLmAdapter(),
        "starcoder2": Starcoder2Adapter(),
        "xglm": XGLMAdapter(),
        **llama_kin(),
        **mixtures(),
    }

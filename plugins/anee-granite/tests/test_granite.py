"""The adapter keeps ANEE's promises, with Granite's multipliers and without."""

from anee_granite import GraniteAdapter
from transformers import GraniteConfig

from anee_core.conformance import AdapterConformance

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}


class TestGranite(AdapterConformance):
    adapter = GraniteAdapter()
    configs = {"plain": GraniteConfig(**SMALL), "scaled": GraniteConfig(**SMALL, **MULTIPLIERS)}

"""The adapter keeps ANEE's promises, with nanochat's cap on its logits and without."""

from anee_nanochat import NanoChatAdapter
from transformers import NanoChatConfig

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


class TestNanoChat(AdapterConformance):
    adapter = NanoChatAdapter()
    configs = {
        "plain": NanoChatConfig(**SMALL, final_logit_softcapping=None),
        "capped": NanoChatConfig(**SMALL, final_logit_softcapping=2.0, attention_bias=True),
    }

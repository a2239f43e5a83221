"""A process that has loaded no model before: one for all that is true of it, for importing torch takes seconds."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
folder = sys.argv[1]
import json
import transformers.cache_utils as cache_utils
import transformers.masking_utils as masking_utils
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.gpt2 import modeling_gpt2

def snapshot():
    owners = (
        cache_utils, masking_utils, modeling_llama, modeling_gpt2, GenerationMixin, PreTrainedModel, LlamaForCausalLM,
        modeling_llama.LlamaModel, modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaAttention,
        cache_utils.DynamicCache, cache_utils.DynamicLayer, cache_utils.Cache,
    )
    return {
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "masks": sorted(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        "cache layers": sorted((k, v.__name__) for k, v in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.items()),
        "static cache layers": sorted((k, v.__name__) for k, v in cache_utils.STATIC_LAYER_TYPE_MAPPING.items()),
        "models": len(AutoModelForCausalLM._model_mapping._extra_content),
        **{owner.__name__: {k: id(v) for k, v in vars(owner).items()} for owner in owners},
    }

# transformers notes some things on its classes at first use; that is not counted.
transformed = AutoModelForCausalLM.from_pretrained(folder)
transformed.generate(**transformed.dummy_inputs, max_new_tokens=2, num_beams=2, do_sample=False)

before = snapshot()
import anee
model = anee.load(folder, "random:p=0.5,protect=1 1+window:recent=4")
model.generate("Hello you", max_new_tokens=4)
model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=4, num_beams=2, do_sample=False)
after = snapshot()
changed = [f"{k}: {n}" for k in before if isinstance(before[k], dict)
           for n in before[k].keys() | after[k].keys() if before[k].get(n) != after[k].get(n)]
changed += [k for k in before if not isinstance(before[k], dict) and before[k] != after[k]]
print(json.dumps(changed))

from anee.cli import main
sys.argv = ["anee", "generate", "no-such-model", "Hello"]
print("plain", file=sys.stderr)
try:
    main()
except SystemExit as stop:
    print("code", stop.code, file=sys.stderr)
sys.argv.insert(1, "--debug")
main()
"""


@pytest.fixture(scope="module")
def done(llama_folder, make_cache):
    """How the script ended."""
    command = [sys.executable, "-c", SCRIPT, str(llama_folder)]
    environment = {**os.environ, "ANEE_CACHE": str(make_cache())}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def test_nothing_of_transformers_is_changed(done):
    assert done.stdout, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_process_prints_one_error_line_and_with_debug_the_traceback(done):
    _, found, errors = done.stderr.partition("plain\n")
    assert found, done.stderr
    plain, code, debug = errors.partition("code 2\n")
    assert code, done.stderr
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in plain
    assert plain.splitlines()[-1].startswith("error: cannot find the model 'no-such-model'")
    assert plain.count("error:") == 1
    assert "Traceback (most recent call last)" in debug
    assert "anee_core.errors.ModelError: cannot find the model 'no-such-model'" in debug

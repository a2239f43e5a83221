"""What people do with transformers models, they can do with ours."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

import anee
from anee_core.errors import ModelError

POLICY = "random:p=0.4,protect=1 1"
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}assistant: "


@pytest.fixture
def model(llama_folder):
    return anee.load(llama_folder, POLICY)


def test_pipeline(model):
    made = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    (found,) = made("the cat", max_new_tokens=6, do_sample=False)
    assert found["generated_text"] == model.generate("the cat", max_new_tokens=6).text
    assert not model.last_trace.ran.all()
    batch = pipeline("text-generation", model=model, tokenizer=model.tokenizer, batch_size=2)
    texts = [row[0]["generated_text"] for row in batch(["the cat", "a dog ran"], max_new_tokens=6, do_sample=False)]
    assert texts == [model.generate(text, max_new_tokens=6).text for text in ("the cat", "a dog ran")]


def test_chat_template(model):
    model.tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "who saw a dog?"}]
    made = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    answer = made(messages, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    read = model.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    row = model.generate(**read, max_new_tokens=5, do_sample=False)[0]
    assert model.tokenizer.decode(row[read["input_ids"].shape[1] :]) == answer["content"]


def test_iterating_over_the_text_as_it_comes(model):
    inputs = model.tokenizer("the cat", return_tensors="pt")
    streamer = TextIteratorStreamer(model.tokenizer)
    options = {"streamer": streamer, "max_new_tokens": 6, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == model.generate("the cat", max_new_tokens=6).text


@pytest.mark.parametrize("when", ["before", "after", "around"])
def test_lora_before_after_and_around(llama_folder, when):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    network = AutoModelForCausalLM.from_pretrained(llama_folder)
    ids = torch.randint(3, 97, (2, 12))
    with torch.no_grad():
        plain = network(ids).logits
    if when == "before":
        wrapped = get_peft_model(network, lora)
        called = anee.load(wrapped, POLICY)
    elif when == "after":
        called = anee.load(network, POLICY)
        get_peft_model(called.model, lora)  # changes the layers in place
    else:
        called = get_peft_model(anee.load(network, POLICY), lora)
    called.eval()
    reference = anee.load(network)
    with torch.no_grad():
        logits = called(input_ids=ids).logits
        assert not torch.allclose(reference(ids).logits, plain, atol=1e-3)  # the updates count
        under = anee.load(network, POLICY)
        torch.testing.assert_close(logits, under(ids).logits)
        rows = called.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert torch.equal(
            rows, under.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        )


def test_a_model_placed_by_accelerate_runs(llama_folder, model):
    placed = anee.load(llama_folder, POLICY, device_map="auto")
    ids = torch.randint(3, 97, (1, 12))
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, model(ids).logits)


def test_weights_on_disk_are_refused(llama_folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    with pytest.raises(ModelError, match="not in memory"):
        anee.load(llama_folder, POLICY, device_map={**places, **layers}, offload_folder=str(tmp_path))

"""transformers' Trainer trains, evaluates, saves and resumes a model as it does a plain one."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import FIVE, SEVEN, adaptive, build, tokens
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

import anee
from anee_core.errors import ModelError

IDS = tokens(8, 10, seed=2)


def trainer_of(model, folder, collator=None, **options):
    """Return a trainer for four steps."""
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])
    arguments = TrainingArguments(**{
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 0, **options,
    })  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collator)


def trained(model, folder, collator=None, **options):
    """Train for a few steps and evaluate; return the losses."""
    trainer = trainer_of(model, folder, collator, gradient_accumulation_steps=2, **options)
    loss = trainer.train().training_loss
    return loss, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(("packed", "smoothing"), [(False, 0.0), (True, 0.0), (False, 0.2)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_model_trains_as_a_plain_one(family, packed, smoothing, tmp_path):
    network = build(family)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn for other shapes where documents are padded
    plain = copy.deepcopy(network)
    # Rows of several documents: they come with positions and without a mask.
    collator = DataCollatorWithFlattening() if packed else None
    ours = trained(adaptive(network, fast=False), tmp_path / "ours", collator, label_smoothing_factor=smoothing)
    inner = trained(plain, tmp_path / "plain", collator, label_smoothing_factor=smoothing)
    assert ours[0] == pytest.approx(inner[0], rel=1e-4)
    assert ours[1] == pytest.approx(inner[1], rel=1e-3)
    for mine, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert (mine - other).abs().mean() < 1e-3


@pytest.mark.parametrize("policy", FIVE[1:])
def test_a_model_under_a_policy_trains(policy, tmp_path):
    network = build("llama")
    before = copy.deepcopy(network.state_dict())
    loss, evaluated = trained(adaptive(network, policy), tmp_path)
    assert 0 < evaluated < loss
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > 10
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


@pytest.mark.parametrize("family", SEVEN)
def test_what_is_saved_is_read_by_transformers_and_a_resumed_run_ends_where_another_does(family, tmp_path):
    policy, often = "static:skip=1 3", {"save_strategy": "steps", "save_steps": 2}
    whole = adaptive(build(family), policy)
    trainer = trainer_of(whole, tmp_path / "whole", **often)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = whole.eval()(IDS).logits
    for folder in ("saved", "whole/checkpoint-4"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(plain(IDS).logits, whole.model(IDS).logits)
        assert torch.equal(anee.load(tmp_path / folder, policy)(IDS).logits, expected)
    resumed = adaptive(build(family), policy)
    again = trainer_of(resumed, tmp_path / "again", **often)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    weights = resumed.state_dict()
    assert weights.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in whole.state_dict().items())


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-multi-query"])
def test_an_adapter_is_saved_and_resumed_inside_a_model_and_around_it(family, around, tmp_path):
    build(family).save_pretrained(tmp_path / "base")

    def make():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
        if around:
            return get_peft_model(adaptive(plain, "static:skip=1 3"), lora)
        return adaptive(get_peft_model(plain, lora), "static:skip=1 3")

    model = make()
    trainer = trainer_of(model, tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    expected = model.eval()(IDS).logits
    if around and family != "llama":  # whose weights transformers finds with another "model." in front of them too
        with pytest.raises(ModelError, match=r"load it so again: PeftModel.from_pretrained\(anee.load\("):
            anee.load(tmp_path / "saved", "static:skip=1 3")
    else:
        assert torch.equal(anee.load(tmp_path / "saved", "static:skip=1 3")(IDS).logits, expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if around:
        found = PeftModel.from_pretrained(adaptive(base, "static:skip=1 3"), tmp_path / "saved")
    else:
        found = adaptive(PeftModel.from_pretrained(base, tmp_path / "saved"), "static:skip=1 3")
    assert torch.equal(found.eval()(IDS).logits, expected)
    resumed = make()
    again = trainer_of(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(resumed.eval()(IDS).logits, expected)

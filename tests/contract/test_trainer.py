"""transformers' Trainer trains and evaluates a model as it does a plain one."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny import FIVE, adaptive, build, tokens
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments


def trained(model, folder, collator=None):
    """Train for a few steps and evaluate; return the losses."""
    ids = tokens(8, 10, seed=2)
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collator)
    loss = trainer.train().training_loss
    return loss, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_model_trains_as_a_plain_one(family, packed, tmp_path):
    network = build(family)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn for other shapes where documents are padded
    plain = copy.deepcopy(network)
    # Rows of several documents: they come with positions and without a mask.
    collator = DataCollatorWithFlattening() if packed else None
    ours = trained(adaptive(network, fast=False), tmp_path / "ours", collator)
    inner = trained(plain, tmp_path / "plain", collator)
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

"""Train the mini model: a byte-level BPE, then a GPT-2 of 12 layers, 256 wide, on plain text files.

    python benchmarks/train_mini.py --text books/train-*.txt --valid books/valid.txt --folder run

An interrupted run goes on from its last checkpoint, and a finished one can be given more ``--steps``. The README of
``plugins/anee-mini`` has the commands that made the model in that package. What it writes
into ``--folder``/weights is a model folder that `anee.load` takes.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from anee_core.training.data import Batches, token_blocks
from anee_core.training.loop import accelerator_of, run_training
from anee_core.training.objective import Objective
from anee_core.training.run_options import RunOptions
from anee_core.training.schedules import trapezoid

END = "<|endoftext|>"
NAME = "anee-mini-1"
"""Of the weights, for policies that were trained for them; weights that are trained anew want another."""


class LanguageModelling(Objective):
    """Cross-entropy of the next token, with layer dropout (LayerDrop; Fan et al., 2019, arXiv:1909.11556).

    A dropped layer is left out for a whole batch, with a probability that rises linearly with depth; so the model gets
    used to missing layers, and a batch with missing ones takes less time.
    """

    def __init__(self, model: Any, held_out: Tensor, layer_dropout: float) -> None:
        super().__init__()
        self.model = model
        layers = len(model.transformer.h)
        self._dropout = layer_dropout * torch.arange(layers) / max(layers - 1, 1)
        self._held_out = held_out

    def forward(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of token ids [B, T]."""
        inner = self.model.transformer
        # Short blocks begin anywhere, so that they train all positions.
        spare = len(inner.wpe.weight) - input_ids.shape[1]
        start = int(torch.randint(spare + 1, ())) if self.training else 0
        hidden_states = inner.wte(input_ids) + inner.wpe.weight[start : start + input_ids.shape[1]]
        keep = torch.rand(len(inner.h)) >= self._dropout if self.training else self._dropout >= 0
        for layer, kept in zip(inner.h, keep.tolist(), strict=True):
            if kept:
                hidden_states = layer(hidden_states)
        logits = self.model.lm_head(inner.ln_f(hidden_states))[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten()), {}

    def validate(self) -> dict[str, float]:
        """Return the loss in nats per token, and the perplexity, of the held-out blocks."""
        losses = [float(self(block)[0]) for block in self._held_out.split(4)]
        mean = sum(losses) / len(losses)
        return {"loss": mean, "perplexity": math.exp(mean)}


def simplest_books(files: list[str], share: float, folder: Path) -> str:
    """Return the file with the books of the commonest words, a ``share`` of all characters, made if it is not there
    yet: a run that goes on finds the file as it was, and so the tokens that were made of it.

    Books are separated by a line ``END``. A small model's sentences become readable sooner on them.
    """
    path = folder / f"simplest-{share:g}.txt"
    if path.exists():
        return str(path)
    books = [book for file in files for book in Path(file).read_text(encoding="utf-8").split(END)]
    words = [re.findall(r"[a-z']+", book.lower()) for book in books]
    counts = Counter(word for book in words for word in book)
    common = {word for word, _ in counts.most_common(2000)}
    commonness = [sum(word in common for word in book) / max(len(book), 1) for book in words]
    left = share * sum(map(len, books))
    chosen = []
    for place in sorted(range(len(books)), key=lambda place: -commonness[place]):
        if left > 0:
            chosen.append(books[place].strip())
            left -= len(books[place])
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f"\n{END}\n".join(chosen), encoding="utf-8")
    return str(unfinished.replace(path))


def make_tokenizer(files: list[str], folder: Path, size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a folder, learned from the files if it is not there yet."""
    if not (folder / "tokenizer.json").exists():
        learner = ByteLevelBPETokenizer()
        learner.train(files, vocab_size=size, special_tokens=[END])
        made = PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, bos_token=END, eos_token=END, pad_token=END)
        made.model_max_length = 1024
        made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_model(vocabulary: int, layers: int = 12) -> GPT2LMHeadModel:
    """Return the untrained model."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=1024, n_embd=256, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        anee_backbone=NAME,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def begin_with(model: GPT2LMHeadModel, folder: Path) -> None:
    """Copy the weights of a trained model, whose layers are repeated up to the depth of this one.

    Most of the time is saved by training few layers first (depthwise stacking; Du et al., 2024, arXiv:2405.15319).
    """
    trained = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    shallow = trained.transformer.h
    for i, layer in enumerate(model.transformer.h):
        layer.load_state_dict(shallow[i % len(shallow)].state_dict())
    trained.transformer.h = model.transformer.h
    model.load_state_dict(trained.state_dict())


def make_optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al., 2024) for the layers' matrices and AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if ".h." in name and p.dim() == 2]
    rest = [p for name, p in named.items() if not (".h." in name and p.dim() == 2)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="training text")
    parser.add_argument("--valid", required=True, help="held-out text")
    parser.add_argument("--folder", type=Path, required=True, help="for tokens, checkpoints, logs and the result")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--decay", type=int, default=600, help="steps over which the learning rate falls at the end")
    parser.add_argument("--simplest", type=float, default=1.0, help="share of the text: books of the commonest words")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence; short ones take less time")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--rate", type=float, default=8e-4, help="largest learning rate")
    parser.add_argument("--layer-dropout", type=float, default=0.2, help="of the last layer; the first has none")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--start", type=Path, help="model folder to begin with; fewer layers than --layers are repeated"
    )
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="bf16: faster on CPUs that have it")
    parser.add_argument("--vocabulary", type=int, default=4096)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    options = RunOptions(
        chosen.folder / "run", chosen.steps, 1, 1.0, chosen.precision, seed=1, validate_every=50, save_every=25
    )
    accelerator = accelerator_of(options)
    weights = chosen.folder / "weights"
    with accelerator.main_process_first():
        if chosen.start and not (weights / "tokenizer.json").exists():
            PreTrainedTokenizerFast.from_pretrained(chosen.start).save_pretrained(weights)
        tokenizer = make_tokenizer(chosen.text, weights, chosen.vocabulary)
        text = chosen.text
        if chosen.simplest < 1:
            text = [simplest_books(text, chosen.simplest, chosen.folder)]
        blocks = token_blocks(text, tokenizer, chosen.length, chosen.folder / "tokens")
        held_out = token_blocks([chosen.valid], tokenizer, 1024, chosen.folder / "tokens")[:32]["input_ids"]
    model = make_model(len(tokenizer), chosen.layers)
    if chosen.start:
        begin_with(model, chosen.start)
    batches = Batches(blocks, chosen.batch, options.seed, accelerator.process_index, accelerator.num_processes)
    objective = LanguageModelling(model, held_out.to(accelerator.device), chosen.layer_dropout)
    rate = trapezoid(chosen.steps, warmup=50, decay=chosen.decay)
    run_training(objective, make_optimizers(model, chosen.rate), rate, batches, options, accelerator)
    if accelerator.is_main_process:
        model.to(torch.bfloat16).save_pretrained(weights)


if __name__ == "__main__":
    main()

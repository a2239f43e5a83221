"""From text files to batches of token ids, in an order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anee_core.errors import InputError, MissingPackageError
from anee_core.files import writing
from anee_core.model.adaptive_model import AdaptiveModel


def token_blocks(files: Sequence[str | Path], tokenizer: Any, length: int, cache: Path) -> Any:
    """Cut text files into blocks of ``length`` tokens: a `datasets.Dataset` of ``input_ids``, memory-mapped from disk.

    Args:
        files: UTF-8 text.
        tokenizer: a transformers tokenizer.
        length: tokens per block.
        cache: folder that keeps the result, for the next run on the same files.

    Raises:
        InputError: a file does not exist or is no UTF-8 text, or there is less text than one block.
        MissingPackageError: the package datasets is not installed.
        OutputError: the result cannot be kept.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError("training reads text through datasets: pip install 'anee[train]'") from error
    paths = [str(path) for path in files]
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"there is no text file '{path}'")

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # Special tokens that a tokenizer puts around a text belong to no place inside a book.
        ids = tokenizer("\n".join(batch["text"]) + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]}

    with writing(cache):
        try:
            lines = datasets.load_dataset("text", data_files=paths, split="train", cache_dir=str(cache))
        except datasets.exceptions.DatasetGenerationError as error:
            raise InputError(f"cannot read {', '.join(paths)}: {error.__cause__ or error}") from error
        blocks = lines.map(cut, batched=True, batch_size=4000, remove_columns="text", desc="tokens")
    if not len(blocks):
        raise InputError(
            f"{', '.join(paths)}: less text than one block of {length} tokens; give more, or a shorter block"
        )
    return blocks.with_format("torch")


def read_text(
    model: AdaptiveModel, text: Sequence[str | Path], valid: str | Path | None, cache: Path, length: int, held_out: int
) -> tuple[Any, Tensor]:
    """Return the blocks to train on, and token ids [N, T] of at most ``held_out`` blocks to validate on.

    Args:
        model: with a tokenizer.
        text: files to train on.
        valid: file to validate on. None: the first blocks of the training text, which are then left out of training.
        cache: see `token_blocks`.
        length: tokens per block.
        held_out: blocks to validate on.

    Raises:
        InputError: the model has no tokenizer, there is too little text, or blocks are longer than its context.
        MissingPackageError: the package datasets is not installed.
    """
    if model.tokenizer is None:
        raise InputError("training reads text: the model needs a tokenizer")
    limit = model.adapter.position_limit(model.parts)
    if limit is not None and length > limit:
        raise InputError(
            f"blocks of {length} tokens do not fit the model's context of {limit}; choose a shorter length"
        )
    blocks = token_blocks(text, model.tokenizer, length, cache)
    if valid is None:
        count = min(held_out, len(blocks) // 2)
        held_out_blocks, blocks = blocks.select(range(count)), blocks.select(range(count, len(blocks)))
    else:
        held_out_blocks = token_blocks([valid], model.tokenizer, length, cache)
    return blocks, held_out_blocks[:held_out]["input_ids"]


class Batches:
    """Batches [B, T] of blocks, shuffled anew each epoch.

    A step's batch follows from ``seed`` and the step, so that an interrupted run goes on as if nothing had happened.
    """

    def __init__(self, blocks: Any, batch: int, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        if len(blocks) < batch * ranks:
            raise InputError(
                f"{len(blocks)} blocks of text are fewer than one batch of {batch * ranks}; give more text"
            )
        self._blocks, self._size, self._seed, self._rank, self._ranks = blocks, batch, seed, rank, ranks
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, step: int) -> Tensor:
        """Return the batch of a step, [B, T]."""
        per_epoch = len(self._blocks) // (self._size * self._ranks)
        epoch, place = divmod(step, per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._blocks), generator=generator)
        first = (place * self._ranks + self._rank) * self._size
        chosen: Tensor = self._blocks[self._order[first : first + self._size].tolist()]["input_ids"]
        return chosen

"""A training run of adaptively sparse attention: from a model and text files to a folder that a policy loads."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from anee_core.cache_policies.asa import AsaWeights
from anee_core.calibration.fingerprint import fingerprint
from anee_core.errors import InputError, MissingPackageError
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.training.asa import Interactions, SparseAttention
from anee_core.training.data import Batches, read_text
from anee_core.training.loop import accelerator_of, run_training
from anee_core.training.run_options import RunOptions
from anee_core.training.schedules import parse_schedule, trapezoid

logger = logging.getLogger(__name__)

Backbone = Literal["frozen", "lora", "full"]


@dataclass(frozen=True)
class AsaOptions:
    """What is trained, and how.

    Args:
        backbone: what of the model is trained beside the interactions: nothing ("frozen"), low-rank updates of its
            linears ("lora"), or everything ("full").
        gamma: weight of the mean share of context that is kept.
        target: share of the context to drop; gamma then adapts until it is met.
        rank: width of the interaction projections.
        alpha: schedule of the sparse sigmoid's sharpness; see `parse_schedule`. None: from 2 to 8 over four fifths of
            the run.
        beta: bias of the interactions at the start. None: where nothing is dropped at the first alpha.
        start: folder with weights to start from, trained before for the same model.
        distil: whether to learn from the dense model instead of the text; if the whole model is trained, it learns from
            the text as a dense one too, and serves both. None: unless the whole model is trained.
        length: tokens per block.
        batch: blocks per batch.
        rate: learning rate of the interactions.
        backbone_rate: learning rate of the model's own weights.
        warmup: steps until the learning rates are reached.
        lora_rank: of the low-rank updates.
        valid_blocks: blocks to validate on.
    """

    backbone: Backbone = "frozen"
    gamma: float = 0.3
    target: float | None = None
    rank: int = 64
    alpha: str | None = None
    beta: float | None = None
    start: str | None = None
    distil: bool | None = None
    length: int = 512
    batch: int = 4
    rate: float = 1e-3
    backbone_rate: float = 1e-4
    warmup: int = 20
    lora_rank: int = 16
    valid_blocks: int = 8

    def __post_init__(self) -> None:
        if self.backbone not in get_args(Backbone):
            raise InputError(f"backbone is {', '.join(get_args(Backbone))}; got '{self.backbone}'")
        if self.gamma < 0 or (self.target is not None and not 0 < self.target < 1):
            raise InputError(f"gamma is at least 0 and target lies in (0, 1); got {self.gamma:g} and {self.target}")
        if min(self.rank, self.batch, self.lora_rank, self.valid_blocks) < 1 or self.length < 2:
            raise InputError("rank, batch, lora_rank and valid_blocks are at least 1, length at least 2")
        if min(self.rate, self.backbone_rate) <= 0 or self.warmup < 0:
            raise InputError(
                f"rate and backbone_rate are above 0, warmup at least 0; got {self.rate:g}, {self.backbone_rate:g} and "
                f"{self.warmup}"
            )
        if self.alpha is not None:
            parse_schedule(self.alpha)


def train_asa(
    model: AdaptiveModel,
    text: Sequence[str | Path],
    run: RunOptions,
    options: AsaOptions | None = None,
    valid: str | Path | None = None,
) -> list[dict[str, float]]:
    """Train interactions for a model and return the figures of every validation.

    ``run.folder`` gets what ``policy="asa:FOLDER"`` loads, the checkpoints of the run, and, if the model itself was
    trained, that model in ``model``, which belongs to the policy from then on. Low-rank updates are also kept by
    themselves, as PEFT reads them, in ``adapter``.

    Args:
        model: with a tokenizer; trained in place unless frozen.
        text: files to learn from.
        run: how the run goes; a run found in its folder is continued.
        options: what is trained.
        valid: file to validate on. Default: the first blocks of the training text, which are then left out of training.

    Raises:
        InputError: too little text, or options out of range.
        CheckpointError: the folder holds another run.
        MissingPackageError: datasets or PEFT is not installed.
    """
    options = options or AsaOptions()
    accelerator = accelerator_of(run)
    with accelerator.main_process_first():
        cache = run.folder / "tokens"
        blocks, held_out = read_text(model, text, valid, cache, options.length, options.valid_blocks)
    adapted = _open_backbone(model, options)
    objective = _objective(model, options, run.steps, held_out, adapted)
    objective.to(accelerator.device)
    batches = Batches(blocks, options.batch, run.seed, accelerator.process_index, accelerator.num_processes)
    groups = [{"params": list(objective.interactions.parameters()), "lr": options.rate}]
    own = [p for p in objective.model.parameters() if p.requires_grad]
    if own:
        groups.append({"params": own, "lr": options.backbone_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rate = trapezoid(run.steps, options.warmup, decay=max(run.steps // 5, 1))
    history = run_training(objective, [optimizer], rate, batches, run, accelerator, asdict(options))
    if accelerator.is_main_process:
        network = model.parts.model
        if adapted is not None:
            adapted.save_pretrained(run.folder / "adapter")
            network = adapted.merge_and_unload()
        backbone = None if options.backbone == "frozen" else _save_model(model, network, run)
        facts = {"gamma": float(objective.gamma), "steps": run.steps, "valid": history[-1] if history else {}}
        objective.weights(backbone, **facts).save(run.folder)
        logger.info("wrote %s", run.folder)
    return history


def _open_backbone(model: AdaptiveModel, options: AsaOptions) -> Any:
    """Say what of the model is trained, and return the PEFT model around it, if there is to be one."""
    network = model.parts.model
    for parameter in network.parameters():
        parameter.requires_grad_(options.backbone == "full")
    if options.backbone != "lora":
        return None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError("LoRA needs PEFT: pip install 'anee[train]'") from error
    rank = options.lora_rank
    return get_peft_model(network, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _objective(
    model: AdaptiveModel, options: AsaOptions, steps: int, held_out: Tensor, adapted: Any
) -> SparseAttention:
    distil = options.backbone != "full" if options.distil is None else options.distil
    alpha = parse_schedule(options.alpha or f"cosine_2_8_{max(4 * steps // 5, 1)}")
    beta = 1 / max(alpha(0) - 1, 1e-3) if options.beta is None else options.beta
    layers, width = len(model.parts.layers), model.config.hidden_size
    interactions = Interactions(layers, options.rank, width, beta)
    if options.start is not None:
        interactions.start_from(AsaWeights.load(options.start))
    # The paths are the same inside PEFT's wrappers, but the modules are not.
    parts = model.adapter.parts(model.parts.model)
    return SparseAttention(
        adapter=model.adapter,
        parts=parts,
        interactions=interactions,
        alpha=alpha,
        gamma=options.gamma,
        target=options.target,
        distil=distil,
        held_out=held_out,
        unchanged=nullcontext if adapted is None else adapted.disable_adapter,
    )


def _save_model(model: AdaptiveModel, network: Any, run: RunOptions) -> str:
    """Save the trained model under a name of its own, and return the name."""
    name = hashlib.sha256(f"{fingerprint(model)} {run.seed}".encode()).hexdigest()[:16]
    network.config.anee_backbone = name
    network.save_pretrained(run.folder / "model")
    model.tokenizer.save_pretrained(run.folder / "model")
    return name

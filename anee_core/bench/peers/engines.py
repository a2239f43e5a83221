"""Other engines that generate with the same weights, where installed, for `anee bench`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anee_core.bench.peers.gguf_file import token_of, write_gguf
from anee_core.bench.peers.openvino_model import write_openvino
from anee_core.bench.peers.own_process import OwnProcess, Run, Start
from anee_core.errors import AneeError, MissingPackageError, ModelError

logger = logging.getLogger(__name__)


def peers(
    network: Any, tokenizer: Any, folder: Path, positions: int, start_engine: Callable[[Start], Run] = OwnProcess
) -> dict[str, Run]:
    """Return a way to generate greedily with each other engine that is installed and can run a model in its dtype.

    Args:
        network: a transformers model on the CPU.
        tokenizer: its tokenizer, or None; CTranslate2 does not convert models without.
        folder: where the model is written in the engines' own formats, as large as it is.
        positions: tokens of prompt and continuation.
        start_engine: starts an engine; by default in a process of its own.
    """
    found = {}
    for name, prepare in (("llama.cpp", _llama_cpp), ("CTranslate2", _ctranslate2), ("OpenVINO", _openvino)):
        try:
            found[name] = start_engine(prepare(network, tokenizer, folder, positions))
        except AneeError as error:
            logger.warning("%s takes no part: %s", name, error)
    return found


def _llama_cpp(network: Any, tokenizer: Any, folder: Path, positions: int) -> Start:
    path = folder / "model.gguf"
    # One is compiled where it is installed, for that processor; the other comes compiled, for many.
    for package, start in (("llama_cpp", _llama_cpp_python), ("xllamacpp", _xllamacpp)):
        if find_spec(package) is not None:
            write_gguf(network, path)
            return partial(start, path, positions, torch.get_num_threads())
    raise MissingPackageError("it needs xllamacpp or llama-cpp-python: pip install 'anee[peers]'")


def _llama_cpp_python(path: Path, positions: int, threads: int) -> Run:
    from llama_cpp import Llama

    engine: Any = Llama(
        str(path), n_ctx=positions + 8, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run(prompt: Tensor, count: int, streamer: Any) -> None:
        streamer.put(prompt)
        engine.reset()  # or it would not read a prompt again that it knows
        tokens = engine.generate(prompt[0].tolist(), temp=0.0, repeat_penalty=1.0)
        for _, token in zip(range(count), tokens, strict=False):
            streamer.put(torch.tensor([token]))

    return run


def _xllamacpp(path: Path, positions: int, threads: int) -> Run:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_batch, params.n_parallel = str(path), positions + 8, 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    engine = xllamacpp.Server(params)

    def run(prompt: Tensor, count: int, streamer: Any) -> None:
        def see(part: dict[str, Any]) -> None:
            text = part["choices"][0]["text"]
            if text:  # the last part tells why it ended
                streamer.put(torch.tensor([token_of(text)]))

        streamer.put(prompt)
        engine.handle_completions(
            {
                "prompt": prompt[0].tolist(), "max_tokens": count, "temperature": 0.0, "ignore_eos": True,
                "cache_prompt": False, "stream": True,
            },
            see,
        )  # fmt: skip

    return run


def _ctranslate2(network: Any, tokenizer: Any, folder: Path, positions: int) -> Start:
    try:
        import ctranslate2
    except ImportError as error:
        raise MissingPackageError("it needs ctranslate2: pip install 'anee[peers]'") from error
    kind = str(network.dtype).removeprefix("torch.")
    if kind not in ctranslate2.get_supported_compute_types("cpu"):
        raise ModelError(f"it does not compute in {kind} on this processor")
    if tokenizer is None:
        raise ModelError("it converts models with a tokenizer only")
    source, converted = folder / "source", folder / "ctranslate2"
    network.save_pretrained(source)
    tokenizer.save_pretrained(source)
    ctranslate2.converters.TransformersConverter(str(source)).convert(str(converted), quantization=kind, force=True)
    return partial(_ctranslate2_generator, converted, kind, tokenizer, torch.get_num_threads())


def _ctranslate2_generator(folder: Path, kind: str, tokenizer: Any, threads: int) -> Run:
    import ctranslate2

    engine = ctranslate2.Generator(str(folder), intra_threads=threads, compute_type=kind)

    def run(prompt: Tensor, count: int, streamer: Any) -> None:
        def see(step: Any) -> bool:
            streamer.put(torch.tensor([step.token_id]))
            return False

        streamer.put(prompt)
        engine.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt[0].tolist())], max_length=count, min_length=count, sampling_topk=1,
            include_prompt_in_result=False, callback=see,
        )  # fmt: skip

    return run


def _openvino(network: Any, tokenizer: Any, folder: Path, positions: int) -> Start:
    path = folder / "openvino.xml"
    return partial(_openvino_request, path, write_openvino(network, path), torch.get_num_threads())


def _openvino_request(path: Path, precision: str, threads: int) -> Run:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request: Any = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(prompt: Tensor, count: int, streamer: Any) -> None:
        streamer.put(prompt)
        request.reset_state()
        ids, positions = prompt.numpy(), np.arange(prompt.shape[1])[None]
        for _ in range(count):
            inputs = {"input_ids": ids, "position_ids": positions, "beam_idx": np.zeros(1, np.int32)}
            ids, positions = request.infer(inputs)[0][:, -1].argmax(-1)[None], positions[:, -1:] + 1
            streamer.put(torch.from_numpy(ids[0]))

    return run

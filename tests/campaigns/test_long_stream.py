"""Streams far beyond the context, at constant memory: what is held, allocated and computed stays as it is."""

import gc
import resource

import pytest
import torch
from tiny import VOCABULARY, adaptive, build, gate_weights
from transformers import LlamaConfig, LlamaForCausalLM

SINGLE, BLOCK = 2048, 256
WINDOW = "window:sinks=4,recent=64"


def one_layer():
    """Return the smallest model: one layer of width 16, for a context of 128."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def resident():
    """Return the bytes that the process has in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Stream:
    """A row that goes on and on under one policy."""

    def __init__(self, model):
        self.model, self.cache = model, model.new_cache()
        self.token, self.read = torch.tensor([[5]]), 0

    def singles(self, count):
        """Decode ``count`` tokens, each the likeliest after the last; return the logits of the last."""
        for _ in range(count):
            logits = self.model(self.token, past_key_values=self.cache, logits_to_keep=1).logits
            self.token = logits[:, -1:].argmax(-1)
        self.read += count
        return logits

    def blocks(self, count):
        """Read random tokens in blocks; return the logits of the last."""
        generator = torch.Generator().manual_seed(self.read)
        for _ in range(count // BLOCK):
            ids = torch.randint(2, VOCABULARY, (1, BLOCK), generator=generator)
            logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.read += count
        return logits


@torch.no_grad()
@pytest.mark.parametrize(("name", "single", "total"), [("a window", 100_000, 1_000_000), ("a gate", 50_000, 300_000)])
def test_a_stream_takes_no_more_memory_the_longer_it_is(name, single, total, campaign, tmp_path):
    if name == "a window":
        model = adaptive(one_layer(), WINDOW)
    else:
        gate_weights()[0].save(tmp_path)
        model = adaptive(build("llama"), f"gate:{tmp_path},protect=1 1,window=32+{WINDOW}", 0.7)
    stream, noted = Stream(model), []
    singles, blocks = single // SINGLE, -(-(total - single) // (16 * BLOCK))
    pieces = [("singles", SINGLE)] * (singles + 1) + [("blocks", 16 * BLOCK)] * blocks
    if not campaign.long:
        pieces = [("singles", 512), ("blocks", 8 * BLOCK), ("singles", 512)]
    for i in campaign.trials(f"a long stream under {name}", short=len(pieces), long=len(pieces)):
        way, count = pieces[i]
        logits = getattr(stream, way)(count)
        if not logits.isfinite().all():
            campaign.fault(f"after {stream.read} tokens the logits are not finite")
        gc.collect()
        noted.append((stream.read, way, stream.cache.nbytes(), int(stream.cache.kept().max()), resident()))
    for way in ("singles", "blocks"):
        of_way = [each for each in noted if each[1] == way]
        then, _, bytes_then, _, memory_then = of_way[min(2, len(of_way) - 1)]  # once storage is as large as it gets
        now, _, bytes_now, held, memory = of_way[-1]
        if bytes_now > bytes_then:
            campaign.fault(f"{way}: the cache has {bytes_then} bytes after {then} tokens, {bytes_now} after {now}")
        if held > 68:
            campaign.fault(f"{way}: {held} tokens are held")
        if memory > memory_then + 16 * 2**20:
            campaign.fault(f"{way}: {memory_then >> 20} MB after {then} tokens, {memory >> 20} after {now}")
    read, _, held_bytes, _, memory = noted[-1]
    campaign.count(f"{read} tokens: {held_bytes} bytes of cache, {noted[0][4] >> 20} to {memory >> 20} MB")

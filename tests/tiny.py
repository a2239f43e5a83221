"""Seeded tiny models of every family, and ragged batches to feed them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations, product
from pathlib import Path

import torch

import anee
from anee_core.calibration import CalibrationOptions
from anee_core.conformance.subject import Subject, without_layers
from anee_core.conformance.tiny import read_configs
from anee_core.controllers.gate import GateController, GateWeights
from anee_core.interfaces import Calibration
from anee_core.model import AdaptiveModel
from anee_core.plugins import Plugins
from anee_core.policy import ShortcutWeights
from anee_core.training.gate import GatedModel
from anee_core.training.options import GateOptions

PLUGINS = Plugins.discover()
VOCABULARY = 97
QUICK = CalibrationOptions(sequences=1, length=8, progress=False)

CONFIGS = read_configs(Path(__file__).parent / "configs")
"""Every family that ANEE has an adapter for, in all its variants: six layers, width 32."""
FAMILIES = (
    "falcon-grouped", "falcon-grouped-one-norm", "falcon-multi-query", "falcon-sequential", "gemma", "gemma2",
    "gemma3", "gpt-neox", "gpt-neox-sequential", "gpt2", "gptj", "llama", "mistral", "mistral-full", "mixtral", "opt",
    "opt-350m", "phi3", "phi3-longrope", "phi3-sliding", "qwen2", "qwen2-sliding", "qwen3", "qwen3-moe",
)  # fmt: skip
"""Families that have an adapter class, or stand for many: everything is tried on them, and of the others in ``CONFIGS``
what the conformance suite checks."""
FEW = ("gpt2", "llama", "qwen2-sliding", "falcon-multi-query")
"""Learned positions; grouped queries; windows in some layers; a tuple, a fused projection and a mask at all times."""
SEVEN = ("gpt2", "gptj", "llama", "falcon-multi-query", "mistral", "gemma2", "qwen2-sliding")
"""Families, and below policies, under which it is tested what of transformers works."""
FIVE = ("dense", "static:skip=1 3", "random:p=0.4,protect=0 0", "window:sinks=1,recent=4", "knorm:keep=0.5")


def build(family, attention=None, dtype=torch.float32):
    """Return a tiny transformers model with weights large enough that every layer matters."""
    config = CONFIGS[family]
    return Subject(PLUGINS.adapters[config.model_type], config, plugins=PLUGINS).build(dtype, attention)


@cache
def shared(family, attention=None, dtype=torch.float32):
    """Return that model, the same one for all tests: they leave it as it is."""
    return build(family, attention, dtype)


def pairwise(*factors, allowed=lambda *row: True):
    """Return rows with a value of each factor, as few as a greedy choice finds, in which values meet in pairs.

    Any two values of different factors that meet in some allowed row of the full product meet in one that is returned:
    most faults show where two things come together, and all pairs are far fewer than all rows. The same factors give
    the same rows.
    """

    def pairs(row):
        return list(combinations(enumerate(row), 2))

    holders = {}
    for row in product(*factors):
        for pair in pairs(row) if allowed(*row) else ():
            holders.setdefault(pair, []).append(row)
    missing, chosen, used = dict.fromkeys(holders), [], Counter()
    while missing:
        gains = [(sum(pair in missing for pair in pairs(row)), row) for row in holders[next(iter(missing))]]
        most = max(gain for gain, _ in gains)
        best = [row for gain, row in gains if gain == most]
        # The one whose values have been used least, so that none stands in for the others.
        chosen.append(min(best, key=lambda row: sum(used[value] for value in enumerate(row))))
        used.update(enumerate(chosen[-1]))
        for pair in pairs(chosen[-1]):
            missing.pop(pair, None)
    return chosen


def adaptive(model, policy="dense", budget=None, **options) -> AdaptiveModel:
    """Load a model under a policy, with a made-up calibration where one is needed."""
    layers = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(3)
    calibration = Calibration(torch.rand(layers, generator=generator), torch.linspace(0, 1, 101), "made up", "made up")
    options.setdefault("calibration", calibration)
    return anee.load(model, policy, budget, plugins=PLUGINS, **options)


def tokens(batch=2, length=11, seed=0):
    """Return random token ids [B, T] without the special ones."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(lengths, side, extra=0):
    """Return ids and mask [B, T] of rows with these lengths, padded on one side, by ``extra`` more than needed."""
    width = max(lengths) + extra
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, at] = tokens(1, length, seed=row + 1)[0]
        mask[row, at] = 1
    return ids, mask


def stepwise(model, ids, mask=None):
    """Return logits [B, T, V] of decoding a sequence one token at a time."""
    cache, parts = model.new_cache(), []
    for t in range(ids.shape[1]):
        seen = None if mask is None else mask[:, : t + 1]
        parts.append(model(ids[:, t : t + 1], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


POLICIES = {
    "dense": ("dense", None),
    "static": ("static:skip=1 3", None),
    "static, first and last": ("static:skip=0 5", None),
    "static, exit": ("static:exit=4", None),
    "static, calibrated": ("static:protect=1 1", 0.7),
    "random": ("random:p=0.5,protect=0 0", None),
    "random, exit": ("random:p=0.3,exit=0.2,protect=1 1", None),
    "heuristic": ("heuristic:protect=1 1", 0.7),
    "heuristic, exit": ("heuristic:protect=1 1,exit=0.3,spread=0.2", 0.7),
    "window": ("window:sinks=1,recent=4", None),
    "window, share": ("window:sinks=1,keep=0.4,least=1", None),
    "h2o": ("h2o:keep=0.4,least=1", None),
    "tova": ("tova:keep=5", None),
    "tova, by layer": ("tova:keep=0.3 0.5 3 4 0.5 1,least=1,sinks=1,recent=2", None),
    "knorm": ("knorm:keep=0.4,least=1,recent=2", None),
    "snapkv": ("snapkv:keep=0.4,least=1,every=4,window=2,pool=3", None),
    "random tokens": ("random_tokens:keep=0.4,least=1", None),
    "random and tova": ("random:p=0.5,protect=0 0+tova:keep=0.4,least=1", None),
    "random and knorm": ("random:p=0.5,protect=0 0+knorm:keep=0.4,least=1", None),
    "random and window": ("random:p=0.5,protect=0 0+window:sinks=1,recent=4", None),
    "heuristic and h2o": ("heuristic:protect=1 1+h2o:keep=0.4,least=1", 0.7),
    "heuristic and window": ("heuristic:protect=1 1+window:sinks=1,recent=4", 0.7),
}


def gate_weights():
    """Return a made-up gate that skips some of everything, and shortcuts, for tiny models."""
    layers, width, rank = 6, 32, 4
    generator = torch.Generator().manual_seed(3)
    gate = GateWeights(
        weight=torch.randn(layers, width, generator=generator) * width**-0.5,
        bias=torch.full((layers,), 0.1),
        mean=torch.full((layers,), 0.05),
        spread=torch.ones(layers),
        budgets=torch.tensor([0.3, 1.0]),
        shares=torch.stack((torch.full((layers,), 0.8), torch.full((layers,), 0.1))),
    )
    shortcuts = ShortcutWeights(
        torch.randn(layers, rank, width, generator=generator) * 0.1,
        torch.randn(layers, width, rank, generator=generator),
        torch.randn(layers, width, generator=generator) * 0.1,
    )
    return gate, shortcuts


def gated(network, folder, **options):
    """Return that gate in training, under options of `GateOptions`, and the model that runs it deployed."""
    gate, shortcuts = gate_weights()
    gate.save(folder)
    shortcuts.save(folder)
    deployed = adaptive(network, f"gate:{folder},protect=1 1+shortcuts:{folder}", 0.7)
    parts = (deployed.adapter, deployed.parts, deployed.engine.costs)
    return GatedModel(*parts, gate, shortcuts, GateController(protect=(1, 1)), GateOptions(**options)), deployed


def skipping_equals_removing(model, network, ids):
    """Check a model under ``static:skip=1 2`` against its network without these layers."""
    expected = without_layers(network, model.adapter.layout.layers, {1, 2})(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids).logits, expected)
    assert not torch.equal(expected, network(ids).logits)

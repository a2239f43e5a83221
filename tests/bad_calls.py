"""Calls that cannot be right, each by the argument that is wrong; they are given a GPT-2 with a tokenizer."""

import torch
from tiny import PLUGINS, build

import anee
from anee_core.cache_policies import SnapKVCachePolicy, TovaCachePolicy, WindowCachePolicy
from anee_core.calibration import CalibrationOptions
from anee_core.calibration.importance import calibrate
from anee_core.controllers import GateController, HeuristicController, RandomController, StaticController
from anee_core.policy import Policy

NAN, INF, HUGE = float("nan"), float("inf"), 10**20
IDS = torch.arange(2, 8)[None]
ONE = torch.tensor([[3]])
THING = object()


def loads(**wrong):
    """Return a call of `anee.load` on a small model."""
    return lambda model: anee.load(build("llama"), **{"plugins": PLUGINS, **wrong})


def generates(inputs="abc", **wrong):
    return lambda model: model.generate(inputs, **{"max_new_tokens": 3, **wrong})


def decodes(ids=IDS, **wrong):
    return lambda model: model.decode(ids, **{"max_new_tokens": 3, **wrong})


def forwards(**wrong):
    return lambda model: model(**{"input_ids": IDS, **wrong})


def goes_on(**wrong):
    """Return a forward of one token on a filled cache."""

    def run(model):
        cache = model.new_cache()
        model(IDS, past_key_values=cache)
        model(**{"input_ids": ONE, "past_key_values": cache, **wrong})

    return run


def on_cache(use):
    """Return a call on a cache that holds two rows."""

    def run(model):
        cache = model.new_cache()
        model(IDS.expand(2, -1), past_key_values=cache)
        use(cache)

    return run


def each(call, name, values):
    """Return the calls with each value of one argument."""
    return [(f"{name}={str(value)[:30]!r}", call(**{name: value})) for value in values]


def of(name, values, run):
    """Return calls of ``run`` with the model, or the cache, and each value of what ``name`` says."""
    return [(f"{name}={str(value)[:30]!r}", lambda given, value=value: run(given, value)) for value in values]


def of_cache(name, values, run):
    return [(named, on_cache(call)) for named, call in of(name, values, run)]


def draws(**wrong):
    return decodes(do_sample=True, **wrong)


def skips(model, value):
    model.set_policy(Policy(StaticController(skip=value)))


def calibrates(name):
    """Return a function that calibrates a model under options of which one is wrong."""
    return lambda model, value: calibrate(model, CalibrationOptions(**{name: value, "progress": False}))


IN_LOADING = [
    *of("model", [None, 5, "", "x" * 5000, "no/such", b"x", ["mini"], "a\x00b"], lambda _, value: anee.load(value)),
    ("model=Linear", lambda model: anee.load(torch.nn.Linear(2, 2))),
    *each(loads, "policy", [5, RandomController, "", "nonsense", "x" * 5000, "a\x00b", ["dense"], "window:recent=-1"]),
    *each(loads, "budget", ["0.5", True, 0, -1, 2, NAN, INF, [0.5]]),
    *each(loads, "hard", ["yes", 1, None]),
    *each(loads, "dtype", ["float7", 5, "", torch.int64]),
    *each(loads, "device", ["nowhere", 5.5, "cuda:99", ""]),
    *each(loads, "prefill", ["maybe", 3, None]),
    *each(loads, "prefill_chunk", [0, -1, 1.5, "a", True, HUGE, NAN]),
    *each(loads, "fast", ["yes", 1, None]),
    *each(loads, "weights", ["int3", 5, "", True]),
    *each(loads, "calibration", ["x", 5]),
    *each(loads, "tokenizer", [5, "x"]),
    *each(loads, "plugins", [5, "x"]),
    *each(loads, "nonsense", [1]),
]
IN_SETTING = [
    *of("policy", ["window", None, 5], lambda model, value: model.set_policy(value)),
    *of("budget", ["0.5", True, NAN, 0], lambda model, value: model.set_policy(Policy(), value)),
    *of("hard", ["yes", 1], lambda model, value: model.set_policy(Policy(), hard=value)),
    *of("calibration", ["x", 5], lambda model, value: model.set_policy(Policy(), calibration=value)),
    *of("controller", [5], lambda model, value: model.set_policy(Policy(controller=value))),
    *of("cache_policy", [5], lambda model, value: model.set_policy(Policy(cache_policy=value))),
    *of("profiler", [5], lambda model, value: model.set_policy(Policy(profiler=value))),
    *of("recent", [0, True, "x", 1.5, HUGE], lambda _, value: WindowCachePolicy(recent=value)),
    *of("keep", [0, 1.5, NAN, "x", None, (), HUGE], lambda _, value: TovaCachePolicy(keep=value)),
    *of("window", [0, 999, "x"], lambda _, value: SnapKVCachePolicy(window=value)),
    *of("p", [-1, 2, NAN, "x", True], lambda _, value: RandomController(p=value)),
    *of("spread", [-1, 2, NAN, "x"], lambda _, value: HeuristicController(spread=value)),
    *of("skip", [(99,), (-1,), (1.5,), ("x",), 5, "x"], skips),
    *of("prior", [0, NAN, "x", None], lambda _, value: GateController(prior=value)),
    *of("length", [-5, 10**6, "x"], calibrates("length")),
    *of("sequences", [0, "x"], calibrates("sequences")),
    *of("seed", [-1, NAN], calibrates("seed")),
    *of("text", ["/no/such"], calibrates("text")),
    *of("options", [5], calibrate),
]
IN_GENERATING = [
    *of("inputs", [5, "", [], [""], ["a", 3], THING, IDS.float(), IDS[0]], lambda model, value: model.generate(value)),
    *of("inputs", [500 + IDS, IDS[:, :0]], lambda model, value: model.generate(value)),
    *each(generates, "max_new_tokens", [0, -1, 1.5, "3", True, HUGE, NAN, 500]),
    *each(generates, "top_k", [-1, 2.5, HUGE]),
    *each(generates, "stop_strings", [5, [5]]),
    *each(generates, "eos_token_id", ["x", 1.5]),
    *each(generates, "nonsense", [1]),
    *each(generates, "generation_config", [5, "x"]),
    *each(generates, "num_beams", [0, -1]),
    *each(generates, "output_scores", [True]),
    ("attention_mask", generates(IDS, attention_mask=torch.ones(1, 9).long())),
    ("past_key_values=5", generates(IDS, past_key_values=5)),
    ("cache_implementation", generates(IDS, cache_implementation="static")),
    *of(
        "input_ids", [None, 5, "abc", [[1]], IDS[0], IDS.float(), IDS.bool(), 500 + IDS, -IDS], lambda m, v: m.decode(v)
    ),
    *each(decodes, "max_new_tokens", [0, 1.5, "3", HUGE, 500]),
    *each(draws, "temperature", [0, -1, NAN, INF, 1e-300, "x"]),
    *each(draws, "top_p", [0, 1.1, NAN, "x"]),
    *each(decodes, "repetition_penalty", [0, NAN, 1e30, "x"]),
    *each(decodes, "seed", [-1, 1.5, HUGE, "x"]),
    *each(decodes, "pad_token_id", ["x", 1.5, [0]]),
    *each(decodes, "max_time", [-1, "x", NAN]),
    *each(decodes, "do_sample", ["yes", 2]),
    *each(decodes, "streamer", [5]),
    *each(decodes, "logits_processor", [5, [5]]),
    *each(decodes, "stopping_criteria", [5, [5]]),
    *each(decodes, "attention_mask", [5, [[1] * 6], torch.zeros(1, 6)]),
    *each(decodes, "attention_mask", [torch.ones(2, 6), torch.ones(1, 3), torch.ones(0, 6)]),
    *each(decodes, "num_beams", [2]),
]
IN_FORWARDS = [
    *each(forwards, "input_ids", [[[5]], None, 5, IDS[0], IDS.float(), torch.tensor([[97]]), IDS[:0]]),
    *each(forwards, "attention_mask", [[[1] * 6], torch.ones(1, 9), torch.ones(6), torch.zeros(1, 6), 5]),
    *each(forwards, "position_ids", [[[1]], IDS[:, :2], -IDS, IDS.float(), 500 + IDS]),
    *each(forwards, "inputs_embeds", [torch.zeros(1, 6, 32)]),
    *each(forwards, "labels", [IDS[:, :3], IDS.float(), IDS.int(), 5, 97 + IDS, -IDS]),
    *each(forwards, "logits_to_keep", [-1, 1.5, "x", torch.tensor([99]), torch.tensor([-9]), torch.tensor([0.5]), ONE]),
    *each(forwards, "output_hidden_states", ["x", [1], 1]),
    *each(forwards, "past_key_values", [5, "x", [1]]),
    *each(forwards, "output_attentions", [True]),
    *each(forwards, "nonsense", [1]),
    *each(goes_on, "input_ids", [torch.tensor([[97]]), torch.tensor([[-1]]), ONE.expand(2, -1), ONE.float(), [[5]]]),
    *each(goes_on, "position_ids", [torch.tensor([[-1]]), torch.tensor([[500]]), torch.tensor([[0.5]])]),
    *each(goes_on, "attention_mask", [torch.ones(1, 3), torch.ones(2, 7)]),
    ("inputs_embeds", goes_on(input_ids=None, inputs_embeds=torch.full((1, 1, 32), NAN))),
]
ROWS = [[0], torch.tensor([2]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([[0]]), torch.arange(0), None]
IN_CACHES = [
    *of("capacity", [-1, 2.5, "x", True, HUGE], lambda model, value: model.new_cache(value)),
    *of_cache("count", [1.5, True, "1", None, -1, 99, HUGE], lambda cache, value: cache.rollback(value)),
    *of_cache("rows", ROWS, lambda cache, value: cache.reorder(value)),
    *of_cache("tokens_to_remove", [1.5, "x", -99], lambda cache, value: cache.crop(value)),
    *of_cache("repeats", [0, -1, 1.5, "x"], lambda cache, value: cache.batch_repeat_interleave(value)),
    *of_cache("indices", [*ROWS, torch.ones(3).bool()], lambda cache, value: cache.batch_select_indices(value)),
]
CALLS = [*IN_LOADING, *IN_SETTING, *IN_GENERATING, *IN_FORWARDS, *IN_CACHES]

"""What policy strings and policy objects mean, and strings that make a policy again."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import PLUGINS, QUICK

import anee
from anee_core.cache_policies.full import FullCachePolicy
from anee_core.cache_policies.window import WindowCachePolicy
from anee_core.controllers.dense import DenseController
from anee_core.controllers.heuristic import HeuristicController
from anee_core.controllers.random import RandomController
from anee_core.controllers.static import StaticController
from anee_core.errors import PolicyError
from anee_core.hookspecs import hookimpl
from anee_core.interfaces import Controller
from anee_core.plugins import Plugins
from anee_core.policy import Policy, make_policy, parse_policy


def parse(text):
    return parse_policy(text, PLUGINS)


def parts(policy):
    return policy.controller, policy.cache_policy


@dataclass(frozen=True)
class Demanding(Controller):
    """A layer policy with an option of every kind, one of them without a default."""

    name: ClassVar[str] = "demanding"

    folder: str
    flag: bool = False
    share: float = 0.5
    limit: float | None = 1.0
    layers: tuple[int, ...] = (1, 2)
    table: tuple[str, ...] = ()

    def decide(self, signals, context):
        """Skip nothing."""
        raise NotImplementedError


@pytest.fixture
def demanding():
    """Return plugins with `Demanding`, and with a factory of whole policies."""
    plugins = Plugins.discover()

    def bundle(skip="1", tokens="full"):
        return Policy(StaticController(skip=(int(skip),)), parse(tokens).cache_policy)

    class Hooks:
        @hookimpl
        def anee_controllers(self):
            return {"demanding": Demanding}

        @hookimpl
        def anee_policies(self):
            return {"bundle": bundle}

    plugins.register(Hooks(), "demanding", "demanding-plugin", "1.0")
    return plugins


# What a string means.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", Policy()),
        ("static:skip=5 14", Policy(StaticController(skip=(5, 14)))),
        ("static:skip=5", Policy(StaticController(skip=(5,)))),
        ("static:skip=", Policy(StaticController(skip=()))),
        ("static:skip=3,protect=1 0", Policy(StaticController(skip=(3,), protect=(1, 0)))),
        ("static:exit=7,skip=1  2", Policy(StaticController(skip=(1, 2), exit=7))),
        ("static:skip=none,exit=None", Policy(StaticController())),
        ("  static : skip = 5 14 , exit = 20 ", Policy(StaticController(skip=(5, 14), exit=20))),
        ("static:", Policy(StaticController())),
        ("random:p=0.3", Policy(RandomController(p=0.3))),
        ("random:p=.3,seed=7,exit=1e-2", Policy(RandomController(p=0.3, seed=7, exit=0.01))),
        ("random:p=none", Policy(RandomController())),
        ("heuristic:spread=0.25,exit=0.9", Policy(HeuristicController(spread=0.25, exit=0.9))),
        ("window", Policy(DenseController(), WindowCachePolicy())),
        ("window:sinks=1,recent=8", Policy(DenseController(), WindowCachePolicy(sinks=1, recent=8))),
        ("static:skip=1+window:recent=8", Policy(StaticController(skip=(1,)), WindowCachePolicy(recent=8))),
        ("window:recent=8+static:skip=1", Policy(StaticController(skip=(1,)), WindowCachePolicy(recent=8))),
        (" window + random:p=0.1 ", Policy(RandomController(p=0.1), WindowCachePolicy())),
        ("dense+full", Policy()),
    ],
)
def test_string_makes_the_policy_it_describes(text, expected):
    assert parts(parse(text)) == parts(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("flag=true", {"flag": True}),
        ("flag=False", {"flag": False}),
        ("share=3", {"share": 3.0}),
        ("limit=none", {"limit": None}),
        ("limit=-2.5e-3", {"limit": -0.0025}),
        ("layers=", {"layers": ()}),
        ("layers=4 -1", {"layers": (4, -1)}),
    ],
)
def test_options_are_read_as_their_declared_type(demanding, text, value):
    controller = parse_policy(f"demanding:folder=a b=c/d,{text}", demanding).controller
    assert controller == Demanding(folder="a b=c/d", **value)
    assert all(type(getattr(controller, name)) is type(expected) for name, expected in value.items())


def test_string_as_long_as_a_deep_model_needs_is_read():
    """Longer than any file name may be: it is not mistaken for one."""
    layers = tuple(range(200))
    assert parse(f"static:skip={' '.join(map(str, layers))}").controller.skip == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("statik", r"unknown policy 'statik'; did you mean 'static'\? known: asa, dense, full, gate"),
        ("static:skip=1+windw", r"unknown policy 'windw'; did you mean 'window'\?"),
        ("no/such/folder", r"unknown policy 'no/such/folder'"),
        ("static:skp=1", r"static: unknown option 'skp'; did you mean 'skip'\? known: exit, protect, skip"),
        ("static:_actions=1", r"static: unknown option '_actions'"),
        ("dense:p=1", r"dense: unknown option 'p'; known: none"),
        ("window:recent=8,resent=9", r"window: unknown option 'resent'; did you mean 'recent'\?"),
        ("static:skip=one", r"static: skip takes whole numbers separated by spaces; got 'one'"),
        ("static:skip=1.5", r"static: skip takes whole numbers separated by spaces; got '1.5'"),
        ("static:exit=1.5", r"static: exit takes a whole number; got '1.5'"),
        ("static:exit=", r"static: exit takes a whole number; got ''"),
        ("random:p=often", r"random: p takes a number; got 'often'"),
        ("random:p=nan", r"random: p takes a finite number; got 'nan'"),
        ("random:p=inf", r"random: p takes a finite number; got 'inf'"),
        ("random:exit=none", r"random: exit takes a number; got 'none'"),
        ("random:p=1.5", "random: p is a number, at least 0 and at most 1; got 1.5"),
        ("heuristic:spread=0.7", "heuristic: spread is a number, at least 0 and at most 0.5; got 0.7"),
        ("heuristic:exit=0", "heuristic: exit is a number, above 0 and at most 1; got 0.0"),
        ("window:recent=0", "window: recent is a whole number, at least 1 and at most 2,147,483,647; got 0"),
        ("static:skip=5,14", r"static: '14' is no option"),
        ("static:skip", r"static: 'skip' is no option; write option=value"),
        ("static:skip=1,exit=3,skip=2", r"static: option 'skip' is given twice"),
        ("static:skip=1+random:p=0.5", r"names two layer policies"),
        ("static:skip=1+static:skip=2", r"names two layer policies"),
        ("window+full", r"names two token policies"),
        ("window+static:skip=1+window", r"names two token policies"),
        ("", r"'' has an empty part"),
        ("static:skip=1+", r"has an empty part"),
        ("+window", r"has an empty part"),
        ("static:skip=1++window", r"has an empty part"),
        (":skip=1", r"has an empty part"),
    ],
)
def test_wrong_string_is_one_line_that_says_what_is_wrong(text, message):
    with pytest.raises(PolicyError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("demanding", "demanding: .*missing 1 required positional argument: 'folder'; its options are: folder, flag"),
        ("demanding:folder=x,flag=yes", "demanding: flag takes true or false; got 'yes'"),
        ("demanding:folder=x,table=1 2", r"demanding: table cannot be set in a policy string .*tuple\[str"),
        ("bundle:depth=1", "bundle: .*unexpected keyword argument 'depth'"),
        ("bundle+static:skip=1", "names two layer policies"),
        ("bundle:tokens=window+window", "names two token policies"),
    ],
)
def test_wrong_string_for_a_plugin_is_as_readable(demanding, text, message):
    with pytest.raises(PolicyError, match=message):
        parse_policy(text, demanding)


def test_whole_policies_of_plugins_take_options_and_join_with_the_other_kind(demanding):
    alone = parse_policy("bundle:skip=2", demanding)
    assert parts(alone) == (StaticController(skip=(2,)), FullCachePolicy())
    joined = parse_policy("bundle:skip=3+window:recent=5", demanding)
    assert parts(joined) == (StaticController(skip=(3,)), WindowCachePolicy(recent=5))


def test_wrong_layers_show_when_the_policy_meets_the_model(tiny_llama):
    for text, message in {
        "static:skip=4": "static: no layer 4 to skip; the model has layers 0 to 3",
        "static:skip=-1": "static: no layer -1",
        "static:exit=4": "static: exit=4; the model has layers 0 to 3",
        "static:skip=1,protect=1": r"protect takes two counts, first and last layers, like 'protect=2 2'; got \(1,\)",
        "random": "random: say how often to skip",
    }.items():
        with pytest.raises(PolicyError, match=message):
            anee.load(tiny_llama, text)


# What may be given instead of a string.


def test_objects_are_taken_as_they_are():
    policy = Policy(RandomController(p=0.5), WindowCachePolicy())
    assert make_policy(policy, PLUGINS) is policy
    controller, cache_policy = StaticController(skip=(1,)), WindowCachePolicy(recent=3)
    assert parts(make_policy(controller, PLUGINS)) == (controller, FullCachePolicy())
    assert parts(make_policy(cache_policy, PLUGINS)) == (DenseController(), cache_policy)
    assert parts(make_policy(None, PLUGINS)) == (DenseController(), FullCachePolicy())


@pytest.mark.parametrize("given", [5, StaticController, ["static"], torch.nn.Linear(1, 1)])
def test_other_things_are_refused(given):
    with pytest.raises(
        PolicyError, match=r"a policy is a string, a folder, a Policy, a Controller or a CachePolicy; got"
    ):
        make_policy(given, PLUGINS)


def test_object_and_string_decide_alike(tiny_llama):
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        by_string = anee.load(tiny_llama, "random:p=0.5,protect=0 0+window:recent=4")
        by_object = anee.load(tiny_llama, Policy(RandomController(p=0.5, protect=(0, 0)), WindowCachePolicy(recent=4)))
        assert torch.equal(by_string(ids).logits, by_object(ids).logits)
        assert torch.equal(by_string.last_trace.ran, by_object.last_trace.ran)


def test_binding_to_a_model_leaves_the_object_as_it_was(tiny_llama, tiny_gpt2):
    policy = Policy(StaticController(skip=(1,)))
    before = str(policy), repr(policy)
    anee.load(tiny_llama, policy)
    anee.load(tiny_gpt2, policy)
    assert (str(policy), repr(policy)) == before


# Back to a string.


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "static",
        "static:skip=5 14",
        "static:skip=",
        "static:skip=1,exit=7,protect=1 0",
        "random:p=0.3,exit=1e-05,protect=0 0,seed=9",
        "heuristic:spread=0.2,exit=0.95",
        "dense+window:sinks=0,recent=12",
        "static:skip=1+window",
    ],
)
def test_string_of_a_policy_makes_it_again(text):
    policy = parse(text)
    assert str(policy) == text
    assert parts(parse(str(policy))) == parts(policy)


def test_string_of_a_plugin_policy_makes_it_again(demanding):
    text = "demanding:folder=a/b,flag=True,limit=None,layers=7"
    policy = parse_policy(text, demanding)
    assert str(policy) == text
    assert parts(parse_policy(str(policy), demanding)) == parts(policy)


def test_string_of_a_bound_policy_is_the_one_that_was_given(tiny_llama):
    for text in ("static:skip=1 2", "random:p=0.4,protect=1 1+window:recent=5", "heuristic:protect=1 1"):
        assert str(anee.load(tiny_llama, text, calibration=QUICK).policy) == text

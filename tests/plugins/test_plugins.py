"""Plugins as users get them: distributions with entry points, good ones, broken ones and ones that clash."""

import json
import logging
import sys

import pytest
import torch

import anee
from anee_core.errors import ModelError, PluginError, PolicyError
from anee_core.plugins import KINDS, Plugins
from anee_core.policy import parse_policy

CONTROLLER = """
    from dataclasses import dataclass

    import torch
    from anee_core.hookspecs import hookimpl
    from anee_core.interfaces import Controller


    @dataclass(frozen=True)
    class Sparse(Controller):
        name = "{name}"
        every: int = 2

        def decide(self, signals, context):
            layers = torch.arange(context.layer_idx, context.num_layers)
            return (layers % self.every == 1).to(torch.uint8)[:, None, None].expand(-1, *signals.shape[:2])


    @hookimpl
    def anee_controllers():
        return {{"{name}": Sparse}}
"""

EVERYTHING = """
    from dataclasses import dataclass

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from anee_core.hookspecs import hookimpl
    from anee_core.interfaces import CachePolicy, Controller, Layout, ModelAdapter


    class OtherConfig(LlamaConfig):
        model_type = "other"


    class OtherForCausalLM(LlamaForCausalLM):
        config_class = OtherConfig


    class OtherAdapter(ModelAdapter):
        layout = Layout(
            layers="model.layers",
            final_norm="model.norm",
            rotary="model.rotary_emb",
            attention="self_attn",
            mlp="mlp",
            input_norm="input_layernorm",
        )


    @dataclass(frozen=True)
    class Odd(Controller):
        name = "odd"
        first: int = 1

        def decide(self, signals, context):
            layers = torch.arange(context.layer_idx, context.num_layers)
            return (layers % 2 == self.first).to(torch.uint8)[:, None, None].expand(-1, *signals.shape[:2])


    @dataclass(frozen=True)
    class Last(CachePolicy):
        name = "last"
        count: int = 3

        def retain(self, view):
            return view.position_ids[:, None] > view.query_position[:, :, None] - self.count


    def source(request):
        torch.manual_seed(0)
        config = OtherConfig(
            vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
        return OtherForCausalLM(config).to(dtype=request.dtype or torch.float32).eval(), None


    @hookimpl
    def anee_adapters():
        return {"other": OtherAdapter()}


    @hookimpl
    def anee_controllers():
        return {"odd": Odd}


    @hookimpl
    def anee_cache_policies():
        return {"last": Last}


    @hookimpl
    def anee_model_sources():
        return {"toy": source}
"""

HOOK = """
    from anee_core.hookspecs import hookimpl


    @hookimpl
    def anee_{kind}():
        {body}
"""


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def about(plugins, distribution):
    return [info for info in plugins.infos if info.distribution == distribution]


def test_built_in_parts_come_through_the_entry_points_of_the_anee_distribution():
    plugins = Plugins.discover()
    built_in = {info.name: info.provides for info in about(plugins, "anee")}
    assert {"core", "adapters"} <= set(built_in)
    assert {"dense", "static", "random", "heuristic"} <= set(built_in["core"]["controllers"])
    assert {"full", "window"} <= set(built_in["core"]["cache_policies"])
    assert {"gpt2", "llama"} <= set(built_in["adapters"]["adapters"])
    assert plugins.infos[0].distribution == "anee"
    assert not any(info.problem for info in about(plugins, "anee"))


def test_nothing_is_known_before_discovery():
    plugins = Plugins()
    assert not any(len(getattr(plugins, kind)) for kind in KINDS)
    with pytest.raises(PolicyError, match="unknown policy 'dense'; known: none"):
        parse_policy("dense", plugins)


def test_third_party_parts_work_together_in_one_model(install):
    install("other-plugin", EVERYTHING, version="2.3")
    model = anee.load("toy", policy="odd:first=0+last:count=2", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    result = model.decode(torch.tensor([[5, 6, 7, 8, 9]]), max_new_tokens=4)
    steps = [step.ran for step in result.trace.steps if not step.dense]
    assert all(ran[:, 0, 0].tolist() == [False, True, False, True] for ran in steps)
    assert len(steps) == 4
    assert result.trace.kept.flatten().tolist() == [2, 2, 2, 2]
    (info,) = about(Plugins.discover(), "other-plugin")
    assert (info.name, info.version, info.problem) == ("other-plugin", "2.3", None)
    assert info.provides == {
        "adapters": ("other",),
        "controllers": ("odd",),
        "cache_policies": ("last",),
        "model_sources": ("toy",),
    }


def test_third_party_policies_run_models_of_built_in_families(install, tiny_llama):
    install("other-plugin", EVERYTHING)
    model = anee.load(tiny_llama, policy="odd")
    with torch.no_grad():
        expected = anee.load(tiny_llama, policy="static:skip=1 3")(torch.arange(2, 9)[None]).logits
        torch.testing.assert_close(model(torch.arange(2, 9)[None]).logits, expected)
    assert str(model.policy) == "odd"


def test_a_model_source_takes_no_options_of_transformers(install):
    install("other-plugin", EVERYTHING)
    with pytest.raises(anee.AneeError, match="the model source 'toy' takes no option 'revision'"):
        anee.load("toy", revision="main")


def test_two_plugins_objects_do_not_share_registrations(install):
    before = Plugins.discover()
    install("other-plugin", EVERYTHING)
    after = Plugins.discover()
    assert "odd" in after.controllers
    assert "odd" not in before.controllers
    with pytest.raises(PolicyError, match="unknown policy 'odd'"):
        parse_policy("odd", before)


def test_uninstalled_plugin_is_gone(install, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("sys.path", [*sys.path])
        install("other-plugin", EVERYTHING)
        assert about(Plugins.discover(), "other-plugin")
    assert not about(Plugins.discover(), "other-plugin")


BROKEN = {
    "import fails": ("raise RuntimeError('no such [/thing]')", "RuntimeError: no such [/thing]"),
    "needs what is not there": ("import a_package_that_is_missing", "ModuleNotFoundError"),
    "does not parse": ("def :", "SyntaxError"),
    "ends the interpreter": ("raise SystemExit(3)", "SystemExit"),
    "hook fails": (HOOK.format(kind="controllers", body="raise ValueError('not today')"), "ValueError: not today"),
    "hook returns a list": (HOOK.format(kind="controllers", body="return ['sparse']"), "AttributeError"),
    "hook is misspelt": (HOOK.format(kind="contollers", body="return {}"), "contollers"),
}


@pytest.mark.parametrize(("source", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_plugin_is_left_out_with_a_warning_and_the_rest_works(install, caplog, tiny_llama, source, problem):
    install("bad-plugin", source, version="0.7")
    install("good-plugin", CONTROLLER.format(name="sparse"))
    model = anee.load(tiny_llama, policy="sparse")
    assert model(torch.arange(2, 9)[None]).logits.isfinite().all()
    (warning,) = messages(caplog)
    assert "bad-plugin 0.7" in warning
    assert problem in warning

    plugins = Plugins.discover()
    (info,) = about(plugins, "bad-plugin")
    assert problem in info.problem
    assert not info.provides
    (line,) = plugins.problems()
    assert "bad-plugin 0.7" in line
    assert problem in line


def test_a_broken_hook_takes_the_whole_plugin_out(install):
    install("half-plugin", CONTROLLER.format(name="sparse") + HOOK.format(kind="adapters", body="return 1 / 0"))
    plugins = Plugins.discover()
    assert "sparse" not in plugins.controllers
    assert "ZeroDivisionError" in about(plugins, "half-plugin")[0].problem


def test_missing_module_or_attribute_names_the_distribution(install, caplog):
    install("bad-plugin", "", entry_points="one = bad_plugin_gone\ntwo = bad_plugin:nothing")
    plugins = Plugins.discover()
    assert {info.name for info in about(plugins, "bad-plugin") if info.problem} == {"one", "two"}
    assert all("bad-plugin 1.0" in message for message in messages(caplog))
    assert len(messages(caplog)) == 2


def test_unreadable_metadata_of_another_distribution_stops_nothing(install, caplog):
    install("good-plugin", CONTROLLER.format(name="sparse"))
    install("torn-plugin", "", entry_points="this is no entry point")
    assert "sparse" in Plugins.discover().controllers
    assert any("torn-plugin" in message for message in messages(caplog))


def test_name_that_two_third_parties_claim_is_an_error_when_used(install, caplog, tiny_llama):
    install("first-plugin", CONTROLLER.format(name="sparse"), version="1.1")
    install("second-plugin", CONTROLLER.format(name="sparse"), version="2.2")
    install("third-plugin", CONTROLLER.format(name="sparser"))
    plugins = Plugins.discover()
    (warning,) = messages(caplog)
    for text in (warning, *plugins.problems()):
        assert "'sparse'" in text
        assert "first-plugin 1.1" in text
        assert "second-plugin 2.2" in text
    with pytest.raises(PluginError, match="uninstall all but one") as caught:
        anee.load(tiny_llama, policy="sparse", plugins=plugins)
    assert "first-plugin 1.1" in str(caught.value)
    assert "second-plugin 2.2" in str(caught.value)
    assert anee.load(tiny_llama, policy="sparser:every=3", plugins=plugins).policy.controller.every == 3
    assert anee.load(tiny_llama, policy="static:skip=1", plugins=plugins)


def test_adapters_that_clash_are_an_error_when_a_model_needs_them(install):
    install("other-plugin", EVERYTHING)
    install(
        "copy-plugin", EVERYTHING.replace('"odd"', '"odd2"').replace('"last"', '"last2"').replace('"toy"', '"toy2"')
    )
    for name in ("toy", "toy2"):
        with pytest.raises(PluginError, match=r"adapter 'other' is provided by .*-plugin 1.0 and by .*-plugin 1.0"):
            anee.load(name, policy="odd")


@pytest.mark.parametrize(
    ("kind", "provider"),
    [
        ("controllers", "anee_core.controllers.DenseController"),
        ("cache_policies", "anee_core.cache_policies.FullCachePolicy"),
        ("policies", "dict"),
    ],
)
def test_built_in_policy_name_cannot_be_taken_over(install, caplog, kind, provider):
    """Whatever kind of policy claims the name: a policy string has one name for all of them."""
    body = f"import anee_core.builtin, anee_core; return {{'static': {provider}}}"
    install("greedy-plugin", HOOK.format(kind=kind, body=body))
    plugins = Plugins.discover()
    (warning,) = messages(caplog)
    assert "'static'" in warning
    assert "greedy-plugin 1.0" in warning
    assert "the built-in one is used" in warning
    assert plugins.problems() == [warning]
    policy = parse_policy("static:skip=1", plugins)
    assert type(policy.controller).__module__ == "anee_core.controllers.static"


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("adapters", "an instance of ModelAdapter"),
        ("profilers", "a subclass of Profiler"),
        ("controllers", "a subclass of Controller"),
        ("cache_policies", "a subclass of CachePolicy"),
        ("policies", "a function"),
        ("model_sources", "a function"),
        ("trained_policies", "a path"),
    ],
)
def test_provider_of_the_wrong_kind_makes_a_plugin_broken(install, kind, wanted):
    install("odd-plugin", HOOK.format(kind=kind, body="return {'odd': 5}"))
    plugins = Plugins.discover()
    (problem,) = plugins.problems()
    assert "odd-plugin 1.0" in problem
    assert f"5 for 'odd', which is not {wanted}" in problem
    assert plugins.policy_part("odd") is None


def test_built_in_adapter_cannot_be_taken_over(install, caplog, tiny_llama):
    install(
        "greedy-plugin",
        HOOK.format(kind="adapters", body="import anee_adapters; return {'llama': anee_adapters.GPT2Adapter()}"),
    )
    model = anee.load(tiny_llama)
    assert type(model.adapter).__name__ == "LlamaAdapter"
    assert any("adapter 'llama'" in message and "greedy-plugin" in message for message in messages(caplog))


def test_name_that_third_parties_claim_for_two_kinds_of_policy_is_an_error_when_used(install):
    install("first-plugin", CONTROLLER.format(name="sparse"))
    body = "import anee_core.builtin as parts; return {'sparse': parts.FullCachePolicy}"
    install("second-plugin", HOOK.format(kind="cache_policies", body=body))
    with pytest.raises(PluginError, match=r"policy 'sparse' is provided by .*first-plugin 1.0.*second-plugin 1.0"):
        parse_policy("sparse", Plugins.discover())


def test_entry_points_of_one_name_in_two_distributions_both_load(install, caplog):
    install("first-plugin", CONTROLLER.format(name="sparse"), entry_points="main = first_plugin")
    install("second-plugin", CONTROLLER.format(name="sparser"), entry_points="main = second_plugin")
    plugins = Plugins.discover()
    assert {"sparse", "sparser"} <= set(plugins.controllers)
    mine = {info.distribution for info in plugins.infos if info.name == "main"}
    assert mine == {"first-plugin", "second-plugin"}
    assert not messages(caplog)


def test_distribution_that_is_on_the_path_twice_counts_once(install, caplog):
    install("same-plugin", CONTROLLER.format(name="sparse"), version="2.0")
    install("same-plugin", CONTROLLER.format(name="sparse"), version="1.0")
    plugins = Plugins.discover()
    assert [info.version for info in about(plugins, "same-plugin")] == ["1.0"], "the first on the path is the one used"
    assert not messages(caplog)


def test_unknown_family_names_the_families_that_plugins_add(install, tmp_path):
    install("other-plugin", EVERYTHING)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match=r"no adapter for the model family 'bert'; .*\bother\b"):
        anee.load(str(tmp_path), adapter=None)


def test_list_names_plugin_distribution_version_and_what_it_provides(install, run_anee):
    install("other-plugin", EVERYTHING, version="2.3")
    outcome = run_anee("plugins")
    assert outcome.code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    start = rows.index(["other-plugin", "other-plugin", "2.3", "adapters: other"])
    provided = [row[3] for row in rows[start : start + 4]]
    assert provided == ["adapters: other", "controllers: odd", "cache policies: last", "model sources: toy"]
    assert any(row[1] == "anee" for row in rows)


def test_list_as_json_parses_and_holds_the_same(install, run_anee):
    install("other-plugin", EVERYTHING, version="2.3")
    install("bad-plugin", "raise RuntimeError('boom')")
    outcome = run_anee("plugins", "--json")
    found = {info["distribution"]: info for info in json.loads(outcome.out)}
    assert found["other-plugin"]["provides"]["controllers"] == ["odd"]
    assert found["other-plugin"]["version"] == "2.3"
    assert found["other-plugin"]["problem"] is None
    assert found["bad-plugin"]["problem"] == "RuntimeError: boom"


def test_list_shows_broken_plugins_and_clashes(install, run_anee):
    install("bad-plugin", "raise RuntimeError('what [red]is[/green] this')")
    install("greedy-plugin", HOOK.format(kind="controllers", body="return {'static': dict}"))
    outcome = run_anee("plugins")
    assert outcome.code == 0
    assert "RuntimeError: what [red]is[/green] this" in outcome.out
    assert any("bad-plugin" in line for line in outcome.errors)
    assert any("greedy-plugin" in line and "'static'" in line for line in outcome.errors)

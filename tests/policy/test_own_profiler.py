"""A profiler that a plugin brings: controllers name it, and it measures what they decide by."""

import pytest
import torch
from tiny import build, tokens

import anee
from anee_core.plugins import Plugins

SOURCE = """
    from dataclasses import dataclass
    from typing import ClassVar
    import torch
    from anee_core.hookspecs import hookimpl
    from anee_core.interfaces import Action, Controller, Profiler

    class Parity(Profiler):
        names = ("odd",)
        def observe(self, observation, names):
            return (observation.seen % 2).float()[..., None]

    @dataclass(frozen=True)
    class OddSkipper(Controller):
        name: ClassVar[str] = "odd_skipper"
        signals: ClassVar[tuple[str, ...]] = ("{signal}",)
        profiler: ClassVar[str] = "{profiler}"
        layer: int = 2
        def decide(self, signals, context):
            layers = torch.arange(context.num_layers)[:, None, None]
            skip = (layers == self.layer) & (signals[..., 0] > 0)
            return skip.to(torch.uint8) * int(Action.SKIP)

    @hookimpl
    def anee_profilers():
        return {{"parity": Parity}}

    @hookimpl
    def anee_controllers():
        return {{"odd_skipper": OddSkipper}}
"""


def load(install, policy="odd_skipper", signal="odd", profiler="parity"):
    install("anee-parity", SOURCE.format(signal=signal, profiler=profiler))
    return anee.load(build("llama"), policy, plugins=Plugins.discover())


def test_what_a_named_profiler_measures_decides(install):
    model = load(install)
    model(tokens(1, 6))
    assert model.last_trace.ran[2, 0].tolist() == [True, False] * 3
    assert model.last_trace.ran[[0, 1, 3, 4, 5]].all()


def test_a_policy_whose_profiler_is_installed_is_saved_and_read_again(install, tmp_path):
    model = load(install, "odd_skipper:layer=3+window:sinks=1,recent=4")
    model.policy.save(tmp_path)
    again = anee.load(build("llama"), str(tmp_path), plugins=Plugins.discover())
    assert type(again.policy.profiler) is type(model.policy.profiler)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"profiler": "nobody"}, "unknown profiler 'nobody'"), ({"signal": "even"}, "'parity' knows no signal 'even'")],
)
def test_a_profiler_or_signal_that_is_not_there_is_named(install, wrong, message):
    with pytest.raises(anee.AneeError, match=message):
        load(install, **wrong)

"""Commands for those who extend ANEE: check an adapter or a policy, start a new adapter."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anee.commands.flags import Flags, flat
from anee_core.errors import InputError
from anee_core.files import writable
from anee_core.ranges import SomeShare, check_numbers


@dataclass(frozen=True)
class Checking:
    """What is checked beside or instead of a target."""

    config: tuple[Path, ...] = ()
    """A small model config as JSON, or a folder of them; may be repeated."""
    model_type: str | None = None
    """Family of an adapter that is not registered."""
    policy: tuple[str, ...] = ()
    """Check this policy string instead of an adapter; may be repeated."""
    budget: SomeShare | None = None
    """Budget of the policies."""
    check: tuple[str, ...] = ()
    """Run only this check; may be repeated."""
    report: Path | None = None
    """Write the results to this file."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.budget is not None and not self.policy:
            raise InputError("--budget is for --policy")
        if self.model_type and self.config:
            raise InputError("--model-type is for an adapter without --config: a config says its family itself")
        for path in self.config:
            if not path.exists():
                raise InputError(f"there is no config '{path}'")


_SHORT = {"config": "-c", "policy": "-p", "budget": "-b", "check": "-k"}


@flat
def conformance(
    checking: Annotated[Checking, Flags(rename={"report": "json"}, short=_SHORT)],
    target: Annotated[
        str | None, typer.Argument(help="package.module:Adapter, or a registered model family like 'llama'.")
    ] = None,
) -> None:
    """Check that an adapter, or a policy, keeps ANEE's promises.

    Without a target, the adapters registered for the given configs are checked; without configs, a small default of
    each family that the target is registered for. The exit code is 1 if a check fails.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from anee_core.conformance.check import named
    from anee_core.conformance.policies import POLICY_CHECKS
    from anee_core.conformance.policy_subject import PolicySubject
    from anee_core.conformance.report import run_checks
    from anee_core.conformance.suite import ADAPTER_CHECKS
    from anee_core.conformance.target import subjects
    from anee_core.plugins import Plugins

    if checking.policy and (target or checking.config or checking.model_type):
        raise InputError("--policy checks policies: leave the adapter and its configs out")
    if checking.report is not None:
        writable(checking.report)
    torch.set_num_threads(1)  # models this small only get slower on several
    transformers_logging.disable_progress_bar()  # each check saves and loads a model
    logging.getLogger("transformers").setLevel(logging.ERROR)
    plugins, console = Plugins.discover(), Console()
    if checking.policy:
        listed = [(text, "policy", PolicySubject(text, checking.budget, plugins)) for text in checking.policy]
        result = run_checks(listed, named(POLICY_CHECKS, checking.check), console)
    else:
        found = subjects(target, checking.config, checking.model_type, plugins)
        result = run_checks(found, named(ADAPTER_CHECKS, checking.check), console)
    result.print(console)
    if checking.report is not None:
        result.save(checking.report)
    raise typer.Exit(0 if result.passed else 1)


def new_adapter(
    name: Annotated[str, typer.Argument(help="The model family, as transformers calls it: 'jais2'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the plugin into.")] = Path(),
) -> None:
    """Write the start of a plugin with an adapter: package, entry point, conformance test."""
    from anee_core.conformance.scaffold import write_plugin

    folder = write_plugin(name, output)
    print(f"wrote {folder}: now run")
    print(f"  pip install -e {folder}")
    print(f"  pytest {folder}")

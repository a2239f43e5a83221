"""Commands for those who extend ANEE: check an adapter or a policy, start a new adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anee_core.errors import InputError


def conformance(
    target: Annotated[
        str | None, typer.Argument(help="package.module:Adapter, or a registered model family like 'llama'.")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", help="A small model config as JSON, or a folder of them; may be repeated."),
    ] = None,
    model_type: Annotated[
        str | None, typer.Option("--model-type", help="Family of an adapter that is not registered.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="Check this policy string instead of an adapter; may be repeated."),
    ] = None,
    budget: Annotated[float | None, typer.Option("--budget", "-b", help="Budget of the policies.")] = None,
    check: Annotated[
        list[str] | None, typer.Option("--check", "-k", help="Run only this check; may be repeated.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
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

    if policy and (target or config or model_type):
        raise InputError("--policy checks policies: leave the adapter and its configs out")
    if budget is not None and not policy:
        raise InputError("--budget is for --policy")
    if model_type and config:
        raise InputError("--model-type is for an adapter without --config: a config says its family itself")
    for path in config or ():
        if not path.exists():
            raise InputError(f"there is no config '{path}'")
    torch.set_num_threads(1)  # models this small only get slower on several
    transformers_logging.disable_progress_bar()  # each check saves and loads a model
    logging.getLogger("transformers").setLevel(logging.ERROR)
    plugins, console = Plugins.discover(), Console()
    if policy:
        listed = [(text, "policy", PolicySubject(text, budget, plugins)) for text in policy]
        result = run_checks(listed, named(POLICY_CHECKS, check), console)
    else:
        found = subjects(target, config or (), model_type, plugins)
        result = run_checks(found, named(ADAPTER_CHECKS, check), console)
    result.print(console)
    if report is not None:
        result.save(report)
    raise typer.Exit(0 if result.passed else 1)


def new_adapter(
    name: Annotated[str, typer.Argument(help="The model family, as transformers calls it: 'stablelm'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the plugin into.")] = Path(),
) -> None:
    """Write the start of a plugin with an adapter: package, entry point, conformance test."""
    from anee_core.conformance.scaffold import write_plugin

    folder = write_plugin(name, output)
    print(f"wrote {folder}: now run")
    print(f"  pip install -e {folder}")
    print(f"  pytest {folder}")

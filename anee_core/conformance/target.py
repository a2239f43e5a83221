"""From what a user names to what is checked."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.conformance.subject import Subject
from anee_core.conformance.tiny import read_configs, small_config
from anee_core.errors import AdapterError, InputError, suggestion
from anee_core.plugins import Plugins


def subjects(
    target: str | None, configs: Sequence[Path], model_type: str | None, plugins: Plugins
) -> list[tuple[str, str, Subject]]:
    """Return (name, model type, subject) of what is to be checked.

    Args:
        target: ``package.module:Adapter``, a registered model type, or None for whatever is registered for the
            configs.
        configs: JSON files or folders of them; none for a small default of the family.
        model_type: the family of a ``target`` that is not registered, where no config says it.
        plugins: what is installed.

    Raises:
        InputError, AdapterError: something named does not exist or does not fit.
    """
    adapter = None if target is None else find_adapter(target, plugins)
    found = {name: config for path in configs for name, config in read_configs(path).items()}
    if not found:
        kinds = [model_type] if model_type else _served(adapter, target, plugins)
        found = {kind: small_config(kind) for kind in kinds}
    listed = []
    for name, config in found.items():
        kind = config.model_type
        if target in plugins.adapters and kind != target:
            raise InputError(f"the config '{name}' is of the family '{kind}', not '{target}'")
        if adapter is None and kind not in plugins.adapters:
            raise AdapterError(f"no adapter for the model family '{kind}'; {suggestion(kind, plugins.adapters)}")
        listed.append((name, kind, Subject(adapter or plugins.adapters[kind], config, name, plugins=plugins)))
    return listed


def find_adapter(target: str, plugins: Plugins) -> ModelAdapter:
    """Return the adapter named ``package.module:Adapter``, or registered for a model type."""
    module_name, colon, name = target.partition(":")
    if not colon:
        if target not in plugins.adapters:
            raise AdapterError(
                f"no adapter for '{target}': name one as package.module:Adapter, or a registered family; "
                f"{suggestion(target, plugins.adapters)}"
            )
        return plugins.adapters[target]
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: an adapter under work need not be installed
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise AdapterError(f"cannot import '{module_name}' ({type(error).__name__}: {error})") from error
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, ModelAdapter):
        try:
            found = found()
        except TypeError as error:
            raise AdapterError(f"'{name}' of {module_name} cannot be made ({error}): name an instance of it") from error
    if not isinstance(found, ModelAdapter):
        adapters = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, ModelAdapter)]
        raise AdapterError(f"'{name}' of {module_name} is no ModelAdapter; {suggestion(name, adapters)}")
    return found


def _served(adapter: ModelAdapter | None, target: str | None, plugins: Plugins) -> list[str]:
    """Return the model types that an adapter is registered for; all that are, for None."""
    if target in plugins.adapters:
        return [str(target)]
    kinds = [k for k in plugins.adapters if adapter is None or type(plugins.adapters[k]) is type(adapter)]
    if not kinds:
        raise InputError(
            f"{target} is registered for no model family: pass --config with a small config, or --model-type"
        )
    return kinds

"""Find plugins, keep broken ones from doing harm, and say who provides what."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distribution, distributions
from pathlib import Path
from typing import Any

import pluggy

from anee_core.adapter.model_adapter import ModelAdapter
from anee_core.errors import PluginError, suggestion
from anee_core.hookspecs import PROJECT, Hooks
from anee_core.interfaces.cache_policy import CachePolicy
from anee_core.interfaces.controller import Controller
from anee_core.interfaces.profiler import Profiler
from anee_core.interfaces.shortcut import Shortcut

logger = logging.getLogger(__name__)

KINDS = (
    "adapters",
    "profilers",
    "controllers",
    "cache_policies",
    "shortcuts",
    "policies",
    "model_sources",
    "trained_policies",
)
"""Kinds of what plugins provide; the hook of each is called ``anee_`` and the kind."""
_BUILT_IN = "anee"


@dataclass(frozen=True)
class PluginInfo:
    """One plugin that was found."""

    name: str
    """Name of its entry point."""
    distribution: str
    """Distribution that it comes from."""
    version: str
    """Version of the distribution."""
    provides: Mapping[str, tuple[str, ...]]
    """Names of what it provides, by kind."""
    problem: str | None = None
    """What is wrong with it; None if nothing is."""

    @property
    def origin(self) -> str:
        """Entry point and distribution that it comes from, for messages."""
        return f"'{self.name}' of {self.distribution} {self.version}"


class Registry(Mapping[str, Any]):
    """The providers of one kind by name. A name that two plugins claim cannot be looked up."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._providers: dict[str, list[tuple[PluginInfo, Any]]] = {}

    def add(self, name: str, provider: Any, plugin: PluginInfo) -> None:
        """Enter a provider."""
        self._providers.setdefault(name, []).append((plugin, provider))

    def claimants(self, name: str) -> list[PluginInfo]:
        """Return the plugins that provide a name."""
        return [plugin for plugin, _ in self._providers.get(name, [])]

    def has_built_in(self, name: str) -> bool:
        """Whether ANEE itself provides a name."""
        return any(plugin.distribution == _BUILT_IN for plugin in self.claimants(name))

    def __getitem__(self, name: str) -> Any:
        """Return the provider of a name.

        Raises:
            PluginError: several plugins provide it.
        """
        found = self._providers[name]
        built_in = [provider for plugin, provider in found if plugin.distribution == _BUILT_IN]
        if built_in:
            return built_in[0]
        if len(found) > 1:
            raise PluginError(f"{_clash(self.kind, name, self.claimants(name))}; uninstall all but one")
        return found[0][1]

    def __contains__(self, name: object) -> bool:
        return name in self._providers

    def __iter__(self) -> Iterator[str]:
        return iter(self._providers)

    def __len__(self) -> int:
        return len(self._providers)

    def require(self, name: str, error: type[Exception], what: str) -> Any:
        """Return the provider of a name, or raise ``error`` saying which names there are."""
        if name not in self._providers:
            raise error(f"unknown {what} '{name}'; {suggestion(name, self)}")
        return self[name]


class Plugins:
    """Everything installed that implements an ``anee`` hook.

    A plugin that fails to import or to answer is left out with a warning that names its distribution. Built-in names
    cannot be taken over; a name that two other plugins claim is an error when it is used.
    """

    def __init__(self) -> None:
        self.infos: list[PluginInfo] = []
        registries = {kind: Registry(kind.removesuffix("s").replace("_", " ")) for kind in KINDS}
        registries["cache_policies"].kind, registries["policies"].kind = "token policy", "policy"
        registries["trained_policies"].kind = "trained policy"
        self.adapters = registries["adapters"]
        self.profilers = registries["profilers"]
        self.controllers = registries["controllers"]
        self.cache_policies = registries["cache_policies"]
        self.shortcuts = registries["shortcuts"]
        self.policies = registries["policies"]
        self.model_sources = registries["model_sources"]
        self.trained_policies = registries["trained_policies"]
        self._registries = registries
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Hooks)

    @classmethod
    def discover(cls) -> Plugins:
        """Load the plugins of all installed distributions, built-in ones first."""
        plugins = cls()
        found = list(_entry_points())
        found.sort(key=lambda pair: pair[1].metadata["Name"] != _BUILT_IN)
        for entry_point, origin in found:
            plugins.load(entry_point, origin)
        for clash in plugins._clashes():
            logger.warning("%s", clash)
        return plugins

    def load(self, entry_point: EntryPoint, distribution: Distribution) -> None:
        """Import one entry point and register what it provides."""
        name, version = distribution.metadata["Name"], distribution.version
        try:
            self.register(entry_point.load(), entry_point.name, name, version)
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
            logger.warning(
                "plugin '%s' of %s %s is broken and left out (%s); update or uninstall %s",
                entry_point.name, name, version, problem, name,
            )  # fmt: skip
            self.infos.append(PluginInfo(entry_point.name, name, version, {}, problem))

    def register(self, plugin: Any, name: str, distribution: str, version: str) -> None:
        """Register an object with hooks under the name of an entry point."""
        self._manager.register(plugin, name=f"{distribution}:{name}")
        provided: dict[str, Mapping[str, Any]] = {}
        try:
            self._manager.check_pending()
            for kind in KINDS:
                caller = self._manager.subset_hook_caller(
                    f"anee_{kind}", [p for p in self._manager.get_plugins() if p is not plugin]
                )
                provided[kind] = {n: provider for answer in caller() for n, provider in answer.items()}
                _check_providers(kind, provided[kind])
        except Exception:
            self._manager.unregister(plugin)
            raise
        info = PluginInfo(name, distribution, version, {k: tuple(v) for k, v in provided.items() if v})
        self.infos.append(info)
        for kind, providers in provided.items():
            for provider_name, provider in providers.items():
                self._registries[kind].add(provider_name, provider, info)

    def problems(self) -> list[str]:
        """Return one line for each broken plugin and each clash of names."""
        return [f"{info.origin} is broken: {info.problem}" for info in self.infos if info.problem] + self._clashes()

    def policy_part(self, name: str) -> Registry | None:
        """Return the registry of what a name in a policy string means; None if nothing has that name.

        Raises:
            PluginError: plugins provide it as different kinds of policy.
        """
        found = [registry for registry in self._policy_kinds if name in registry]
        for registry in found:
            if registry.has_built_in(name):
                return registry
        claimants = _distinct([plugin for registry in found for plugin in registry.claimants(name)])
        if len(claimants) > 1:
            raise PluginError(f"{_clash('policy', name, claimants)}; uninstall all but one")
        return found[0] if found else None

    def trained_for(self, backbone: str | None) -> dict[str, Path]:
        """Return the folders with what was trained for a model, by the policy's name.

        Raises:
            PluginError: several plugins have something for the same policy.
        """
        pairs = [(name, name.rpartition("/")) for name in self.trained_policies]
        return {policy: self.trained_policies[name] for name, (model, _, policy) in pairs if model == backbone}

    @property
    def _policy_kinds(self) -> tuple[Registry, ...]:
        """The kinds that share the names of policy strings."""
        return self.policies, self.controllers, self.cache_policies, self.shortcuts

    def _clashes(self) -> list[str]:
        """Return one line for each name that several plugins claim."""
        lines = []
        single = [(self.adapters,), (self.profilers,), (self.model_sources,), (self.trained_policies,)]
        for registries in (*single, self._policy_kinds):
            for name in sorted({name for registry in registries for name in registry}):
                owners = [registry for registry in registries if name in registry]
                claimants = _distinct([plugin for registry in owners for plugin in registry.claimants(name)])
                if len(claimants) > 1:
                    used = any(registry.has_built_in(name) for registry in owners)
                    outcome = "the built-in one is used" if used else "uninstall all but one to use it"
                    kind = owners[0].kind if len(owners) == 1 else "policy"
                    lines.append(f"{_clash(kind, name, claimants)}; {outcome}")
        return lines


def _check_providers(kind: str, providers: Mapping[str, Any]) -> None:
    """Raise `PluginError` for a provider that is not what its hook asks for."""
    classes = {
        "profilers": Profiler,
        "controllers": Controller,
        "cache_policies": CachePolicy,
        "shortcuts": Shortcut,
    }
    for name, provider in providers.items():
        if kind == "adapters":
            fits, wanted = isinstance(provider, ModelAdapter), "an instance of ModelAdapter"
        elif kind == "trained_policies":
            fits, wanted = isinstance(provider, Path), "a path"
        elif kind in classes:
            base = classes[kind]
            fits, wanted = isinstance(provider, type) and issubclass(provider, base), f"a subclass of {base.__name__}"
        else:
            fits, wanted = callable(provider), "a function"
        if not fits:
            raise PluginError(f"anee_{kind} gives {provider!r} for '{name}', which is not {wanted}")


def _distinct(plugins: list[PluginInfo]) -> list[PluginInfo]:
    """Return each plugin once: one that gives several kinds of policy the same name claims it once."""
    return list({id(plugin): plugin for plugin in plugins}.values())


def _clash(kind: str, name: str, claimants: list[PluginInfo]) -> str:
    return f"{kind} '{name}' is provided by {' and by '.join(c.origin for c in claimants)}"


def _entry_points() -> Iterator[tuple[EntryPoint, Distribution]]:
    """Yield the entry points of the group, one distribution at a time, each distribution once."""
    seen = set()
    for found in distributions():
        name = None
        try:
            if not _of_group(found):
                continue  # before its metadata is parsed, which takes longer
            name = found.metadata["Name"]
            if name is None or name in seen:
                continue
            first = distribution(name)  # on the path before others of that name
            entry_points = _of_group(first)
        except Exception as error:
            logger.warning("the metadata of %s cannot be read (%s); reinstall it", name or _name(found), error)
            continue
        seen.add(name)
        yield from ((entry_point, first) for entry_point in entry_points)


def _of_group(found: Distribution) -> list[EntryPoint]:
    """Return a distribution's entry points that are for ANEE."""
    return [entry_point for entry_point in found.entry_points if entry_point.group == PROJECT]


def _name(found: Distribution) -> str:
    """Return the name of a distribution of which something else could not be read."""
    try:
        return str(found.metadata["Name"])
    except Exception:
        return "a distribution"

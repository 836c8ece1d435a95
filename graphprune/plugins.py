"""Plug-ins: what a package offers through the entry point group ``graphprune.plugins``.

The entry point names a module (or object) that holds a ``Plugin`` called ``plugin``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from graphprune.criteria import Criterion
from graphprune.errors import UsageError
from graphprune.pipeline import Pass
from graphprune.repair.damage import Repair
from graphprune.rules import BUILTIN, Rule
from graphprune.targets import Target
from graphprune.targets import builtin as builtin_targets

GROUP = "graphprune.plugins"


@dataclass(frozen=True)
class Plugin:
    """Rules by (domain, operator), criteria, repairs, pass classes, passes that run before every
    analysis, and hardware targets."""

    name: str
    rules: Mapping[tuple[str, str], Rule] = field(default_factory=dict)
    criteria: Sequence[Criterion] = ()
    repairs: Sequence[Repair] = ()
    passes: Sequence[Callable[..., Pass]] = ()
    prepare: Sequence[Pass] = ()
    targets: Sequence[Target] = ()


@dataclass(frozen=True)
class Registry:
    """Everything that the installed plug-ins offer, by name."""

    rules: Mapping[tuple[str, str], Rule]
    criteria: Mapping[str, Criterion]
    repairs: Mapping[str, Repair]
    passes: Mapping[str, Callable[..., Pass]]
    prepare: tuple[Pass, ...]
    targets: Mapping[str, Target]

    def criterion(self, name: str) -> Criterion:
        if name not in self.criteria:
            raise UsageError(
                f"there is no criterion {name!r}", hint=f"One of: {', '.join(self.criteria)}."
            )
        return self.criteria[name]

    def repair(self, name: str) -> Repair:
        if name not in self.repairs:
            raise UsageError(
                f"there is no repair {name!r}", hint=f"One of: none, {', '.join(self.repairs)}."
            )
        return self.repairs[name]


def installed() -> tuple[Plugin, ...]:
    """Plug-ins of all installed packages, the built-in one first, then by name."""
    found = sorted(entry_points(group=GROUP), key=lambda e: (e.name != "builtin", e.name))
    return tuple(_load(entry) for entry in found)


def collect(plugins: Sequence[Plugin]) -> Registry:
    """Merge plug-ins; two that offer one name are an error that names both."""
    rules: dict[tuple[str, str], Rule] = dict(BUILTIN)
    owner: dict[object, str] = dict.fromkeys(BUILTIN, "graphprune")
    criteria: dict[str, Criterion] = {}
    repairs: dict[str, Repair] = {}
    passes: dict[str, Callable[..., Pass]] = {}
    targets = dict(builtin_targets())
    owner.update({("target", name): "graphprune" for name in targets})
    for plugin in plugins:
        for key, rule in plugin.rules.items():
            _claim(owner, key, plugin.name)
            rules[key] = rule
        for criterion in plugin.criteria:
            _claim(owner, ("criterion", criterion.name), plugin.name)
            criteria[criterion.name] = criterion
        for repair in plugin.repairs:
            _claim(owner, ("repair", repair.name), plugin.name)
            repairs[repair.name] = repair
        for target in plugin.targets:
            _claim(owner, ("target", target.name), plugin.name)
            targets[target.name] = target
        for make in plugin.passes:
            _claim(owner, ("pass", _pass_name(make)), plugin.name)
            passes[_pass_name(make)] = make
    prepare = tuple(step for plugin in plugins for step in plugin.prepare)
    return Registry(rules, criteria, repairs, passes, prepare, targets)


def _pass_name(make: Callable[..., Pass]) -> str:
    """A pass class carries its name as the default of its field ``name``."""
    return str(getattr(make, "name", getattr(make, "__name__", make)))


def _claim(owner: dict[object, str], key: object, name: str) -> None:
    if key in owner:
        raise UsageError(
            f"plug-ins {owner[key]!r} and {name!r} both offer {key}", hint="Uninstall one of them."
        )
    owner[key] = name


def _load(entry: EntryPoint) -> Plugin:
    loaded = entry.load()
    plugin = getattr(loaded, "plugin", loaded)
    if not isinstance(plugin, Plugin):
        raise UsageError(
            f"entry point {entry.name!r} holds no Plugin",
            entry.value,
            "It names a module with `plugin = Plugin(...)`; update that package or uninstall it.",
        )
    return plugin

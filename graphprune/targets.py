"""Hardware targets: data files that say which channel counts run well."""

from __future__ import annotations

import json
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from graphprune.errors import UsageError
from graphprune.tables import Counts, lines, parse
from graphprune.wording import listed

KEYS = {
    "name",
    "description",
    "minimum",
    "multiple",
    "macs_per_element",
    "fewest_steps",
    "block",
    "whole",
    "latency",
    "latency_command",
    "rates",
    "slow_fusions",
}
MADE = "`graphprune targets measure -o FILE.toml` writes such a file."
SLOW_FUSIONS = {"SkipLayerNormalization"}  # that a pass can keep apart


@dataclass(frozen=True)
class Target:
    """Channel multiples by operator, and the least number of channels a layer keeps. What a target
    says of latency decides instead of this machine: a table, or a command that asks the device."""

    name: str
    description: str = ""
    minimum: int = 1
    multiple: Mapping[str, int] = field(default_factory=dict)
    macs_per_element: float = 0.0  # roofline balance: MACs in the time of one element of traffic
    fewest_steps: int = 1  # a group too narrow for so many steps of the grid takes finer ones
    block: int = 1  # channels in a block of the runtime's layout (``graphprune.layout``)
    whole: tuple[str, ...] = ()  # operators that leave that layout unless blocks are whole
    strict: bool = False  # --round-to: the grid is never made finer
    fixed_minimum: bool = False  # --min-channels: the minimum is never lowered
    latency: Mapping[str, Mapping[Counts, float]] = field(default_factory=dict)  # microseconds
    latency_command: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)  # MACs per microsecond, by operator
    slow_fusions: tuple[str, ...] = ()  # what ONNX Runtime fuses into slower kernels, kept apart

    def multiple_of(self, operator: str) -> int:
        return self.multiple.get(operator, self.multiple.get("default", 1))

    @property
    def finest(self) -> bool:
        lowest = self.minimum == 1 or self.fixed_minimum
        return lowest and self.block == 1 and all(step == 1 for step in self.multiple.values())

    def halved(self) -> Target:
        """The same target with half as wide steps, for models too small for its grid."""
        steps = {operator: max(1, step // 2) for operator, step in self.multiple.items()}
        least = self.minimum if self.fixed_minimum else max(1, self.minimum // 2)
        return replace(self, multiple=steps, minimum=least, block=max(1, self.block // 2))

    def __str__(self) -> str:
        steps = ", ".join(f"{k} {v}" for k, v in self.multiple.items())
        return f"{self.name}: {self.description} (multiples: {steps}; at least {self.minimum})"


def builtin() -> dict[str, Target]:
    """The targets that ship as data files, by name."""
    folder = resources.files("graphprune") / "hardware"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    found = [_parse(f.read_text(), f.name) for f in files]
    return {target.name: target for target in found}


def choose(
    known: Mapping[str, Target], name: str, round_to: int | None = None, minimum: int | None = None
) -> Target:
    """The target of that name, of that TOML file, or ``auto``: what this CPU is."""
    if name == "auto":
        target = known[detect()]
    elif name in known:
        target = known[name]
    elif name.endswith(".toml"):
        target = _read(Path(name))
    else:
        raise UsageError(
            f"there is no hardware target {name!r}",
            hint=f"One of auto, {', '.join(known)}, or a .toml file.",
        )
    if round_to is not None:
        name = f"{target.name} rounded to {round_to}"
        target = replace(target, name=name, multiple={"default": round_to}, block=1, strict=True)
    if minimum is not None:
        target = replace(target, minimum=minimum, fixed_minimum=True)
    return target


def detect() -> str:
    """Name of the built-in target for this machine's CPU."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "cpu-neon"
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    if {"avx512f", "avx512bw", "avx512vl"} <= set(flags):
        return "cpu-avx512"
    if "avx2" in flags or platform.machine().lower() in ("x86_64", "amd64"):
        return "cpu-avx2"
    return "generic"


def _read(path: Path) -> Target:
    try:
        return _parse(path.read_text(), str(path))
    except OSError as error:
        cause = f"cannot read the target file: {error.strerror}"
        raise UsageError(cause, str(path), MADE) from error
    except UnicodeDecodeError as error:
        raise UsageError("the target file is not text", str(path), MADE) from error


def _parse(text: str, where: str) -> Target:
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the target file is not TOML: {error}", where, MADE) from error
    unknown = set(data) - KEYS
    if unknown:
        raise UsageError(
            f"unknown keys in the target file: {listed(sorted(unknown))}",
            where,
            f"Known: {listed(sorted(KEYS))}.",
        )
    multiple = data.get("multiple", {})
    if not isinstance(multiple, dict):
        hint = "Such as: [multiple], then default = 8 and Conv = 32."
        raise UsageError("`multiple` must be a table of operators", where, hint)
    fewest = data.get("fewest_steps", 1)
    block, whole = data.get("block", 1), data.get("whole", [])
    numbers = [*multiple.values(), data.get("minimum", 1), fewest, block]
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise UsageError("`whole` must be a list of operators", where, 'Such as ["Concat"].')
    balance = data.get("macs_per_element", 0.0)
    if type(balance) not in (int, float) or balance < 0:
        hint = "With 0, or without it, MACs alone count."
        raise UsageError("macs_per_element must be a number from 0 on", where, hint)
    if not all(type(v) is int and v >= 1 for v in numbers):
        raise UsageError(
            "multiples, minimum, fewest_steps and block must be whole numbers from 1 on",
            where,
            "With 1, or without it, there is no such limit.",
        )
    fusions = data.get("slow_fusions", [])
    if not isinstance(fusions, list) or not set(map(str, fusions)) <= SLOW_FUSIONS:
        raise UsageError("unknown slow_fusions", where, f"Known: {listed(sorted(SLOW_FUSIONS))}.")
    rates = data.get("rates", {})
    if not isinstance(rates, dict) or not all(
        type(rate) in (int, float) and rate > 0 for rate in rates.values()
    ):
        hint = "Such as: [rates], then Conv = 20000.0."
        raise UsageError("`rates` must be a table of MACs per microsecond, above 0", where, hint)
    command = data.get("latency_command", "")
    if not isinstance(command, str):
        hint = 'Such as "ssh board time-onnx".'
        raise UsageError("latency_command must be a text", where, hint)
    return Target(
        str(data.get("name", Path(where).stem)),
        str(data.get("description", "")),
        data.get("minimum", 1),
        multiple,
        float(balance),
        fewest,
        block,
        tuple(whole),
        latency=parse(data.get("latency", []), where),
        latency_command=command,
        slow_fusions=tuple(fusions),
        rates={str(operator): float(rate) for operator, rate in rates.items()},
    )


def as_toml(target: Target) -> str:
    """The target as a file that ``--target-hardware`` takes."""
    said = [
        f"name = {json.dumps(target.name)}",
        f"description = {json.dumps(target.description)}",
        f"minimum = {target.minimum}",
        f"fewest_steps = {target.fewest_steps}",
        f"macs_per_element = {target.macs_per_element:g}",
        f"slow_fusions = {json.dumps(list(target.slow_fusions))}",
        f"block = {target.block}",
        f"whole = {json.dumps(list(target.whole))}",
        *(
            [f"latency_command = {json.dumps(target.latency_command)}"]
            * bool(target.latency_command)
        ),
        "",
        "[multiple]",
        *(f"{json.dumps(operator)} = {step}" for operator, step in target.multiple.items()),
        "",
        "[rates]  # MACs per microsecond, for what is not in the table",
        *(f"{json.dumps(operator)} = {rate:.6g}" for operator, rate in target.rates.items()),
        "",
        *lines(target.latency),
    ]
    return "\n".join(said)

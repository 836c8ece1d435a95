"""What a user may ask of a pruning, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from graphprune.analysis import Scope
from graphprune.coupling import USUAL_UNITS
from graphprune.criteria import Criterion, Scoring
from graphprune.errors import UsageError
from graphprune.outside.masks import RESOLVE
from graphprune.plugins import Registry
from graphprune.shapes import Shape

REFINE_STEPS = 80  # where the user gives samples
SPREADS = ("auto", "solved", "balanced", "global", "uniform")


# What is easily given in another form than is taken: option, types, how it is given.
FORMS: tuple[tuple[str, Any, str], ...] = (
    ("calib", str | Path, "the path of an .npz file (numpy.savez writes one) or of a folder"),
    ("eval_data", str | Path, "the path of an .npz file, or module:function"),
    ("input_shapes", Mapping, "sizes by graph input: {'x': (1, 3, 224, 224)}"),
)


@dataclass(frozen=True)
class Options:
    """Everything that decides a plan, then everything that decides how it is checked.

    Budgets are the shares of the original's MACs, parameters, file size, peak activation memory and
    latency that may remain, or milliseconds.
    """

    flops: float | None = None
    params: float | None = None
    size: float | None = None
    peak_memory: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    max_drop: float | None = None
    criterion: str | None = None  # obspa; l1 where fast
    scores: Path | None = None  # instead of a criterion
    masks: Path | None = None  # instead of a criterion and of budgets
    resolve: str | None = None  # error, where masks disagree
    aligned: bool = True  # positions in groups, before the analysis
    repair: str | None = None  # obs; moments where fast
    refine: int | None = None  # steps by gradient after the repair
    fast: bool = False
    calib: Path | None = None  # None: synthesised inputs
    samples: int | None = None
    preprocess: str | None = None
    memory: float = 4.0  # GB of activations
    search: int = 0
    cache: bool = True
    scoring: Scoring = field(default_factory=Scoring)
    spread: str = "auto"
    hardware: str = "auto"
    round_to: int | None = None
    min_channels: int | None = None
    protect: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    units: tuple[str, ...] = USUAL_UNITS
    input_shapes: Mapping[str, Shape] | None = None
    allow_miss: bool = False
    allow_interface_change: bool = False
    allow_inexact: bool = False
    unconstrained: bool = False
    lossless: bool = True  # what does nothing leaves before anything else
    verify: bool = True
    measure: bool = True
    rounds: int = 21
    threads: int = 1
    provider: str = "cpu"
    eval_data: str | Path | None = None
    max_accuracy_drop: float | None = None
    min_speedup: float | None = None

    @staticmethod
    def of(**given: Any) -> Options:
        """Options by name; one that does not exist is an error that names those that do. ``seed``
        is the one of ``scoring``; what may be several may be one text, as on the command line.

        Raises ``UsageError`` for what has another form than the option.
        """
        if "seed" in given:
            given["scoring"] = replace(given.get("scoring", Scoring()), seed=given.pop("seed"))
        for name in ("units", "protect", "only"):
            if isinstance(given.get(name), str):
                given[name] = tuple(given[name].split(",")) if name == "units" else (given[name],)
        for name, form, so in FORMS:
            if not isinstance(given.get(name), form | None):
                raise UsageError(f"{name} is a {type(given[name]).__name__}", hint=f"Give {so}.")
        known = [f.name for f in fields(Options)]
        for name in given:
            if name not in known:
                raise UsageError(
                    f"there is no option {name!r}", hint=f"One of: {', '.join(known)}."
                )
        if str(given.get("calib")) == "none":  # the word for what is the default
            given["calib"] = None
        return Options(**given)

    def check(self) -> None:
        """Refuse combinations that contradict each other."""
        asked = self.budgets()
        self._check_outside()
        self.check_gates()
        if self.timed and (self.latency_ms is not None) == (self.latency is not None):
            raise UsageError(
                "a latency is asked for twice", hint="Give --target-latency or --target-latency-ms."
            )
        if self.latency_ms is not None and not self.latency_ms > 0:
            raise UsageError(
                f"--target-latency-ms is {self.latency_ms!r}", hint="Give one above 0."
            )
        if self.timed and not self.measure:
            raise UsageError(
                "a latency budget is held against a measurement", hint="Leave out --no-measure."
            )
        if self.max_drop is not None and (asked or not self.max_drop > 0):
            raise UsageError(
                f"--max-drop {self.max_drop:g} finds the smallest model itself, for a drop above 0",
                hint="Leave out the budgets (--target-flops and others).",
            )
        if self.search and self.spread not in ("auto", "solved"):
            raise UsageError(
                f"--search compares solved plans, and --spread {self.spread} ranks",
                hint="Leave out one of them.",
            )
        if self.refine and self.unbudgeted:
            raise UsageError(
                "--refine makes up for what leaves, and without a budget nothing is lost",
                hint="Give a budget (--target-flops and others), or leave out --refine.",
            )
        if self.search and self.unbudgeted:
            raise UsageError(
                "--search compares plans within a budget, and none is given",
                hint="Give a budget (--target-flops and others), or leave out --search.",
            )
        if "ranks" in self.units and (self.fast or self.spread not in ("auto", "solved")):
            raise UsageError(
                "--units ranks weighs layers of lower rank by their outputs on calibration inputs",
                hint="Leave out --fast, and --spread but for solved.",
            )
        if "ranks" in self.units and self.unconstrained:
            raise UsageError(
                "--units ranks and --unconstrained do not work together: a plan weighs channels "
                "against one of them",
                hint="Prune with one of them, then the result with the other.",
            )
        seen = self.calib is not None or self.preprocess is not None
        if self.fast and (seen or self.search or self.spread == "solved"):
            raise UsageError(
                "--fast looks at weights alone",
                hint="Leave out --calib, --preprocess, --search, --spread solved.",
            )
        if self.preprocess is not None and str(self.calib).lower().endswith(".npz"):
            raise UsageError(
                "--preprocess says how pictures become inputs, and the arrays of an .npz file are "
                "inputs already",
                hint="Leave out --preprocess, or give a folder of pictures (--calib FOLDER).",
            )

    def check_gates(self) -> None:
        """What gates hold a result against must be measured."""
        if self.max_accuracy_drop is not None and self.eval_data is None:
            raise UsageError(
                "--max-accuracy-drop needs labelled data", hint="Give --eval FILE.npz."
            )
        if self.min_speedup is not None and not (self.measure and self.rounds):
            raise UsageError(
                "--min-speedup needs the latency measurement", hint="Leave out --no-measure."
            )

    def _check_outside(self) -> None:
        """Scores and masks decide alone."""
        if self.from_outside and "blocks" in self.units:
            raise UsageError(
                "--scores and --masks say nothing of blocks",
                hint="Leave out blocks of --units, or the file.",
            )
        if self.resolve is not None and self.masks is None:
            raise UsageError("--resolve says what masks mean", hint="Give --masks FILE.npz.")
        if self.resolve not in (None, *RESOLVE):
            raise UsageError(
                f"--resolve {self.resolve!r} is unknown", hint=f"One of: {', '.join(RESOLVE)}."
            )
        given = {"--criterion": self.criterion, "--scores": self.scores, "--masks": self.masks}
        named = [option for option, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} would both decide", hint="Leave one out.")
        if self.masks is None:
            return
        also = {
            "a budget": bool(self.budgets()) or self.timed or self.max_drop is not None,
            "--search": self.search > 0,
            "--units ranks": "ranks" in self.units,
            "--spread": self.spread != "auto",
            "--round-to": self.round_to is not None,
            "--min-channels": self.min_channels is not None,
            "--allow-miss": self.allow_miss,
        }
        named = [option for option, value in also.items() if value]
        if named:
            raise UsageError(
                f"masks say themselves what leaves, and {', '.join(named)} would decide it too",
                hint="Leave out one of them; with a budget, give --scores instead.",
            )

    def budgets(self) -> dict[str, float]:
        """Kind of cost → share that may remain."""
        asked = {
            "macs": self.flops,
            "params": self.params,
            "bytes": self.size,
            "memory": self.peak_memory,
            "latency": self.latency,
        }
        budgets = {kind: share for kind, share in asked.items() if share is not None}
        for kind, share in budgets.items():
            if not isinstance(share, int | float) or not 0 < share <= 1:
                raise UsageError(
                    f"the {kind} budget is {share!r}", hint="A budget is a share in (0, 1]."
                )
        decided = self.max_drop is not None or self.masks is not None
        alone = self.lossless and self.scores is None
        if not (budgets or decided or alone) and self.latency_ms is None:
            raise UsageError(
                "no budget is given",
                hint="Say how much may remain, for example --target-flops 0.5.",
            )
        if self.spread not in SPREADS:
            raise UsageError(
                f"--spread {self.spread!r} is unknown", hint=f"One of: {', '.join(SPREADS)}."
            )
        return budgets

    @property
    def unbudgeted(self) -> bool:
        """Whether nothing is asked for but the lossless clean-up."""
        shares = (self.flops, self.params, self.size, self.peak_memory, self.latency)
        others = (self.max_drop, self.latency_ms, self.scores, self.masks)
        return all(value is None for value in (*shares, *others))

    @property
    def timed(self) -> bool:
        """Whether a budget is on latency."""
        return self.latency is not None or self.latency_ms is not None

    @property
    def from_outside(self) -> bool:
        """Whether a file decides instead of a criterion."""
        return self.scores is not None or self.masks is not None

    @property
    def criterion_name(self) -> str:
        if self.unbudgeted:  # nothing is chosen
            return self.criterion or "l1"
        if self.scores is not None:
            return f"scores {Path(self.scores).name}"
        if self.masks is not None:
            return f"masks {Path(self.masks).name}"
        return self.criterion or ("l1" if self.fast else "obspa")

    @property
    def repair_name(self) -> str:
        if self.unbudgeted:  # nothing is lost
            return self.repair or "none"
        return self.repair or ("moments" if self.fast else "obs")

    @property
    def refine_steps(self) -> int:
        """Steps by gradient after the repair; inputs that are made up do not always pay for them
        (docs/accuracy.md)."""
        if self.refine is not None:
            return self.refine
        own = self.calib is not None and not self.unbudgeted
        return REFINE_STEPS if own and self.repair_name == "obs" else 0

    @property
    def by_weights(self) -> str:
        """The options that may be why nothing looks at inputs."""
        given = {
            "--fast": self.fast,
            "--scores": self.scores is not None,
            "--masks": self.masks is not None,
            f"--criterion {self.criterion}": self.criterion is not None,
            f"--repair {self.repair}": self.repair is not None,
        }
        return " and ".join(option for option, there in given.items() if there)

    def criterion_of(self, registry: Registry) -> Criterion:
        """What scores; of a file only how its numbers are lifted to units."""
        name = self.criterion_name
        return Criterion(name) if self.from_outside else registry.criterion(name)

    def needs_inputs(self, registry: Registry) -> bool:
        """Whether the model must be seen at work: for the criterion, or for the repair."""
        criterion, name = self.criterion_of(registry), self.repair_name
        names = [self.criterion_name] if criterion.needs_inputs else []
        names += [name] if name != "none" and registry.repair(name).needs_inputs else []
        names += ["--refine"] if self.refine_steps else []
        names += ["--units ranks"] if "ranks" in self.units else []
        names += ["--unconstrained"] if self.unconstrained and self.masks is None else []
        if self.fast and names:
            raise UsageError(
                f"--fast looks at weights alone; {' and '.join(names)} at inputs",
                hint="Leave out --fast, or choose others (`graphprune prune --help`).",
            )
        looked_at = {"--calib": self.calib, "--preprocess": self.preprocess}
        given = " and ".join(name for name, value in looked_at.items() if value is not None)
        if self.unbudgeted and not names and given:
            raise UsageError(
                f"without a budget nothing looks at {given}",
                hint="Give a budget (--target-flops and others), or leave it out.",
            )
        if not names and given:
            raise UsageError(
                f"neither criterion {self.criterion_name} nor repair {name} looks at {given}",
                hint="Leave it out, or leave out --criterion or --repair.",
            )
        return bool(names)

    def plans_by_inputs(self, registry: Registry) -> bool:
        """Whether inputs are looked at for more than to compare finished plans."""
        plain = replace(self, unconstrained=False, calib=None, preprocess=None)
        return plain.needs_inputs(registry)

    @property
    def keeps_means(self) -> bool:
        """Whether experts may leave their means behind: a repair on inputs finds them."""
        repaired = self.repair_name == "obs" and not self.unconstrained
        return "experts" in self.units and repaired and not self.from_outside

    @property
    def scope(self) -> Scope:
        return Scope(
            self.protect,
            self.only,
            self.input_shapes,
            self.units,
            self.allow_interface_change,
            self.allow_inexact,
            self.aligned and self.masks is None,  # masks speak of positions as they are
            self.lossless and not self.from_outside,  # files speak of the model as it is
            self.keeps_means,
        )

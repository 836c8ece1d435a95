"""A loaded model in the normal form that is analysed, and what was installed around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from graphprune.analysis import Analysis, Scope
from graphprune.cache import Cache
from graphprune.cleaned import Cleaned
from graphprune.control import regions
from graphprune.cost import Costs, count_params
from graphprune.errors import UsageError
from graphprune.latency.predict import Latency
from graphprune.linear import repairable
from graphprune.model import Model, label
from graphprune.pipeline import Carry, Change, Context, Pass, Pipeline, as_they_are
from graphprune.plugins import Registry, collect, installed
from graphprune.spelling import spelled
from graphprune.storage import load, source_bytes
from graphprune.wording import counted

NO_CACHE = Cache(None)
NOT_CLEANED = Cleaned()
KEEPS_APART = {"SkipLayerNormalization": "part_norms"}  # fusion → the pass that prevents it
# What passes say that they change where weights move or nodes are others.
REWRITES = ("positions", "weight", "sequence", "sum")


@dataclass(frozen=True)
class Prepared:
    """The model as given, its normal form under analysis, and what plug-ins offer."""

    original: Model
    analysis: Analysis
    context: Context
    registry: Registry
    original_bytes: int
    cache: Cache = NO_CACHE
    latency: Latency | None = None  # predicts milliseconds, where a budget is on them
    moved: bool = False  # whether weights were rewritten on the way to the normal form
    carry: Carry = as_they_are  # the same way for arrays that belong to weights
    unconstrained: bool = False  # whether readers of shared channels have selectors
    cleaned: Cleaned = NOT_CLEANED  # what left without loss
    uncleaned: Costs | None = None  # what the model cost before that
    given: Analysis | None = None  # before layers became two, where some did
    changes: tuple[Change, ...] = ()  # that made them two

    @property
    def before(self) -> Costs:
        """What the model costs as it was given. Its parameters are counted as they are stored: the
        normal form may hold a weight twice, for each of two readers."""
        found = self.uncleaned
        if found is None:
            analysis = self.given or self.analysis
            found = analysis.cost.of(analysis.nothing_removed)
        return replace(found, params=self.stored)

    @cached_property
    def stored(self) -> float:
        """Parameters of the model as it was given."""
        return count_params(self.original)

    @property
    def left(self) -> Costs:
        """What it costs as it is analysed: without what left without loss."""
        found = self.analysis.cost.of(self.analysis.nothing_removed)
        params = count_params(self.analysis.model) if self.cleaned else self.stored
        return replace(found, params=params)

    @property
    def expert_notes(self) -> list[str]:
        """What the report says of experts whose means stay."""
        count = len(self.analysis.relations.weighed)
        said = "of experts that leave, the router's place and their mean outputs stay"
        return [f"{said}: {count} mixture(s)"] if count else []

    @property
    def unknown_notes(self) -> list[str]:
        """What the report says of operators without a rule."""
        return [
            f"no rule for {name}: {counted(len(nodes), 'node')} pinned, first {nodes[0]!r}"
            for name, nodes in sorted(self.analysis.relations.unknown.items())
        ]

    @property
    def notes(self) -> list[str]:
        """What the report says of the model itself."""
        notes = [*self.original.notes, *self.unknown_notes, *self.cleaned.notes]
        notes += self.expert_notes
        if "blocks" in self.context.scope.units and not (self.analysis.coupling.blocks >= 0).any():
            kept = "those there are must stay" if self.analysis.blocks else "there are none"
            notes.append(f"--units blocks: no residual block may leave: {kept}")
        return notes

    @property
    def whole(self) -> dict[str, float]:
        """What the user's model costs: budgets are shares of that, whatever leaves without loss."""
        costs = self.before
        whole = {"macs": costs.macs, "params": costs.params, "memory": costs.memory}
        return {**whole, "bytes": self.original_bytes}

    @property
    def quantised_notes(self) -> list[str]:
        """What the report says where calibration inputs repair: these operators they do not."""
        relations = self.analysis.relations
        constants = self.analysis.model.constant_names
        plain = spelled(self.analysis.model)
        repaired = {plain.node(linear.node) for linear in repairable(plain.model)}
        whole = relations.quantised.keys() | relations.dequantised.keys()
        nodes = {
            contraction.node
            for contraction in relations.contractions
            if self.analysis.model.nodes[contraction.node].input[contraction.input]
            in whole & constants
        } - repaired
        if not nodes:
            return []
        return [
            counted(
                len(nodes),
                "operator with quantised weights is not repaired",
                "operators with quantised weights are not repaired",
            )
        ]

    @property
    def body_notes(self) -> list[str]:
        """What the report says of bodies where calibration inputs decided and repaired the rest."""
        model, coupling = self.analysis.model, self.analysis.coupling
        free = {a.tensor for a in coupling.parameters if (coupling.unit_of(a.slots) >= 0).any()}
        inside = [
            node
            for node, bodies in zip(model.nodes, regions(model.nodes), strict=True)
            if bodies and free.intersection(node.input)
        ]
        if not inside:
            return []
        return [
            f"{counted(len(inside), 'node')} with weights inside bodies of control flow, first "
            f"{label(inside[0])!r}: scored by weights alone and not repaired"
        ]

    def apart(self, fusions: object) -> tuple[Pass, ...]:
        """Passes that keep apart what ONNX Runtime would fuse into slower kernels. Raises
        ``UsageError`` where a plan names anything else."""
        if not isinstance(fusions, list | tuple) or any(
            name not in [*KEEPS_APART] for name in fusions
        ):
            raise UsageError(
                f"the plan's slow_fusions are {str(fusions)[:100]}",
                hint=f"Known: {', '.join(KEEPS_APART)}. Make a new plan.",
            )
        return tuple(self.registry.passes[KEEPS_APART[name]]() for name in fusions)

    def folded(self, model: Model) -> Model:
        """``model`` with BatchNormalization folded where that is exact; names stay. Bodies are in
        their place: calibration and repair run parts of the graph."""
        return self.registry.passes["fold_batch_norm"]().run(model, self.context).model.closed


def registry() -> Registry:
    """What all installed plug-ins offer."""
    return collect(installed())


def prepare(
    model: str | Path | onnx.ModelProto, scope: Scope | None = None, offered: Registry | None = None
) -> Prepared:
    """Load a model, bring constants into one form, and analyse it."""
    original = load(model)
    return analyse(original, source_bytes(model, original), scope, offered)


def analyse(
    original: Model,
    original_bytes: int,
    scope: Scope | None = None,
    offered: Registry | None = None,
    cache: Cache | None = None,
) -> Prepared:
    """As ``prepare``, from a loaded model."""
    offered = offered or registry()
    for name, shape in ((scope.input_shapes if scope else None) or {}).items():
        if min(shape, default=1) < 1:
            cause = f"--input-shape {list(shape)} has a size below 1"
            raise UsageError(cause, name, "Sizes are 1 or more.")
    known = replace(scope or Scope(), given=tuple(original.nodes))
    context = Context(rules=offered.rules, scope=known)
    done = Pipeline(offered.prepare).run(original, context)
    moved = any(change.what in REWRITES for change in done.changes)
    model, cleaned, uncleaned = done.model, NOT_CLEANED, None
    if context.scope.lossless:
        before = context.analysis(model)  # now, while it is at hand
        clean = offered.passes["clean_up"]().run(model, context)
        cleaned = Cleaned(clean.changes, clean.skipped)
        if clean.modified:
            uncleaned = before.cost.of(before.nothing_removed)
            model, moved = clean.model, True
    if context.scope.means:
        plain = context.analysis(model)
        beside = offered.passes["stand_in_experts"]().run(model, context)
        if beside.modified:
            uncleaned = uncleaned or plain.cost.of(plain.nothing_removed)
            model, moved = beside.model, True
    return Prepared(
        original,
        context.analysis(model),
        context,
        offered,
        original_bytes,
        cache or NO_CACHE,
        moved=moved,
        carry=done.carry,
        cleaned=cleaned,
        uncleaned=uncleaned,
    )

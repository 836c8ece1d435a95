"""Repair by reconstruction: every linear operator downstream of a cut, in topological order, is
solved to give the original's outputs from the inputs that it has now (the asymmetric affine form of
the OBS update, with a ridge towards the sliced weights)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from graphprune.bypass import only_reader, past_blocks, stands_for_sum
from graphprune.frontier import Frontier
from graphprune.interface import reshaped
from graphprune.least_squares import Ridged, best_ridge, error, offset
from graphprune.linear import RECURRENT, Linear, Matrix, repairable, shared
from graphprune.model import Model, captured, label
from graphprune.repair.damage import Damage, Repaired
from graphprune.repair.joint import CONSTANT, Joint, look_ahead
from graphprune.repair.sites import Known, Site, rows_of, site_of, sums_of
from graphprune.repair.turns import Uses, turns
from graphprune.rewriting import as_stored, rewritten, stored
from graphprune.selectors import is_selector
from graphprune.stand_ins import stands_in
from graphprune.statistics import Sums

WIDEST = 12288  # columns of a Gram matrix: a wider operator gets its mean output corrected alone
AFFINE, BIAS = "affine", "bias"
NO_BIAS = "it takes no bias"
STEPS_DIFFER = "the mean of a recurrent operator's gates is that of none of its steps"
ROOM = 1 << 30  # bytes of Gram matrices that wait for further uses of their weights


@dataclass(frozen=True)
class Solved:
    """New weights of an operator, and the bias of each of its uses that has been seen."""

    matrix: Matrix
    biases: Sequence[Matrix]
    report: Repaired


def reconstruct(damage: Damage, form: str = AFFINE) -> tuple[Model, tuple[Repaired, ...]]:
    """The pruned model with repaired weights, and what each repair did.

    ``form`` is "affine" (weights and bias) or "bias" (mean outputs alone).
    """
    work = with_biases(damage.pruned, _operators(damage.pruned))
    dirty = dirty_tensors(damage.original, work)
    several = [
        uses
        for uses in _operators(work)
        if any(_in_reach(damage, work, dirty, linear) for linear in uses)
    ]
    todo = turns(work, several)
    originals = {linear.weight: linear for linear in repairable(damage.original)}
    before = Frontier(damage.original, damage.feeds, damage.memory / 2)
    after = Frontier(work, damage.feeds, damage.memory / 2)
    left = {linear.node for uses in todo for linear in uses}
    joints = {
        uses[0].weight: Joint(uses[0].matrix(work), len(uses)) for uses in several if len(uses) > 1
    }
    waiting = {uses[0].weight for uses in todo if len(uses) == 1 and uses[0].weight in joints}
    too_wide = _too_wide({weight: joints[weight] for weight in sorted(waiting)})
    ahead = [
        (linear, joints[linear.weight])
        for uses in todo
        for linear in uses
        if linear.weight in waiting - too_wide and form == AFFINE
    ]
    look_ahead(damage, ahead)
    found: dict[str, Solved] = {}
    seen: dict[str, list[int]] = {}  # weight → the nodes that its biases are of
    targets = set[str | None]()
    for number, uses in enumerate(todo):
        damage.progress(number / len(todo))
        first = uses[0]
        if form == BIAS and first.kind in RECURRENT:
            why = Repaired(label(work.nodes[first.node]), f"not repaired: {STEPS_DIFFER}")
            found[first.weight] = Solved(np.empty(0), (), why)
            left.discard(first.node)
            continue
        sites = [site_of(work, damage.shapes.shape, k, after, left, originals) for k in uses]
        before.advance([site.target or site.linear.x for site in sites])
        if not first.reverse:
            after.advance([n for s in sites for n in (s.linear.x, s.stream) if n is not None])
        targets.update(site.target for site in sites)
        plain = form == BIAS or first.weight in too_wide
        if first.weight in joints:
            found[first.weight] = _jointly(
                damage, work, sites, before, after, plain, joints[first.weight]
            )
        else:
            found[first.weight] = _repaired(damage, work, sites[0], before, after, plain)
        done = found[first.weight]
        for linear, bias in zip(uses, done.biases[-len(uses) :], strict=True):
            after.weights |= stored(work, (linear, done.matrix, bias), after.weights)
            left.discard(linear.node)
            seen.setdefault(linear.weight, []).append(linear.node)
    final = [
        (linear, found[linear.weight].matrix, found[linear.weight].biases[place])
        for uses in _operators(damage.pruned)  # in node order, as in ``work``
        for linear, place in zip(uses, np.argsort(seen.get(uses[0].weight, [])), strict=False)
    ]
    reports = [solved.report for solved in found.values()]
    return rewritten(damage.pruned, final), (*reports, *_not_replaced(work, targets))


def _operators(model: Model) -> list[Uses]:
    """All that can be repaired, those that share their weights together."""
    return [*((linear,) for linear in repairable(model)), *shared(model)]


def _in_reach(damage: Damage, work: Model, dirty: set[str], linear: Linear) -> bool:
    """Whether the cut has changed what the operator reads, or what is to be matched behind it."""
    if linear.x in dirty and not _keeps_all(damage, linear):
        return True
    return _beside_dirty(work, dirty, linear) or _before_block(work, linear)


def _not_replaced(model: Model, targets: set[str | None]) -> list[Repaired]:
    """Of the blocks that have left, those that nothing stands in for."""
    why = "not replaced: no linear operator ends right before the block that was removed"
    gone = [node for node in model.nodes if stands_for_sum(node)]
    ends = [past_blocks(model, node.output[0]) for node in gone]
    return [
        Repaired(label(n), why) for n, end in zip(gone, ends, strict=True) if end not in targets
    ]


def _beside_dirty(work: Model, dirty: set[str], linear: Linear) -> bool:
    """Whether this stands in for some of what it is added to, and some of that has left."""
    if not stands_in(work.nodes[linear.node]) or linear.y is None:
        return False
    sum_ = next((n for n in work.nodes if stands_in(n) and linear.y in n.input), None)
    return sum_ is not None and sum_.input[0] in dirty


def _before_block(model: Model, linear: Linear) -> bool:
    """Whether blocks have left right behind this operator, or behind a sum it is added to."""
    if linear.y is None:
        return False
    reader = only_reader(model, linear.y)
    ends = [linear.y]
    if reader is not None and reader.op_type == "Add" and not reader.domain:
        ends.append(reader.output[0])
    return any(past_blocks(model, name) != name for name in ends)


def _keeps_all(damage: Damage, linear: Linear) -> bool:
    """Whether these are recurrent weights that read all the states they ever did: from the
    original's states, as they are repaired, nothing is to be gained."""
    if not linear.reverse:
        return False
    states = damage.coupling.relations.slots.tensors[linear.weight][linear.contracted_axis]
    return bool(damage.alive[states.slots].all())


def with_biases(model: Model, operators: Sequence[Uses] | None = None) -> Model:
    """The model with a bias of zeros in every linear operator that has none: all that have weights
    of their own, unless some are named."""
    mine = [(one,) for one in repairable(model)] if operators is None else operators
    bare = [linear for uses in mine for linear in uses if linear.bias is None and linear.affine]
    matrices = [linear.matrix(model) for linear in bare]
    zeros = [np.zeros(matrix.shape[:2]) for matrix in matrices]
    return rewritten(model, list(zip(bare, matrices, zeros, strict=True)))


def dirty_tensors(original: Model, pruned: Model) -> set[str]:
    """Tensors of ``pruned`` that a weight or a graph input of another shape reaches, or a sum that
    a block has left."""
    changed = {
        name
        for name, tensor in pruned.initializers.items()
        if name in original.initializers and original.initializers[name].dims != tensor.dims
    }
    changed.update(ends.name for ends in reshaped(original, pruned) if ends.side == "input")
    for node in pruned.nodes:
        if is_selector(node) and node.input[1] not in original.initializers:  # reads fewer
            changed.add(node.output[0])
        if stands_for_sum(node):
            changed.add(node.output[0])
        if changed.intersection(node.input) or changed & captured(node):
            changed.update(name for name in node.output if name)
    return changed


def _repaired(
    damage: Damage, work: Model, site: Site, before: Frontier, after: Frontier, plain: bool
) -> Solved:
    """Weights and bias of one operator, and how much nearer to the original they come; the bias
    alone where that is to be ``plain``."""
    linear = site.linear
    weights = linear.matrix(work)
    old = linear.offset(work, weights.shape[0] * weights.shape[1])
    name = label(work.nodes[linear.node])
    plain = plain or weights.shape[2] > WIDEST
    if plain and not linear.affine:
        return Solved(weights, (old,), Repaired(name, f"not repaired: {NO_BIAS}"))
    if plain:
        means = _mean_error(damage, site, before, after, weights, old)
        return Solved(weights, (old + means,), Repaired(name, "bias"))
    fit, held = sums_of(damage, site, before, after)
    centred = Sums.centred if linear.affine else Sums.about_zero
    everything = centred(fit.merged(held))
    ridge = best_ridge(centred(fit), centred(held), weights)
    inputs = Ridged(everything, ridge)
    matrix, bias = inputs.solved(everything, weights)
    errors: tuple[float | None, float | None] = None, None
    scale = float(everything.tt.sum())
    if scale > CONSTANT * float(np.square(everything.mean_t).sum()):
        errors = (
            error(everything, weights, old) / scale,
            error(everything, matrix, bias) / scale,
        )
    if site.rectified:  # what lies below zero on both sides does not count: solve once more
        relaxed = sums_of(damage, site, before, after, (matrix, bias))
        both = replace(centred(relaxed[0].merged(relaxed[1])), xx=everything.xx)
        matrix, bias = inputs.solved(both, weights)
        everything = both
    rounded = as_stored(work, linear, stored(work, (linear, matrix, bias)))
    if rounded is not None:  # what rounding adds to the mean, the bias takes away
        bias = offset(everything, rounded)
    return Solved(matrix, (bias,), Repaired(name, f"ridge {ridge:g}", *errors))


def _jointly(
    damage: Damage,
    work: Model,
    sites: Sequence[Site],
    before: Frontier,
    after: Frontier,
    plain: bool,
    joint: Joint,
) -> Solved:
    """As ``_repaired``, for uses of one weight, together with those that ``joint`` has seen."""
    first, weights = sites[0].linear, joint.weights
    olds = [site.linear.offset(work, weights.shape[0] * weights.shape[1]) for site in sites]
    uses = [i for i, _ in work.consumers[first.weight]]
    known = partial(Repaired, label(work.nodes[uses[0]]), weight=first.weight, uses=len(uses))
    if plain or weights.shape[2] > WIDEST:
        for site, old in zip(sites, olds, strict=True):
            means = _mean_error(damage, site, before, after, weights, old)
            joint.biases.append(old + means)
        return Solved(weights, tuple(joint.biases), known("bias"))
    matrix = joint.add(damage, sites, olds, before, after)
    return Solved(matrix, tuple(joint.biases), known(f"ridge {joint.ridge:g}", *joint.errors))


def _too_wide(joints: Mapping[str, Joint]) -> set[str]:
    """Of weights whose Gram matrices wait for further uses, those for which there is no room."""
    left, found = ROOM, set()
    for weight, joint in sorted(joints.items(), key=lambda item: item[1].weights.shape[2]):
        groups, _, columns = joint.weights.shape
        left -= 6 * 8 * groups * columns**2
        if left < 0:
            found.add(weight)
    return found


def _mean_error(
    damage: Damage, site: Site, before: Known, after: Known, weights: Matrix, bias: Matrix
) -> Matrix:
    """How far the mean outputs are below the targets' means: [groups, out]."""
    total, count = np.zeros(bias.shape), 0
    narrow = weights.astype(np.float32).transpose(0, 2, 1)
    for chunk in range(after.chunks):
        for x, targets, _ in rows_of(damage, site, before, after, chunk):
            total += (targets - x @ narrow).sum(axis=1, dtype=np.float64)
            count += x.shape[1]
    return total / max(count, 1) - bias

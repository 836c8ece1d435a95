"""Repair by reconstruction: every linear operator downstream of a cut, in topological order, is
solved to give the original's outputs from the inputs that it has now (algorithms: OBS update,
asymmetric form)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphprune.coupling import Coupling, Mask
from graphprune.frontier import Frontier
from graphprune.linear import Linear, Matrix, inputs_at, linears, positions, rewritten
from graphprune.model import Array, Model, label
from graphprune.oracle import sliced
from graphprune.repair.solve import best_ridge, error, offset, solved
from graphprune.runtime import Feeds
from graphprune.statistics import Sums, chunk_rows

HELD_OUT = 5  # every fifth chunk chooses the ridge


@dataclass(frozen=True)
class Repaired:
    """One operator's repair: squared error of its output before and after, per variance."""

    node: str
    ridge: float
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.node}: {self.before:.3g} -> {self.after:.3g} (ridge {self.ridge:g})"


def reconstruct(
    original: Model,
    pruned: Model,
    dtypes: Mapping[str, int],
    coupling: Coupling,
    alive: Mask,
    feeds: Sequence[Feeds],
    *,
    memory: float = 4e9,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Model, tuple[Repaired, ...]]:
    """``pruned`` with repaired weights, and what each repair did.

    ``dtypes`` covers the tensors of both models; tensors keep their names in ``pruned``.
    """
    work = with_biases(pruned)
    todo = [linear for linear in linears(work) if linear.x in dirty_tensors(original, work)]
    before = Frontier(original, dtypes, feeds, memory / 2)
    after = Frontier(work, dtypes, feeds, memory / 2)
    reference = {linear.weight: linear for linear in linears(original)}
    left = {linear.node for linear in todo}
    changed, reports = [], []
    for number, linear in enumerate(todo):
        progress(number / len(todo))
        match = match_point(work, linear, after, left)
        before.advance([linear.x] if linear.y is None else [match[0] if match else linear.y])
        after.advance([linear.x, *match[1:]] if match else [linear.x])
        fit, held = _sums(linear, match, before, after, reference, original, coupling, alive, seed)
        weights = linear.matrix(work)
        everything = fit.merged(held).centred()
        ridge = best_ridge(fit.centred(), held.centred(), weights)
        matrix, bias = solved(everything, weights, ridge)
        reports.append(_report(work, linear, ridge, everything, weights, matrix, bias))
        changed.append((linear, matrix, bias))
        after.weights |= rewritten(work, [changed[-1]]).initializers
        left.discard(linear.node)
    by_weight = {linear.weight: linear for linear in linears(pruned)}
    final = [(by_weight[linear.weight], matrix, bias) for linear, matrix, bias in changed]
    return rewritten(pruned, final), tuple(reports)


def _report(
    model: Model,
    linear: Linear,
    ridge: float,
    moments: object,
    weights: Matrix,
    matrix: Matrix,
    bias: Matrix,
) -> Repaired:
    from graphprune.statistics import Moments

    assert isinstance(moments, Moments)
    variance = max(float(moments.tt.sum()), 1e-30)
    old = linear.offset(model, weights.shape[0] * weights.shape[1])
    return Repaired(
        label(model.nodes[linear.node]),
        ridge,
        error(moments, weights, old) / variance,
        error(moments, matrix, bias) / variance,
    )


def with_biases(model: Model) -> Model:
    """The model with a bias of zeros in every linear operator that has none."""
    bare = [linear for linear in linears(model) if linear.bias is None]
    changes = []
    for linear in bare:
        matrix = linear.matrix(model)
        changes.append((linear, matrix, np.zeros(matrix.shape[:2])))
    return rewritten(model, changes)


def dirty_tensors(original: Model, pruned: Model) -> set[str]:
    """Tensors of ``pruned`` that a changed weight reaches."""
    changed = {
        name
        for name, tensor in pruned.initializers.items()
        if name in original.initializers and original.initializers[name].dims != tensor.dims
    }
    for node in pruned.nodes:
        if changed.intersection(node.input):
            changed.update(name for name in node.output if name)
    return changed


def match_point(
    model: Model, linear: Linear, after: Frontier, left: set[int]
) -> tuple[str, str] | None:
    """(z, s) where the operator's output y is only added to s, and s is known already: z = y + s.

    Matching z instead of y also corrects what has gone wrong on the other branch, a residual
    stream for instance.
    """
    if linear.y is None or linear.y in model.output_names:
        return None
    readers = model.consumers.get(linear.y, [])
    if len(readers) != 1 or readers[0][1] < 0:
        return None
    node = model.nodes[readers[0][0]]
    if node.op_type != "Add" or node.domain:
        return None
    other = node.input[1 - readers[0][1]]
    if other in model.constant_names or other == linear.y:
        return None
    return (node.output[0], other) if after.reaches(other, left) else None


def _sums(
    linear: Linear,
    match: tuple[str, str] | None,
    before: Frontier,
    after: Frontier,
    reference: Mapping[str, Linear],
    original: Model,
    coupling: Coupling,
    alive: Mask,
    seed: int,
) -> tuple[Sums, Sums]:
    """Sums over the chunks to fit, and over those held out."""
    fit: Sums | None = None
    held: Sums | None = None
    for chunk in range(after.chunks):
        x = after[linear.x][chunk]
        if linear.y is None:
            blocks = _recurrent_rows(linear, x, before[linear.x][chunk], reference, original)
        else:
            name = match[0] if match else linear.y
            target = sliced({name: before[name][chunk]}, coupling, alive)[name]
            if match:
                target = target - after[match[1]][chunk]
            blocks = chunk_rows(linear, x, target, after.chunks, (seed, linear.node, chunk))
        for rows, targets in blocks:
            if fit is None or held is None:
                fit, held = Sums.empty(rows, targets), Sums.empty(rows, targets)
                held.shift_x, held.shift_t = fit.shift_x, fit.shift_t
            (held if chunk % HELD_OUT == HELD_OUT - 1 else fit).add(rows, targets)
    assert fit is not None and held is not None
    return fit, held


def _recurrent_rows(
    linear: Linear, x: Array, x0: Array, reference: Mapping[str, Linear], original: Model
) -> list[tuple[Array, Array]]:
    """Targets of input weights are the gates' inputs that the original computes from its own x."""
    first = reference[linear.weight]
    where = positions(linear, x.shape, x.size, (0,))
    rows0 = inputs_at(first, x0, x0.shape, where)
    matrix = first.matrix(original)
    bias = first.offset(original, matrix.shape[1])
    targets = (rows0 @ matrix.transpose(0, 2, 1) + bias[:, None]).astype(np.float32)
    return [(inputs_at(linear, x, x.shape, where), targets)]


__all__ = ["Repaired", "offset", "reconstruct"]

"""UDFC (arXiv 2308.07209, section 3): a removed channel is a linear combination of kept ones, found
from the producer's weights alone and folded into every consumer."""

from __future__ import annotations

import numpy as np

from graphprune.coupling import Coupling, Mask
from graphprune.linear import CONVOLUTIONS, Linear, Matrix, repairable
from graphprune.model import Model
from graphprune.repair.consumers import (
    Consumer,
    Index,
    channel_axis,
    consumers,
    places_of,
)
from graphprune.repair.damage import Damage, Repaired
from graphprune.rewriting import rewritten
from graphprune.rules.elementwise import BROADCAST, UNARY
from graphprune.shapes import Shapes

OFFSETS = 0.01  # lambda 1: how much a difference of biases weighs beside one of the weights
RIDGE = 1.0  # lambda 2, in units of the kept filters' mean squared norm
TRANSPARENT = {*UNARY, *BROADCAST, "Clip", "CastLike", "Dropout"} | {
    "AveragePool",
    "MaxPool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Resize",
    "Upsample",
    "Flatten",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "QuantizeLinear",
    "DequantizeLinear",
}


class NoProducerError(Exception):
    """The channels that a consumer reads are no rows of one linear operator."""


def compensate(
    damage: Damage, *, offsets: float = OFFSETS, ridge: float = RIDGE
) -> tuple[Model, tuple[Repaired, ...]]:
    """The pruned model with every lost channel's weights folded into those of kept channels.

    s_j = (V_Sᵀ V_S + λ1 b_S b_Sᵀ + λ2 I)⁻¹ (V_Sᵀ v_j + λ1 b_j b_S), with v the filters and b the
    biases of the producer in the original (BatchNormalization folded), and then
    W⁺_{:,i} += Σ_j s_ji W⁺_{:,j}. λ1 is ``offsets``, λ2 is ``ridge`` times the mean squared norm of
    the kept filters.

    Exact where nothing stands between producer and consumer; an activation is passed as if it were
    linear. Consumers of several producers (a residual stream, a gate), of a grouped one, or behind
    a normalisation that could not be folded keep their weights and are reported. With ``ridge``
    near 0 and at least as many kept filters as their length C_in k², each lost filter is fitted
    exactly by large ones that cancel each other, which the activation in between undoes.
    """
    changed, reports = [], []
    model = damage.original
    producers = {linear.y: linear for linear in repairable(model) if linear.y is not None}
    for consumer in consumers(damage):
        try:
            producer = _producer(model, damage.shapes, consumer.linear.x, producers)
            fitted, unexplained = _fitted(damage, consumer, producer, offsets, ridge)
        except NoProducerError as reason:
            reports.append(Repaired(consumer.node, f"not repaired: {reason}"))
            continue
        changed.append(fitted)
        how = f"udfc, {unexplained:.0%} of the lost filters unexplained"
        reports.append(Repaired(consumer.node, how))
    return rewritten(damage.pruned, changed), tuple(reports)


def combinations(
    rows: Matrix, biases: Matrix, kept: Mask, offsets: float, ridge: float
) -> tuple[Matrix, float]:
    """s [lost, kept] of the paper's least squares for ``rows`` [channels, in] and ``biases``
    [channels], and the share of the lost rows' squared norm that it does not explain."""
    vectors = np.column_stack([rows, offsets**0.5 * biases])
    damaged, basis = vectors[~kept], vectors[kept]
    penalty = ridge * np.square(rows[kept]).sum() / len(basis) + np.finfo(np.float64).tiny
    gram = basis @ basis.T + penalty * np.eye(len(basis))
    mixing = np.linalg.solve(gram, basis @ damaged.T).T
    size = max(float(np.square(damaged).sum()), float(np.finfo(np.float64).tiny))
    return mixing, float(np.square(damaged - mixing @ basis).sum()) / size


def _producer(model: Model, shapes: Shapes, name: str, producers: dict[str, Linear]) -> Linear:
    """The one linear operator whose channels reach ``name`` through activations and pooling."""
    found: dict[str, Linear] = {}
    waiting, seen = [name], {name}
    while waiting:
        tensor = waiting.pop()
        if tensor in producers:
            found[producers[tensor].weight] = producers[tensor]
            continue
        if tensor not in model.producer:
            raise NoProducerError("it reads a graph input")
        node = model.nodes[model.producer[tensor]]
        if node.op_type not in TRANSPARENT or node.domain:
            raise NoProducerError(f"{node.op_type} stands between it and its producer")
        for source in filter(None, node.input):
            constant = source in model.constant_names or source in shapes.value
            if constant and node.op_type in BROADCAST and _size(model, shapes, source) > 1:
                raise NoProducerError(f"{node.op_type} by channel stands before it")
            if not constant and source not in seen:
                seen.add(source)
                waiting.append(source)
    if len(found) != 1:
        raise NoProducerError(f"{len(found)} producers")
    producer = next(iter(found.values()))
    if producer.groups > 1:
        raise NoProducerError("a grouped producer: its filters have different inputs")
    return producer


def _size(model: Model, shapes: Shapes, name: str) -> int:
    shape = shapes.shape.get(name)
    return model.array(name).size if shape is None else int(np.prod(shape))


def _fitted(
    damage: Damage, consumer: Consumer, producer: Linear, offsets: float, ridge: float
) -> tuple[tuple[Linear, Matrix, Matrix], float]:
    rows = producer.matrix(damage.original)[0]
    biases = producer.offset(damage.original, len(rows))[0]
    columns = _columns(producer, consumer, damage.coupling, len(rows))
    places, mixing, shift = [], [], []
    worst = 0.0
    for column, kept in zip(columns, consumer.kept, strict=True):
        place = places_of(column, kept)
        if place is None:
            raise NoProducerError("a channel leaves at some positions only")
        channels, lives = column[place[:, 0]], kept[place[:, 0]]
        mix, missed = combinations(rows[channels], biases[channels], lives, offsets, ridge)
        worst = max(worst, missed)
        places.append(place)
        mixing.append(mix)
        shift.append(np.zeros(len(mix)))
    return consumer.folded(places, mixing, shift), worst


def _columns(producer: Linear, consumer: Consumer, coupling: Coupling, channels: int) -> Index:
    """[groups, columns]: the producer's channel that each of the consumer's columns reads.

    What is coupled is the same channel, whatever moved the data in between.
    """
    slots = coupling.relations.slots.tensors
    y, x = slots[producer.y or ""], slots[consumer.linear.x]
    axis = 1 if producer.kind in CONVOLUTIONS else y.rank - 1
    made = coupling.labels[y[axis].slots]
    read = coupling.labels[x[channel_axis(consumer.linear, x.rank)].slots]
    order = np.argsort(made)
    found = order[np.searchsorted(made[order], read).clip(max=len(made) - 1)]
    if len(made) != channels or len(np.unique(made)) != channels or (made[found] != read).any():
        raise NoProducerError("its channels are no rows of one producer")
    grouped: Index = found.reshape(-1, consumer.kept.shape[1])[consumer.groups]
    return grouped

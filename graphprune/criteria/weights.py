"""Criteria that need nothing but the weights (formulas: SPA's table of criteria)."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from graphprune.batch_norm import EPSILON
from graphprune.criteria import Criterion, Part
from graphprune.model import Array
from graphprune.relations import Role

Scores = NDArray[np.float64]


def absolute(weights: Array, axis: int, seed: int) -> Array:
    """|theta|"""
    return np.abs(weights)


def squared(weights: Array, axis: int, seed: int) -> Array:
    """theta^2"""
    return np.square(weights)


def uniform(weights: Array, axis: int, seed: int) -> Scores:
    """A draw from [0, 1) per slot, decided by the seed, the shape and the axis alone."""
    key = zlib.crc32(f"{weights.shape}:{axis}".encode())
    return np.asarray(np.random.default_rng([seed, key]).random(weights.shape[axis]))


def distances(weights: Array, axis: int, seed: int) -> Scores:
    """sum_k ||W_c - W_k||_2: how far a filter is from all others (FPGM, arXiv 1811.00250).

    Distances come from the Gram matrix of the centred filters, in float64, block by block.
    """
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
    rows = rows - rows.mean(axis=0)
    norms = np.square(rows).sum(axis=1)
    result = np.empty(len(rows))
    block = max(1, (1 << 24) // max(len(rows), 1))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        squares = norms[part, None] + norms[None, :] - 2 * rows[part] @ rows.T
        result[part] = np.sqrt(np.maximum(squares, 0)).sum(axis=1)
    return result


def l2_of_parts(parts: list[Part]) -> Scores:
    """All elements of a unit as one vector: its squared norm, for LAMP."""
    return np.asarray(np.sum([part.value for part in parts], axis=0))


def scale_or_rows(parts: list[Part]) -> Scores:
    """|gamma| of the unit's normalisations; where there are none (folded), the producers' L1."""
    scales = [p.value for p in parts if p.role == Role.SCALE]
    rows = [p.value for p in parts if p.role == Role.PRODUCER]
    return np.asarray(np.sum(scales or rows or [p.value for p in parts], axis=0))


def path_saliency(parts: list[Part]) -> Scores:
    """(sum |gamma / sigma| |W_A[c]|) (sum |W_B[:, c]|): everything that flows through a channel
    (after DFPC, arXiv 2203.06909)."""
    scale = np.ones_like(parts[0].value)
    for part in parts:
        if part.role == Role.SCALE:
            scale = scale * part.value
        elif part.role == Role.VARIANCE:
            scale = scale / np.sqrt(part.value + EPSILON)
    produced = [p.value for p in parts if p.role == Role.PRODUCER]
    consumed = [p.value for p in parts if p.role == Role.CONSUMER]
    before = np.sum(produced, axis=0) if produced else 1.0
    after = np.sum(consumed, axis=0) if consumed else 1.0
    return np.asarray(scale * before * after, dtype=np.float64)


ROWS_AND_SCALES = frozenset({Role.PRODUCER, Role.SCALE})

CRITERIA = (
    Criterion("random", uniform, doc="the control: a seeded draw"),
    Criterion("l1", absolute, doc="sum of magnitudes", pointwise=True),
    Criterion("l2", squared, doc="sum of squares", pointwise=True),
    Criterion("fpgm", distances, frozenset({Role.PRODUCER}), doc="distance to the other filters"),
    Criterion(
        "lamp",
        squared,
        combine=l2_of_parts,
        normalise="lamp",
        doc="layer-adaptive magnitude",
        pointwise=True,
    ),
    Criterion(
        "bn-scale",
        absolute,
        ROWS_AND_SCALES,
        scale_or_rows,
        doc="scale of the normalisation",
        pointwise=True,
    ),
    Criterion(
        "dfpc",
        absolute,
        frozenset(Role) - {Role.VECTOR},
        path_saliency,
        doc="path saliency",
        pointwise=True,
    ),
)

"""How far outputs are from the original's, as one number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphprune.model import Array

TINY = 1e-12
LEAST_PROBABILITY = 1e-6


def distortion(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """Mean over the float outputs of the squared error over the variance. Class scores ([rows,
    classes]) count as logits, less each row's mean, which means nothing.

    On pictures it was trained on a classifier is so sure that divergences of its predictions say
    little: errors of logits rank plans better (ResNet-56 at half of its MACs: 80.5 % against 78.1).
    """
    values = [
        _of(a.astype(np.float64), _like(a, b).astype(np.float64))
        for a, b in zip(expected, actual, strict=True)
        if a.dtype.kind == "f" and a.size
    ]
    return float(np.mean(values)) if values else 0.0


def relative_error(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """||a - b|| / ||a|| over all float outputs together."""
    pairs = [
        (a.astype(np.float64), _like(a, b).astype(np.float64))
        for a, b in zip(expected, actual, strict=True)
        if a.dtype.kind == "f"
    ]
    size = sum(float(np.square(a).sum()) for a, _ in pairs)
    return float(np.sqrt(sum(np.square(a - b).sum() for a, b in pairs) / max(size, TINY)))


def agreement(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """Mean share of rows with the same largest score, over the outputs that are class scores
    ([rows, classes]); 1 where none are."""
    shares = [
        float((a.argmax(axis=1) == _like(a, b).argmax(axis=1)).mean())
        for a, b in zip(expected, actual, strict=True)
        if a.dtype.kind == "f" and a.ndim == 2 and a.shape[1] > 1 and len(a)
    ]
    return float(np.mean(shares)) if shares else 1.0


def divergence(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """Mean Kullback-Leibler divergence of the predictions from the expected ones, in nats, over the
    rows of the outputs that are class scores ([rows, classes]); 0 where none are."""
    found = []
    for a, b in zip(expected, actual, strict=True):
        if a.dtype.kind == "f" and a.ndim == 2 and a.shape[1] > 1 and len(a):
            p, q = (_log_probabilities(scores.astype(np.float64)) for scores in (a, _like(a, b)))
            found.append(float((np.exp(p) * (p - q)).sum(axis=1).mean()))
    return float(np.mean(found)) if found else 0.0


def row_errors(expected: Sequence[Array], actual: Sequence[Array]) -> Array:
    """Squared error of every row of the first float output: [rows], in no unit."""
    for a, b in zip(expected, actual, strict=True):
        if a.dtype.kind != "f" or not a.size or not a.ndim:
            continue
        wanted, got = a.astype(np.float64), _like(a, b).astype(np.float64)
        if a.ndim == 2 and a.shape[1] > 1:
            wanted, got = _logits(wanted), _logits(got)
        return np.asarray(np.square(wanted - got).reshape(len(a), -1).mean(axis=1))
    return np.zeros(0)


def _like(expected: Array, actual: Array) -> Array:
    """``actual``, or zeros where it is of another shape: then the data decided how many rows there
    are (detections), and no element of it stands for one of the expected."""
    return actual if actual.shape == expected.shape else np.zeros_like(expected)


def _of(expected: Array, actual: Array) -> float:
    if expected.ndim == 2 and expected.shape[1] > 1:
        expected, actual = _logits(expected), _logits(actual)
    spread = max(float(np.square(expected - expected.mean()).mean()), TINY)
    return float(np.square(expected - actual).mean()) / spread


def _log_probabilities(scores: Array) -> Array:
    logits = _logits(scores)
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def _logits(scores: Array) -> Array:
    """Scores less their row's mean; probabilities (rows that sum to one) by their logarithms."""
    if scores.min() >= 0 and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        scores = np.log(np.maximum(scores, LEAST_PROBABILITY))
    return np.asarray(scores - scores.mean(axis=1, keepdims=True))

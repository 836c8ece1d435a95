"""Criteria that look at the inputs of a unit's consumers: forward passes, no gradients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphprune.criteria import Criterion
from graphprune.criteria.surgeon import Consumer
from graphprune.thin import variances

Scores = NDArray[np.float64]


def _over_columns(consumer: Consumer, values: Scores) -> Scores:
    """Sum of ``values`` [groups, in] over each unit's columns."""
    groups = np.arange(values.shape[0])[None, :, None]
    return np.asarray(values[groups, consumer.columns].sum(axis=(1, 2)))


def wanda(consumer: Consumer) -> Scores:
    """sum_i |W_ij| ||X_j||_2 over the rows i and columns j of a unit (arXiv 2306.11695, eq. 1)."""
    norms = np.sqrt(np.maximum(variances(consumer.covariance) + np.square(consumer.mean), 0))
    found = _over_columns(consumer, np.abs(consumer.weights).sum(axis=1) * norms)
    return found / max(float(found.sum()), 1e-30)  # comparable with its other consumers


def flap(consumer: Consumer) -> Scores:
    """Var(X_j) ||W_:j||^2: what is left of a column once its mean went into the bias
    (arXiv 2312.11983, eq. 6)."""
    squares = np.square(consumer.weights).sum(axis=1)
    return _over_columns(consumer, variances(consumer.covariance) * squares) / consumer.energy


def variance(consumer: Consumer) -> Scores:
    """Var(X_j) alone (variance-based pruning, arXiv 2507.12988)."""
    found = _over_columns(consumer, variances(consumer.covariance))
    return found / max(float(found.sum()), 1e-30)


OBSERVED = (
    Criterion("obspa", greedy=True, doc="second-order error over all consumers, greedily"),
    Criterion("wanda", observed=wanda, doc="magnitude times the norm of what it reads"),
    Criterion("flap", observed=flap, doc="fluctuation of what is read times squared weights"),
    Criterion("variance", observed=variance, doc="variance of what is read"),
)

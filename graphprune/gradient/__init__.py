"""Reverse mode on ONNX graphs: a model becomes one that also computes a gradient of its input.

Only gradients with respect to *inputs* are written: weights are constants, so a network's
backward pass costs about as much as its forward pass. The result is an ordinary ONNX model, and
ONNX Runtime does the arithmetic. Griewank and Walther, Evaluating Derivatives (2008), chapter 3.

Each operator has one vector-Jacobian rule in a flat table (``pointwise``, ``linear``, ``pooling``,
``normalisation``, ``movement``). An operator without one is where the gradient stops, and is
reported by name.
"""

from __future__ import annotations

from graphprune.gradient import linear, movement, normalisation, pointwise, pooling
from graphprune.gradient.reverse import Gradient, Gradients, gradient, gradients

__all__ = [
    "Gradient",
    "Gradients",
    "gradient",
    "gradients",
    "linear",
    "movement",
    "normalisation",
    "pointwise",
    "pooling",
]

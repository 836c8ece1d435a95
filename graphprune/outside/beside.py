"""Arrays that belong to weights, moved as the graph moves the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from graphprune.coupling import FLOAT_TYPES
from graphprune.model import Array, Model, set_initializer

MOVES = {"Concat", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
MOVES |= {"Unsqueeze"}  # operators that only move numbers


def sources(model: Model, name: str) -> set[str] | None:
    """The float initialisers that the constant ``name`` is moved together from; ``None`` where
    anything but moving is done to them."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in model.initializers:
            found |= {name} if model.initializers[name].data_type in FLOAT_TYPES else set()
            continue
        node = model.nodes[model.producer[name]]
        if node.op_type not in MOVES or node.domain:
            return None
        waiting += filter(None, node.input)
    return found


def beside(model: Model, name: str, arrays: Mapping[str, Array]) -> Array | None:
    """What belongs to the constant ``name`` when ``arrays`` belong to initialisers (same shapes):
    NaN where one it is made of has none. ``None`` where all have none, or it is no mere move."""
    made_of = sources(model, name)
    if made_of is None or made_of.isdisjoint(arrays):
        return None
    if name in model.initializers:
        return arrays[name]
    stand_ins = {
        source: set_initializer(source, np.asarray(arrays[source], np.float64))
        if source in arrays
        else set_initializer(source, np.full(tuple(model.initializers[source].dims), np.nan))
        for source in made_of
    }
    return replace(model, initializers={**model.initializers, **stand_ins}).array(name)

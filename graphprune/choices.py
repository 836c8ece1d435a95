"""Choices: operators that divide one among slots (Softmax) or take the largest of them (TopK).

A slot that is not there is one whose number is lower than all others: to a Softmax it adds nothing,
and TopK does not take it. So where the slots are experts, removal is exact, if at least as many
stay as are taken. Experts are what a choice leads to weights that are stacked, one for each slot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from graphprune.model import set_initializer
from graphprune.relations import Choice, Pin, Relations
from graphprune.slots import Axis

Labels = NDArray[np.int32]  # slot → component
Mask = NDArray[np.bool_]
NOT_CHOSEN = "experts are not among the --units"


def settled(relations: Relations, labels: Labels, units: Collection[str]) -> Relations:
    """The relations for the kinds of ``units``: choices among experts are exact where these may
    leave; all others pin what their operator pins without."""
    experts = np.zeros(int(labels.max(initial=-1)) + 1, dtype=bool)
    for slots in relations.experts:
        experts[labels[slots]] = True
    shifted = {pin.node for pin in relations.shifts}
    taken, pins = [], []
    for choice in relations.choices:
        if not experts[labels[choice.slots]].all():
            reason = "positions along the axis are part of the answer"
        elif "experts" not in units:
            reason = NOT_CHOSEN
        else:
            taken.append(choice)
            continue
        if choice.node not in shifted:
            pins.append(Pin(choice.slots, f"{choice.operator}: {reason}", choice.node))
    exact = {(choice.node, choice.slots.tobytes()) for choice in taken}
    return replace(
        relations,
        choices=taken,
        pins=[*relations.pins, *pins],
        shifts=[p for p in relations.shifts if (p.node, p.slots.tobytes()) not in exact],
    )


def too_few(relations: Relations, alive: Mask) -> Choice | None:
    """The first choice that would take more slots than stay (bool per slot), if there is one."""
    return next((c for c in relations.choices if alive[c.slots].sum() < c.least), None)


def standing(relations: Relations) -> list[Axis]:
    """Axes of which something must stay: all but those of tensors that die with their expert."""
    return [
        axis
        for axis in relations.slots.axes
        if len(axis) and not (len(axis) == 1 and int(axis.slots[0]) in relations.vanishing)
    ]


def fewest(relations: Relations, unit_of: NDArray[np.int64]) -> Mapping[int, int]:
    """Unit → how many of its kind must stay; ``unit_of`` is the unit of each slot, else -1."""
    found: dict[int, int] = {}
    for choice in (*relations.choices, *relations.weighed):
        units = unit_of[choice.slots]
        real = np.unique(units[units >= 0])
        least = max(1, choice.least - int((units < 0).sum()))
        for unit in real.tolist():
            found[unit] = max(found.get(unit, 1), min(least, len(real)))
    return found


def lowered(
    name: str, choice: Choice, kept: Mask, rank: int, dtype: int
) -> tuple[str, list[onnx.NodeProto], list[onnx.TensorProto]]:
    """``name`` with a number lower than all (where the smallest are taken, higher) where ``kept``
    (one per slot) is false: the new name, nodes and constants."""
    result = f"{name}/graphprune_kept_{choice.node}_{choice.axis}"
    shape = [1] * rank
    shape[choice.axis] = -1
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(dtype))
    limits: Any = np.iinfo if kind.kind in "iu" else ml_dtypes.finfo
    limits = limits(kind)
    lowest = float(limits.max if choice.smallest else limits.min) / 2  # times zero it is still zero
    mask = set_initializer(f"{result}/mask", kept.reshape(shape))
    value = set_initializer(f"{result}/lowest", np.array(lowest, kind))
    node = helper.make_node("Where", [mask.name, name, value.name], [result], result)
    return result, [node], [mask, value]

"""What the rules say about a model: ties, folds, counts, shifts, pins, roles and MACs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from graphprune.quantisation import Quantised
from graphprune.slots import Axis, SlotArray, Slots


class Role(IntEnum):
    """How a parameter axis takes part in a group."""

    VECTOR = 0  # biases, running means: one number per channel
    PRODUCER = 1  # rows: what computes the channel
    CONSUMER = 2  # columns: what reads it
    SCALE = 3  # the scale of a normalisation
    VARIANCE = 4  # the stored variance of a normalisation


@dataclass(frozen=True)
class Tie:
    """Slots that live or die together, pairwise; stated by the node of index ``node``."""

    a: SlotArray
    b: SlotArray
    node: int


@dataclass(frozen=True)
class Fold:
    """``whole`` is the row-major product of ``parts``; one part at most may lose slots.

    Reshape, channel shuffle, grouped convolution and flatten are folds. Removing slot j of the
    part that carries the removal removes every slot of ``whole`` whose coordinate there is j.
    """

    whole: SlotArray
    parts: tuple[SlotArray, ...]
    node: int


@dataclass(frozen=True)
class Count:
    """A number in the node that is just how many of ``slots`` survive.

    It stands in attribute ``attr`` or in constant input ``input``, at ``element`` if it is a list.
    """

    node: int
    slots: SlotArray
    attr: str | None = None
    input: int | None = None
    element: int | None = None
    negative: bool = False  # counted from the end, as a negative position is


@dataclass(frozen=True)
class Default:
    """An attribute left out stands for ``value``, which it must still mean once ``slots`` leave."""

    node: int
    attr: str
    value: float
    slots: SlotArray


@dataclass(frozen=True)
class Renumber:
    """Input ``input`` of the node holds positions among ``slots``: they move when slots leave."""

    node: int
    slots: SlotArray
    input: int


@dataclass(frozen=True)
class Contraction:
    """The node sums over ``axis`` of input ``input``: zeroing it there equals removing it.

    Zero is what ``quantised`` says where the input is an integer tensor. ``partner`` is the axis of
    another input that it is multiplied with, slot by slot, where there is one: zeros there are the
    same zeros.
    """

    node: int
    input: int
    axis: int
    slots: SlotArray
    quantised: Quantised | None = None
    partner: Axis | None = None


@dataclass(frozen=True)
class Choice:
    """The node chooses among ``slots``, along ``axis`` of input ``input``: by their numbers, of
    which it takes ``least`` of the largest, or of the ``smallest``."""

    node: int
    operator: str
    input: int
    axis: int
    slots: SlotArray
    least: int = 1
    smallest: bool = False


@dataclass(frozen=True)
class Pin:
    """Slots that must stay, and why; ``node`` is -1 for the model's interface."""

    slots: SlotArray
    reason: str
    node: int


@dataclass(frozen=True)
class Read:
    """``read`` is a copy of ``source``, slot by slot, for one reader: it may leave while its source
    stays; its source leaves with all that read it, and only then."""

    source: SlotArray
    read: SlotArray
    node: int


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a node: the product of the surviving slots of ``factors``."""

    node: int
    factors: tuple[SlotArray, ...]


@dataclass(frozen=True)
class Branch:
    """A term of a sum that is there or not: ``tensor``, with ``nodes`` that serve it alone. Its
    one slot is no tensor's; once that has left, the tensor counts as zeros."""

    tensor: str
    slots: SlotArray
    nodes: frozenset[int]
    end: int  # the node that writes the sum


@dataclass(frozen=True)
class Reuse:
    """The node may write its first output into the memory of input ``input``: as a ``view`` always,
    else where nothing else reads that input any more."""

    node: int
    input: int
    view: bool


@dataclass
class Relations:
    """Everything that the rules stated, in node order; filled by ``relate``, then only read."""

    slots: Slots
    total: int  # slots of tensors plus virtual ones
    ties: list[Tie] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    defaults: list[Default] = field(default_factory=list)
    renumbers: list[Renumber] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    weighed: list[Choice] = field(default_factory=list)  # of experts that leave their router as is
    experts: list[SlotArray] = field(default_factory=list)  # axes along which weights are stacked
    positions: dict[str, SlotArray] = field(default_factory=dict)  # tensor → what it numbers
    looked_up: set[tuple[int, int]] = field(default_factory=set)  # node and input that may read it
    shifts: list[Pin] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    interface: list[Pin] = field(default_factory=list)  # graph inputs and outputs
    macs: list[Macs] = field(default_factory=list)
    reuses: list[Reuse] = field(default_factory=list)
    roles: list[tuple[SlotArray, Role]] = field(default_factory=list)
    heads: list[SlotArray] = field(default_factory=list)
    channels: list[SlotArray] = field(default_factory=list)  # of a group, be the groups heads
    branches: list[Branch] = field(default_factory=list)  # stated after the rules
    apart: list[Branch] = field(default_factory=list)  # experts, each a slot of their router
    vanishing: set[int] = field(default_factory=set)  # lone slots of tensors that die with them
    shape_reads: list[int] = field(default_factory=list)  # nodes that read a tensor's shape
    quantised: dict[str, Quantised] = field(default_factory=dict)  # integer tensor → how it reads
    dequantised: dict[str, int] = field(default_factory=dict)  # its real reading → the node
    unknown: dict[str, list[str]] = field(default_factory=dict)  # operator without rule → nodes

    def __str__(self) -> str:
        lines = [f"{len(self.ties)} ties, {len(self.folds)} folds, {len(self.pins)} pins"]
        lines += [f"pin: {pin.reason} ({len(pin.slots)} slots)" for pin in self.pins]
        return "\n".join(lines)

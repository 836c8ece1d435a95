"""A model run from its middle on: in stretches of a few nodes, each a session of its own, whose
inputs on some samples are kept. Other weights then cost what comes after them, and only the
sessions of the stretches that hold them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from graphprune.bypass import without_terms
from graphprune.errors import ModelError
from graphprune.frontier import Value, open_input, segment
from graphprune.linear import Linear
from graphprune.model import Array, Model, captured
from graphprune.rewriting import Change, rewritten
from graphprune.runtime import Feeds, run_session, session

NODES, MOST = 12, 24  # of a stretch, about; stretches, for each has threads of its own
Values = Mapping[str, Value]


class Stretches:
    """``model`` on ``feeds``, few and of one shape: ``reference`` holds its outputs on each.

    ``operators`` are those whose weights may change. Beyond ``memory`` bytes the inputs of every
    second stretch are let go, and runs start further up.
    """

    def __init__(
        self,
        model: Model,
        feeds: Sequence[Feeds],
        operators: Iterable[Linear],
        memory: float = 1e9,
        threads: int = 0,
    ) -> None:
        self.model = model
        self.threads = threads
        self.outputs = [v.name for v in model.outputs if v.name not in model.constant_names]
        nodes = _needed(model, self.outputs)
        made = {o: k for k, i in enumerate(nodes) for o in model.nodes[i].output if o}
        place = {i: k for k, i in enumerate(nodes)}
        pairs = [(o.node, o.bias_node) for o in operators if o.bias_node is not None]
        whole = [(place[a], place[b]) for a, b in pairs if a in place and b in place]
        last = self._last_reads(nodes)

        def parted(bounds: Sequence[int]) -> list[list[Array]]:
            self._part(nodes, bounds, made, last)
            return self._run_all(feeds, memory)

        try:
            self.reference = parted(_bounds(len(nodes), made, last, whole))
        except ModelError:  # what ONNX Runtime infers of the whole it may not of a part
            self.reference = parted([0, len(nodes)])

    def _part(
        self,
        nodes: Sequence[int],
        bounds: Sequence[int],
        made: Mapping[str, int],
        last: Mapping[str, int],
    ) -> None:
        self.stretches = [nodes[a:b] for a, b in pairwise(bounds)]
        self.stretch_of = {i: k for k, part in enumerate(self.stretches) for i in part}
        self.alive = [  # what later stretches read, by boundary
            {name for name, read in last.items() if made.get(name, -1) < bound <= read}
            for bound in bounds
        ]
        self.held: dict[int, list[Values]] = {}
        self.runners: list[Any] = []
        self.shorter: dict[tuple[int, frozenset[str]], Any] = {}  # sessions without some terms

    def _last_reads(self, nodes: Sequence[int]) -> dict[str, int]:
        """Where each tensor is last read; outputs are read at the end."""
        constants = self.model.constant_names
        last: dict[str, int] = {}
        for k, i in enumerate(nodes):
            node = self.model.nodes[i]
            reads = {n for n in (*node.input, *captured(node)) if n and n not in constants}
            last |= dict.fromkeys(reads, k)
        return last | dict.fromkeys(self.outputs, len(nodes))

    def _run_all(self, feeds: Sequence[Feeds], memory: float) -> list[list[Array]]:
        """One feed after the other, so that no more than one has all its activations in memory."""
        answers = []
        used, stride = 0, 1
        for feed in feeds:
            now: Values = {name: np.asarray(feed[name]) for name in self.alive[0]}
            for k in range(len(self.stretches)):
                if k % stride == 0:
                    self.held.setdefault(k, []).append(now)
                    used += _bytes(now)
                while used > memory and len(self.held) > 1:
                    stride *= 2
                    for boundary in [b for b in self.held if b % stride]:
                        used -= sum(map(_bytes, self.held.pop(boundary)))
                if k == len(self.runners):
                    self.runners.append(self._opened(self._segment(k, now)))
                now = self._step(k, self.runners[k], now)
            answers.append(self._answers(now))
        return answers

    def _answers(self, values: Values) -> list[Array]:
        return [values[name] for name in self.outputs]

    def _segment(self, k: int, values: Values) -> Model:
        """The stretch as a model of its own; constants are computed anew in each."""
        model, constants = self.model, self.model.constant_names
        nodes = set(self.stretches[k])
        waiting = [n for i in nodes for n in _reads(model, i) if n in constants]
        while waiting:
            index = model.producer.get(waiting.pop())
            if index is not None and index not in nodes:
                nodes.add(index)
                waiting += _reads(model, index)
        ordered = [model.nodes[i] for i in sorted(nodes)]
        inputs = [open_input(name, values[name], _known(values[name])) for name in self._inputs(k)]
        return segment(model, model.initializers, ordered, inputs, self._written(k))

    def _opened(self, part: Model) -> Any:
        return session(part, self.threads, spinning=False)

    def _inputs(self, k: int) -> list[str]:
        read = {n for i in self.stretches[k] for n in _reads(self.model, i)}
        return sorted(read & self.alive[k])

    def _written(self, k: int) -> list[str]:
        return sorted(self.alive[k + 1] - self.alive[k])

    def _step(self, k: int, runner: Any, values: Values) -> Values:
        """What is alive after stretch ``k``, from what is alive before it."""
        given = run_session(runner, {name: values[name] for name in self._inputs(k)})
        found = {**values, **dict(zip(self._written(k), given, strict=True))}
        return {name: found[name] for name in self.alive[k + 1]}

    def changed(self, changes: Sequence[Change]) -> Iterator[list[Array]]:
        """The outputs for each feed when some operators get other weights and biases."""
        places: dict[int, list[Change]] = {}
        for change in changes:
            if change[0].node in self.stretch_of:  # else no output needs it
                places.setdefault(self.stretch_of[change[0].node], []).append(change)
        if not places:
            yield from self.reference
            return
        others: dict[int, Any] = {}

        def runner(k: int, now: Values) -> Any:
            if k in places and k not in others:
                part = self._segment(k, now)
                others[k] = self._opened(_rewritten(part, self.model, places[k]))
            return others.get(k, self.runners[k])

        yield from self._from(min(places), runner)

    def without(self, terms: Collection[str]) -> Iterator[list[Array]]:
        """The outputs for each feed when sums lose terms that nothing else reads."""
        places: dict[int, set[str]] = {}
        for term in terms:
            reader = self.model.consumers[term][0][0]
            if reader in self.stretch_of:
                places.setdefault(self.stretch_of[reader], set()).add(term)
        if not places:
            yield from self.reference
            return

        def runner(k: int, now: Values) -> Any:
            key = k, frozenset(places.get(k, ()))
            if not key[1]:
                return self.runners[k]
            if key not in self.shorter:
                part = self._segment(k, now)
                nodes, _ = without_terms(part.nodes, key[1])
                self.shorter[key] = self._opened(part.with_graph(nodes, part.initializers.values()))
            return self.shorter[key]

        yield from self._from(min(places), runner)

    def _from(self, first: int, runner: Callable[[int, Values], Any]) -> Iterator[list[Array]]:
        """The outputs for each feed, run by other sessions from stretch ``first`` on."""
        start = max(k for k in self.held if k <= first)
        for held in self.held[start]:
            now = held
            for k in range(start, len(self.stretches)):
                now = self._step(k, runner(k, now), now)
            yield self._answers(now)


def _reads(model: Model, index: int) -> list[str]:
    node = model.nodes[index]
    return [name for name in (*node.input, *captured(node)) if name]


def _needed(model: Model, outputs: Sequence[str]) -> list[int]:
    """Nodes that the outputs need, in order, but for those that compute constants."""
    needed: set[int] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        index = model.producer.get(name)
        if index is None or index in needed or name in model.constant_names:
            continue
        needed.add(index)
        waiting += _reads(model, index)
    return sorted(needed)


def _bounds(
    count: int, made: Mapping[str, int], last: Mapping[str, int], whole: Sequence[tuple[int, int]]
) -> list[int]:
    """Where stretches begin, and the end: about every ``NODES`` nodes, where few tensors cross."""
    size = max(NODES, -(-count // MOST))
    crossing = np.zeros(count + 2, np.int64)
    for name, read in last.items():  # alive at the boundaries made + 1 .. read
        crossing[made.get(name, -1) + 1] += 1
        crossing[read + 1] -= 1
    for first, second in whole:  # an operator and the node that adds its bias: never parted
        crossing[min(first, second) + 1] += count + 1
        crossing[max(first, second) + 1] -= count + 1
    crossing = np.cumsum(crossing)
    bounds = [0]
    while count - bounds[-1] > 3 * size // 2:
        window = np.arange(bounds[-1] + size // 2, bounds[-1] + 3 * size // 2)
        off = np.abs(window - bounds[-1] - size)
        best = int(window[np.lexsort((off, crossing[window]))[0]])
        if crossing[best] > count:
            best = next((b for b in range(best, count) if crossing[b] <= count), count)
        bounds.append(best)
    return bounds if bounds[-1] == count else [*bounds, count]


def _rewritten(part: Model, model: Model, changes: Sequence[Change]) -> Model:
    """The stretch with the changes, whose operators are named by their place in ``model``."""

    def here(index: int | None) -> int | None:
        if index is None:
            return None
        return part.producer[next(name for name in model.nodes[index].output if name)]

    mine = []
    for linear, matrix, offset in changes:
        node = here(linear.node)
        assert node is not None
        local = replace(linear, node=node, bias_node=here(linear.bias_node))
        mine.append((local, matrix, offset))
    return rewritten(part, mine)


def _known(value: Value) -> tuple[int, ...] | None:
    """Its shape: all feeds have one, and ONNX Runtime checks operators by what it knows of it."""
    return value.shape if isinstance(value, np.ndarray) else None


def _bytes(values: Values) -> int:
    return sum(value.nbytes for value in values.values() if isinstance(value, np.ndarray))

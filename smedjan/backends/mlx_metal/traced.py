"""What MLX allocates for a node: its rule traced into MLX's primitives, whose arrays are counted without being made.

`mx.export_function` gives the primitives of a function of arrays that nobody evaluates. From each one's name follows
what it takes: a view lies where its input does (Transpose, Slice, Split: mlx/backend/common/common.cpp), an elementwise
result takes the place of an input of as many bytes that is read for the last time (`set_binary_op_output_data`), any
other one is new. In a compiled function, elementwise results that only elementwise primitives read are never in memory
(mlx/compile.cpp, `is_fusable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import DTYPES
from smedjan.graph.tensor import Spec

UNARY = {
    *("Abs", "AsType", "Ceil", "Cos", "Erf", "Exp", "Expm1", "Floor", "Log", "Log1p", "LogicalNot", "Negative"),
    *("Round", "Rsqrt", "Sigmoid", "Sign", "Sin", "Sqrt", "Square", "Tanh"),
}
BINARY = {
    *("Add", "Divide", "Equal", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr", "LogAddExp"),
    *("Maximum", "Minimum", "Multiply", "NotEqual", "Power", "Subtract", "BitwiseBinary", "Select"),
}
ELEMENTWISE = UNARY | BINARY

IN_PLACE = ELEMENTWISE | {"Softmax", "SliceUpdate", "Scatter", "RMSNorm", "LayerNorm", "Copy"}
"""Primitives whose result can take the place of an input that dies."""

DEPTH = 11
"""Primitives one behind another that MLX makes one kernel of (`max_compile_depth`)."""

SPARE = 1 << 14
"""Bytes by which a buffer may be too large for what takes its place (`donation_extra`)."""


@dataclass(frozen=True, slots=True)
class Given:
    """An input of a rule: `root` tells inputs that lie in one buffer; `dies` with the node, of `nbytes`."""

    spec: Spec
    strides: tuple[int, ...]
    root: int
    dies: bool
    nbytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """An output in the buffer of input `alias`, or (None) in one of its own of `nbytes`; not `there`: None."""

    alias: int | None
    strides: tuple[int, ...]
    nbytes: int
    there: bool = True


@dataclass(frozen=True, slots=True)
class Footprint:
    """extra    the most bytes that are there besides what was before, results included; what dies may be in them
    largest     bytes of the largest array that is made
    """

    extra: int
    largest: int
    results: tuple[Result, ...]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    made, stride = [], 1
    for size in reversed(shape):
        made.append(stride)
        stride *= size
    return tuple(reversed(made))


@dataclass(slots=True)
class _Buffer:
    """input: which of the rule's inputs lies in it; mortal: its place may be taken, or freed, within the rule"""

    nbytes: int
    mortal: bool
    input: int | None = None
    readers: int = 0
    reads: int = 0
    kept: bool = False
    holds: list[_Buffer] = field(default_factory=list)
    """Of a value that is never in memory: what the kernel that it is a part of reads."""


@dataclass(slots=True)
class _Value:
    shape: tuple[int, ...]
    itemsize: int
    strides: tuple[int, ...]
    buffer: _Buffer

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize

    @property
    def dense(self) -> bool:
        """In rows, one behind another; where a dimension has one element its stride says nothing."""
        right = zip(self.shape, self.strides, row_major(self.shape), strict=True)
        return all(size == 1 or found == wanted for size, found, wanted in right)

    @property
    def multipliable(self) -> bool:
        """Whether a product reads it where it lies: each matrix dense, as it is or transposed."""
        if len(self.shape) < 2:
            return True
        (rows, columns), (far, near) = self.shape[-2:], self.strides[-2:]
        straight = (near == 1 or columns == 1) and (far == columns or rows == 1)
        return straight or ((far == 1 or rows == 1) and (near == rows or columns == 1))


@dataclass(slots=True)
class _Primitive:
    name: str
    inputs: list[str]
    outputs: list[tuple[str, tuple[int, ...], int]]
    arguments: list[Any] = field(default_factory=list)


def trace(run: Callable[..., Any], given: Sequence[Given | None], wanted: Sequence[int], *, fused: bool) -> Footprint:
    """Of `run(*arrays)`, of whose results only the `wanted` ones are read."""
    there = [each for each in given if each is not None]
    arrays = [mx.zeros(each.spec.shape, dtype=DTYPES[each.spec.dtype]) for each in there]

    absent: set[int] = set()

    def function(*arrays: mx.array) -> list[mx.array]:
        left = iter(arrays)
        made = run(*(None if each is None else next(left) for each in given))
        made = made if isinstance(made, tuple) else (made,)
        absent.update(index for index in wanted if made[index] is None)
        return [made[index] for index in wanted if index not in absent]

    told: dict[str, list[Any]] = {"inputs": [], "outputs": [], "constants": [], "primitive": []}

    def hear(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "primitive":
            told[kind].append(event)
        elif kind in told:
            told[kind] = event[kind]

    try:
        mx.export_function(hear, function, *arrays)
    except ValueError as error:
        if "Unable to" not in str(error):
            raise
        return _untold(there, run, given, wanted)
    primitives = [
        _Primitive(
            each["name"],
            [name for name, *_ in each["inputs"]],
            [(name, tuple(shape), dtype.size) for name, shape, dtype in each["outputs"]],
            list(each["arguments"]),
        )
        for each in told["primitive"]
    ]
    primitives = evaluated(primitives, [name for name, *_ in told["outputs"]])
    constants = [(name, tuple(array.shape), array.dtype.size) for name, array in told["constants"]]
    names = [name for name, *_ in told["inputs"]]
    found = _Replay(there, names, constants, primitives, [name for name, *_ in told["outputs"]], fused=fused).run()
    left = iter(found.results)
    results = tuple(Result(None, (), 0, there=False) if index in absent else next(left) for index in wanted)
    return Footprint(found.extra, found.largest, results)


def _untold(
    there: Sequence[Given], run: Callable[..., Any], given: Sequence[Given | None], wanted: Sequence[int]
) -> Footprint:
    """Of a rule with a primitive that MLX does not export: its results, and float32 copies of all that it reads."""
    left = iter([mx.zeros(each.spec.shape, dtype=DTYPES[each.spec.dtype]) for each in there])
    made = run(*(None if each is None else next(left) for each in given))
    made = made if isinstance(made, tuple) else (made,)
    results = tuple(
        Result(None, (), 0, there=False)
        if made[index] is None
        else Result(None, row_major(made[index].shape), made[index].nbytes)
        for index in wanted
    )
    sizes = [4 * each.spec.numel for each in there] + [result.nbytes for result in results]
    return Footprint(sum(sizes), max(sizes, default=0), results)


WIDTH = 20
"""Arrays that MLX looks at side by side when it orders what it evaluates (`MLX_BFS_MAX_WIDTH`)."""


def evaluated(primitives: Sequence[_Primitive], outputs: Sequence[str]) -> list[_Primitive]:
    """The primitives in the order in which MLX evaluates them: breadth first from the outputs, back to front, and depth
    first where that is wider than WIDTH (mlx/transforms.cpp, `eval_impl`)."""
    maker = {name: index for index, each in enumerate(primitives) for name, *_ in each.outputs}
    sources = [[maker[name] for name in each.inputs if name in maker] for each in primitives]
    ends = [maker[name] for name in outputs if name in maker]
    degree: dict[int, int] = {}
    stack = [*ends]
    while stack:
        found = stack.pop()
        degree[found] = degree.get(found, 0) + 1
        if degree[found] == 1:
            stack.extend(sources[found])
    tape: list[int] = [-1]
    waiting: list[tuple[int, int]] = []
    at = 0
    while degree and (at < len(tape) or waiting):
        if at < len(tape):
            found, start = tape[at], 0
            at += 1
        else:
            found, start = waiting.pop()
        edges = ends if found < 0 else sources[found]
        for edge in range(start, len(edges)):
            if len(tape) - at >= WIDTH:
                waiting.append((found, edge))
                break
            source = edges[edge]
            degree[source] -= 1
            if not degree[source]:
                del degree[source]
                tape.append(source)
    return [primitives[index] for index in reversed(tape[1:])]


class _Replay:
    """The primitives in order, with the bytes that are alive."""

    def __init__(
        self,
        given: Sequence[Given],
        names: Sequence[str],
        constants: Sequence[tuple[str, tuple[int, ...], int]],
        primitives: Sequence[_Primitive],
        outputs: Sequence[str],
        *,
        fused: bool,
    ) -> None:
        self.primitives, self.outputs, self.fused = primitives, outputs, fused
        self.values: dict[str, _Value] = {}
        self.alive = self.peak = self.largest = 0
        buffers: dict[int, _Buffer] = {}
        for index, (name, each) in enumerate(zip(names, given, strict=True)):
            buffer = buffers.setdefault(each.root, _Buffer(each.nbytes, each.dies, index))
            itemsize = DTYPES[each.spec.dtype].size
            self.values[name] = _Value(each.spec.shape, itemsize, each.strides, buffer)
        self.dying = sum(buffer.nbytes for buffer in buffers.values() if buffer.mortal)
        for name, shape, itemsize in constants:
            self.values[name] = _Value(shape, itemsize, row_major(shape), _Buffer(prod(shape) * itemsize, False))
        self.reads: dict[str, int] = {}
        for primitive in primitives:
            for name in set(primitive.inputs):
                self.reads[name] = self.reads.get(name, 0) + 1
        self.unmade = self._fused_away() if fused else set()

    def _fused_away(self) -> set[str]:
        """Results of elementwise primitives that elementwise ones alone read, in chains no longer than MLX fuses."""
        elementwise = ELEMENTWISE | {"Broadcast"}
        needed = {name for each in self.primitives if each.name not in elementwise for name in each.inputs}
        needed.update(self.outputs)
        depth: dict[str, int] = {}
        for each in self.primitives:
            if each.name in elementwise:
                below = 1 + max((depth.get(name, 0) for name in each.inputs), default=0)
                depth.update((name, below) for name, *_ in each.outputs if name not in needed and below < DEPTH)
        return set(depth)

    def run(self) -> Footprint:
        for name in self.outputs:
            if name in self.values:
                self.values[name].buffer.kept = True
        for name, value in self.values.items():
            value.buffer.readers += self.reads.get(name, 0)
            value.buffer.reads += self.reads.get(name, 0)
        for primitive in self.primitives:
            self._step(primitive)
        results = []
        for name in self.outputs:
            value = self.values[name]
            alias = value.buffer.input
            results.append(Result(alias, value.strides, 0 if alias is not None else value.buffer.nbytes))
        return Footprint(max(0, self.peak), self.largest, tuple(results))

    def _step(self, primitive: _Primitive) -> None:
        ins = [self.values[name] for name in primitive.inputs]
        spare = 0
        if primitive.name in ("Matmul", "AddMM"):
            spare = sum(value.nbytes for value in ins[:2] if not value.multipliable)
        elif primitive.name in ("Softmax", "LogSumExp", "RMSNorm", "LayerNorm"):
            spare = sum(value.nbytes for value in ins[:1] if not value.dense)
        self.peak = max(self.peak, self.alive + spare)
        for index, (name, shape, itemsize) in enumerate(primitive.outputs):
            value = self._view(primitive, ins, index, shape, itemsize)
            if value is None:
                value = self._made(primitive, ins, name, shape, itemsize)
            self.values[name] = value
            value.buffer.readers += self.reads.get(name, 0)
            value.buffer.reads += self.reads.get(name, 0)
            value.buffer.kept |= name in self.outputs
        self.peak = max(self.peak, self.alive + spare)
        for name in set(primitive.inputs):
            self._read(self.values[name].buffer)
        for name, *_ in primitive.outputs:
            buffer = self.values[name].buffer
            if not buffer.readers and not buffer.kept and buffer.mortal:
                self._free(buffer)

    def _read(self, buffer: _Buffer) -> None:
        buffer.readers -= 1
        if not buffer.readers and buffer.mortal and not buffer.kept:
            self._free(buffer)

    def _free(self, buffer: _Buffer) -> None:
        self.alive -= buffer.nbytes
        buffer.nbytes = 0
        held, buffer.holds = buffer.holds, []
        for each in held:
            self._read(each)

    def _made(
        self, primitive: _Primitive, ins: list[_Value], name: str, shape: tuple[int, ...], itemsize: int
    ) -> _Value:
        nbytes = prod(shape) * itemsize
        if name in self.unmade:
            held = list({id(value.buffer): value.buffer for value in ins}.values())
            for buffer in held:
                buffer.readers += 1
            return _Value(shape, itemsize, row_major(shape), _Buffer(0, True, holds=held))
        if primitive.name in IN_PLACE:
            for value in ins:
                buffer = value.buffer
                # An earlier reader may not have run yet, and holds it.
                last = buffer.readers == buffer.reads == 1 and buffer.mortal and not buffer.kept
                fits = value.itemsize == itemsize and nbytes <= buffer.nbytes <= nbytes + SPARE
                if last and fits and value.shape == shape and value.dense:
                    taken = _Buffer(buffer.nbytes, True)
                    buffer.nbytes = 0
                    return _Value(shape, itemsize, row_major(shape), taken)
        self.alive += nbytes
        self.largest = max(self.largest, nbytes)
        return _Value(shape, itemsize, row_major(shape), _Buffer(nbytes, True))

    def _view(
        self, primitive: _Primitive, ins: list[_Value], index: int, shape: tuple[int, ...], itemsize: int
    ) -> _Value | None:
        """The result where it lies in its input's buffer, or None."""
        if not ins:
            return None
        of, name, said = ins[0], primitive.name, primitive.arguments
        strides: tuple[int, ...] | None = None
        if name == "Transpose":
            strides = tuple(of.strides[axis] for axis in said[0])
        elif name == "Slice":
            strides = tuple(stride * step for stride, step in zip(of.strides, said[2], strict=True))
        elif name in ("Split", "StopGradient"):
            strides = of.strides
        elif name == "Depends":
            of = ins[index]
            strides = of.strides
        elif name == "ExpandDims":
            listed = list(of.strides)
            for axis in sorted(said[0]):
                listed.insert(axis, 1)
            strides = tuple(listed)
        elif name == "Squeeze":
            strides = tuple(stride for axis, stride in enumerate(of.strides) if axis not in said[0])
        elif name == "Broadcast":
            lead = len(shape) - len(of.shape)
            strides = (0,) * lead + tuple(
                0 if size == 1 and wide != 1 else stride
                for size, stride, wide in zip(of.shape, of.strides, shape[lead:], strict=True)
            )
        elif name == "Unflatten":
            axis, sizes = said[0], shape[said[0] : len(shape) - len(of.shape) + said[0] + 1]
            strides = (
                *of.strides[:axis],
                *(of.strides[axis] * inner for inner in row_major(sizes)),
                *of.strides[axis + 1 :],
            )
        elif name == "Flatten":
            first, last = said
            inner = of.strides[first : last + 1]
            sizes = of.shape[first : last + 1]
            steps = [(size, stride) for size, stride in zip(sizes, inner, strict=True) if size != 1]
            if all(far == near * size for (_, far), (size, near) in pairwise(steps)):
                strides = (*of.strides[:first], steps[-1][1] if steps else 1, *of.strides[last + 1 :])
        elif name in ("Reshape", "View", "Contiguous") and of.dense:
            strides = row_major(shape)
        if strides is None:
            return None
        return _Value(shape, itemsize, strides, of.buffer)

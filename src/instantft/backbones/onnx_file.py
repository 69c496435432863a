"""ONNX files without the onnx package: enough of the protobuf wire format to see a graph and to add nodes to it.

A message is a row of fields, each a number and a value: an integer, eight or four bytes, or a stretch of bytes, which
may be a message again. Two facts make editing simple. A field that is repeated is a row of equal numbers, so nodes,
constants and outputs are added by writing them behind what is there; and two graphs in one model are one graph, field
by field, so what is there need not even be copied. Numbers of fields are those of onnx.proto (ONNX IR 3 to 13).

Files may come from strangers: every length is checked against what is there, tensors are not read but only measured,
and data outside the model's folder are refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import FileError

__all__ = [
    "Model", "Node", "Value", "constant", "fresh", "given", "graph", "node", "output", "read_model", "rewritten",
]  # fmt: skip

WHAT = "an ONNX model"

MAX_FILE = (1 << 31) - 1
"""Largest model file: protobuf knows no larger message."""

MAX_NODES = 100_000
MAX_EXTERNAL = 1 << 34
"""Most bytes of external data."""

FLOAT, UINT8, INT8, INT32, INT64, STRING = 1, 2, 3, 6, 7, 8
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16} | {
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4
}  # fmt: skip
"""Bits of a value by type of tensor."""

Bytes = memoryview | bytes
Field = tuple[int, "int | memoryview"]


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: its name.
        type: element type, 0 where it is no tensor.
        shape: sizes; None where one is free or has a name; None as a whole where it is not given.
    """

    name: str
    type: int
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        op, domain: what it does.
        inputs, outputs: names of values; "" for one that is left out.
        subgraph: whether it holds graphs of its own, as control flow does.
        raw: its bytes.
    """

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    subgraph: bool
    raw: memoryview = field(repr=False)


@dataclass(frozen=True)
class Model:
    """What a model file holds.

    Attributes:
        path: the file.
        raw: its bytes.
        opset: version of the standard operators.
        inputs: without the constants.
        constants: names of those, and their shapes.
        external: files of external data, all of them in the model's folder.
    """

    path: Path
    raw: memoryview = field(repr=False)
    opset: int
    nodes: tuple[Node, ...] = field(repr=False)
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, tuple[int, ...]] = field(repr=False)
    external: tuple[Path, ...]


def read_model(path: Path) -> Model:
    """Read and check a model file.

    Raises:
        FileError: missing, truncated, damaged, with functions, control flow or operators that onnxruntime does not
            bring along, or with external data outside its folder.
    """
    size = files.regular_size(path, WHAT)
    if not 16 <= size <= MAX_FILE:
        raise FileError(f"{WHAT} must have 16 to {MAX_FILE} bytes, but {path} has {size}")
    try:
        raw = memoryview(path.read_bytes())  # and not mapped: who shortens a mapped file ends this process
    except OSError as e:
        raise FileError(f"{WHAT} must be a readable file, but {path} is not: {files.reason(e)}") from None
    try:
        return _model(path, raw)
    except (ValueError, OverflowError) as e:
        raise FileError(f"{WHAT} must be whole, but {path} is truncated, damaged or something else: {e}") from None


def _model(path: Path, raw: memoryview) -> Model:
    parts: list[memoryview] = []
    opset, functions = 0, 0
    for number, value in fields(raw):
        if number == 7:
            parts.append(_bytes(value))
        elif number == 8:
            domain, version = "", 0
            for n, v in fields(_bytes(value)):
                domain, version = (_text(v), version) if n == 1 else (domain, _integer(v) if n == 2 else version)
            opset = version if domain in ("", "ai.onnx") else opset
        elif number == 25:
            functions += 1
    if not parts or not opset:
        raise ValueError("it has no graph, or no version of the operators")
    if functions:
        raise FileError(f"{WHAT} must be one graph, but {path} defines functions: inline them when exporting")
    nodes: list[Node] = []
    inputs: list[Value] = []
    outputs: list[Value] = []
    constants: dict[str, tuple[int, ...]] = {}
    external: dict[Path, None] = {}
    for number, value in (f for part in parts for f in fields(part)):
        if number == 1:
            nodes.append(_node(_bytes(value)))
        elif number == 5:
            name, shape, where = _tensor(_bytes(value), path)
            constants[name] = shape
            if where is not None:
                external[where] = None
        elif number == 11:
            inputs.append(_value(_bytes(value)))
        elif number == 12:
            outputs.append(_value(_bytes(value)))
        elif number == 15:
            raise FileError(f"{WHAT} must have plain tensors, but {path} has sparse ones")
        if len(nodes) > MAX_NODES:
            raise FileError(f"{WHAT} must have at most {MAX_NODES} nodes, but {path} has more")
    for made in nodes:
        if made.subgraph:
            raise FileError(f"{WHAT} must have no control flow, but {path} has {made.op[:40]!r}: export it traced")
        if made.domain not in ("", "ai.onnx", "com.microsoft"):
            raise FileError(
                f"{WHAT} must use operators that onnxruntime brings along, but {path} has {made.op[:40]!r} of "
                f"{made.domain[:40]!r}"
            )
    given = tuple(v for v in inputs if v.name not in constants)
    return Model(path, raw, opset, tuple(nodes), given, tuple(outputs), constants, tuple(external))


def fields(raw: memoryview) -> Iterator[Field]:
    """The fields of a message: number, and integer or bytes.

    Raises:
        ValueError: it is none.
    """
    at, end = 0, len(raw)
    while at < end:
        key, at = _varint(raw, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(raw, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field is of type {kind}")
        if length > end - at:
            raise ValueError(f"{length} bytes are announced where {end - at} are left")
        yield number, raw[at : at + length]
        at += length


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(raw) or shift > 63:
            raise ValueError("a number does not end")
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes should")
    return value


def _integer(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes stand where a number should")
    return value - (1 << 64) if value >> 63 else value


def _text(value: int | memoryview) -> str:
    return str(_bytes(value), "utf-8")


def _integers(value: int | memoryview) -> Iterator[int]:
    """One of a row of integers, or all of them packed together."""
    if isinstance(value, int):
        yield _integer(value)
        return
    at = 0
    while at < len(value):
        found, at = _varint(value, at)
        yield _integer(found)


def _node(raw: memoryview) -> Node:
    op, domain, subgraph = "", "", False
    inputs: list[str] = []
    outputs: list[str] = []
    for number, value in fields(raw):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 4:
            op = _text(value)
        elif number == 5:
            subgraph |= any(n in (6, 11) for n, _ in fields(_bytes(value)))
        elif number == 7:
            domain = _text(value)
    return Node(op, domain, tuple(inputs), tuple(outputs), subgraph, raw)


def _value(raw: memoryview) -> Value:
    name, kind, shape = "", 0, None
    for number, value in fields(raw):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for n, tensor in fields(_bytes(value)):
                if n != 1:
                    continue
                for m, v in fields(_bytes(tensor)):
                    if m == 1:
                        kind = _integer(v)
                    elif m == 2:
                        shape = tuple(_dimension(_bytes(d)) for k, d in fields(_bytes(v)) if k == 1)
    return Value(name, kind, shape)


def _dimension(raw: memoryview) -> int | None:
    sizes = [_integer(v) for n, v in fields(raw) if n == 1]
    return sizes[-1] if sizes else None


def _tensor(raw: memoryview, path: Path) -> tuple[str, tuple[int, ...], Path | None]:
    """Name, shape, and file of external data, if any; the data themselves are measured, not read."""
    name, kind, where = "", 0, 0
    shape: list[int] = []
    plain = None
    entries: dict[str, str] = {}
    for number, value in fields(raw):
        if number == 1:
            shape.extend(_integers(value))
        elif number == 2:
            kind = _integer(value)
        elif number == 8:
            name = _text(value)
        elif number == 9:
            plain = len(_bytes(value))
        elif number == 13:
            pair = {n: _text(v) for n, v in fields(_bytes(value))}
            entries[pair.get(1, "")] = pair.get(2, "")
        elif number == 14:
            where = _integer(value)
    if kind not in BITS or any(n < 0 for n in shape):
        raise ValueError(f"tensor {name[:60]!r} is of type {kind} and shape {shape[:8]}")
    size = -(-math.prod(shape) * BITS[kind] // 8)
    if where == 1:
        return name, tuple(shape), _outside(entries, size, name, path)
    if plain is not None and plain != size:
        raise ValueError(f"tensor {name[:60]!r} announces {size} bytes and has {plain}")
    if plain is None and math.prod(shape) > len(raw):
        raise ValueError(f"tensor {name[:60]!r} announces {math.prod(shape)} values in {len(raw)} bytes")
    return name, tuple(shape), None


def _outside(entries: Mapping[str, str], size: int, name: str, path: Path) -> Path:
    """The file of external data, which must be in the model's folder and hold what is announced."""
    location = entries.get("location", "")
    try:
        folder = Path(os.path.realpath(path.parent))
        target = Path(os.path.realpath(folder / location))
        inside = bool(location) and not os.path.isabs(location) and target.is_relative_to(folder)
    except (OSError, ValueError):
        inside = False
    if not inside:
        raise FileError(
            f"{WHAT} must keep its data in its own folder, but in {path} {name[:60]!r} points to {location[:80]!r}"
        )
    held = files.regular_size(target, f"external data of {path}")
    offset, length = (int(entries[k]) if entries.get(k) else d for k, d in (("offset", 0), ("length", size)))
    if length != size or offset < 0 or offset + length > held or held > MAX_EXTERNAL:
        raise ValueError(f"tensor {name[:60]!r} needs {size} bytes at {offset} of a file of {held}")
    return target


# -- writing ---------------------------------------------------------------------------------------------------------


def _put(number: int, value: int | Bytes | str) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    data = value.encode() if isinstance(value, str) else bytes(value)
    return _number(number << 3 | 2) + _number(len(data)) + data


def _number(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int | Sequence[int]) -> bytes:
    """A node, as a field of a graph.

    Args:
        op: a standard operator.
        inputs, outputs: names of values.
        attributes: integers, or rows of them.
    """
    message = b"".join([*(_put(1, n) for n in inputs), *(_put(2, n) for n in outputs), _put(4, op)])
    for name, value in attributes.items():
        if isinstance(value, int):
            message += _put(5, _put(1, name) + _put(3, value) + _put(20, 2))
        else:
            message += _put(5, _put(1, name) + b"".join(_put(8, v) for v in value) + _put(20, 7))
    return _put(1, message)


def _renamed(old: Node, outputs: Sequence[str]) -> bytes:
    """The node with other names for its outputs, as a field of a graph."""
    rest = b"".join(_put(n, v) for n, v in fields(old.raw) if n != 2)
    return _put(1, rest + b"".join(_put(2, name) for name in outputs))


def constant(name: str, value: NDArray[np.float32] | NDArray[np.int64]) -> bytes:
    """A constant tensor, as a field of a graph."""
    kind = FLOAT if value.dtype == np.float32 else INT64
    data = np.ascontiguousarray(value, "<f4" if kind == FLOAT else "<i8").tobytes()
    dims = b"".join(_put(1, n) for n in value.shape)
    return _put(5, dims + _put(2, kind) + _put(8, name) + _put(9, data))


def _described(name: str, kind: int, shape: Iterable[int | str]) -> bytes:
    dims = b"".join(_put(1, _put(1 if isinstance(n, int) else 2, n)) for n in shape)
    return _put(1, name) + _put(2, _put(1, _put(1, kind) + _put(2, dims)))


def output(name: str, shape: Iterable[int | str] | None = None) -> bytes:
    """An output, as a field of a graph; a float tensor of a shape where one is given, else whatever comes."""
    return _put(12, _put(1, name) if shape is None else _described(name, FLOAT, shape))


def given(name: str, shape: Iterable[int | str]) -> bytes:
    """A float input, as a field of a graph."""
    return _put(11, _described(name, FLOAT, shape))


def graph(contents: Bytes) -> bytes:
    """These fields as a graph of a model: written behind a model, they become part of its graph."""
    return _put(7, contents)


def fresh(contents: bytes, opset: int = 13) -> bytes:
    """A model of its own with these fields as its graph."""
    return _put(1, 8) + _put(2, "instantft") + graph(_put(2, "instantft") + contents) + _put(8, _put(2, opset))


def rewritten(model: Model, logits: str, frozen: str, contents: bytes) -> bytes:
    """The model's bytes with `contents` in its graph.

    What was called `logits` is called `frozen` there; `contents` make a new value of the name `logits`, on which
    whatever used the old one goes on.
    """
    before: list[bytes] = []
    behind: list[bytes] = []
    moved = {logits}
    for n in model.nodes:
        if moved.intersection(n.inputs):
            moved.update(n.outputs)
            behind.append(_put(1, n.raw))
        elif logits in n.outputs:
            before.append(_renamed(n, [frozen if name == logits else name for name in n.outputs]))
        else:
            before.append(_put(1, n.raw))
    top: list[bytes] = []
    rest: list[bytes] = []
    for number, value in fields(model.raw):
        if number == 7:
            rest.extend(_put(k, v) for k, v in fields(_bytes(value)) if k != 1)
        else:
            top.append(_put(number, value))
    return b"".join([*top, graph(b"".join([*before, contents, *behind, *rest]))])

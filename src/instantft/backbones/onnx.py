"""Networks in ONNX files, run by onnxruntime (extra ``[onnx]``).

Everything above the cache knows a network by its records, so a foreign network needs three things: its logits, some
taps, and somebody who runs it. The logits are the output, before a softmax or sigmoid. Taps are inputs of linear maps
and convolutions on the way there. Both become further outputs of the graph, taps of several dimensions as the means of
a stated grid, and nothing else in the model changes.

The solvers and engines are given the network as a row of ``foreign`` layers, one between each tap and the next
(docs/decisions/0011-foreign-networks.md).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import lift
from ..cache.store import Store, memory_store
from ..engine import Engine, Floats, Tensors, Trainer
from ..engine.dense import Dense
from ..errors import DataError, EngineError, FileError, UsageError
from ..methods import Method
from ..spec import MAX_LAYERS, MAX_WIDTH, LayerSpec, NetSpec
from . import onnx_file
from .builtin import Network, check_preprocessing
from .onnx_file import WHAT, Model, Node, constant, node, output

__all__ = ["BUDGET", "OnnxNetwork", "Tap", "from_onnx", "tap_nodes"]

BUDGET = 16_384
"""Bytes a sample, in float32, that the taps chosen by ``auto`` may take."""

MAX_TAPS = 8
"""Most taps that ``auto`` chooses."""

GRIDS = (0, 8, 4, 2, 1)
"""Cells along each side of the means of an image that ``auto`` tries; 0: the whole image."""

MAX_MEMORY = 1 << 32
"""Bytes that onnxruntime may take at once for a batch or for opening a model, beside the model's own."""

PROBED = 5
"""Samples by which shapes are found; few sizes in a network are 5, so the batch is known by it."""

BATCH = 32
"""Samples that onnxruntime is given at a time, which bounds its memory."""

FORMAT = "instantft-onnx"

SHAPING = frozenset(("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout", "Cast", "Transpose"))
PASSING = SHAPING | {"QuantizeLinear", "DequantizeLinear"}
"""Operators that change how values lie, not what they are."""

MEANS = frozenset(("GlobalAveragePool", "AveragePool", "ReduceMean"))
SCORES = frozenset(("Softmax", "LogSoftmax", "Sigmoid"))
LINEAR = frozenset(("Conv", "Gemm", "MatMul"))
POSITIVE = frozenset(("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Softplus"))
KEEP_SIGN = PASSING | MEANS | {"MaxPool", "GlobalMaxPool"}


@dataclass(frozen=True)
class Tap:
    """A value inside the network that adapters may start from.

    Attributes:
        value: its name in the graph.
        shape: of one sample.
        grid: cells along each side that are averaged over; 0: none, the value is taken whole.
        nonnegative: whether it comes from a ReLU or the like.
        type: NumPy's name of its type.
    """

    value: str
    shape: tuple[int, ...]
    grid: int = 0
    nonnegative: bool = False
    type: str = "float32"

    @property
    def name(self) -> str:
        """value, or value@G where it is averaged over a grid of G cells a side."""
        return f"{self.value}@{self.grid}" if self.grid else self.value

    @property
    def cells(self) -> tuple[int, ...]:
        """The shape that is left after averaging."""
        if not self.grid or len(self.shape) < 2:
            return self.shape
        if len(self.shape) == 2:  # (positions, features)
            return min(self.grid**2, self.shape[0]), self.shape[1]
        return self.shape[0], *(min(self.grid, n) for n in self.shape[1:])

    @property
    def width(self) -> int:
        """Values in a record."""
        return math.prod(self.cells)


@dataclass(frozen=True, eq=False)
class OnnxNetwork(Network):
    """A network in an ONNX file, with the taps that were chosen. Made by `from_onnx`.

    Attributes:
        model: the file.
        logits: name of the value that is c.
        logits_shape, logits_type: of one sample, in the graph.
        taps: those chosen, in the order of the graph.
        candidates: those there are, taken whole.
        channels_last: whether the graph wants images (height, width, channels); samples have channels first even so.
    """

    model: Model = field(kw_only=True)
    logits: str = field(kw_only=True)
    logits_shape: tuple[int, ...] = field(kw_only=True)
    logits_type: str = field(kw_only=True)
    taps: tuple[Tap, ...] = field(kw_only=True)
    candidates: tuple[Tap, ...] = field(kw_only=True)
    channels_last: bool = field(kw_only=True)
    digest: str = field(kw_only=True)
    """SHA-256 of the model file and its external data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_sessions", {})

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the model's bytes, its taps, and the preprocessing."""
        text = json.dumps([FORMAT, self.digest, self.logits, self.spec.to_json(), list(self.mean), list(self.std)])
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def prefix(self) -> str:
        """What no name in the graph begins with, but for a slash; names of what is added to it do."""
        names = {name for n in self.model.nodes for name in n.outputs} | set(self.model.constants)
        taken = {name.partition("/")[0] for name in names}
        return next(p for p in chain(("instantft",), (f"instantft{i}" for i in count(2))) if p not in taken)

    def bind(self, engine: Engine) -> Engine:
        """An engine that runs this network, and leaves training to `engine`."""
        if isinstance(engine, _OnnxEngine):
            engine = engine.inner
        return _OnnxEngine(self, engine)

    def check_method(self, m: Method) -> None:
        """See that a method needs nothing but records.

        Raises:
            UsageError: it does.
        """
        if not m.rows_only:
            raise UsageError(
                "a network that onnxruntime runs must be adapted by a method that needs only its taps "
                f"(skip-ridge, skip2-lora, skip-lora, lora-last), not {m.name}"
            )

    def widened(self) -> Network:
        """Not possible.

        Raises:
            UsageError: always.
        """
        raise UsageError("a class can be added to networks of our own, not to an ONNX model")

    def save(self, path: str | PathLike[str]) -> None:
        """Not possible: the file is there already.

        Raises:
            UsageError: always.
        """
        raise UsageError("an ONNX model must be saved by who made it; export writes it with an adapter")

    def feed(self, x: Floats) -> NDArray[Any]:
        """Samples (n, N) as the graph wants them."""
        value = self.model.inputs[0]
        shape = self.spec.input_shape
        images = x.reshape(len(x), *shape)
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        elif value.shape is not None and len(value.shape) != len(shape) + 1:
            sizes = [n if n is not None else -1 for n in value.shape[1:]]
            images = images.reshape(len(x), *sizes)
        if value.type == onnx_file.UINT8:
            images = np.rint(images * 255).clip(0, 255)
        return np.ascontiguousarray(images, _TYPES[value.type])

    def records(self, x: Floats, threads: int = 1) -> Floats:
        """Record rows (T, spec.record.width) of samples (T, N).

        Raises:
            DataError: the network yields NaN or Inf, or does not take these samples.
        """
        session = self._session(threads)
        segments = self.spec.record.segments
        names = [f"{self.prefix}/x{k}" for k in range(1, self.spec.L)] + [f"{self.prefix}/c"]
        rows = np.zeros((len(x), self.spec.record.width), np.float32)
        for start in range(0, len(x), BATCH):
            at = slice(start, min(start + BATCH, len(x)))
            values = _run(session, names, {self.model.inputs[0].name: self.feed(x[at])}, self.model.path)
            for s, value in zip(segments, values, strict=True):
                rows[at, s.offset : s.offset + s.size] = value
        if not np.isfinite(rows).all():
            row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise DataError(f"a network's taps and output must be finite, but of sample {row} they are not")
        return rows

    def _session(self, threads: int) -> Any:
        sessions: dict[int, Any] = self._sessions  # type: ignore[attr-defined]
        if threads not in sessions:
            contents = tap_nodes(self, self.logits) + b"".join(
                output(f"{self.prefix}/{name}") for name in ("c", *(f"x{k}" for k in range(1, self.spec.L)))
            )
            sessions[threads] = _open(self.model, contents, threads)
        return sessions[threads]


def from_onnx(
    path: str | PathLike[str],
    taps: str | Sequence[str] | None = None,
    *,
    like: NetSpec | None = None,
    input_shape: Sequence[int] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> OnnxNetwork:
    """The network in an ONNX file, to be adapted as one of our own.

    Args:
        path: the file; external data must be in the same folder.
        taps: names or glob patterns of candidates, with ``@G`` behind to average images over G×G cells (positions of a
            sequence over G·G); None or "auto": up to MAX_TAPS, evenly spread, on the finest grid of GRIDS with which
            they take BUDGET bytes a sample; "auto:BYTES": another budget.
        like: the shape of an earlier network of this file, whose taps are taken instead, as for an adapter's.
        input_shape: (N,) or (channels, height, width), where the file leaves sizes open.
        mean, std: preprocessing of samples, as in `Network`.

    Raises:
        EngineError: onnxruntime is not installed.
        FileError: missing, damaged, hostile, or no network with one score a class at its end.
        UsageError: no candidate has such a name, or too many taps.
    """
    path = Path(path)
    model = onnx_file.read_model(path)
    if like is not None:
        asked = [y.name for y in like.layers[:-1]]
        taps = [*asked, *(v.name for v in model.inputs[:1])] if like.input_tap else asked
        input_shape = like.input_shape if input_shape is None else input_shape
    graph = _Graph(model)
    logits, last = graph.ending()
    values = graph.candidates(logits, last)
    shape, channels_last = _input_shape(model, input_shape)
    found = _probe(model, [*values, logits], shape, channels_last)
    ending = found.pop()
    C = math.prod(ending.shape)
    if C < 2 or sum(n > 1 for n in ending.shape) != 1:
        raise FileError(f"{WHAT} must end in one score a class, but {logits!r:.60} of {path} is {list(ending.shape)}")
    seen: dict[str, Tap] = {}
    for tap in found:
        whole = replace(tap, nonnegative=graph.nonnegative(tap.value))
        if tap.type.startswith("float") and 1 <= len(tap.shape) <= 3 and math.prod(tap.shape) <= MAX_WIDTH:
            seen.setdefault(tap.value, whole)
    entry = model.inputs[0].name
    if entry in seen and (channels_last or model.inputs[0].type != onnx_file.FLOAT):
        seen[entry] = replace(seen[entry], shape=(math.prod(shape),))
    candidates = tuple(seen.values())
    chosen = _chosen(candidates, taps, entry)
    behind = [tap for tap in chosen if tap.name != entry]
    if not behind:
        raise UsageError(f"taps must have one besides the input {entry!r:.60}, but {taps!r:.80} has none")
    layers = [LayerSpec("foreign", tap.width, relu=tap.nonnegative, name=tap.name) for tap in behind]
    if len(layers) >= MAX_LAYERS:
        raise UsageError(f"taps must be at most {MAX_LAYERS - 1}, not {len(layers)}: name fewer, or use 'auto'")
    spec = NetSpec(
        shape, (*layers, LayerSpec("foreign", C, name=logits)), input_tap=any(tap.name == entry for tap in chosen)
    )
    means, stds = check_preprocessing(tuple(mean), tuple(std), shape)
    return OnnxNetwork(
        spec, {}, means, stds,
        model=model, logits=logits, logits_shape=ending.shape, logits_type=ending.type, taps=tuple(behind),
        candidates=candidates, channels_last=channels_last, digest=_digest(model),
    )  # fmt: skip


def tap_nodes(network: OnnxNetwork, frozen: str) -> bytes:
    """Fields of a graph that make x^1 … x^{L-1} and c of a network, as P/xK and P/c, P its prefix.

    Args:
        network: the network.
        frozen: what its logits are called.
    """
    made: list[bytes] = []
    p = network.prefix
    for k, tap in enumerate(network.taps, start=1):
        made.extend(_tap(tap, f"{p}/x{k}"))
    made.extend(_flat(frozen, network.logits_type, f"{p}/c"))
    return b"".join(made)


def _tap(tap: Tap, name: str) -> Iterator[bytes]:
    """Nodes that average a value over its grid, in each direction by a matrix of shares, and lay it flat."""
    value = tap.value
    if tap.type != "float32":
        yield node("Cast", [value], [f"{name}/float"], to=onnx_file.FLOAT)
        value = f"{name}/float"
    if tap.cells != tap.shape:
        if len(tap.shape) == 3:
            yield constant(f"{name}/columns", np.ascontiguousarray(_shares(tap.shape[2], tap.cells[2]).T))
            yield node("MatMul", [value, f"{name}/columns"], [f"{name}/narrow"])
            value = f"{name}/narrow"
        along = len(tap.shape) - 2
        yield constant(f"{name}/rows", _shares(tap.shape[along], tap.cells[along]))
        yield node("MatMul", [f"{name}/rows", value], [f"{name}/cells"])
        value = f"{name}/cells"
    yield node("Flatten", [value], [name], axis=1)


def _flat(value: str, kind: str, name: str) -> Iterator[bytes]:
    if kind != "float32":
        yield node("Cast", [value], [f"{name}/float"], to=onnx_file.FLOAT)
        value = f"{name}/float"
    yield node("Flatten", [value], [name], axis=1)


def _shares(n: int, cells: int) -> Floats:
    """(cells, n): mean of the pixels i·n/cells … (i+1)·n/cells, rounded outwards, for every cell i."""
    shares = np.zeros((cells, n), np.float32)
    for i in range(cells):
        a, b = i * n // cells, -(-(i + 1) * n // cells)
        shares[i, a:b] = 1 / (b - a)
    return shares


# -- looking at the graph --------------------------------------------------------------------------------------------


class _Graph:
    """Who makes which value, and what can be known before anything runs."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.makers: dict[str, Node] = {}
        self.fixed = set(model.constants)
        for n in model.nodes:
            for name in n.outputs:
                if name in self.makers:
                    raise FileError(f"{WHAT} must make each value once, but {model.path} makes {name[:60]!r} twice")
                self.makers[name] = n
            if all(name in self.fixed for name in n.inputs if name):  # a Constant has no inputs
                self.fixed.update(n.outputs)

    def ending(self) -> tuple[str, Node]:
        """The logits, and the linear map they come from.

        Raises:
            FileError: there are none.
        """
        path, outputs = self.model.path, [v.name for v in self.model.outputs]
        if len(outputs) != 1 and "logits" not in outputs:
            raise FileError(f"{WHAT} must have one output, or one called logits, but {path} has {str(outputs)[:120]}")
        logits = outputs[0] if len(outputs) == 1 else "logits"
        while (n := self.makers.get(logits)) is not None and n.inputs and (n.op in PASSING or n.op in SCORES):
            if n.op in SCORES:
                return n.inputs[0], self._linear(n.inputs[0])
            logits = n.inputs[0]
        logits = outputs[0] if len(outputs) == 1 else "logits"
        return logits, self._linear(logits)

    def _linear(self, value: str) -> Node:
        """The linear map that yields `value`, but for constants and means; of a sum of such maps, the first."""
        path, found = self.model.path, []
        waiting, seen = [value], {value}
        while waiting:
            n = self.makers.get(waiting.pop())
            free = [] if n is None else [name for name in n.inputs if name and name not in self.fixed]
            if n is None or not free:
                raise FileError(f"{WHAT} must end in a linear layer with weights of its own, but {path} has none")
            if n.op in LINEAR and len(n.inputs) > 1 and n.inputs[1] in self.fixed:
                found.append(n)
                continue
            single = n.op in PASSING or n.op in MEANS or (n.op == "Mul" and len(free) == 1)
            if not single and n.op not in ("Add", "Sum"):
                raise FileError(
                    f"{WHAT} must end in a linear layer (Gemm, MatMul or Conv; then at most means, softmax, sigmoid), "
                    f"but {path} ends in {n.op[:40]!r}: export it up to its logits"
                )
            waiting += [name for name in reversed(free) if name not in seen]
            seen.update(free)
        return found[0]

    def candidates(self, logits: str, last: Node) -> list[str]:
        """Inputs of linear maps and convolutions on the way to the logits, in the order of the graph."""
        waiting = [self.makers[logits]]
        needed = set(waiting[0].outputs)
        while waiting:
            for name in waiting.pop().inputs:
                n = self.makers.get(name)
                if n is not None and not needed.issuperset(n.outputs):
                    needed.update(n.outputs)
                    waiting.append(n)
        found: dict[str, None] = {}
        for n in self.model.nodes:
            if n.op in LINEAR and needed.intersection(n.outputs) and len(n.inputs) > 1:
                value, weight = n.inputs[:2]
                if weight in self.fixed and value not in self.fixed:
                    found[self._entry(value)] = None
        final = self._entry(last.inputs[0])
        found.pop(final, None)  # it comes last
        return [*found, final]

    def _entry(self, value: str) -> str:
        """The model's input, where `value` is that laid out otherwise; else the value."""
        at = value
        for _ in range(len(self.model.nodes)):
            n = self.makers.get(at)
            if n is None or n.op not in PASSING:
                break
            at = n.inputs[0]
        return at if at == self.model.inputs[0].name else value

    def nonnegative(self, value: str) -> bool:
        """Whether no value can be below zero."""
        for _ in range(len(self.model.nodes)):
            n = self.makers.get(value)
            if n is None or not n.inputs or (n.op not in KEEP_SIGN and n.op not in POSITIVE):
                return False
            if n.op in POSITIVE:
                return True
            value = n.inputs[0]
        return False


_TYPES: dict[int, Any] = {
    onnx_file.FLOAT: np.float32, onnx_file.UINT8: np.uint8, onnx_file.INT32: np.int32, onnx_file.INT64: np.int64,
    10: np.float16, 11: np.float64,
}  # fmt: skip


def _input_shape(model: Model, given: Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
    """Shape of a sample, channels first, and whether the graph has them last."""
    path = model.path
    if len(model.inputs) != 1:
        names = ", ".join(v.name for v in model.inputs)
        raise FileError(f"{WHAT} must have one input, but {path} has {len(model.inputs)}: {names:.100}")
    value = model.inputs[0]
    if value.type not in _TYPES or not value.shape:
        raise FileError(f"{WHAT} must take a tensor of numbers with a batch in front, but {path} does not")
    batch, *sizes = value.shape
    if batch is not None and batch > 0:
        raise FileError(
            f"{WHAT} must take batches of any size, but {path} was exported for {batch}: "
            "export it with a dynamic axis 0"
        )
    channels_last = len(sizes) == 3 and sizes[2] in (1, 3, 4) and sizes[0] not in (1, 3, 4)
    wanted: tuple[int | None, ...] = tuple(n if n is not None and n > 0 else None for n in sizes)
    if channels_last:
        wanted = wanted[2], wanted[0], wanted[1]
    if given is not None:
        if len(given) != len(wanted) or any(w not in (None, g) for w, g in zip(wanted, given, strict=True)):
            raise UsageError(f"input_shape must fit {list(wanted)} of {path}, not {list(given)}")
        wanted = tuple(int(n) for n in given)
    known = tuple(n for n in wanted if n is not None)
    if len(known) != len(wanted) or not known:
        raise FileError(
            f"{WHAT} must give the size of a sample, but {path} leaves {list(wanted)} open: give input_shape"
        )
    if math.prod(known) > MAX_WIDTH:
        raise FileError(f"{WHAT} must take at most {MAX_WIDTH} values a sample, but {path} takes {list(known)[:8]}")
    return (known if len(known) in (1, 3) else (math.prod(known),)), channels_last


def _probe(model: Model, values: Sequence[str], shape: tuple[int, ...], channels_last: bool) -> list[Tap]:
    """Shapes and types of those values that keep the batch in front, found by running PROBED samples of zeros."""
    entry = model.inputs[0]
    session = _open(model, b"".join(output(v) for v in values if v not in _listed(model)), 1)
    sizes = list((entry.shape or ())[1:])
    if any(n is None for n in sizes) or math.prod(n for n in sizes if n) != math.prod(shape):
        full = (shape[1], shape[2], shape[0]) if channels_last else shape
    else:
        full = tuple(n for n in sizes if n)
    zeros = np.zeros((PROBED, *full), _TYPES[entry.type])
    asked = list(dict.fromkeys(v for v in values if v != entry.name))
    found = dict(zip(asked, _run(session, asked, {entry.name: zeros}, model.path), strict=True))
    found[entry.name] = zeros
    taps = []
    for v in values:
        array = found[v]
        if array.ndim >= 2 and array.shape[0] == PROBED:
            taps.append(Tap(v, tuple(array.shape[1:]), type=str(array.dtype)))
    if not taps or taps[-1].value != values[-1]:
        raise FileError(
            f"{WHAT} must keep the batch in front, but of {PROBED} samples {values[-1][:60]!r} in {model.path} is "
            f"{list(found[values[-1]].shape)}: export it with a dynamic axis 0"
        )
    return taps


def _listed(model: Model) -> set[str]:
    return {v.name for v in model.outputs} | {v.name for v in model.inputs}


def _chosen(candidates: tuple[Tap, ...], taps: str | Sequence[str] | None, entry: str) -> list[Tap]:
    """The taps asked for, in the order of the graph."""
    if taps is None or (isinstance(taps, str) and taps.split(":")[0] == "auto"):
        text = "" if taps is None else str(taps)[5:]
        if text and not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise UsageError(f"a budget must be a number of bytes, as in auto:16384, not {text!r:.40}")
        return _automatic(candidates, int(text) if text else BUDGET, entry)
    chosen: dict[str, tuple[int, Tap]] = {}
    for asked in [t.strip() for t in taps.split(",")] if isinstance(taps, str) else taps:
        pattern, grid = asked, 0
        at, _, cells = asked.rpartition("@")
        if at and cells.isascii() and cells.isdigit() and 1 <= len(cells) <= 4 and int(cells) > 0:
            pattern, grid = at, int(cells)
        if any(c.value == asked for c in candidates):
            pattern, grid = asked, 0
        matching = [c for c in candidates if c.value == pattern]
        matching = matching or [c for c in candidates if fnmatchcase(c.value, pattern)]
        if not matching:
            some = ", ".join(c.value for c in candidates)
            raise UsageError(f"taps must be names or patterns of candidates ({some:.200}), not {asked!r:.80}")
        for c in matching:
            tap = replace(c, grid=grid)
            tap = replace(tap, grid=grid if tap.cells != c.shape else 0)
            chosen[tap.name] = candidates.index(c), tap
    return [tap for _, tap in sorted(chosen.values(), key=lambda pair: (pair[0], pair[1].grid))]


def _automatic(candidates: tuple[Tap, ...], budget: int, entry: str) -> list[Tap]:
    """At most MAX_TAPS, evenly spread and with the last, on the finest grid that fits the budget.

    Images of one pixel are left to those who name them: but for the last, they are what channels are weighted by.
    """
    candidates = (*(c for c in candidates[:-1] if c.shape[1:] != (1, 1)), candidates[-1])
    for many in range(min(MAX_TAPS, len(candidates)), 0, -1):
        last = len(candidates) - 1
        places = sorted({round(last - i * last / max(many - 1, 1)) for i in range(many)})
        for grid in GRIDS:
            taps = [replace(candidates[i], grid=grid) for i in places]
            taps = [replace(t, grid=grid if t.cells != t.shape else 0) for t in taps]
            if 4 * sum(t.width for t in taps) <= budget:
                return taps
    raise UsageError(
        f"a budget must have room for the last tap, which takes {4 * replace(candidates[-1], grid=1).width} bytes a "
        f"sample, not {budget}"
    )


# -- onnxruntime -----------------------------------------------------------------------------------------------------


def _open(model: Model, contents: bytes, threads: int) -> Any:
    """A session of the model with more fields in its graph."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise EngineError(
            "onnxruntime must be installed to run ONNX models, but is not: pip install 'instantft[onnx]'"
        ) from None
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if model.external:
        folder = str(model.path.resolve().parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        with _bounded(MAX_MEMORY + 8 * len(model.raw) + 4 * sum(path.stat().st_size for path in model.external)):
            return ort.InferenceSession(
                bytes(model.raw) + onnx_file.graph(contents), options, providers=["CPUExecutionProvider"]
            )
    except Exception as e:  # onnxruntime's exceptions have no common root
        raise FileError(f"{WHAT} must load in onnxruntime, but {model.path} does not: {_reason(e)}") from None


def _run(session: Any, names: Sequence[str], feeds: Mapping[str, NDArray[Any]], path: Path) -> list[NDArray[Any]]:
    try:
        with _bounded(MAX_MEMORY):
            return list(session.run(list(names), dict(feeds)))
    except Exception as e:
        raise FileError(f"{WHAT} must run in onnxruntime, but {path} does not: {_reason(e)}") from None


@contextmanager
def _bounded(more: int) -> Iterator[None]:
    """Whatever happens inside may take `more` bytes of memory beyond what there is, and then fails to get any.

    A graph of a few bytes may ask for a tensor of any size, and the system would give it, until it kills the process.
    Where the system has no such limits (outside Linux), there is none.
    """
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = min(n for n in (used + more, soft, hard) if n != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reason(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:200]


def _digest(model: Model) -> str:
    h = hashlib.sha256(model.raw)
    for path in sorted(model.external):
        h.update(path.name.encode() + b"\0")
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
    return h.hexdigest()


class _OnnxEngine:
    """The engine of a network that onnxruntime runs. Training, which needs only records, is left to an engine of ours.

    That engine is told of a network of fc layers as wide as the taps. Nobody has weights for it, and nobody asks: the
    store it is given holds the record of every sample.
    """

    def __init__(self, network: OnnxNetwork, inner: Engine) -> None:
        self.network, self.inner = network, inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def dense(self) -> Dense:
        """See Engine.dense."""
        return self.inner.dense

    def forward(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """y = gain·c + Σ x^k·A_k·B_k + bias; see Engine.forward."""
        lift.check_none(tensors)
        records = self.network.records(x, threads)
        *behind, c = (records[:, s.offset : s.offset + s.size] for s in spec.record.segments)
        y = np.array(tensors.get("output.gain", np.float32(1)) * c + tensors.get("output.bias", np.float32(0)))
        for k, tap in enumerate([x, *behind]):
            name = f"lora.{k}-{spec.L}"
            if f"{name}.A" in tensors:
                y += (tap @ tensors[f"{name}.A"]) @ tensors[f"{name}.B"]
        return y

    def records(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """See Engine.records."""
        return self.network.records(x, threads)

    def fill(
        self, spec: NetSpec, tensors: Tensors, x: Floats, numbers: NDArray[np.int64], store: Store, threads: int = 1
    ) -> None:
        """See Engine.fill."""
        todo = np.flatnonzero(store.admits(numbers) & ~store.held(numbers))
        for start in range(0, len(todo), BATCH):
            rows = todo[start : start + BATCH]
            store.write(numbers[rows], self.network.records(x[rows], threads))
        store.misses += len(todo)
        store.hits -= len(todo)  # every access is counted by the trainer; those this call served were no hits

    def trainer(
        self,
        spec: NetSpec,
        tensors: Tensors,
        method: Method,
        rank: int,
        x: Floats,
        y: NDArray[np.int32],
        *,
        numbers: NDArray[np.int64],
        store: Store | None,
        batch_size: int,
        lr: float,
        momentum: float = 0.0,
    ) -> Trainer:
        """See Engine.trainer; without a store, one in memory holds the records of all samples."""
        self.network.check_method(method)
        if store is None:
            store, numbers = memory_store("fp32", spec.record, len(x)), np.arange(len(x), dtype=np.int64)
        self.fill(spec, tensors, x, numbers, store)
        if not store.held(numbers).all():
            raise UsageError(
                f"the cache must have room for all {len(x)} samples where onnxruntime runs the network, "
                f"not {store.capacity}: leave cache_capacity out, or use skip-ridge"
            )
        layers = tuple(LayerSpec("fc", y.out, relu=y.relu) for y in spec.layers)
        width, added = (spec.tap_widths[0],), dict(tensors)
        if not spec.input_tap:  # an x^0 of one zero, whose adapter stays what it is
            width, x = (1,), np.zeros((len(x), 1), np.float32)
            if method.adapters == "skip":
                added[f"lora.0-{spec.L}.A"] = np.zeros((1, rank), np.float32)
                added[f"lora.0-{spec.L}.B"] = np.zeros((rank, spec.C), np.float32)
        made = self.inner.trainer(
            NetSpec(width, layers), added, method, rank, x, y,
            numbers=numbers, store=store, batch_size=batch_size, lr=lr, momentum=momentum,
        )  # fmt: skip
        return made if spec.input_tap else _WithoutInput(made)


class _WithoutInput:
    """A trainer that says nothing of the adapter of x^0."""

    def __init__(self, inner: Trainer) -> None:
        self.epochs = inner.epochs
        self._inner = inner

    def tensors(self) -> dict[str, Floats]:
        return {name: value for name, value in self._inner.tensors().items() if not name.startswith("lora.0-")}

"""Networks in ONNX files, run by onnxruntime (extra ``[onnx]``): `foreign` says what such a network is.

Logits and taps become further outputs of the graph, taps of several dimensions as the means of a stated grid, and
nothing else in the model changes.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine import Floats
from ..errors import EngineError, FileError, UsageError
from ..spec import MAX_WIDTH, NetSpec
from . import onnx_file
from .builtin import check_preprocessing
from .foreign import PROBED, ForeignNetwork, Input, Tap, choose, positions_of, row_shape, shares, taps_of, usable
from .graph import Graph
from .onnx_file import WHAT, Model, constant, node, output

__all__ = ["OnnxNetwork", "from_onnx", "tap_nodes"]

MAX_SECONDS = 60.0
"""Time that opening a model may take, and running PROBED samples for the first time."""

MAX_MEMORY = 1 << 32
"""Bytes that onnxruntime may take at once for a batch or for opening a model, beside the model's own."""


@dataclass(frozen=True, eq=False, repr=False)
class OnnxNetwork(ForeignNetwork):
    """A network in an ONNX file, with the taps that were chosen. Made by `from_onnx`.

    Attributes:
        model: the file.
        logits_shape, logits_type: of one sample, in the graph.
        channels_last: whether the graph wants images (height, width, channels); samples have channels first even so.
        sha256: of the model file and its external data, when it was opened.
    """

    model: Model = field(kw_only=True)
    logits_shape: tuple[int, ...] = field(kw_only=True)
    logits_type: str = field(kw_only=True)
    channels_last: bool = field(kw_only=True)
    sha256: str = field(kw_only=True)

    FORMAT = "instantft-onnx"
    WHAT = "an ONNX model"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_sessions", {})

    @property
    def digest(self) -> str:
        """See ForeignNetwork.digest."""
        return self.sha256

    @cached_property
    def prefix(self) -> str:
        """What no name in the graph begins with, but for a slash; names of what is added to it do."""
        names = {name for n in self.model.nodes for name in n.outputs} | set(self.model.constants)
        taken = {name.partition("/")[0] for name in names}
        return next(p for p in chain(("instantft",), (f"instantft{i}" for i in count(2))) if p not in taken)

    def save(self, path: str | PathLike[str]) -> None:
        """Not possible: the file is there already.

        Raises:
            UsageError: always.
        """
        raise UsageError("an ONNX model must be saved by who made it; export writes it with an adapter")

    def feed(self, x: Floats) -> dict[str, NDArray[Any]]:
        """Samples (n, N) as the graph wants them."""
        if not self.plain:
            return self.unpack(x)
        value = self.model.inputs[0]
        images = x.reshape(len(x), *self.inputs[0].shape)
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        if value.type == onnx_file.UINT8:
            images = np.rint(images * 255).clip(0, 255)
        return {value.name: np.ascontiguousarray(images, _TYPES[value.type])}

    def run(self, x: Floats, threads: int) -> list[NDArray[Any]]:
        """See ForeignNetwork.run."""
        names = [f"{self.prefix}/x{k}" for k in range(1, self.spec.L)] + [f"{self.prefix}/c"]
        return _run(self._session(threads), names, self.feed(x), self.model.path)

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
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> OnnxNetwork:
    """The network in an ONNX file, to be adapted as one of our own.

    Args:
        path: the file; external data must be in the same folder.
        taps: names or glob patterns of candidates, with ``@G`` behind to average images over G×G cells (positions of a
            sequence over G·G); None or "auto": up to MAX_TAPS, evenly spread, each on the finest grid that fits its
            share of BUDGET bytes a record; "auto:BYTES": another budget.
        like: the shape of an earlier network of this file, whose taps are taken instead, as for an adapter's.
        input_shape: (N,) or (channels, height, width), where the file leaves sizes open; of several inputs, by name, or
            one number that is every open size.
        mean, std: preprocessing of samples, as in `Network`.

    Raises:
        EngineError: onnxruntime is not installed.
        FileError: missing, damaged, hostile, or no network with one score a class at its end.
        UsageError: no candidate has such a name, or too many taps.
    """
    path = Path(path)
    model = onnx_file.read_model(path)
    entry = model.inputs[0].name if model.inputs else ""
    if like is not None:
        taps = taps_of(like, entry)
    inputs, channels_last = _inputs(model, input_shape, like)
    graph = Graph(model.nodes, model.constants, [i.name for i in inputs], WHAT, str(path), FileError)
    outputs = [v.name for v in model.outputs]
    if len(outputs) != 1 and "logits" not in outputs:
        raise FileError(f"{WHAT} must have one output, or one called logits, but {path} has {str(outputs)[:120]}")
    logits, last = graph.ending(outputs[0] if len(outputs) == 1 else "logits")
    values = graph.candidates(logits, last)
    found = _probe(model, [*values, logits], inputs, channels_last)
    ending = found.pop()
    wrong = FileError(f"{WHAT} must end in one score a class, but {logits!r:.60} of {path} is {list(ending.shape)}")
    positions = positions_of(ending.shape, inputs, wrong)
    plain = len(inputs) == 1 and not inputs[0].whole
    shape = row_shape(inputs, positions)
    taken = []
    for tap in found:
        if tap.value in graph.entries:
            if not plain or positions > 1:
                continue  # x^0 is not what the linear map reads
            if channels_last or model.inputs[0].type != onnx_file.FLOAT:
                tap = replace(tap, shape=(math.prod(shape),))  # noqa: PLW2901
        last_axis = values[tap.value].op != "Conv"
        taken.append(replace(tap, nonnegative=graph.nonnegative(tap.value), last=last_axis))
    candidates = usable(taken, positions)
    C = math.prod(ending.shape) // positions
    spec, behind = choose(candidates, taps, entry, shape, logits, C, positions)
    means, stds = check_preprocessing(tuple(mean), tuple(std), shape)
    return OnnxNetwork(
        spec, {}, means, stds,
        inputs=inputs, taps=behind, candidates=candidates, logits=logits,
        model=model, logits_shape=ending.shape, logits_type=ending.type,
        channels_last=channels_last, sha256=_digest(model),
    )  # fmt: skip


def tap_nodes(network: OnnxNetwork, frozen: str) -> bytes:
    """Fields of a graph that make x^1 … x^{L-1} and c of a network, as P/xK and P/c, P its prefix.

    Args:
        network: the network.
        frozen: what its logits are called.
    """
    made: list[bytes] = []
    p, axis = network.prefix, 2 if network.spec.positions > 1 else 1
    for k, tap in enumerate(network.taps, start=1):
        made.extend(_tap(tap, f"{p}/x{k}", axis))
    made.extend(_flat(frozen, network.logits_type, f"{p}/c", axis))
    return b"".join(made)


def _tap(tap: Tap, name: str, axis: int) -> Iterator[bytes]:
    """Nodes that average a value over its grid, in each direction by a matrix of shares, and lay it flat."""
    value, cells = tap.value, tap.cells
    if tap.type != "float32":
        yield node("Cast", [value], [f"{name}/float"], to=onnx_file.FLOAT)
        value = f"{name}/float"
    if cells != tap.shape:
        if len(tap.shape) == 3 and tap.last:
            (H, W, F), rows = tap.shape, cells[0]
            yield constant(f"{name}/wide", np.array([-1, H, W * F], np.int64))
            yield node("Reshape", [value, f"{name}/wide"], [f"{name}/flat"])
            yield constant(f"{name}/shares", shares(H, rows))
            yield node("MatMul", [f"{name}/shares", f"{name}/flat"], [f"{name}/lower"])
            yield constant(f"{name}/whole", np.array([-1, rows, W, F], np.int64))
            yield node("Reshape", [f"{name}/lower", f"{name}/whole"], [f"{name}/narrow"])
            value = f"{name}/narrow"
        elif not tap.last:
            yield constant(f"{name}/columns", np.ascontiguousarray(shares(tap.shape[-1], cells[-1]).T))
            yield node("MatMul", [value, f"{name}/columns"], [f"{name}/narrow"])
            value = f"{name}/narrow"
        if tap.last or len(tap.shape) == 3:
            yield constant(f"{name}/rows", shares(tap.shape[-2], cells[-2]))
            yield node("MatMul", [f"{name}/rows", value], [f"{name}/cells"])
            value = f"{name}/cells"
    yield node("Flatten", [value], [name], axis=axis)


def _flat(value: str, kind: str, name: str, axis: int) -> Iterator[bytes]:
    if kind != "float32":
        yield node("Cast", [value], [f"{name}/float"], to=onnx_file.FLOAT)
        value = f"{name}/float"
    yield node("Flatten", [value], [name], axis=axis)


# -- what goes in ----------------------------------------------------------------------------------------------------

_TYPES: dict[int, Any] = {
    onnx_file.FLOAT: np.float32, onnx_file.UINT8: np.uint8, onnx_file.INT32: np.int32, onnx_file.INT64: np.int64,
    9: np.bool_, 10: np.float16, 11: np.float64,
}  # fmt: skip


def _inputs(
    model: Model, given: Sequence[int] | Mapping[str, Sequence[int]] | None, like: NetSpec | None
) -> tuple[tuple[Input, ...], bool]:
    """What a sample consists of, images channels first, and whether the graph has those last."""
    path = model.path
    if not model.inputs:
        raise FileError(f"{WHAT} must have an input, but {path} has none")
    shapes: list[tuple[int | None, ...]] = []
    for value in model.inputs:
        if value.type not in _TYPES or not value.shape:
            raise FileError(f"{WHAT} must take a tensor of numbers with a batch in front, but {path} does not")
        batch, *sizes = value.shape
        if batch is not None and batch > 0:
            raise FileError(
                f"{WHAT} must take batches of any size, but {path} was exported for {batch}: "
                "export it with a dynamic axis 0"
            )
        shapes.append(tuple(n if n is not None and n > 0 else None for n in sizes))
    first = shapes[0]
    channels_last = len(shapes) == 1 and len(first) == 3 and first[2] in (1, 3, 4) and first[0] not in (1, 3, 4)
    if channels_last:
        shapes[0] = first[2], first[0], first[1]
    if given is None and like is not None:
        given = _open_sizes(shapes, like, [v.name for v in model.inputs])
    inputs = []
    for value, wanted in zip(model.inputs, shapes, strict=True):
        sizes_given = given.get(value.name) if isinstance(given, Mapping) else given
        if len(shapes) > 1 and not isinstance(given, Mapping) and given is not None and len(given) == 1:
            sizes_given = [given[0] if n is None else n for n in wanted]
        if sizes_given is not None:
            fits = len(sizes_given) == len(wanted)
            if not fits or any(w not in (None, g) for w, g in zip(wanted, sizes_given, strict=True)):
                raise UsageError(f"input_shape must fit {list(wanted)} of {path}, not {list(sizes_given)}")
            wanted = tuple(int(n) for n in sizes_given)  # noqa: PLW2901
        known = tuple(n for n in wanted if n is not None)
        if len(known) != len(wanted) or not known:
            raise FileError(
                f"{WHAT} must give the size of a sample, but {path} leaves {list(wanted)} of {value.name!r:.60} open: "
                "give input_shape"
            )
        if math.prod(known) > MAX_WIDTH:
            raise FileError(f"{WHAT} must take at most {MAX_WIDTH} values a sample, but {path} takes {list(known)[:8]}")
        inputs.append(Input(value.name, known, np.dtype(_TYPES[value.type]).name))
    return tuple(inputs), channels_last


def _open_sizes(
    shapes: Sequence[tuple[int | None, ...]], like: NetSpec, names: Sequence[str]
) -> Mapping[str, Sequence[int]]:
    """Shapes of the inputs of an earlier network, where all that the file leaves open is the length of a sequence."""
    if len(shapes) == 1 and len(shapes[0]) == len(like.input_shape) and like.positions == 1:
        return {names[0]: like.input_shape}
    N = math.prod(like.input_shape) - (like.positions > 1)
    for length in range(1, N + 1):
        made = [tuple(length if n is None else n for n in shape) for shape in shapes]
        if (total := sum(map(math.prod, made))) >= N:
            return dict(zip(names, made, strict=True)) if total == N else {}
    return {}


def _probe(model: Model, values: Sequence[str], inputs: Sequence[Input], channels_last: bool) -> list[Tap]:
    """Shapes and types of those values that keep the batch in front, found by running PROBED samples of zeros."""
    session = _open(model, b"".join(output(v) for v in values if v not in _listed(model)), 1)
    zeros = {}
    for i in inputs:
        full = (i.shape[1], i.shape[2], i.shape[0]) if channels_last else i.shape
        zeros[i.name] = np.zeros((PROBED, *full), i.type)
    asked = list(dict.fromkeys(v for v in values if v not in zeros))
    found = zeros | dict(zip(asked, _run(session, asked, zeros, model.path, timely=True), strict=True))
    taps = []
    for v in values:
        array = found[v]
        if array.ndim >= 2 and array.shape[0] == PROBED:
            taps.append(Tap(v, tuple(array.shape[1:]), type=str(array.dtype)))
    if not taps or taps[-1].value != values[-1]:
        if found[values[-1]].shape == (PROBED,):
            raise FileError(
                f"{WHAT} must end in (batch, scores), but {values[-1][:60]!r} in {model.path} is one number a sample "
                "and has no axis of scores: keep that axis when exporting, even of one"
            )
        raise FileError(
            f"{WHAT} must keep the batch in front, but of {PROBED} samples {values[-1][:60]!r} in {model.path} is "
            f"{list(found[values[-1]].shape)}: export it with a dynamic axis 0"
        )
    return taps


def _listed(model: Model) -> set[str]:
    return {v.name for v in model.outputs} | {v.name for v in model.inputs}


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
            contents = bytes(model.raw) + onnx_file.graph(contents)
            return _timely(
                lambda: ort.InferenceSession(
                    contents, options, providers=["CPUExecutionProvider"],
                    enable_fallback=0,  # it would print what is wrong to standard output, and try the same again
                )
            )  # fmt: skip
    except Exception as e:  # onnxruntime's exceptions have no common root
        raise FileError(f"{WHAT} must load in onnxruntime, but {model.path} does not: {_reason(e)}") from None


def _run(
    session: Any, names: Sequence[str], feeds: Mapping[str, NDArray[Any]], path: Path, *, timely: bool = False
) -> list[NDArray[Any]]:
    """The values called `names`; `timely`: within MAX_SECONDS, for a model that nobody has run before."""
    try:
        with _bounded(MAX_MEMORY):
            if not timely:
                return list(session.run(list(names), dict(feeds)))
            import onnxruntime as ort

            options = ort.RunOptions()
            try:
                return list(_timely(lambda: session.run(list(names), dict(feeds), options)))
            except TimeoutError:
                options.terminate = True  # before the next node
                raise
    except Exception as e:
        raise FileError(f"{WHAT} must run in onnxruntime, but {path} does not: {_reason(e)}") from None


def _timely(work: Callable[[], Any]) -> Any:
    """What `work` returns, if that is within MAX_SECONDS; else it is left behind, in a thread that ends with Python.

    Raises:
        TimeoutError: it is not; and whatever `work` raises.
    """
    done: list[Any] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as e:
            failed.append(e)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(MAX_SECONDS)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"it takes more than {MAX_SECONDS:g} seconds")
    return done[0]


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

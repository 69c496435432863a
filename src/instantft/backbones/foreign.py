"""Networks that somebody else runs (docs/decisions/0011-foreign-networks.md): what those of ONNX files and of PyTorch
modules have in common.

Everything above the cache knows a network by its records, so a foreign network needs three things: its logits, some
taps, and somebody who runs it. The logits are the output, before a softmax or sigmoid. Taps are inputs of linear maps
and convolutions on the way there, of several dimensions as the means of a stated grid. Solvers and engines are given
the network as a row of ``foreign`` layers, one between each tap and the next.

A sample is a row of float32, as everywhere; of several inputs, or of integers, all its values side by side, and
float32 holds those exactly up to 2^24. A network that scores every position of a sequence of P has P records a sample,
and a row for each: the sample's values, and the number of the position.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import lift
from ..cache.store import Store, memory_store
from ..engine import Engine, Floats, Labels, Tensors, Trainer
from ..engine.dense import Dense
from ..errors import DataError, InstantFTError, UsageError
from ..methods import Method
from ..spec import MAX_LAYERS, MAX_WIDTH, LayerSpec, NetSpec
from .builtin import Given, Labelled, Network

__all__ = [
    "BATCH", "BUDGET", "PROBED", "ForeignNetwork", "Input", "Tap", "choose", "positions_of", "row_shape", "shares",
    "taps_of", "usable",
]  # fmt: skip

BUDGET = 16_384
"""Bytes a record, in float32, that the taps chosen by ``auto`` may take."""

MAX_TAPS = 8
"""Most taps that ``auto`` chooses."""

GRIDS = (0, 8, 4, 2, 1)
"""Cells along each side of the means of an image that ``auto`` tries, finest first; 0: the whole image."""

PROBED = 5
"""Samples by which shapes are found; few sizes in a network are 5, so the batch is known by it."""

BATCH = 32
"""Samples that a network is given at a time, which bounds its memory."""

EXACT = 1 << 24
"""Integers up to which float32 holds every one."""

IGNORED = -100
"""A label that is none, as PyTorch's losses have it."""

MASK = "attention_mask"
"""Name of the input that is 0 at positions which are filling."""


@dataclass(frozen=True)
class Input:
    """An input of a foreign network.

    Attributes:
        name: how the network calls it.
        shape: of one sample.
        type: NumPy's name of its type.
    """

    name: str
    shape: tuple[int, ...]
    type: str = "float32"

    @property
    def whole(self) -> bool:
        """Whether its values are integers, such as numbers of words, and not measured."""
        return self.type.startswith(("int", "bool"))

    @property
    def width(self) -> int:
        """Values of one sample."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Tap:
    """A value inside the network that adapters may start from.

    Attributes:
        value: its name in the network.
        shape: of one sample; of one position where the network scores each.
        grid: cells along each side that are averaged over; 0: none, the value is taken whole.
        nonnegative: whether it comes from a ReLU or the like.
        type: NumPy's name of its type.
        last: whether features come last, as linear maps have them, and not first, as convolutions.
    """

    value: str
    shape: tuple[int, ...]
    grid: int = 0
    nonnegative: bool = False
    type: str = "float32"
    last: bool = False

    @property
    def name(self) -> str:
        """value, or value@G where it is averaged over a grid of G cells a side."""
        return f"{self.value}@{self.grid}" if self.grid else self.value

    @property
    def cells(self) -> tuple[int, ...]:
        """The shape that is left after averaging."""
        if not self.grid or len(self.shape) < 2:
            return self.shape
        places = self.shape[:-1] if self.last else self.shape[1:]
        most = self.grid if len(places) > 1 else self.grid**2  # a sequence has one side
        left = tuple(min(most, n) for n in places)
        return (*left, self.shape[-1]) if self.last else (self.shape[0], *left)

    @property
    def width(self) -> int:
        """Values in a record."""
        return math.prod(self.cells)


@dataclass(frozen=True, eq=False, repr=False)
class ForeignNetwork(Network):
    """A network that somebody else runs, with the taps that were chosen.

    Attributes:
        inputs: what it takes, in its order.
        taps: those chosen, in the order of the network.
        candidates: those there are, taken whole.
        logits: name of the value that is c.
    """

    inputs: tuple[Input, ...] = field(kw_only=True)
    taps: tuple[Tap, ...] = field(kw_only=True)
    candidates: tuple[Tap, ...] = field(kw_only=True)
    logits: str = field(kw_only=True)

    FORMAT = "instantft-foreign"
    WHAT = "a foreign network"

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of all that decides what the network computes."""

    @abstractmethod
    def run(self, x: Floats, threads: int) -> list[NDArray[Any]]:
        """x^1 … x^{L-1} and c of samples (n, N), (n·P, size) each; see `records`."""

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the network, its taps, and the preprocessing."""
        text = json.dumps([self.FORMAT, self.digest, self.logits, self.spec.to_json(), list(self.mean), list(self.std)])
        return hashlib.sha256(text.encode()).hexdigest()

    def bind(self, engine: Engine) -> Engine:
        """An engine that runs this network, and leaves training to `engine`.

        Raises:
            UsageError: that engine runs the frozen part itself, or not at all.
        """
        if isinstance(engine, _ForeignEngine):
            engine = engine.inner
        if engine.own_steps:
            raise UsageError(
                f"the engine {engine.name} must be given a network of our own (dnn, lenet5), not {self.WHAT}"
            )
        return _ForeignEngine(self, engine)

    def check_method(self, m: Method) -> None:
        """See that a method needs nothing but records.

        Raises:
            UsageError: it does.
        """
        if not m.rows_only:
            raise UsageError(
                f"{self.WHAT} must be adapted by a method that needs only its taps "
                f"(skip-ridge, skip2-lora, skip-lora, lora-last), not {m.name}"
            )

    def runtime_cost(self, threads: int = 1) -> tuple[float, int]:
        """Seconds a record, and bytes that are held once it has run, measured on two batches; bytes 0 outside Linux."""
        costs: dict[int, tuple[float, int]] = vars(self).setdefault("_costs", {})
        if threads not in costs:
            rows = np.zeros((BATCH, self.spec.geometry[0].N), np.float32)
            rows[1::2, 0] = 1  # so that no two that follow each other are positions of one sample
            before = _resident()
            self.records(rows, threads)
            held, began = _resident() - before, time.perf_counter()
            self.records(rows, threads)
            costs[threads] = (time.perf_counter() - began) / (BATCH * self.spec.positions), max(held, 0)
        return costs[threads]

    def widened(self) -> Network:
        """Not possible.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"a class can be added to networks of our own, not to {self.WHAT}")

    @property
    def plain(self) -> bool:
        """Whether samples are what they are everywhere: one input, of measured values."""
        return len(self.inputs) == 1 and not self.inputs[0].whole

    @property
    def keys(self) -> tuple[str, ...]:
        """See Network.keys: of several inputs, their names."""
        return ("x",) if len(self.inputs) == 1 else tuple(i.name for i in self.inputs)

    def pack(self, x: Given) -> ArrayLike:
        """Samples as one array, a row each; of a network that scores positions, a row for each of those.

        Args:
            x: one array (T, …) or, of several inputs, a mapping of their names, or a tuple in their order; integers
                where the network takes such. Rows that were packed before stay as they are.

        Raises:
            DataError: an input is missing, or not as the network takes it.
        """
        given: list[Any]
        if isinstance(x, Mapping) and len(self.inputs) == 1 and set(x) == set(self.keys):
            given = list(x.values())
        elif isinstance(x, Mapping):
            if set(x) != {i.name for i in self.inputs}:
                raise DataError(
                    f"x must have the network's inputs ({', '.join(i.name for i in self.inputs)}), "
                    f"not {', '.join(map(str, x))[:120]}"
                )
            given = [x[i.name] for i in self.inputs]
        elif isinstance(x, tuple) and len(x) == len(self.inputs):
            given = list(x)
        else:
            given = [x]
        arrays = [self.as_array(value) for value in given]
        N = math.prod(self.spec.input_shape)
        packed = arrays[0].ndim == 2 and arrays[0].shape[1] == N and arrays[0].dtype.kind == "f"
        if len(arrays) == 1 and ((self.plain and self.spec.positions == 1) or packed):
            return arrays[0]
        if len(arrays) != len(self.inputs):
            raise DataError(
                f"x must be a dict of the network's inputs ({', '.join(i.name for i in self.inputs)}), not one array"
            )
        T = len(arrays[0]) if arrays[0].ndim else 0
        rows = [_rows(i, value, T) for i, value in zip(self.inputs, arrays, strict=True)]
        P = self.spec.positions
        if P == 1:
            return np.concatenate(rows, axis=1)
        spread = np.empty((T, P, N), np.float32)
        spread[:, :, :-1] = np.concatenate(rows, axis=1)[:, None]
        spread[:, :, -1] = np.arange(P)
        return spread.reshape(T * P, N)

    def as_array(self, value: Any) -> NDArray[Any]:
        """An input's values as a NumPy array."""
        try:
            return np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as e:
            raise DataError(f"x must be an array, but is none: {' '.join(str(e).split())[:120]}") from None

    def flat(self, rows: Floats, y: NDArray[Any], groups: Any = None, weights: Any = None) -> Labelled:
        """See Network.flat. Positions whose label is IGNORED, or that are masked, are left out; where no groups are
        named, those of a sample are a group.

        Args:
            rows: (T·P, N).
            y: (T, P) labels, or (T, P, C) of several outputs.
            groups, weights: (T,), or None.

        Raises:
            DataError: there is no label for each position, or none is left; or groups or weights are not one a sample.
        """
        P = self.spec.positions
        if P == 1:
            return rows, y, groups, weights
        T = len(rows) // P
        if y.shape[:2] != (T, P):
            raise DataError(f"y must be ({T}, {P}), one label a position ({IGNORED}: none), not {tuple(y.shape)}")
        for name, values in (("groups", groups), ("weights", weights)):
            if values is not None and np.shape(values) != (T,):
                raise DataError(f"{name} must be ({T},), one a sample, not {list(np.shape(values))}")
        counts = self._counted(rows, y)
        told = [None if v is None else np.repeat(np.asarray(v), P)[counts] for v in (groups, weights)]
        if groups is None:
            of = np.repeat(np.arange(T), P)[counts]
            told[0] = of if of[0] != of[-1] else None
        return rows[counts], y.reshape(T * P, *y.shape[2:])[counts], told[0], told[1]

    def shaped(self, values: NDArray[Any]) -> NDArray[Any]:
        """See Network.shaped: (T·P, …) as (T, P, …)."""
        P = self.spec.positions
        return values if P == 1 else values.reshape(len(values) // P, P, *values.shape[1:])

    def _counted(self, rows: Floats, y: NDArray[Any]) -> NDArray[np.bool_]:
        """Which records have a label and are not masked."""
        P = self.spec.positions
        counts: NDArray[np.bool_] = np.ones(len(rows), bool) if y.ndim > 2 else y.reshape(-1) != IGNORED
        at = 0
        for i in self.inputs:
            if i.name == MASK and i.shape == (P,):
                counts &= rows[np.arange(len(rows)), at + rows[:, -1].astype(np.int64)] != 0
            at += i.width
        if not counts.any():
            raise DataError(f"y must have a label other than {IGNORED} at a position that is not masked, but has none")
        return counts

    def unpack(self, x: Floats) -> dict[str, NDArray[Any]]:
        """What the network is given for samples (n, N): name → (n, …)."""
        made, at = {}, 0
        for i in self.inputs:
            values = x[:, at : at + i.width].reshape(len(x), *i.shape)
            made[i.name] = np.ascontiguousarray(values, i.type)
            at += i.width
        return made

    def records(self, x: Floats, threads: int = 1) -> Floats:
        """Record rows (T, spec.record.width) of samples (T, N).

        Raises:
            DataError: the network yields NaN or Inf, or does not take these samples.
        """
        P, of, places = self.spec.positions, np.arange(len(x)), np.zeros(len(x), np.int64)
        if P > 1:
            new = np.ones(len(x), bool)
            new[1:] = (x[1:, :-1] != x[:-1, :-1]).any(axis=1)
            of, places, x = np.cumsum(new) - 1, x[:, -1].astype(np.int64), x[new, :-1]
        rows = np.zeros((len(of), self.spec.record.width), np.float32)
        for start in range(0, len(x), BATCH):
            at = slice(*np.searchsorted(of, (start, start + BATCH)))
            which = (of[at] - start) * P + places[at]
            values = self.run(x[start : start + BATCH], threads)
            for s, value in zip(self.spec.record.segments, values, strict=True):
                rows[at, s.offset : s.offset + s.size] = value[which]
        if not np.isfinite(rows).all():
            row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise DataError(f"a network's taps and output must be finite, but of sample {row // P} they are not")
        return rows


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        import resource

        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return 0


def _rows(i: Input, value: NDArray[Any], T: int) -> Floats:
    """The values of one input, (T, width) float32."""
    if value.shape != (T, *i.shape):
        raise DataError(
            f"{i.name} must be (T, {', '.join(map(str, i.shape))}) as the network's input is, with as many samples as "
            f"the others, not {list(value.shape)}"
        )
    kinds = "iub" if i.whole else "f"
    if value.dtype.kind not in kinds and not (value.dtype == np.uint8 and not i.whole):
        raise DataError(f"{i.name} must be {'integers' if i.whole else 'float or uint8'}, not {value.dtype}")
    if i.whole and value.size and (int(value.max()) > EXACT or int(value.min()) < -EXACT):
        raise DataError(f"{i.name} must hold integers of at most {EXACT}, not {int(np.abs(value).max())}")
    rows = value.reshape(T, -1).astype(np.float32)
    return rows * np.float32(1 / 255) if value.dtype == np.uint8 and not i.whole else rows


def shares(n: int, cells: int) -> Floats:
    """(cells, n): mean of the pixels i·n/cells … (i+1)·n/cells, rounded outwards, for every cell i."""
    made = np.zeros((cells, n), np.float32)
    for i in range(cells):
        a, b = i * n // cells, -(-(i + 1) * n // cells)
        made[i, a:b] = 1 / (b - a)
    return made


# -- taps ------------------------------------------------------------------------------------------------------------


def row_shape(inputs: Sequence[Input], positions: int) -> tuple[int, ...]:
    """Shape of a sample as everything above knows it: of one input of measured values its own, else one long row."""
    first = inputs[0]
    if len(inputs) == 1 and not first.whole and positions == 1 and len(first.shape) in (1, 3):
        return first.shape
    return (sum(i.width for i in inputs) + (positions > 1),)


def positions_of(scores: tuple[int, ...], inputs: Sequence[Input], refusal: InstantFTError) -> int:
    """Positions that a network scores, whose output for a sample has this shape: 1 of (C,), C one or more, P of (P, C)
    where an input is a sequence of P.

    Raises:
        refusal: it is neither.
    """
    large = [n for n in scores if n > 1]
    if len(large) == 1 or (scores and not large):
        return 1
    if len(scores) == 2 and len(large) == 2 and any(i.shape[:1] == scores[:1] for i in inputs):
        return scores[0]
    raise refusal


def usable(found: Sequence[Tap], positions: int) -> tuple[Tap, ...]:
    """Those of the values found that can be taps; of a network that scores positions, those there are for each."""
    seen: dict[str, Tap] = {}
    for tap in found:
        if (
            not tap.type.startswith(("float", "bfloat"))
            or not 1 <= len(tap.shape) <= 3
            or math.prod(tap.shape) > MAX_WIDTH
        ):
            continue
        if positions == 1:
            seen.setdefault(tap.value, tap)
        elif tap.last and len(tap.shape) == 2 and tap.shape[0] == positions:
            seen.setdefault(tap.value, replace(tap, shape=tap.shape[1:]))
    return tuple(seen.values())


def taps_of(like: NetSpec, entry: str) -> list[str]:
    """Names of the taps of an earlier network of the same model, whose input is called `entry`."""
    asked = [y.name for y in like.layers[:-1]]
    return [*asked, entry] if like.input_tap else asked


def choose(
    candidates: tuple[Tap, ...],
    taps: str | Sequence[str] | None,
    entry: str,
    shape: tuple[int, ...],
    logits: str,
    C: int,
    positions: int,
) -> tuple[NetSpec, tuple[Tap, ...]]:
    """The network's shape, and its taps behind the input.

    Args:
        candidates: in the order of the network.
        taps: as in `from_onnx`.
        entry: name of the input.
        shape: of a sample.
        logits, C, positions: name and number of the scores, and how many positions have such.

    Raises:
        UsageError: no candidate has such a name, or there are none or too many.
    """
    if not candidates:
        raise UsageError("a network must have a linear map or convolution whose input can be tapped, but has none")
    chosen = _chosen(candidates, taps, entry)
    behind = tuple(tap for tap in chosen if tap.name != entry)
    if not behind:
        raise UsageError(f"taps must have one besides the input {entry!r:.60}, but {taps or 'auto'!r:.80} has none")
    if len(behind) >= MAX_LAYERS:
        raise UsageError(f"taps must be at most {MAX_LAYERS - 1}, not {len(behind)}: name fewer, or use 'auto'")
    layers = [LayerSpec("foreign", tap.width, relu=tap.nonnegative, name=tap.name) for tap in behind]
    last = LayerSpec("foreign", C, name=logits)
    return NetSpec(shape, (*layers, last), len(behind) < len(chosen), positions), behind


def _chosen(candidates: tuple[Tap, ...], taps: str | Sequence[str] | None, entry: str) -> list[Tap]:
    """The taps asked for, in the order of the network."""
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
    """The input, where it fits the budget, and values behind it, evenly spread and with the last: MAX_TAPS in all.

    The input is whole or not there, and takes nothing of the budget: the samples are kept anyway. The others share the
    budget (`_shared`). Images of one pixel are left to those who name them: but for the last, they are what channels
    are weighted by.
    """
    *others, final = candidates
    front = [c for c in others if c.value == entry and 4 * c.width <= budget]
    weights = [c for c in others if (c.shape[:-1] if c.last else c.shape[1:]) == (1, 1)]
    behind = [*(c for c in others if c.value != entry and c not in weights), final]
    last = len(behind) - 1
    for many in range(min(MAX_TAPS - len(front), len(behind)), 0, -1):
        places = sorted({round(last - i * last / max(many - 1, 1)) for i in range(many)})
        taps = _shared([behind[i] for i in places], budget)
        if 4 * sum(t.width for t in taps) <= budget:
            return [*front, *taps]
    raise UsageError(
        f"a budget must have room for the last tap, which takes {4 * replace(final, grid=1).width} bytes a "
        f"sample, not {budget}"
    )


def _shared(taps: list[Tap], budget: int) -> list[Tap]:
    """Each whole or on the finest of GRIDS that fits its share of the budget; what narrow ones leave, wider ones get.

    Where not even the coarsest grid fits, they are more than the budget.
    """
    made: dict[str, Tap] = {}
    left = budget // 4
    for waiting, tap in zip(range(len(taps), 0, -1), sorted(taps, key=lambda t: t.width), strict=True):
        on = [replace(tap, grid=grid) for grid in GRIDS]
        found = next((t for t in on if t.width * waiting <= left), on[-1])
        made[tap.value] = replace(found, grid=found.grid if found.cells != tap.shape else 0)
        left -= found.width
    return [made[tap.value] for tap in taps]


class _ForeignEngine:
    """The engine of a network that somebody else runs. Training, which needs only records, is left to one of ours.

    That engine is told of a network of fc layers as wide as the taps. Nobody has weights for it, and nobody asks: the
    store it is given holds the record of every sample.
    """

    def __init__(self, network: ForeignNetwork, inner: Engine) -> None:
        self.network, self.inner = network, inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def dense(self) -> Dense:
        """See Engine.dense."""
        return self.inner.dense

    own_steps = False

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
        step = BATCH * spec.positions
        for start in range(0, len(todo), step):
            rows = todo[start : start + step]
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
        y: Labels,
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
                f"the cache must have room for all {len(x)} samples of a foreign network, "
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

"""The native engine: puts arrays in the order the C11 core wants them and calls it. No arithmetic happens here.

`INSTANTFT_ISA` forces one instruction set (x86-64-v4, x86-64-v3, x86-64-v2, neon, scalar).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..cache.store import Store
from ..errors import EngineError, UsageError
from ..lift import check_none
from ..methods import Method, connections, layer_types
from ..spec import NetSpec, pad
from ..tasks import as_targets
from . import EpochStats, Floats, Labels, Tensors
from .dense import Array, DType

if TYPE_CHECKING:
    from .._core import Core, Plan

__all__ = ["CODEC_IDS", "NativeEngine", "fma_peak", "isas"]

# Bits and numbers of instantft.h.
_W, _B, _X, _GAMMA, _BETA, _BATCH_STATS, _LAYER_ADAPTER, _SKIP_ADAPTER = (1 << i for i in range(8))
_LOSSES = {"classification": 0, "multi-label": 1, "regression": 2}
CODEC_IDS = {"fp32": 0, "fp16": 1, "int8": 2, "nf4": 3, "nf4-block64": 4, "relu4": 5, "relu2": 6, "nf4-hw": 7}
"""Numbers of `ift_codec_id`."""
_ROLES = ("weight", "bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
_LAYER_A, _LAYER_B, _SKIP_A, _SKIP_B = range(6, 10)

_PREDICT_BATCH = 64
_SAMPLES_A_THREAD = 32
"""Fewer than this and a further thread costs more than it saves."""

_DOUBLES = 512
"""Columns that are held in float64 at a time."""

_NONE32 = np.empty(0, np.float32)
_NONE8 = np.empty(0, np.uint8)
_NONE64 = np.empty(0, np.int64)


def isas() -> list[str]:
    """Instruction sets this build holds and this processor runs, best first.

    Raises:
        EngineError: the core was not built.
    """
    try:
        from .. import _core
    except ImportError as e:
        why = "was not built" if "_core" not in (e.path or "") else f"does not load ({e})"
        raise EngineError(
            f"the native engine needs its compiled core, which {why}: install a C and C++ compiler "
            "(Debian: apt-get install build-essential) and install instantft again, or use --engine reference"
        ) from None
    return _core.isas()


def _load_core() -> Core:
    available = isas()
    name = os.environ.get("INSTANTFT_ISA") or available[0]
    if name not in available:
        raise UsageError(f"INSTANTFT_ISA must be one of {', '.join(available)} on this machine, not {name!r}")
    from .._core import Core

    return Core(name)


def fma_peak(core: Core | None = None) -> float:
    """The fused multiply-add rate of one core of this machine in operations per second, measured for about 50 ms.

    Vectors of the chosen instruction set, twelve independent chains in registers, two operations each.
    """
    from time import perf_counter

    core = core or _load_core()
    best = 0.0
    for _ in range(10):
        start = perf_counter()
        operations = core.fma_loop(6_000_000)
        best = max(best, operations / (perf_counter() - start))
    return best


def _aligned(n: int) -> Floats:
    """n uninitialised float32, starting at a multiple of 64 bytes."""
    raw = np.empty(n + 16, np.float32)
    skip = (-raw.ctypes.data // 4) % 16
    return raw[skip : skip + n]


def _scratch() -> NDArray[np.uint8]:
    """Workspace of the dense algebra."""
    from .._core import DENSE_BYTES

    return _aligned(DENSE_BYTES // 4).view(np.uint8)


def _rows(x: Floats) -> Floats:
    """x (T, N) with every row padded by zeros to a multiple of PAD floats; x itself where that holds already."""
    T, N = x.shape
    if pad(N) == N and x.flags.c_contiguous and x.dtype == np.float32:
        return x
    rows = np.zeros((T, pad(N)), np.float32)
    rows[:, :N] = x
    return rows


def _adapters_of(tensors: Mapping[str, Floats]) -> list[tuple[int, int]]:
    found = []
    for name in tensors:
        if name.startswith("lora.") and name.endswith(".A"):
            i, j = name.split(".")[1].split("-")
            found.append((int(i), int(j)))
    return sorted(found)


class _Buffers:
    """A plan, and the tensors of a network and its adapters laid out as the plan says."""

    def __init__(
        self, core: Core, spec: NetSpec, tensors: Tensors, bits: list[int], rank: int, batch: int, codec: str = "fp32"
    ) -> None:
        from .._core import Plan

        spec.check_own()
        layers = np.zeros((spec.L, 10), np.int32)
        for k, layer in enumerate(spec.layers):
            layers[k] = (
                layer.kind == "conv",
                layer.out,
                *layer.kernel,
                *layer.padding,
                layer.batch_norm,
                layer.relu,
                layer.pool,
                bits[k],
            )
        shape = spec.input_shape if len(spec.input_shape) == 3 else (spec.input_shape[0], 1, 1)
        self.core, self.spec, self.rank = core, spec, rank
        self.plan: Plan = Plan(layers, (shape[0], shape[1], shape[2]), rank, batch, CODEC_IDS[codec])
        if self.plan.row_width != spec.record.width:
            raise EngineError(f"core and spec must agree on records, not {self.plan.row_width} and {spec.record.width}")
        self.params = np.zeros(self.plan.params, np.float32)
        self.names: dict[str, tuple[int, tuple[int, ...]]] = {}
        for k, role, offset, rows, cols, pitch in self.plan.tensors():
            name = self._name(k, role)
            if name not in tensors:
                continue
            view = self._view(offset, rows, cols, pitch)
            value = tensors[name]
            if role in (_LAYER_A, _SKIP_A):
                view[: value.shape[1]] = value.T
            elif role in (_LAYER_B, _SKIP_B):
                view[: value.shape[0]] = value
            else:
                view[:] = value.reshape(rows, cols)
            self.names[name] = (role, (offset, rows, cols, pitch))
        self.params[self.plan.gain] = tensors["output.gain"][0] if "output.gain" in tensors else 1.0
        if "output.bias" in tensors:
            self.params[self.plan.bias : self.plan.bias + spec.C] = tensors["output.bias"]

    def _name(self, k: int, role: int) -> str:
        if role < len(_ROLES):
            return f"layers.{k}.{_ROLES[role]}"
        j = k + 1 if role in (_LAYER_A, _LAYER_B) else self.spec.L
        return f"lora.{k}-{j}.{'A' if role in (_LAYER_A, _SKIP_A) else 'B'}"

    def _view(self, offset: int, rows: int, cols: int, pitch: int) -> Floats:
        return self.params[offset : offset + rows * pitch].reshape(rows, pitch)[:, :cols]

    def read(self, name: str, shape: tuple[int, ...]) -> Floats:
        """A copy of one tensor in its natural layout."""
        role, (offset, rows, cols, pitch) = self.names[name]
        view = self._view(offset, rows, cols, pitch)
        if role in (_LAYER_A, _SKIP_A):
            view = view[: shape[1]].T
        elif role in (_LAYER_B, _SKIP_B):
            view = view[: shape[0]]
        return np.array(view.reshape(shape), order="C")

    def frozen(self) -> Floats:
        """The parameters with frozen batch norm folded into W and b."""
        folded = np.empty_like(self.params)
        self.core.fold(self.plan, self.params, folded)
        return folded

    def workspace(self) -> Floats:
        return _aligned(self.plan.workspace)


def _spread(n: int, threads: int, work: Callable[[int, int], None]) -> None:
    """work(start, stop) over 0…n in at most `threads` parts, cut at multiples of PAD."""
    parts = max(1, min(threads, n // _SAMPLES_A_THREAD))
    if parts == 1:
        work(0, n)
        return
    _spread_over([pad(n * i // parts) for i in range(parts)] + [n], work)


def _spread_over(cuts: list[int], work: Callable[[int, int], None]) -> None:
    """work(start, stop) between neighbouring cuts, each part on a thread of its own."""
    parts = [(a, b) for a, b in pairwise(cuts) if b > a]
    if len(parts) < 2:
        for part in parts:
            work(*part)
        return
    first, *others = parts
    with ThreadPoolExecutor(len(others)) as pool:
        waiting = [pool.submit(work, a, b) for a, b in others]
        work(*first)  # this thread has a core already
        for done in waiting:
            done.result()


def _train_bits(spec: NetSpec, method: Method) -> list[int]:
    """The method's row, as the core's bits for each layer."""
    bits = []
    reached = dict(connections(method, spec.L))
    for k, kind in enumerate(layer_types(method, spec.L)):
        b = _W * ("w" in kind[3:]) | _B * ("b" in kind[3:]) | _X * ("x" in kind[3:])
        if spec.layers[k].batch_norm:
            b |= {"frozen": 0, "beta": _BETA, "train": _GAMMA | _BETA | _BATCH_STATS}[method.norms]
        if k in reached:
            b |= _LAYER_ADAPTER if method.adapters == "layers" else _SKIP_ADAPTER
        bits.append(b)
    return bits


class NativeDense:
    """The core's `dense.Dense`. Results do not depend on the threads: each element is computed whole by one of them."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def gram(self, X: Array, dtype: DType, threads: int = 1) -> Array:
        """G = X·Xᵀ, lower triangle; see Dense.gram."""
        n, K = X.shape
        G: Array = np.zeros((n, n), dtype)
        # in float64 a stretch of columns at a time, so that they are not all held twice
        stretch = K if X.dtype == dtype else _DOUBLES
        for k in range(0, K, max(stretch, 1)):
            part = X[:, k : k + stretch].astype(dtype, copy=False)
            if part.strides[1] != part.itemsize:
                part = np.ascontiguousarray(part)

            def work(a: int, b: int, part: Array = part, add: bool = k > 0) -> None:
                self._core.gram(part, a, b, add, G, _scratch())

            # parts of equal work: rows of a triangle get longer
            parts = max(1, min(threads, n // _SAMPLES_A_THREAD))
            _spread_over([int(n * (i / parts) ** 0.5) for i in range(parts)] + [n], work)
        return G

    def inverse_factor(self, G: Array) -> Array | None:
        """V = L⁻¹; see Dense.inverse_factor."""
        V = np.zeros_like(G)
        failed = self._core.inverse_factor(G, V, _scratch())
        return None if failed or not np.isfinite(V.sum()) else V

    def inverse_blocks(self, V: Array, starts: NDArray[np.int64]) -> Array:
        """Blocks of VᵀV on its diagonal; see Dense.inverse_blocks."""
        starts = np.ascontiguousarray(starts, np.int64)
        out = np.empty(int((np.diff(starts) ** 2).sum()), V.dtype)
        self._core.inverse_blocks(V, starts, out, _scratch())
        return out

    def combine(
        self, parts: Sequence[Array], weights: Sequence[float], d: Array, c: Array, rows: Array | None = None
    ) -> Array:
        """G = diag(d)·Σ w_p·P_p·diag(d) + c·cᵀ; see Dense.combine."""
        dtype = parts[0].dtype
        G: Array = np.zeros((len(d), len(d)), dtype)
        which = _NONE64 if rows is None else np.ascontiguousarray(rows, np.int64)
        w, d, c = (np.ascontiguousarray(v, dtype) for v in (weights, d, c))
        self._core.combine(list(parts), w, which, d, c, G)
        return G


class NativeEngine:
    """The C11 core behind the Protocol of this package.

    Raises:
        EngineError: the core was not built.
        UsageError: INSTANTFT_ISA names what this machine lacks.
    """

    name = "native"
    own_steps = False

    def __init__(self) -> None:
        self._core = _load_core()
        self.dense = NativeDense(self._core)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._core.name

    def forward(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Logits (T, C); see Engine.forward."""
        check_none(tensors)
        adapters = _adapters_of(tensors)
        layered = any(j < spec.L for _, j in adapters)
        rank = max((tensors[f"lora.{i}-{j}.A"].shape[1] for i, j in adapters), default=0)
        bits = [0] * spec.L
        if layered:
            if any(j != i + 1 for i, j in adapters):
                raise UsageError("adapters must lead either from layer to layer or all to the output, not both")
            for k in range(spec.L):
                bits[k] = _LAYER_ADAPTER
        elif adapters:
            for k in range(adapters[0][0], spec.L):
                bits[k] = _SKIP_ADAPTER
        buffers = _Buffers(self._core, spec, tensors, bits, rank, _PREDICT_BATCH)
        frozen = buffers.frozen()
        rows = _rows(x)
        logits = np.empty((len(x), spec.C), np.float32)

        def work(a: int, b: int) -> None:
            self._core.forward(buffers.plan, buffers.params, frozen, rows[a:b], logits[a:b], buffers.workspace())

        _spread(len(x), threads, work)
        return logits

    def records(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Record rows (T, width); see Engine.records."""
        buffers = _Buffers(self._core, spec, tensors, [0] * spec.L, 0, _PREDICT_BATCH)
        frozen = buffers.frozen()
        rows = _rows(x)
        out = np.empty((len(x), spec.record.width), np.float32)

        def work(a: int, b: int) -> None:
            self._core.records(buffers.plan, frozen, rows[a:b], out[a:b], buffers.workspace())

        _spread(len(x), threads, work)
        return out

    def fill(
        self, spec: NetSpec, tensors: Tensors, x: Floats, numbers: NDArray[np.int64], store: Store, threads: int = 1
    ) -> None:
        """Run the frozen network for what the store lacks and would keep; see Engine.fill."""
        # of several samples that fall into one slot only the highest number stays, so only that one is computed
        slots = store.slots(numbers)
        last = np.full(store.capacity, -1, np.int64)
        np.maximum.at(last, slots, numbers)
        todo = np.flatnonzero((last[slots] == numbers) & (store.owner[slots] < numbers))
        if not len(todo):
            return
        buffers = _Buffers(self._core, spec, tensors, [0] * spec.L, 0, 1, store.codec.name)
        self._check_store(buffers.plan, store)
        frozen = buffers.frozen()
        rows = _rows(x)
        order, slots = todo.astype(np.int64), slots[todo].astype(np.int64)

        def work(a: int, b: int) -> None:
            self._core.fill(buffers.plan, frozen, rows, order[a:b], slots[a:b], store.data, buffers.workspace())

        _spread(len(todo), threads, work)
        store.owner[slots] = numbers[todo]
        # every access is counted by the trainer; those this call served were no hits
        store.misses += len(todo)
        store.hits -= len(todo)

    @staticmethod
    def _check_store(plan: Plan, store: Store) -> None:
        if plan.stride != store.data.shape[1]:
            raise EngineError(
                f"core and store must agree on a record's bytes, not {plan.stride} and {store.data.shape[1]}"
            )

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
    ) -> NativeTrainer:
        """A trainer; see Engine.trainer."""
        if store is not None and not method.cacheable:
            raise UsageError(f"a cache needs a method that leaves the frozen layers alone, not {method.name}")
        if len(numbers) and numbers.min() < 0:
            raise UsageError(f"sample numbers must be at least 0, not {numbers.min()}")
        batch = min(batch_size, len(x))
        codec = store.codec.name if store is not None else "fp32"
        buffers = _Buffers(self._core, spec, tensors, _train_bits(spec, method), rank, batch, codec)
        if store is not None:
            self._check_store(buffers.plan, store)
        return NativeTrainer(buffers, method, rank, x, y, numbers, store, lr, momentum)


class NativeTrainer:
    """Tensors, data and cache of one training, in the core's layout."""

    def __init__(
        self,
        buffers: _Buffers,
        method: Method,
        rank: int,
        x: Floats,
        y: Labels,
        numbers: NDArray[np.int64],
        store: Store | None,
        lr: float,
        momentum: float,
    ) -> None:
        self._buffers, self._method, self._rank, self._store = buffers, method, rank, store
        self._x = _rows(x)
        goal = as_targets(y, buffers.spec.C)
        classes = goal.task == "classification"
        self._y = np.ascontiguousarray(goal.y if classes else np.zeros(len(x)), np.int32)
        self._kind, self._targets, self._weights = _LOSSES[goal.task], _NONE32, _NONE32
        if not goal.plain:
            self._targets = np.ascontiguousarray(goal.soft)
            self._weights = np.ones(len(x), np.float32) if goal.weights is None else goal.weights.astype(np.float32)
        self._numbers = np.ascontiguousarray(numbers, np.int64)
        self._lr, self._momentum = lr, momentum
        n = buffers.plan.params
        self._frozen = buffers.frozen()
        self._grads = np.zeros(n, np.float32) if buffers.plan.general else _NONE32
        self._velocity = np.zeros(n, np.float32) if momentum else _NONE32
        self._workspace = buffers.workspace()

    def epochs(self, order: NDArray[np.int32], lr: float | None = None) -> EpochStats:
        """Run whole epochs; see Trainer.epochs."""
        if lr is not None:
            if not self._buffers.plan.general:  # skip.h keeps −lr·v
                self._velocity *= np.float32(lr / self._lr)
            self._lr = lr
        order = np.ascontiguousarray(order, np.int32)
        E, T = order.shape
        if T and (order.min() < 0 or order.max() >= len(self._x)):
            raise UsageError(f"order must hold rows 0 to {len(self._x) - 1}, not {order.min()} to {order.max()}")
        loss, correct = np.zeros(E), np.zeros(E, np.int64)
        store = self._store
        diverged, hits, misses = self._buffers.core.epochs(
            self._buffers.plan,
            self._buffers.params,
            self._grads,
            self._velocity,
            self._frozen,
            self._x,
            self._y,
            self._numbers,
            store is not None,
            store.data if store is not None else _NONE8,
            store.owner if store is not None else _NONE64,
            self._workspace,
            self._lr,
            self._momentum,
            order,
            loss,
            correct,
            self._targets,
            self._weights,
            self._kind,
        )
        if store is not None:
            store.hits += hits
            store.misses += misses
        return EpochStats(loss / max(T, 1), correct, diverged or None)

    def tensors(self) -> dict[str, Floats]:
        """The trained tensors and moved running statistics; see Trainer.tensors."""
        from ..methods import trainable

        spec = self._buffers.spec
        shapes = trainable(self._method, spec, self._rank)
        if self._method.norms == "train":
            shapes |= {name: shape for name, shape in spec.parameters.items() if ".bn.running_" in name}
        return {name: self._buffers.read(name, shape) for name, shape in shapes.items()}

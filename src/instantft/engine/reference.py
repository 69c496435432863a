"""The slow engine: NumPy, to be read beside Skip2-LoRA (§2-4) and InstantFT (§2-3), and the oracle of the fast one.

Letters: B batch · k layer, from 0 · N, M width of a layer's input and linear output · R rank · C outputs · x^k input of
layer k · y logits · gX gradient of the loss with respect to X. Equation numbers are those of Skip2-LoRA. Convolutions
are the same equations on image patches (im2col). Functions compute in the type of their arguments; the engine hands
them float32. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.store import Store
from ..errors import UsageError
from ..lift import check_none
from ..methods import Method, connections, layer_types, trainable
from ..spec import NetSpec
from ..tasks import Targets, as_targets, loss_and_gradient
from . import EpochStats, Floats, Labels, Tensors
from .dense import NumpyDense

__all__ = ["BN_EPS", "BN_MOMENTUM", "ReferenceEngine", "ReferenceTrainer", "gradients"]

Array = NDArray[Any]
Arrays = Mapping[str, Array]

BN_EPS = 1e-5
BN_MOMENTUM = 0.1
CHUNK = 256
"""Samples that go through the network at a time where nothing is trained."""


class ReferenceEngine:
    """The `Engine` written in NumPy."""

    name = "reference"
    own_steps = False
    dense = NumpyDense()

    def forward(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Logits (T, C) of samples x (T, N), with whatever adapters are present; see `Engine.forward`."""
        check_none(tensors)
        pairs = _present(tensors, spec)
        out = np.empty((len(x), spec.C), np.float32)
        for rows in _chunks(len(x)):
            out[rows] = _forward(spec, tensors, pairs, _float32(x[rows])).y
        return out

    def records(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Record rows (T, spec.record.width) of the frozen network; see `Engine.records`.

        One sample at a time: a matrix product may round differently in a batch of another size, and a record must not
        depend on which samples it was computed with.
        """
        out = np.zeros((len(x), spec.record.width), np.float32)
        for row in range(len(x)):
            run = _forward(spec, tensors, [], _float32(x[row : row + 1]))
            for s, value in zip(spec.record.segments, [*run.x[1:], run.c], strict=True):
                out[row, s.offset : s.offset + s.size] = value[0]
        return out

    def fill(
        self, spec: NetSpec, tensors: Tensors, x: Floats, numbers: NDArray[np.int64], store: Store, threads: int = 1
    ) -> None:
        """Run the frozen network once for every sample the store lacks and would keep; see `Engine.fill`.

        Their accesses are still to come, so each counts as a miss now and one hit less later.
        """
        missing = np.flatnonzero(~store.held(numbers) & store.admits(numbers))
        for rows in _chunks(len(missing)):
            i = missing[rows]
            store.write(numbers[i], self.records(spec, tensors, x[i]))
        store.misses += len(missing)
        store.hits -= len(missing)

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
    ) -> ReferenceTrainer:
        """Make a trainer; see `Engine.trainer`.

        Raises:
            UsageError: a store is given for a method that obsoletes records, or a tensor is missing or misshapen.
        """
        if store is not None and not method.cacheable:
            raise UsageError(f"a cache must go with a method that leaves records valid, not {method.name}")
        return ReferenceTrainer(self, spec, tensors, method, rank, x, y, numbers, store, batch_size, lr, momentum)


class ReferenceTrainer:
    """Algorithm 1 of Skip2-LoRA, for every method; without a store, the same without its lines 6 and 7."""

    def __init__(
        self,
        engine: ReferenceEngine,
        spec: NetSpec,
        tensors: Tensors,
        method: Method,
        rank: int,
        x: Floats,
        y: Labels,
        numbers: NDArray[np.int64],
        store: Store | None,
        batch_size: int,
        lr: float,
        momentum: float,
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._method = method
        self._x = _float32(x)
        self._goal = as_targets(y, spec.C)
        self._numbers = np.asarray(numbers, np.int64)
        self._store = store
        self._batch_size = batch_size
        self._lr = np.float32(lr)
        self._momentum = np.float32(momentum)
        self._tensors: dict[str, Array] = {name: np.array(value, np.float32) for name, value in tensors.items()}
        self._frozen = {name: self._tensors[name].copy() for name in spec.parameters if name in self._tensors}
        """What records are computed with: c too is that of the start, even where FT-Last moves on from it."""
        self._trained = trainable(method, spec, rank)
        # a store that holds every sample stands in for a network that somebody else runs
        recorded = method.rows_only and store is not None and bool(store.held(self._numbers).all())
        for name, shape in {**({} if recorded else spec.parameters), **self._trained}.items():
            if name not in tensors or np.shape(tensors[name]) != shape:
                found = list(np.shape(tensors[name])) if name in tensors else "missing"
                raise UsageError(f"tensor {name} must have the shape {list(shape)}, not {found}")
        self._velocity = {name: np.zeros(shape, np.float32) for name, shape in self._trained.items()}

    def epochs(self, order: NDArray[np.int32], lr: float | None = None) -> EpochStats:
        """Run E whole epochs of steps over the rows in `order` (E, T); see `Trainer.epochs`.

        Where training diverges, the loss of that epoch and of those after it is NaN.
        """
        if lr is not None:
            self._lr = np.float32(lr)
        E, T = order.shape
        loss = np.full(E, np.nan, np.float64)
        correct = np.zeros(E, np.int64)
        step = 0
        for e in range(E):
            total = 0.0
            for start in range(0, T, self._batch_size):
                step += 1
                rows = order[e, start : start + self._batch_size]
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                    run = self._forward(rows)
                    goal = self._goal.at(rows)
                    batch_loss, g = _loss(run.y, goal)
                    if not np.isfinite(batch_loss):
                        return EpochStats(loss, correct, diverged_at=step)
                    self._update(_backward(self._spec, self._tensors, self._method, run, g), run)
                total += batch_loss * len(rows)
                correct[e] += goal.hits(run.y)
            loss[e] = total / T
        return EpochStats(loss, correct)

    def tensors(self) -> dict[str, Floats]:
        """The trained tensors, and running statistics where batch norm is trained, as copies."""
        names = list(self._trained)
        if self._method.norms == "train":
            names += [name for name in self._spec.parameters if ".bn.running_" in name]
        return {name: self._tensors[name].copy() for name in names}

    def _forward(self, rows: NDArray[np.int32]) -> _Run:
        """Algorithm 1, lines 5 to 8: the batch `rows`, its frozen part from the cache, and the adapters."""
        pairs = connections(self._method, self._spec.L)
        if not self._method.cacheable:
            return _forward(self._spec, self._tensors, pairs, self._x[rows], self._method.norms == "train")
        if self._store is None:
            record = self._engine.records(self._spec, self._frozen, self._x[rows])
        else:
            record = self._cached(rows, self._store)
        taps = [self._x[rows]]
        taps += [record[:, s.offset : s.offset + s.size] for s in self._spec.record.segments]
        c = taps.pop()
        if self._method.weights == "last" or self._method.biases == "last":
            # FT-Last: y^n changes with every step, so only its input comes from the cache (§4.2).
            c = _linear(self._spec, self._tensors, self._spec.L - 1, taps[-1])
        run = _Run(x=taps, c=c)
        _output(run, self._spec, self._tensors, pairs)
        return run

    def _cached(self, rows: NDArray[np.int32], store: Store) -> Floats:
        """Records of the batch, as the codec gives them (Algorithm 2: what is cached is not computed again)."""
        numbers = self._numbers[rows]
        held = store.held(numbers)
        record = np.empty((len(rows), self._spec.record.width), np.float32)
        record[held] = store.read(numbers[held])
        store.hits += int(held.sum())
        if not held.all():
            fresh = self._engine.records(self._spec, self._frozen, self._x[rows[~held]])
            record[~held] = store.codec.decode(store.codec.encode(fresh, store.record), store.record)
            store.write(numbers[~held], fresh)
            store.misses += len(fresh)
        return record

    def _update(self, grads: dict[str, Array], run: _Run) -> None:
        """SGD with momentum, v ← μv + g and p ← p − ηv (equations 5, 6, 15, 16 where μ = 0), and running statistics."""
        for name, g in grads.items():
            v = self._velocity[name]
            v *= self._momentum
            v += g
            self._tensors[name] -= self._lr * v
        self._tensors.update(run.running)


def gradients(spec: NetSpec, tensors: Arrays, method: Method, x: Array, y: Labels) -> dict[str, Array]:
    """Gradients of the mean loss of a batch with respect to the tensors that `method` trains, and no others.

    Args:
        spec: the network.
        tensors: its tensors and the method's adapters, all float32 or all float64.
        method: decides what is computed.
        x: (B, N) samples.
        y: (B,) classes, or what else the samples are to teach.

    Returns:
        The gradient of each trained tensor, of its shape, in the type of the arguments.
    """
    run = _forward(spec, tensors, connections(method, spec.L), x, method.norms == "train")
    return _backward(spec, tensors, method, run, _loss(run.y, as_targets(y, spec.C))[1])


@dataclass
class _Run:
    """A forward pass of a batch, with what its backward pass needs."""

    x: list[Array] = field(default_factory=list)
    """x^k (B, N), flat, of every layer."""
    h: dict[tuple[int, int], Array] = field(default_factory=dict)
    """y_A = x^i·A (B, R) of adapter i→j."""
    normed: dict[int, Array] = field(default_factory=dict)
    """Batch norm of layer k: its input less the mean, over the deviation, (B, *linear shape)."""
    deviation: dict[int, Array] = field(default_factory=dict)
    """Its √(variance + ε), per channel."""
    activated: dict[int, Array] = field(default_factory=dict)
    """Output of layer k before pooling, (B, *linear shape)."""
    running: dict[str, Array] = field(default_factory=dict)
    """New running statistics, where batch norm is in training mode."""
    batch_stats: bool = False
    c: Array = field(default_factory=lambda: np.empty(0))
    """(B, C): output of the last layer, without what adapters add."""
    y: Array = field(default_factory=lambda: np.empty(0))
    """(B, C): logits."""


def _forward(spec: NetSpec, tensors: Arrays, pairs: list[tuple[int, int]], x: Array, batch_stats: bool = False) -> _Run:
    """Run the network and the adapters in `pairs`.

    Args:
        x: (B, N) samples.
        batch_stats: True: batch norm in training mode; False: by its running statistics.
    """
    spec.check_own()
    run = _Run(batch_stats=batch_stats)
    for k in range(spec.L - 1):
        run.x.append(x)
        layer, shape = spec.layers[k], spec.geometry[k].linear_shape
        z = _linear(spec, tensors, k, x)
        if (k, k + 1) in pairs:
            z = z + _adapter(run, tensors, k, k + 1)
        z = z.reshape(-1, *shape)
        if layer.batch_norm:
            z = _batch_norm(run, tensors, k, z)
        if layer.relu:
            z = np.maximum(z, 0)
        run.activated[k] = z
        x = _pooled(z, layer.pool).max(axis=-1).reshape(len(z), -1) if layer.pool > 1 else z.reshape(len(z), -1)
    run.x.append(x)
    run.c = _linear(spec, tensors, spec.L - 1, x)
    _output(run, spec, tensors, pairs)
    return run


def _linear(spec: NetSpec, tensors: Arrays, k: int, x: Array) -> Array:
    """y = x·W + b (equation 1), flat (B, M); a convolution is the same on patches."""
    W, b = tensors[f"layers.{k}.weight"], tensors[f"layers.{k}.bias"]
    if spec.layers[k].kind == "fc":
        return np.asarray(x @ W + b)
    z = _patches(spec, k, x) @ W.reshape(len(W), -1).T + b  # (B, h·w, out)
    return np.asarray(z.transpose(0, 2, 1).reshape(len(x), -1))


def _adapter(run: _Run, tensors: Arrays, i: int, j: int) -> Array:
    """y_A = x·W_A, y_B = y_A·W_B (equations 7, 8); returns y_B (B, M)."""
    run.h[i, j] = run.x[i] @ tensors[f"lora.{i}-{j}.A"]
    return np.asarray(run.h[i, j] @ tensors[f"lora.{i}-{j}.B"])


def _output(run: _Run, spec: NetSpec, tensors: Arrays, pairs: list[tuple[int, int]]) -> None:
    """y ← gain·c + Σ_k x^k·A_k·B_k + bias (equation 17; InstantFT equation 1)."""
    y = run.c * tensors["output.gain"] if "output.gain" in tensors else run.c
    for i, j in pairs:
        if j == spec.L:
            y = y + _adapter(run, tensors, i, j)
    run.y = y + tensors["output.bias"] if "output.bias" in tensors else y


def _batch_norm(run: _Run, tensors: Arrays, k: int, z: Array) -> Array:
    """(z − mean)/√(variance + ε)·γ + β, each channel by itself."""
    gamma, beta, mean, variance = (
        tensors[f"layers.{k}.bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
    )
    axes = (0, *range(2, z.ndim))
    if run.batch_stats:
        old_mean, old_variance = mean, variance
        mean, variance = z.mean(axis=axes), z.var(axis=axes)
        n = z.size // z.shape[1]
        keep, new = z.dtype.type(1 - BN_MOMENTUM), z.dtype.type(BN_MOMENTUM)
        unbiased = variance * z.dtype.type(n / max(n - 1, 1))
        run.running[f"layers.{k}.bn.running_mean"] = keep * old_mean + new * mean
        run.running[f"layers.{k}.bn.running_var"] = keep * old_variance + new * unbiased
    run.deviation[k] = np.sqrt(variance + z.dtype.type(BN_EPS))
    run.normed[k] = (z - _channels(mean, z)) / _channels(run.deviation[k], z)
    return np.asarray(run.normed[k] * _channels(gamma, z) + _channels(beta, z))


def _loss(y: Array, goal: Targets) -> tuple[float, Array]:
    """Mean loss of logits y (B, C), and its gradient: of plain classes (softmax(y) − t)/B."""
    losses, g = loss_and_gradient(goal, y)
    return float(losses.mean()), g / y.dtype.type(len(y))


def _backward(spec: NetSpec, tensors: Arrays, method: Method, run: _Run, gy: Array) -> dict[str, Array]:
    """Gradients of what `method` trains, from gy (B, C), computing no more than its compute types say (Table 1).

    Only a layer of type …x hands a gradient to the layer below; without one the pass ends there.
    """
    grads: dict[str, Array] = {}
    pairs, types = connections(method, spec.L), layer_types(method, spec.L)
    for i, j in pairs:
        if j == spec.L and i < spec.L - 1:  # skip adapters: LoRA_yw, nothing flows on
            _adapter_gradients(grads, run, tensors, i, j, gy)
    g = gy  # with respect to the output of layer k
    for k in reversed(range(spec.L)):
        layer, wanted = spec.layers[k], types[k].removeprefix("FC_y")
        gz = g  # with respect to its linear output, flat (B, M)
        if k < spec.L - 1:
            gz = _through_activation(grads, spec, tensors, method, run, k, g)
        # c is scaled by the gain on its way to y, what the last layer's adapter adds is not
        gl = gz * tensors["output.gain"] if k == spec.L - 1 and "output.gain" in tensors else gz
        patches = _patches(spec, k, run.x[k]) if layer.kind == "conv" and "w" in wanted else None
        gm = gl.reshape(len(gl), layer.out, -1)  # (B, out, h·w), or (B, M, 1)
        if "w" in wanted:  # gW = xᵀ·gy (equation 2)
            weight = f"layers.{k}.weight"
            grads[weight] = (
                run.x[k].T @ gl
                if patches is None
                else np.einsum("bop,bpq->oq", gm, patches, optimize=True).reshape(tensors[weight].shape)
            )
        if "b" in wanted:  # gb = Σ gy (equation 3)
            grads[f"layers.{k}.bias"] = gm.sum(axis=(0, 2))
        gh = _adapter_gradients(grads, run, tensors, k, k + 1, gz) if (k, k + 1) in pairs else None
        if "x" not in wanted:
            break
        g = _linear_gx(spec, tensors, k, gl)
        if gh is not None:  # gx ← gx + gx_B·W_Aᵀ (equations 13, 14)
            g = g + gh @ tensors[f"lora.{k}-{k + 1}.A"].T
    order = {name: n for n, name in enumerate(trainable(method, spec, 1))}
    return dict(sorted(grads.items(), key=lambda item: order[item[0]]))


def _adapter_gradients(grads: dict[str, Array], run: _Run, tensors: Arrays, i: int, j: int, gy: Array) -> Array:
    """gW_B = y_Aᵀ·gy, gx_B = gy·W_Bᵀ, gW_A = xᵀ·gx_B (equations 10-12); returns gx_B (B, R)."""
    gh = np.asarray(gy @ tensors[f"lora.{i}-{j}.B"].T)
    grads[f"lora.{i}-{j}.A"] = run.x[i].T @ gh
    grads[f"lora.{i}-{j}.B"] = run.h[i, j].T @ gy
    return gh


def _through_activation(
    grads: dict[str, Array], spec: NetSpec, tensors: Arrays, method: Method, run: _Run, k: int, g: Array
) -> Array:
    """From the gradient at the output of layer k to that at its linear output, flat (B, M): pool, ReLU, batch norm."""
    layer, z = spec.layers[k], run.activated[k]
    if layer.pool > 1:
        g = _unpooled(g.reshape(-1, *spec.geometry[k].out_shape), z, layer.pool)
    g = g.reshape(z.shape)
    if layer.relu:
        g = g * (z > 0)
    if layer.batch_norm:
        g = _batch_norm_gradients(grads, tensors, method, run, k, g)
    return g.reshape(len(g), -1)


def _batch_norm_gradients(
    grads: dict[str, Array], tensors: Arrays, method: Method, run: _Run, k: int, g: Array
) -> Array:
    axes = (0, *range(2, g.ndim))
    normed = run.normed[k]
    if method.norms == "train":
        grads[f"layers.{k}.bn.weight"] = (g * normed).sum(axis=axes)
    if method.norms != "frozen":
        grads[f"layers.{k}.bn.bias"] = g.sum(axis=axes)
    if run.batch_stats:  # mean and variance depend on the batch
        n = g.dtype.type(g.size // g.shape[1])
        g = g - _channels(g.sum(axis=axes) / n, g) - normed * _channels((g * normed).sum(axis=axes) / n, g)
    return np.asarray(g * _channels(tensors[f"layers.{k}.bn.weight"] / run.deviation[k], g))


def _linear_gx(spec: NetSpec, tensors: Arrays, k: int, g: Array) -> Array:
    """gx = gy·Wᵀ (equation 4), flat (B, N); for a convolution every patch's share is added where it came from."""
    W = tensors[f"layers.{k}.weight"]
    if spec.layers[k].kind == "fc":
        return np.asarray(g @ W.T)
    (channels, height, width), (_, h, w) = spec.geometry[k].in_shape, spec.geometry[k].linear_shape
    (kh, kw), (ph, pw) = spec.layers[k].kernel, spec.layers[k].padding
    shares = np.einsum("bohw,ocij->bcijhw", g.reshape(-1, *spec.geometry[k].linear_shape), W, optimize=True)
    gx = np.zeros((len(g), channels, height + 2 * ph, width + 2 * pw), g.dtype)
    for i in range(kh):
        for j in range(kw):
            gx[:, :, i : i + h, j : j + w] += shares[:, :, i, j]
    return gx[:, :, ph : ph + height, pw : pw + width].reshape(len(g), -1)


def _patches(spec: NetSpec, k: int, x: Array) -> Array:
    """im2col: the patch under every output pixel, (B, h·w, channels·kh·kw)."""
    (kh, kw), (ph, pw) = spec.layers[k].kernel, spec.layers[k].padding
    image = x.reshape(-1, *spec.geometry[k].in_shape)
    image = np.pad(image, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    windows = np.lib.stride_tricks.sliding_window_view(image, (kh, kw), axis=(2, 3))
    B, channels, h, w = windows.shape[:4]
    return np.asarray(windows.transpose(0, 2, 3, 1, 4, 5).reshape(B, h * w, channels * kh * kw))


def _pooled(z: Array, p: int) -> Array:
    """The p·p values under every pixel after pooling, row by row: (B, channels, h // p, w // p, p·p)."""
    B, channels, h, w = z.shape[0], z.shape[1], z.shape[2] // p, z.shape[3] // p
    z = z[:, :, : h * p, : w * p].reshape(B, channels, h, p, w, p)
    return np.asarray(z.transpose(0, 1, 2, 4, 3, 5).reshape(B, channels, h, w, p * p))


def _unpooled(g: Array, z: Array, p: int) -> Array:
    """Gradient before max pooling of z: all of it to the first of the largest values."""
    B, channels, h, w = g.shape
    first = _pooled(z, p).argmax(axis=-1)[..., None] == np.arange(p * p)
    spread = (g[..., None] * first).reshape(B, channels, h, w, p, p).transpose(0, 1, 2, 4, 3, 5)
    out = np.zeros_like(z)
    out[:, :, : h * p, : w * p] = spread.reshape(B, channels, h * p, w * p)
    return out


def _channels(v: Array, z: Array) -> Array:
    """v (channels,) shaped to go with z (B, channels, …)."""
    return v.reshape(-1, *[1] * (z.ndim - 2))


def _present(tensors: Arrays, spec: NetSpec) -> list[tuple[int, int]]:
    """The adapters i→j that `tensors` hold, of those that can be there, in order."""
    possible = sorted({(k, j) for k in range(spec.L) for j in (k + 1, spec.L)})
    return [(i, j) for i, j in possible if f"lora.{i}-{j}.A" in tensors]


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]


def _float32(x: Array) -> Floats:
    return np.asarray(x, np.float32)

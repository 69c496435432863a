"""Side by side: every method in this package, and what one would use instead, in interleaved rounds of one process.

The rivals do the same work from the same start: PyTorch eager with its own SGD and as many threads, and
scikit-learn's logistic regression on the last tap. They are looked up by name, and left out where not installed.
`benchmarks/` has the measurements behind the README; this is the small one that everybody can run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapters import initial
from .backbones.builtin import Network
from .cache.codecs import codec
from .cache.store import memory_store
from .engine import Engine, Floats
from .methods import METHODS, SGD_METHODS, Method, connections, method, trainable
from .solvers import sgd
from .solvers.ridge import RidgeResult, fit_ridge

__all__ = ["run_bench"]

Labels = NDArray[np.int32]
Timed = Callable[[], "tuple[float, float, float]"]
"""Seconds in all, seconds of them for the cache, accuracy on the samples."""


@dataclass(frozen=True)
class _Settings:
    rank: int
    epochs: int
    batch_size: int
    lr: float
    seed: int
    threads: int


def run_bench(
    engine: Engine,
    base: Network,
    x: Floats,
    y: Labels,
    *,
    rank: int,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    threads: int,
    repeat: int,
    progress: sgd.Progress,
) -> list[dict[str, Any]]:
    """Time everything `repeat` times, in turns.

    Args:
        engine: ours. base: the network. x: (T, N). y: (T,).
        rank, epochs, batch_size, lr, seed, threads: as in `solvers.sgd.fit`.
        progress: told how many rounds are done.

    Returns:
        For each contestant: name, seconds (median), fill, ratio (its time over that of Skip2-LoRA with its fp32
        cache), bytes_per_sample (of its cache, or None), accuracy (on x).
    """
    settings = _Settings(rank, epochs, batch_size, lr, seed, threads)
    contestants: list[tuple[str, int | None, Timed]] = []
    for m in METHODS.values():
        if not m.cached:
            contestants.append((m.name, None, _ours(engine, base, m, None, x, y, settings)))
    for name, codec_name in (
        ("ft-last", "fp32"),
        ("lora-last", "fp32"),
        ("skip2-lora", "fp32"),
        ("skip2-lora", "nf4"),
        ("skip2-lora", "relu4"),
        ("skip-ridge", "fp32"),
        ("skip-ridge", "relu4"),
    ):
        size = codec(codec_name).bytes_per_sample(base.spec.record)
        timed = _ours(engine, base, method(name), codec_name, x, y, settings)
        contestants.append((f"{name} {codec_name}", size, timed))
    contestants += _rivals(engine, base, x, y, settings)

    runs: list[list[tuple[float, float, float]]] = [[] for _ in contestants]
    for done in range(repeat):
        for i, (_, _, timed) in enumerate(contestants):
            runs[i].append(timed())
            progress(done + (i + 1) / len(contestants))
    totals = [median(r[0] for r in run) for run in runs]
    reference = totals[[name for name, _, _ in contestants].index("skip2-lora fp32")]
    return [
        {
            "name": name,
            "seconds": total,
            "fill": median(r[1] for r in run),
            "ratio": total / reference,
            "bytes_per_sample": size,
            "accuracy": run[0][2],
        }
        for (name, size, _), total, run in zip(contestants, totals, runs, strict=True)
    ]


def _ours(
    engine: Engine, base: Network, m: Method, codec_name: str | None, x: Floats, y: Labels, s: _Settings
) -> Timed:
    def timed() -> tuple[float, float, float]:
        began = time.perf_counter()
        store = memory_store(codec_name, base.spec.record, len(x)) if codec_name else None
        opened = time.perf_counter() - began
        result: sgd.FitResult | RidgeResult
        if m.solver == "ridge":
            result = fit_ridge(engine, base, x, y, store=store, seed=s.seed, threads=s.threads)
        else:
            result = sgd.fit(
                engine,
                base,
                m,
                x,
                y,
                rank=s.rank,
                epochs=s.epochs,
                batch_size=s.batch_size,
                lr=s.lr,
                seed=s.seed,
                threads=s.threads,
                store=store,
            )
        logits = engine.forward(base.spec, {**base.tensors, **result.adapter.tensors}, x)
        fill = result.seconds.fill if store else 0.0
        return opened + result.seconds.total, fill, float((logits.argmax(1) == y).mean())

    return timed


def _rivals(engine: Engine, base: Network, x: Floats, y: Labels, s: _Settings) -> list[tuple[str, int | None, Timed]]:
    found: list[tuple[str, int | None, Timed]] = []
    try:
        torch: Any = import_module("torch")
    except ImportError:
        pass
    else:
        rows = [(m, m.cached) for m in SGD_METHODS.values()]
        for m, cached in rows:
            size = 4 * base.spec.record.size if cached else None
            found.append((f"PyTorch {m.name}", size, _torch(torch, base, m, cached, x, y, s)))
    try:
        linear: Any = import_module("sklearn.linear_model")
    except ImportError:
        pass
    else:
        if len(np.unique(y)) > 1:
            found.append(("scikit-learn logistic head", None, _logistic(linear, engine, base, x, y, s)))
    return found


def _logistic(linear: Any, engine: Engine, base: Network, x: Floats, y: Labels, s: _Settings) -> Timed:
    def timed() -> tuple[float, float, float]:
        import warnings

        began = time.perf_counter()
        records = engine.records(base.spec, base.tensors, x, s.threads)
        filled = time.perf_counter()
        last = base.spec.record.segments[-2] if base.spec.L > 1 else None
        features = x if last is None else records[:, last.offset : last.offset + last.size]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged is no news after so few steps
            model = linear.LogisticRegression(max_iter=100).fit(features, y)
        done = time.perf_counter()
        return done - began, filled - began, float(model.score(features, y))

    return timed


def _torch(torch: Any, base: Network, m: Method, cached: bool, x: Floats, y: Labels, s: _Settings) -> Timed:
    """The same training as a user of PyTorch would write it."""
    F = torch.nn.functional
    spec, names = base.spec, list(trainable(m, base.spec, s.rank))
    pairs, trained = connections(m, spec.L), m.norms == "train"

    def adapter(p: dict[str, Any], i: int, j: int, tap: Any) -> Any:
        return tap @ p[f"lora.{i}-{j}.A"] @ p[f"lora.{i}-{j}.B"]

    def norm(p: dict[str, Any], n: str, z: Any, training: bool) -> Any:
        mean, var, gamma, beta = (p[n + name] for name in ("running_mean", "running_var", "weight", "bias"))
        if training and z.numel() == z.shape[1]:
            # One value a channel, as in a last batch of one sample: PyTorch refuses it. The engines' definition is
            # variance 0, so that beta is all that is left.
            with torch.no_grad():
                mean.lerp_(z.flatten(), 0.1)
                var.mul_(0.9)
            return (z - z.detach()) * 0 + beta.view_as(z)
        return F.batch_norm(z, mean, var, gamma, beta, training)

    def network(p: dict[str, Any], v: Any, training: bool) -> list[Any]:
        """x^0 … x^{L-1} and c, flat; batch norm by the batch where `training`, else by its running statistics."""
        taps = []
        for k, (layer, g) in enumerate(zip(spec.layers, spec.geometry, strict=True)):
            v = v.flatten(1)
            taps.append(v)
            W, b = p[f"layers.{k}.weight"], p[f"layers.{k}.bias"]
            z = (
                torch.addmm(b, v, W)
                if layer.kind == "fc"
                else F.conv2d(v.view(-1, *g.in_shape), W, b, 1, layer.padding)
            )
            if (k, k + 1) in pairs and k + 1 < spec.L:
                z = z + adapter(p, k, k + 1, v).view_as(z)
            if layer.batch_norm:
                z = norm(p, f"layers.{k}.bn.", z, training)
            z = F.relu(z) if layer.relu else z
            v = F.max_pool2d(z, layer.pool) if layer.pool > 1 else z
        return [*taps, v]

    def output(p: dict[str, Any], record: list[Any]) -> Any:
        logits = record[-1]
        for i, j in pairs:
            if j == spec.L:
                logits = logits + adapter(p, i, j, record[i])
        return logits

    def timed() -> tuple[float, float, float]:
        threads = torch.get_num_threads()
        torch.set_num_threads(s.threads)
        start = {**base.tensors, **initial(m, spec, s.rank, s.seed)}
        p = {k: torch.from_numpy(v.copy()) for k, v in start.items()}
        for k in names:
            p[k].requires_grad_()
        samples, labels = torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
        generator = torch.Generator().manual_seed(s.seed)
        began = time.perf_counter()
        optimizer = torch.optim.SGD([p[k] for k in names], lr=s.lr)
        record: list[Any] = []
        if cached:
            with torch.no_grad():
                parts = [network(p, part, False) for part in samples.split(256)]
                record = [torch.cat(segment) for segment in zip(*parts, strict=True)]
        filled = time.perf_counter()
        for _ in range(s.epochs):
            for rows in torch.randperm(len(x), generator=generator).split(s.batch_size):
                rows_of = [segment[rows] for segment in record] if cached else network(p, samples[rows], trained)
                loss = F.cross_entropy(output(p, rows_of), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        done = time.perf_counter()
        with torch.no_grad():
            logits = torch.cat([output(p, network(p, part, False)) for part in samples.split(256)])
            right = (logits.argmax(1) == labels).float().mean()
        torch.set_num_threads(threads)
        return done - began, filled - began if cached else 0.0, float(right)

    return timed

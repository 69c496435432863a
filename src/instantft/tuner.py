"""What a program calls: `load` a network, adapt it with a `FineTuner`, in the manner of scikit-learn.

This file checks and remembers; the work is done in solvers/, engine/ and cache/.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from os import PathLike
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .adapters import Adapter
from .backbones.builtin import Network
from .cache.codecs import codec
from .cache.store import Store, memory_store, open_store
from .data import as_array, as_labels, as_samples, warn_if_poor
from .engine import Engine, Floats, forward, get_engine
from .errors import DataError, FileError, UsageError
from .methods import Method, method
from .solvers import sgd

__all__ = ["FineTuner", "load", "probabilities"]

Self = TypeVar("Self", bound="FineTuner")

PARAMETERS = (
    "base",
    "method",
    "rank",
    "cache",
    "epochs",
    "lr",
    "batch_size",
    "seed",
    "threads",
    "engine",
    "momentum",
    "cache_capacity",
    "cache_file",
)


MAX_NUMBER = 2**63 - 2
"""Largest sample number, so that the number after it is still an int64."""


def load(path: str | PathLike[str]) -> Network:
    """The base network in a ``.safetensors`` file of ours.

    Raises:
        FileError: missing, truncated, damaged, or with a wrong hash.
    """
    return Network.load(path)


class FineTuner:
    """Adapts a frozen network to new samples.

    Args:
        base: the network, which is never changed.
        method: a row of `methods.METHODS`: ft-all, ft-last, ft-bias, ft-all-lora, lora-all, lora-last, skip-lora,
            skip2-lora.
        rank: R of the adapters.
        cache: codec of the forward cache (fp32, fp16, int8, nf4, nf4-block64, relu4), or "none"; None: fp32 for
            skip2-lora, none for the others.
        epochs, lr, batch_size, momentum: of SGD.
        seed: decides the whole result.
        threads: used for filling the cache and for prediction.
        engine: "native", "reference", or an engine; None: native where it was built.
        cache_capacity: samples the cache has room for; None: all of them.
        cache_file: where to keep the cache between runs; None: in memory. `fit` only.

    Attributes:
        adapter_: the adapter.
        history_: {"loss", "accuracy"}, a value an epoch.
        result_: `solvers.sgd.FitResult` of the last call.
        store_: the cache, or None.
        next_number_: the number that the next new sample of `partial_fit` gets.
        classes_: (C,) 0 … C-1.
        n_features_in_: N.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        base: Network,
        method: str = "skip2-lora",
        rank: int = 4,
        cache: str | None = None,
        epochs: int = 10,
        lr: float = 0.1,
        batch_size: int = 20,
        seed: int = 0,
        threads: int = 1,
        engine: str | Engine | None = None,
        momentum: float = 0.0,
        cache_capacity: int | None = None,
        cache_file: str | PathLike[str] | None = None,
    ) -> None:
        self.base = base
        self.method = method
        self.rank = rank
        self.cache = cache
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed
        self.threads = threads
        self.engine = engine
        self.momentum = momentum
        self.cache_capacity = cache_capacity
        self.cache_file = cache_file
        self._check()

    # -- scikit-learn's habits ---------------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self: Self, **params: Any) -> Self:
        """Change constructor arguments; what was fitted stays until the next fit.

        Raises:
            UsageError: there is no such argument, or a value is out of range; then nothing changes.
        """
        for name in params:
            if name not in PARAMETERS:
                raise UsageError(f"a parameter must be one of {', '.join(PARAMETERS)}, not {name!r}")
        before = self.get_params()
        vars(self).update(params)
        try:
            self._check()
        except UsageError:
            vars(self).update(before)
            raise
        return self

    _estimator_type = "classifier"
    """What scikit-learn before 1.6 asks instead of the tags."""

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks before it searches or validates; only it calls this, so it is installed."""
        from sklearn.utils import ClassifierTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
        )

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.get_params().items() if k != "base" and v is not None)
        return f"FineTuner({settings})"

    def fit(self: Self, x: ArrayLike, y: ArrayLike, *, progress: sgd.Progress | None = None) -> Self:
        """Fine-tune on samples from the start. They are numbered 0 … T-1 for the cache.

        Args:
            x: float or uint8, (T, N), (T, channels, height, width) or (T, height, width).
            y: (T,) integers from 0 to C-1.
            progress: told how many epochs are done.

        Raises:
            DataError: samples or labels that cannot be used.
            UsageError: an argument is out of range.
            DivergedError: the loss became NaN or Inf; an earlier adapter stays.
        """
        rows, labels = self._samples(x, y)
        return self.fit_prepared(rows, labels, progress=progress)

    def fit_prepared(
        self: Self,
        x: Floats,
        y: NDArray[np.int32],
        *,
        progress: sgd.Progress | None = None,
        filling: sgd.Progress | None = None,
    ) -> Self:
        """As `fit`, for samples and labels that `data.load_samples` has already checked, scaled and normalised.

        Args:
            filling: told how many samples have gone through the frozen network, while the cache is filled.
        """
        m = self._check()
        rows, labels = x, y
        warn_if_poor(labels, self.batch_size)
        store = self._open(m, rows)
        engine = self._engine()
        numbers = np.arange(len(rows))
        result = self._run(engine, m, rows, labels, store, numbers, None, self.epochs, 0, progress, filling)
        self._keep(result, store, len(rows))
        self._epochs_done = self.epochs
        self.history_: dict[str, list[float]] = _history(result, len(rows))
        return self

    def partial_fit(self: Self, x: ArrayLike, y: ArrayLike, *, numbers: ArrayLike | None = None) -> Self:
        """One more epoch, over these samples, from where the adapter stands.

        Args:
            x, y: as in `fit`.
            numbers: (T,) numbers that samples already had, whose records the cache may still hold; the samples must
                be the same as then. None: new numbers, after all earlier ones (see `next_number_`).

        Raises:
            as `fit`; UsageError also for a `cache_file`, which belongs to one data set.
        """
        m = self._check()
        if self.cache_file is not None:
            raise UsageError("a cache_file must belong to one data set: use fit, or partial_fit without cache_file")
        rows, labels = self._samples(x, y)
        first = getattr(self, "next_number_", 0)
        if numbers is not None:
            given = _numbers(numbers, len(rows))
        elif first <= MAX_NUMBER + 1 - len(rows):
            given = np.arange(first, first + len(rows))
        else:
            raise DataError(f"numbers must be at most 2^63-2, but the next is {first}: give numbers")
        store = self._grown(m, given)
        old = getattr(self, "adapter_", None)
        start = old if old is not None and (old.method, old.rank) == (m.name, self.rank) else None
        if start is not None:
            start.check_base(self.base)
        done = getattr(self, "_epochs_done", 0)
        result = self._run(self._engine(), m, rows, labels, store, given, start, 1, done, None)
        self._keep(result, store, max(first, int(given.max()) + 1))
        self._epochs_done = done + 1
        more = _history(result, len(rows))
        before = getattr(self, "history_", {"loss": [], "accuracy": []})
        self.history_ = {key: before[key] + more[key] for key in before}
        return self

    def use(self: Self, adapter: Adapter) -> Self:
        """Predict with `adapter`, as if `fit` had just made it; `partial_fit` goes on from it where it fits.

        Raises:
            MismatchError: it was made on another network; both hashes are named.
        """
        adapter.check_base(self.base)
        self.adapter_ = adapter
        self.classes_ = np.arange(self.base.spec.C)
        self.n_features_in_ = self.base.spec.tap_widths[0]
        return self

    def decision_function(self, x: ArrayLike) -> Floats:
        """Logits (T, C) float32."""
        adapter = self.adapter
        rows, _ = as_samples(x, self.base.spec, self.base.mean, self.base.std)
        tensors = {**self.base.tensors, **adapter.tensors}
        return forward(self._engine(), self.base.spec, tensors, rows, self.threads)

    def predict_proba(self, x: ArrayLike) -> Floats:
        """Softmax probabilities (T, C) float32."""
        return probabilities(self.decision_function(x))

    def predict(self, x: ArrayLike) -> NDArray[np.int64]:
        """Labels (T,), 0 … C-1."""
        return np.asarray(np.argmax(self.decision_function(x), axis=1), np.int64)

    def score(self, x: ArrayLike, y: ArrayLike) -> float:
        """Accuracy, 0 to 1."""
        predicted = self.predict(x)
        return float(np.mean(predicted == as_labels(y, len(predicted), self.base.spec)))

    # -- what else an adapted network can be asked -------------------------------------------------------------------

    @property
    def adapter(self) -> Adapter:
        """The adapter.

        Raises:
            UsageError: nothing was fitted yet.
        """
        found: Adapter | None = getattr(self, "adapter_", None)
        if found is None:
            raise UsageError("fit must come before predict, score and adapter, but nothing was fitted yet")
        return found

    def forget(self, numbers: ArrayLike) -> None:
        """Drop the records of these samples from the cache; those it does not hold are left out silently."""
        store: Store | None = getattr(self, "store_", None)
        if store is not None:
            store.forget(np.atleast_1d(as_array(numbers, "numbers")))
            store.flush()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _check(self) -> Method:
        """See that every argument is in range; returns the method's row."""
        if not isinstance(self.base, Network):
            raise UsageError(f"base must be a Network, as load() returns it, not {type(self.base).__name__}")
        m = method(self.method)
        sgd.check_arguments(
            rank=self.rank,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            seed=self.seed,
            threads=self.threads,
        )
        if self.cache not in (None, "none"):
            if not isinstance(self.cache, str):
                raise UsageError(f"cache must be the name of a codec, not {self.cache!r:.60}")
            codec(self.cache)
            if not m.cacheable:
                raise UsageError(
                    f"a cache must go with a method that leaves the frozen activations as they are, not {m.name}"
                )
        capacity = self.cache_capacity
        whole = isinstance(capacity, (int, np.integer)) and not isinstance(capacity, bool)
        if capacity is not None and (not whole or capacity < 1):
            raise UsageError(f"cache_capacity must be at least 1 sample, not {capacity!r:.60}")
        if self.codec_name(m) is None and (capacity is not None or self.cache_file is not None):
            raise UsageError(f"cache_capacity and cache_file must go with a cache, but {m.name} runs without one here")
        speaks = all(hasattr(self.engine, name) for name in ("name", "forward", "records", "fill", "trainer"))
        if self.engine is not None and not isinstance(self.engine, str) and not speaks:
            raise UsageError(f"engine must be the name of an engine or an engine, not {self.engine!r:.60}")
        return m

    def codec_name(self, m: Method) -> str | None:
        """Codec of the cache as the arguments stand; None: no cache."""
        if self.cache is None:
            return "fp32" if m.cached else None
        return None if self.cache == "none" else self.cache

    def _engine(self) -> Engine:
        return get_engine(self.engine) if self.engine is None or isinstance(self.engine, str) else self.engine

    def _samples(self, x: ArrayLike, y: ArrayLike) -> tuple[Floats, NDArray[np.int32]]:
        rows, _ = as_samples(x, self.base.spec, self.base.mean, self.base.std)
        return rows, as_labels(y, len(rows), self.base.spec)

    def _open(self, m: Method, rows: Floats) -> Store | None:
        name = self.codec_name(m)
        if name is None:
            return None
        record, capacity = self.base.spec.record, min(int(self.cache_capacity or len(rows)), len(rows))
        if self.cache_file is None:
            return memory_store(name, record, capacity)
        data_hash = hashlib.sha256(rows.data).hexdigest()
        store = open_store(self.cache_file, name, record, capacity, self.base.hash, data_hash)
        if store.damaged:
            warnings.warn(
                f"{store.damaged:,} of {capacity:,} records in {self.cache_file} were damaged or unfinished: "
                "they were dropped and are computed anew",
                stacklevel=3,
            )
        return store

    def _grown(self, m: Method, numbers: NDArray[np.int64]) -> Store | None:
        """The cache of a stream, with room for these numbers unless its capacity is bounded."""
        name = self.codec_name(m)
        if name is None:
            return None
        old: Store | None = getattr(self, "store_", None)
        if old is not None and (old.codec.name, self.adapter.base_hash) != (name, self.base.hash):
            old = None
        needed = int(numbers.max()) + 1
        if self.cache_capacity is not None:
            capacity = int(self.cache_capacity)
        else:
            capacity = max(needed, 0 if old is None else old.capacity)
            if old is not None and capacity > old.capacity:
                capacity = max(capacity, 2 * old.capacity)  # so that a long stream is copied only now and then
        if old is not None and old.capacity == capacity:
            return old
        store = memory_store(name, self.base.spec.record, capacity)
        if old is not None:
            # Encoded bytes are copied as they are, in rising order, so that the higher number stays where two collide.
            held = np.sort(old.owner[old.owner >= 0])
            kept = held[store.admits(held)]
            slots = store.slots(kept)
            store.data[slots] = old.data[old.slots(kept)]
            store.owner[slots] = kept
            store.hits, store.misses = old.hits, old.misses
        return store

    def _run(
        self,
        engine: Engine,
        m: Method,
        rows: Floats,
        labels: NDArray[np.int32],
        store: Store | None,
        numbers: NDArray[np.int64],
        start: Adapter | None,
        epochs: int,
        done: int,
        progress: sgd.Progress | None,
        filling: sgd.Progress | None = None,
    ) -> sgd.FitResult:
        try:
            return sgd.fit(
                engine,
                self.base,
                m,
                rows,
                labels,
                rank=self.rank,
                epochs=epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                momentum=self.momentum,
                seed=self.seed,
                threads=self.threads,
                store=store,
                numbers=numbers,
                start=start,
                epochs_before=done,
                progress=progress,
                filling=filling,
            )
        except BaseException:
            # The records are good whatever became of the training, and serve the next run.
            if store is not None:
                with contextlib.suppress(FileError):
                    store.flush()
            raise

    def _keep(self, result: sgd.FitResult, store: Store | None, next_number: int) -> None:
        """Only now, after success, does anything of the old fit go."""
        if store is not None:
            store.flush()
        self.adapter_ = result.adapter
        self.result_ = result
        self.store_ = store
        self.next_number_ = next_number
        self.classes_ = np.arange(self.base.spec.C)
        self.n_features_in_ = self.base.spec.tap_widths[0]


def probabilities(logits: Floats) -> Floats:
    """Softmax of logits (T, C), by row."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _history(result: sgd.FitResult, T: int) -> dict[str, list[float]]:
    return {"loss": result.stats.loss.tolist(), "accuracy": (result.stats.correct / T).tolist()}


def _numbers(numbers: ArrayLike, T: int) -> NDArray[np.int64]:
    array = as_array(numbers, "numbers")
    if array.dtype.kind not in "iu" or array.shape != (T,):
        raise DataError(f"numbers must be ({T},) integers, one a sample, not {array.dtype} {tuple(array.shape)}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= MAX_NUMBER:
        wrong = array.min() if int(array.min()) < 0 else array.max()
        raise DataError(f"numbers must be 0 to 2^63-2, not {wrong}")
    if len(np.unique(array)) != T:
        raise DataError("numbers must differ from one another, but one comes twice")
    return array.astype(np.int64)

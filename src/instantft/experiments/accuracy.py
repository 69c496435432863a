"""What fine-tuning reaches on the papers' drifts: one trial a task, method, cache and seed.

A seed decides the base network, which images are fine-tuned on, the adapters' start and the order of the samples.
Accuracy is measured on samples that nobody trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..backbones.builtin import Network
from ..cache.store import Store, memory_store
from ..cost import cost
from ..data.protocols import BATCH, RANK, Samples, Task, drifted, network, pretraining
from ..engine import Engine, Tensors, forward, get_engine
from ..errors import DivergedError
from ..methods import METHODS
from ..solvers import sgd
from .core import Numbers, Params, Trial, Where

__all__ = [
    "FOUR_BIT",
    "base_network",
    "base_params",
    "column",
    "engine",
    "small",
    "task_of",
    "trial",
    "trials",
    "with_base",
]

FOUR_BIT = "nf4"
"""InstantFT's codec: 995 bytes a sample of LeNet-5."""

FLOPS = 40e9
"""Operations a second that the estimate of a trial reckons with: a third of a core's peak with AVX-512."""

SAMPLES = {
    "fashion_mnist.npz": 60_000, "mnist.npz": 60_000, "har_features561.npz": 5894, "fan_damage1.npz": 470,
    "fan_damage2.npz": 470, "cifar100_10class_standin.npz": 4000,
}  # fmt: skip
"""To pre-train on, for estimates only."""

TUNED = 1024
"""To fine-tune on, for estimates only."""

FIELDS = ("file", "degrees", "pretrain_epochs", "pretrain_lr", "epochs", "lr", "pretrain", "finetune")


def small(task: Task) -> Task:
    """The task for --quick: few samples to pre-train on, few epochs."""
    if task.degrees is not None:
        return replace(task, pretrain=6000, pretrain_epochs=1, epochs=5)
    if task.colour:
        return replace(task, pretrain=min(task.pretrain, 1000), pretrain_epochs=1, epochs=2)
    return replace(task, pretrain_epochs=10, epochs=30)


def task_of(params: Params) -> Task:
    """The task that parameters describe."""
    return Task(title="", paper=(), source="", **{name: params[name] for name in FIELDS})


def base_params(task: Task, seed: int) -> dict[str, Any]:
    """What a trial on this task must have among its parameters."""
    return {**{name: getattr(task, name) for name in FIELDS}, "seed": seed}


def base_key(params: Params) -> str:
    """Name of the base network of a trial's parameters."""
    stem = str(params["file"]).removesuffix(".npz")
    return f"{stem}-n{params['pretrain']}-e{params['pretrain_epochs']}-lr{params['pretrain_lr']:g}-seed{params['seed']}"


@lru_cache(maxsize=2)
def engine(name: str | None) -> Engine:
    """The engine of a run."""
    return get_engine(name)


@lru_cache(maxsize=2)
def _drifted(task: Task, where: Where, seed: int) -> tuple[Samples, Samples]:
    return drifted(task, where.data, seed)


def base_network(params: Params, where: Where) -> Network:
    """The pre-trained network of a trial's parameters, from the folder of bases or trained now."""
    path = where.bases / f"{base_key(params)}.safetensors"
    if path.is_file():
        return Network.load(path)
    task = task_of(params)
    x, y = pretraining(task, where.data)
    made, _ = sgd.pretrain(
        engine(where.engine), network(task), x, y,
        epochs=task.pretrain_epochs, batch_size=BATCH, lr=task.pretrain_lr, seed=params["seed"],
    )  # fmt: skip
    made.save(path)
    return made


def prepare(params: Params, where: Where) -> None:
    """Pre-train, and keep the network."""
    base_network(params, where)


def accuracy(eng: Engine, net: Network, added: Tensors, test: Samples) -> float | None:
    """Percent of the samples that are classified correctly; None where the logits are not finite."""
    logits = forward(eng, net.spec, {**net.tensors, **added}, test[0])
    if not np.isfinite(logits).all():
        return None
    return float((logits.argmax(axis=1) == test[1]).mean() * 100)


def run(params: Params, where: Where) -> Numbers:
    """One trial.

    Args:
        params: those of `base_params`; method: a method's name, "none" (the base as it is) or "after" (a network
            trained on nothing but the samples to fine-tune on); cache: a codec's name, or None.

    Returns:
        accuracy, in percent; None where training diverged.
    """
    task, seed, eng = task_of(params), params["seed"], engine(where.engine)
    tune, test = _drifted(task, where, seed)
    try:
        if params["method"] == "after":
            net, _ = sgd.pretrain(
                eng,
                network(task),
                *tune,
                epochs=task.pretrain_epochs,
                batch_size=BATCH,
                lr=task.pretrain_lr,
                seed=seed,
            )
            return {"accuracy": accuracy(eng, net, {}, test)}
        net = base_network(params, where)
        if params["method"] == "none":
            return {"accuracy": accuracy(eng, net, {}, test)}
        store: Store | None = None
        if params["cache"]:
            store = memory_store(params["cache"], net.spec.record, len(tune[0]))
        fitted = sgd.fit(
            eng, net, params["method"], *tune,
            rank=RANK, epochs=task.epochs, batch_size=BATCH, lr=task.lr, seed=seed, store=store,
        )  # fmt: skip
    except DivergedError:
        return {"accuracy": None}
    return {"accuracy": accuracy(eng, net, fitted.adapter.tensors, test)}


def with_base(run: Callable[[Params, Where], Numbers], params: Params, seconds: float, *, alone: bool = False) -> Trial:
    """A trial that needs the base network of its parameters."""
    task = task_of(params)
    return Trial(
        run, params, alone=alone, seconds=seconds, base=base_key(params), prepare=prepare,
        base_seconds=_training(task, "ft-all", SAMPLES.get(task.file, 500_000), task.pretrain_epochs),
    )  # fmt: skip


def _training(task: Task, method: str, most: int, epochs: int, cached: bool = False) -> float:
    """Roughly the seconds of so many epochs."""
    c = cost(network(task), METHODS[method], RANK)
    forward_flops = c.forward_cached if cached and c.forward_cached is not None else c.forward
    T = min(task.pretrain or most, most)
    return 0.3 + (forward_flops + c.backward) * epochs * T / FLOPS


def trial(task: Task, method: str, seed: int, cache: str | None = None) -> Trial:
    """The trial of a method on a task; a method that is cached has an fp32 cache unless `cache` says otherwise."""
    m = METHODS.get(method)
    if m is not None and m.cached and cache is None:
        cache = "fp32"
    params = {**base_params(task, seed), "method": method, "cache": cache}
    if method == "after":
        return Trial(run, params, seconds=_training(task, "ft-all", TUNED, task.pretrain_epochs))
    seconds = 0.3 if m is None else _training(task, method, TUNED, task.epochs, cache is not None)
    return with_base(run, params, seconds)


def trials(task: Task, methods: Sequence[tuple[str, str | None]], seeds: Sequence[int]) -> list[Trial]:
    """Every pair of method and cache with every seed."""
    return [trial(task, m, seed, cache) for seed in seeds for m, cache in methods]


def column(found: Any, task: Task, method: str, seeds: Sequence[int], cache: str | None = None) -> list[float | None]:
    """The accuracies of all seeds."""
    return [found(trial(task, method, seed, cache))["accuracy"] for seed in seeds]

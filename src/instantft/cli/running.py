"""Networks and adapters from files, and samples through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bar import Bar
from .options import engine_of, preprocessing

if TYPE_CHECKING:
    from ..adapters import Adapter
    from ..backbones.builtin import Network
    from ..data import Samples
    from ..engine import Engine, Floats


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
) -> tuple[Network, Engine, Samples, Floats]:
    from ..data import load_samples
    from ..solvers import sgd

    sgd.check_arguments(threads=threads)
    network, adapter = adapted(base, adapter_path)
    means, stds = preprocessing(network, mean, std, adapter)
    samples = load_samples(data, network.spec, means, stds, labels=labels)
    chosen = network.bind(engine_of(engine))
    return network, chosen, samples, logits_of(chosen, network, adapter, samples, threads)


def accuracy_of(engine: Engine, network: Network, adapter: Adapter | None, test: Samples, threads: int = 1) -> float:
    return float((logits_of(engine, network, adapter, test, threads).argmax(axis=1) == test.labels).mean())


def logits_of(engine: Engine, network: Network, adapter: Adapter | None, samples: Samples, threads: int) -> Floats:
    from ..engine import forward

    tensors = {**network.tensors, **(adapter.tensors if adapter else {})}
    with Bar("predicting", len(samples.x)) as bar:
        return forward(engine, network.spec, tensors, samples.x, threads, bar.update)

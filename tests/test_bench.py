"""`instantft bench`: the PyTorch rivals do the same work, whatever the size of the last batch, and are judged alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.backbones.builtin import Network
from instantft.bench import run_bench
from instantft.engine.reference import ReferenceEngine
from instantft.methods import SGD_METHODS

from . import samples
from .nets import NETS, samples_for, tensors_for

torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'instantft[torch]'")


def rows(base: Network, x: Any, y: Any, **more: Any) -> dict[str, dict[str, Any]]:
    settings = {"rank": 2, "epochs": 1, "batch_size": 20, "lr": 0.02, "seed": 0, "threads": 1, "repeat": 1, **more}
    told: list[float] = []
    found = run_bench(ReferenceEngine(), base, x, y, progress=told.append, **settings)
    assert told[-1] == settings["repeat"]
    assert told == sorted(told)
    return {r["name"]: r for r in found}


@pytest.mark.parametrize("net", ["dnn", "odd"])
def test_a_last_batch_of_one_sample(net: str) -> None:
    spec = NETS[net]
    x, y = samples_for(spec, 21)
    found = rows(Network(spec, tensors_for(spec)), x, y)
    assert {f"PyTorch {name}" for name in SGD_METHODS} < set(found)


@pytest.mark.parametrize("T", [1, 60])
def test_rivals_are_judged_by_running_statistics(T: int) -> None:
    """With one batch of everything the order does not matter, so both sides must end at the same network.

    The running statistics are far from the batch's, so that mixing them up shows.
    """
    tensors = dict(samples.base().tensors)
    for k in (0, 1):
        tensors[f"layers.{k}.bn.running_mean"] = np.linspace(-3, 3, 5, dtype=np.float32)
        tensors[f"layers.{k}.bn.running_var"] = np.full(5, 9, np.float32)
    x, y = samples.blobs(T)
    found = rows(Network(samples.SPEC, tensors), x, y, batch_size=T, lr=0.5, epochs=3)
    ours = {name: found[name]["accuracy"] for name in SGD_METHODS if name != "skip2-lora"}
    assert {name: found[f"PyTorch {name}"]["accuracy"] for name in ours} == pytest.approx(ours)

"""The PyTorch rivals do the same work as the package: same logits, same steps, for every method and both networks.

A comparison of times means nothing otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from instantft.cache.store import Store, memory_store
from instantft.engine import Engine
from instantft.methods import SGD_METHODS, trainable

from .nets import NETS, samples_for, tensors_for

pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'instantft[torch]'")

from benchmarks.common import ROOT, load, orders, run_flops
from benchmarks.rivals import Rival

Floats = NDArray[np.float32]

FORWARD = 1e-5
"""Largest difference of logits, relative to the largest logit: float32 sums of up to 1,000 products in another order
differ by about √1000·2^-24 = 2e-6."""

STEPS = 2e-4
"""Largest difference of a trained tensor after 8 steps, relative to its largest change. Sums in another order differ by
FORWARD at every step, and batch norm over batches of 3 divides by small deviations: against float64, PyTorch itself is
up to 3e-5 off here, and the engines up to 8e-5."""

ROUNDING = 8 * 2.0**-24
"""And relative to its largest value, which is rounded once a step."""

RANK, BATCH, T, E = 3, 5, 18, 2  # the last batch of an epoch is smaller: 4 steps an epoch


@pytest.mark.parametrize("net", ["dnn", "lenet5", "odd"])
@pytest.mark.parametrize("name", SGD_METHODS)
def test_rival_does_the_same_work(name: str, net: str, engine: Engine) -> None:
    method, spec = SGD_METHODS[name], NETS[net]
    start, (x, y) = tensors_for(spec, method, RANK), samples_for(spec, T)
    lr, momentum = 0.01, 0.5
    rival = Rival(spec, start, method, x, y, lr=lr, momentum=momentum, batch_size=BATCH)

    _same_logits(rival.forward(x), engine.forward(spec, start, x))

    store: Store | None = memory_store("fp32", spec.record, T) if method.cached else None
    trainer = engine.trainer(
        spec, start, method, RANK, x, y,
        numbers=np.arange(T, dtype=np.int64), store=store, batch_size=BATCH, lr=lr, momentum=momentum,
    )  # fmt: skip
    order = orders(T, E, 5)
    trainer.epochs(order)
    rival.epochs(order)
    ours, theirs = trainer.tensors(), rival.tensors()

    assert set(ours) == set(theirs)
    assert set(trainable(method, spec, RANK)) <= set(ours)
    for key, value in ours.items():
        change = float(np.abs(value - start[key]).max())
        if method.norms == "train" and key.endswith(".bias") and key.replace("bias", "bn.bias") in start:
            assert change <= 1e-6, f"{key}: batch statistics cancel it, so only rounding may move it"
            continue
        assert change > 1e-5, f"{key} was not trained"
        _same_steps(key, value, theirs[key], start[key])
    _same_logits(rival.forward(x), engine.forward(spec, {**start, **ours}, x), 10 * FORWARD)


def _same_steps(key: str, a: Floats, b: Floats, start: Floats) -> None:
    tolerance = STEPS * float(np.abs(a - start).max()) + ROUNDING * float(np.abs(a).max())
    assert float(np.abs(a - b).max()) <= tolerance, key


def _same_logits(a: Floats, b: Floats, tolerance: float = FORWARD) -> None:
    assert a.shape == b.shape
    assert float(np.abs(a - b).max()) <= tolerance * float(np.abs(b).max())


@pytest.mark.parametrize("name", ["ft-last", "lora-last", "skip-lora"])
def test_rival_with_and_without_cache_agree(name: str) -> None:
    """What is cached is what would be computed; convolutions over other batches may round otherwise."""
    method, spec = SGD_METHODS[name], NETS["lenet5"]
    start, (x, y) = tensors_for(spec, method, RANK), samples_for(spec, T)
    results = []
    for cached in (False, True):
        rival = Rival(spec, start, method, x, y, lr=0.02, batch_size=BATCH, cached=cached)
        rival.epochs(orders(T, E, 5))
        results.append(rival.tensors())
    for key, value in results[0].items():
        _same_steps(key, value, results[1][key], start[key])


def test_rival_refuses_to_cache_what_changes() -> None:
    spec, method = NETS["dnn"], SGD_METHODS["lora-all"]
    x, y = samples_for(spec, T)
    with pytest.raises(ValueError, match="cached must be False for lora-all"):
        Rival(spec, tensors_for(spec, method, RANK), method, x, y, lr=0.02, cached=True)


@pytest.mark.parametrize("name", SGD_METHODS)
def test_rival_trains_exactly_what_the_method_trains(name: str) -> None:
    """Autograd is asked for no gradient that the method does not need."""
    spec, method = NETS["dnn"], SGD_METHODS[name]
    x, y = samples_for(spec, T)
    rival = Rival(spec, tensors_for(spec, method, RANK), method, x, y, lr=0.02)
    trained = sum(p.numel() for group in rival.optimizer.param_groups for p in group["params"])
    assert trained == sum(int(np.prod(shape)) for shape in trainable(method, spec, RANK).values())
    in_backbone = sum(p.numel() for p in rival.backbone.parameters() if p.requires_grad)
    in_adapters = sum(p.numel() for p in [*rival.A.values(), *rival.B.values()])
    assert trained == in_backbone + in_adapters


def test_ratio_of_operations() -> None:
    """LoRA-All costs 13.1 times the operations of Skip2-LoRA on LeNet-5, as the targets of benchmarks/speed.py say."""
    lora_all, skip2 = (run_flops(NETS["lenet5"], SGD_METHODS[n], 1024, 10) for n in ("lora-all", "skip2-lora"))
    assert lora_all == 1024 * 10 * (923_450 + 743_388)
    assert skip2 == 1024 * (850_794 + 10 * (20_912 + 21_312))
    assert round(lora_all / skip2, 1) == 13.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["speed", "codecs", "threads_cache", "dual_space", "ridge_speed", "streaming", "replay"]
)
def test_quick_runs_need_no_data(name: str, tmp_path: Path) -> None:
    """They say so, and are written down as any other run."""
    pytest.importorskip("instantft._core")
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(tmp_path / "result.json")],
        cwd=ROOT,
        env={
            **os.environ,
            "INSTANTFT_DATA": str(tmp_path / "nowhere"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    needs_data = name != "dual_space"
    assert ("Random numbers stand in for" in done.stdout) == needs_data
    assert "|" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())
    with pytest.raises(SystemExit, match="set INSTANTFT_DATA"):
        load("no such file", quick=True)

"""On measured data: the fan of Skip2-LoRA §5.1 and turned Fashion-MNIST, from the data folder.

The folder is $INSTANTFT_DATA, or ``shared/data`` beside the checkout, as for the benchmarks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.data import as_labels, as_samples
from instantft.data.drift import rotate
from instantft.engine import Engine, get_engine
from instantft.engine.reference import ReferenceEngine
from instantft.errors import EngineError
from instantft.methods import SGD_METHODS
from instantft.solvers import sgd
from instantft.spec import NetSpec, dnn, lenet5

FOLDER = Path(os.environ.get("INSTANTFT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

Arrays = dict[str, NDArray[Any]]

LOGITS = 1e-5
"""Largest difference of the engines' logits, relative to the largest: float32 sums of up to 1,000 products in another
order differ by about √1000·2^-24 = 2e-6."""


def load(name: str) -> Arrays:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"{path} is not here: set INSTANTFT_DATA to the folder that holds {name}")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def native() -> Engine:
    try:
        return get_engine("native")
    except EngineError as e:
        pytest.skip(f"too slow without the compiled core: {e}")


def accuracy(engine: Engine, base: Network, added: Any, x: Any, y: Any) -> float:
    logits = engine.forward(base.spec, {**base.tensors, **added}, x)
    return 100 * float((logits.argmax(axis=1) == y).mean())


def adapted(engine: Engine, base: Network, x: Any, y: Any, codec: str, epochs: int, lr: float, seed: int) -> Any:
    store = memory_store(codec, base.spec.record, len(x))
    fitted = sgd.fit(engine, base, "skip2-lora", x, y, epochs=epochs, lr=lr, seed=seed, store=store)
    return fitted.adapter.tensors


def check_engines_agree(native: Engine, spec: NetSpec, tensors: Any, x: Any) -> None:
    logits, exact = (e.forward(spec, tensors, x[:200]) for e in (native, ReferenceEngine()))
    assert np.abs(logits - exact).max() <= LOGITS * np.abs(exact).max()


def fan(part: str, data: Arrays) -> tuple[Any, Any]:
    x, _ = as_samples(data[f"{part}_x"])
    return x, as_labels(data[f"{part}_y"], len(x))


def test_a_damaged_fan_in_noise(native: Engine) -> None:
    """Damage1: trained in silence, adapted to noise; the caches of 4 bits are as good as that of 32."""
    data = load("fan_damage1.npz")
    (xp, yp), (xf, yf), (xt, yt) = (fan(part, data) for part in ("pretrain", "finetune", "test"))
    before, after = [], {"fp32": [0.0] * 3, "relu4": [0.0] * 3}
    for seed in range(3):
        base, _ = sgd.pretrain(native, dnn(256, 3), xp, yp, epochs=60, lr=0.02, seed=seed)
        before.append(accuracy(native, base, {}, xt, yt))
        for codec, found in after.items():
            added = adapted(native, base, xf, yf, codec, 100, 0.02, seed)
            found[seed] = accuracy(native, base, added, xt, yt)
            check_engines_agree(native, base.spec, {**base.tensors, **added}, xt)
    assert np.mean(after["fp32"]) > np.mean(before) + 20
    assert np.mean(after["fp32"]) > 95
    assert abs(np.mean(after["relu4"]) - np.mean(after["fp32"])) <= 2


def clothes(engine: Engine, images: int, epochs: int) -> tuple[Network, Any, Any]:
    """LeNet-5 trained on some pictures of Fashion-MNIST, and 3,024 others turned by 75°."""
    data = load("fashion_mnist.npz")
    spec = lenet5((1, 28, 28))
    xp, _ = as_samples(data["train_x"][:images], spec)
    yp = as_labels(data["train_y"][:images], images)
    base, _ = sgd.pretrain(engine, spec, xp, yp, epochs=epochs, lr=0.05, momentum=0.5)
    x, _ = as_samples(rotate(data["test_x"][:3024], 75.0), spec)
    return base, x, as_labels(data["test_y"][:3024], 3024)


@pytest.mark.parametrize("codec", ["fp32", "nf4", "relu4"])
def test_clothes_turned_by_75_degrees(native: Engine, codec: str) -> None:
    """1,024 turned pictures win back what the turn took, on 2,000 others."""
    base, x, y = clothes(native, 6000, 2)
    before = accuracy(native, base, {}, x[1024:], y[1024:])
    added = adapted(native, base, x[:1024], y[:1024], codec, 10, 0.02, 0)
    assert accuracy(native, base, added, x[1024:], y[1024:]) > before + 20
    check_engines_agree(native, base.spec, {**base.tensors, **added}, x)


@pytest.mark.slow
def test_every_method_on_clothes(native: Engine) -> None:
    """Every method gains; Skip2-LoRA as much as training the whole network, and the same on both engines."""
    base, x, y = clothes(native, 20_000, 3)
    before = accuracy(native, base, {}, x[1024:], y[1024:])
    gain = {}
    for name in SGD_METHODS:
        fitted = sgd.fit(native, base, name, x[:1024], y[:1024], epochs=10, lr=0.02)
        gain[name] = accuracy(native, base, fitted.adapter.tensors, x[1024:], y[1024:]) - before
    assert min(gain.values()) > 10
    assert gain["skip2-lora"] > gain["ft-all"] - 10
    slow = adapted(ReferenceEngine(), base, x[:1024], y[:1024], "relu4", 10, 0.02, 0)
    fast = adapted(native, base, x[:1024], y[:1024], "relu4", 10, 0.02, 0)
    logits = [native.forward(base.spec, {**base.tensors, **added}, x[1024:]) for added in (slow, fast)]
    assert (logits[0].argmax(axis=1) == logits[1].argmax(axis=1)).mean() > 0.99

"""TinyTL: the published shape, what is trained and what is not, and that it learns. Samples made here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft.experiments import tinytl
from instantft.experiments.core import Settings, Where
from instantft.experiments.tinytl import STAGES, Stage, TinyTL, build, lite_kernel

torch: Any = pytest.importorskip("torch")

SMALL = (Stage(16, 1, ((3, 1),)), Stage(24, 2, ((5, 3), (3, 3))))
N = 60
"""Features."""

LOGITS = 1e-4
"""Largest difference of float32 logits whose batches are of another size, relative to the largest."""


def waves(T: int, seed: int, shift: float = 0.0) -> tuple[Any, Any]:
    """One frequency a class, in noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(T) % 3
    at = np.linspace(0, 2 * np.pi, N)
    x = np.sin(at * (2 + 3 * y[:, None]) + rng.random((T, 1)) + shift) + rng.normal(0, 0.3, (T, N)) + shift
    return x.astype(np.float32), y.astype(np.int32)


def train(net: TinyTL, names: list[str], samples: Any, epochs: int, seed: int = 0) -> None:
    tinytl.train(net, names, samples, epochs=epochs, batch_size=12, lr=0.01, seed=seed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small steps on several threads mostly wait for each other, for minutes where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["gn", "bn"])
def net(request: pytest.FixtureRequest) -> TinyTL:
    return build(torch, N, 3, request.param, 0, SMALL)


def test_the_shape_is_the_published_one() -> None:
    """In 2-D, with 3 input channels, 1,000 classes and no lite residual modules, it has the published parameters."""
    whole = build(torch, 224, 1000, "bn", 0, width=1.0)
    square = {name: t.numel() * (t.shape[2] if t.ndim == 3 else 1) for name, t in whole.tensors.items()}
    square["stem.weight"] *= 3
    assert sum(n for name, n in square.items() if "lite" not in name) == 4_080_512
    assert sum(len(stage.blocks) for stage in STAGES) == 20
    assert whole.tensors["stage6.block0.depth.weight"].shape == (192 * 6, 1, 7)
    assert not any(name.startswith("stage0.block0.lite") for name in whole.tensors)
    assert "stage1.block0.lite1.weight" in whole.tensors


def test_strides_are_the_published_ones() -> None:
    """224 pixels end as 7, as in the paper of ProxylessNAS."""
    sides = [224 // 2]
    for stage in STAGES:
        sides.append(sides[-1] // stage.stride)
    assert sides == [112, 112, 56, 28, 14, 14, 7, 7]


@pytest.mark.parametrize(("length", "kernel"), [(112, 5), (12, 5), (10, 5), (8, 3), (6, 3), (4, 1), (3, 1), (1, 1)])
def test_kernels_of_lite_modules_fit(length: int, kernel: int) -> None:
    assert lite_kernel(length) == kernel


def test_only_biases_lite_modules_and_head_move(net: TinyTL) -> None:
    names = set(net.tuned)
    assert {"stem.beta", "stage1.block1.depth.beta", "head.weight", "head.bias"} <= names
    assert {"stage1.block1.lite1.weight", "stage1.block1.lite1.beta", "stage1.block1.lite2.gamma"} <= names
    assert not {"stem.weight", "stem.gamma", "stage1.block1.depth.weight", "stage1.block1.lite2.beta"} & names
    before = {name: t.clone() for name, t in net.tensors.items()}
    train(net, net.tuned, waves(24, 1), 2)
    # A lite module that ends in gamma 0 passes nothing back in the first step, but it does from the second.
    assert {name for name, t in net.tensors.items() if not torch.equal(t, before[name])} == names


def test_lite_modules_add_nothing_at_first(net: TinyTL) -> None:
    x = torch.from_numpy(waves(12, 2)[0])
    first = net.forward(x, False)
    net.tensors["stage1.block1.lite1.beta"] += 3
    assert torch.equal(net.forward(x, False), first)
    net.tensors["stage1.block1.lite2.gamma"] += 1
    assert not torch.allclose(net.forward(x, False), first)


def test_a_sample_does_not_depend_on_its_batch_when_predicted(net: TinyTL) -> None:
    x = torch.from_numpy(waves(12, 3)[0])
    whole, single = net.forward(x, False), net.forward(x[4:5], False)
    assert whole.shape == (12, 3)
    assert (whole[4:5] - single).abs().max() <= LOGITS * whole.abs().max()


def test_gn_standardises_weights() -> None:
    """Scaling and shifting the weights of a channel changes nothing; without standardisation it would."""
    for norm, same in (("gn", True), ("bn", False)):
        net = build(torch, N, 3, norm, 0, SMALL)  # type: ignore[arg-type]
        x = torch.from_numpy(waves(12, 3)[0])
        first = net.forward(x, False)
        net.tensors["stem.weight"] = net.tensors["stem.weight"] * 2 + 1
        assert torch.allclose(net.forward(x, False), first, atol=LOGITS * float(first.abs().max())) == same


def test_it_learns(net: TinyTL) -> None:
    train(net, list(net.tensors), waves(120, 1), 4)
    drifted = waves(90, 7, shift=1.5)
    before = tinytl.accuracy(net, drifted)
    train(net, net.tuned, waves(90, 8, shift=1.5), 6, 1)
    assert tinytl.accuracy(net, drifted) >= max(80, before)


def test_the_same_seed_trains_the_same() -> None:
    nets = [build(torch, N, 3, "gn", seed, SMALL) for seed in (5, 5, 6)]
    for made in nets:
        train(made, list(made.tensors), waves(24, 1), 1)
    same = [torch.equal(made.tensors["stem.weight"], nets[0].tensors["stem.weight"]) for made in nets]
    assert same == [True, True, False]


def test_batch_norm_by_running_statistics_after_training() -> None:
    net = build(torch, N, 3, "bn", 0, SMALL)
    assert not net.running["stem.mean"].any()
    train(net, ["head.weight"], waves(24, 1), 1)
    assert net.running["stem.mean"].any()


def test_a_trial(tmp_path: Path) -> None:
    """Numbers that can be kept, from a data set of the fan's shape; and PyTorch keeps its threads."""
    rng = np.random.default_rng(0)
    x, y = rng.random((24, 256)).astype(np.float32), np.arange(24) % 3
    parts: Any = {f"{part}_{name}": value for part in ("pretrain", "finetune", "test")
                  for name, value in (("x", x), ("y", y))}  # fmt: skip
    np.savez(tmp_path / "fan_damage1.npz", **parts)
    trial = tinytl._trial("Damage1", "gn", 0, Settings(quick=True))
    torch.set_num_threads(2)
    found = trial.run(trial.params, Where(tmp_path, tmp_path))
    assert torch.get_num_threads() == 2
    assert 0 <= found["accuracy"] <= 100
    assert 0 < found["tuned"] < found["parameters"]
    assert not any(math.isnan(v) for v in found.values())


def test_section() -> None:
    settings = Settings(quick=True)
    assert len(tinytl.TABLE_5.trials(settings)) == 6
    assert len(tinytl.TABLE_5.trials(Settings())) == 18
    section = tinytl.TABLE_5.section(
        settings, lambda t: {"before": 40.0, "accuracy": 90.0, "tuned": 10, "parameters": 30}
    )
    assert section.paper["HAR"]["TinyTL (BN)"] == {"mean": 89.27, "sd": 1.13}
    assert all(len(row) == len(table.head) for table in section.tables for row in table.rows)
    assert "sequence of one channel" in section.note

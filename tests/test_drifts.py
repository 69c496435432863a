"""Full fine-tuning, tuned: schedules, what is held out, and that the shortcut tries a part of the whole grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import drifts
from benchmarks.closed_form import right
from benchmarks.drifts import Setting, best, halved, held_out, pictures, report, search, train, tuned
from instantft.engine import get_engine
from tests import samples


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drifts, "EPOCHS", (1, 2, 4))
    monkeypatch.setattr(drifts, "RATES", (0.01, 0.05))


def test_the_rate_falls_along_a_cosine() -> None:
    s = Setting(True, 0.1, 100)
    assert (s.rate(0), s.momentum) == (0.1, drifts.MOMENTUM)
    assert s.rate(50) == pytest.approx(0.05)
    assert 0 < s.rate(99) < 1e-4
    assert (Setting(False, 0.1, 100).rate(99), Setting(False, 0.1, 100).momentum) == (0.1, 0.0)


@pytest.mark.parametrize("T", [10, 50, 470, 1024, 1050])
def test_a_fifth_is_held_out_in_runs(T: int) -> None:
    out = held_out(T)
    assert abs(out.sum() - T / drifts.SHARE) <= max(drifts.RUNS / 2, drifts.RUNS - T / drifts.SHARE)
    if T >= 50:
        assert np.count_nonzero(np.diff(np.r_[0, out.astype(int)]) == 1) == drifts.RUNS
    assert not out.all()


@pytest.mark.parametrize("cosine", [False, True])
def test_epochs_seen_on_the_way_are_those_of_shorter_training(cosine: bool) -> None:
    """Plain SGD has no schedule; with one, shorter training is another."""
    engine, net, tune = get_engine(), samples.base(), samples.blobs()
    seen = dict(train(engine, net, tune, Setting(cosine, 0.05, 4), 0, (2,)))
    [(_, alone)] = train(engine, net, tune, Setting(cosine, 0.05, 2), 0)
    on_the_way = seen[2]
    assert on_the_way is not None
    assert alone is not None
    same = all(np.array_equal(on_the_way[name], alone[name]) for name in alone)
    assert same != cosine


def test_what_diverges_is_none() -> None:
    x, y = samples.blobs()
    [(epoch, tensors)] = train(get_engine(), samples.base(), (x * 1e15, y), Setting(False, 1e6, 3), 0)
    assert (epoch, tensors) == (3, None)


def test_the_shortcut_tries_a_part_of_the_grid() -> None:
    engine, net, tune = get_engine(), samples.base(), samples.blobs()
    whole = search(engine, net, tune, 0, True)
    part = search(engine, net, tune, 0, False)
    assert len(whole) == 2 * 2 * 3
    assert len(part) == 2 * (2 * 2 + drifts.FINALISTS)
    assert part == halved(whole)
    assert whole[best(whole)] == max(whole.values())


def test_tuned_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drifts, "EPOCHS", (5, 10, 30))
    engine, net, (x, y) = get_engine(), samples.base(), samples.blobs(120)
    setting = best(search(engine, net, (x, y), 0, True))
    [tensors, again] = tuned(engine, net, (x, y), 0, [setting, setting])
    assert tensors is again
    assert right(engine.forward(net.spec, tensors, x), y) > 0.9 > right(engine.forward(net.spec, net.tensors, x), y)


def test_a_setting_that_diverges_leaves_the_base_network() -> None:
    net, (x, y) = samples.base(), samples.blobs()
    [tensors] = tuned(get_engine(), net, (x * 1e15, y), 0, [Setting(False, 1e6, 3)])
    assert tensors == dict(net.tensors)


@pytest.mark.parametrize("setting", [Setting(True, 0.01, 100), Setting(False, 0.1, 10)])
def test_names_of_settings(setting: Setting) -> None:
    assert Setting.named(setting.name) == setting


def test_report_and_pictures(tmp_path: Path) -> None:
    one = {"before": 0.5, "auto": 0.9, "skip2-lora": None, "lora-all": 0.7, "ft-all": 0.6, "tuned": 0.8}
    results = {"fashion-75": {"0": {"0": one, "1": {**one, "auto": 0.92}}}, "mnist-15": {"0": {"0": one}}}
    text = report(results)
    assert "| fashion-75 | 50.0 | 91.0 ± 1.4 | – (2 diverged) | 70.0 | 60.0 | 80.0 ± 0.0 | +11.0 | – | 2 |" in text
    assert "+10.50 on average, +10.00 at worst (within 0.5)" in text
    pytest.importorskip("matplotlib")
    assert [path.name for path in pictures(results, tmp_path)] == ["angles.png", "sizes.png"]

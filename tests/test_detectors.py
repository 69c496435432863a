from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft import lift
from instantft.backbones.builtin import Network
from instantft.engine import get_engine
from instantft.solvers.calibration import softmax
from instantft.watch.detectors import WARM, Adwin, Cusum, Scale, Seen, TapStatistics, World

from .watched import trained, world


def errors(rates: list[tuple[float, int]], seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    return [float(rng.random() < rate) for rate, n in rates for _ in range(n)]


def test_adwin_notices_more_errors_and_knows_since_when() -> None:
    for seed in range(20):
        adwin, found = Adwin(), None
        for i, value in enumerate(errors([(0.1, 1000), (0.6, 200)], seed)):
            if adwin.add(value):
                found = i
                break
        assert found is not None
        assert 1000 <= found < 1080
        assert 950 <= found + 1 - len(adwin) <= 1050


def test_adwin_says_nothing_of_fewer_errors_and_seldom_of_as_many() -> None:
    assert not any(Adwin_alarms([(0.6, 500), (0.1, 500)], seed) for seed in range(10))
    assert sum(Adwin_alarms([(0.2, 2000)], seed) for seed in range(30)) <= 1


def Adwin_alarms(rates: list[tuple[float, int]], seed: int) -> int:
    adwin = Adwin()
    return sum(adwin.add(value) for value in errors(rates, seed))


def test_adwin_forgets_the_old_world_when_things_get_better() -> None:
    adwin = Adwin()
    for value in errors([(0.6, 500), (0.1, 500)], 0):
        adwin.add(value)
    assert adwin.mean < 0.15


def test_adwin_holds_few_buckets() -> None:
    adwin = Adwin()
    for i in range(100_000):
        adwin.add(float(i % 10 == 0))
    assert len(adwin) == 100_000
    assert adwin.mean == pytest.approx(0.1, abs=1e-3)
    assert sum(len(row) for row in adwin._rows) < 6 * 17


def test_adwin_compares_with_what_was_promised() -> None:
    stream = errors([(0.5, 100)], 3)
    assert not Adwin_alarms([(0.5, 100)], 3)
    adwin = Adwin()
    adwin.expect(0.1, 200)
    assert adwin.mean == pytest.approx(0.1, abs=0.01)
    assert any(adwin.add(value) for value in stream)


def test_cusum_notices_a_move_and_forgives_noise_and_outliers() -> None:
    rng = np.random.default_rng(0)
    cusum = Cusum(Scale(5.0, 2.0))
    values = 5 + 2 * rng.normal(size=20_000)
    values[::500] = 1e9
    assert not any(cusum.add(v) for v in values)
    took = next(i for i, v in enumerate(7.5 + 2 * rng.normal(size=100)) if cusum.add(v))
    assert 15 < took < 60
    assert abs(cusum.begun - took) < 25


@pytest.mark.parametrize(("both", "alarm"), [(True, True), (False, False)])
def test_cusum_looks_to_both_sides_where_asked(both: bool, alarm: bool) -> None:
    cusum = Cusum(Scale(0.0, 1.0), both=both)
    assert any(cusum.add(-1.5) for _ in range(100)) == alarm


def test_distance_counts_every_tap_alike_and_bounds_each_value() -> None:
    rng = np.random.default_rng(1)
    taps = [rng.normal(3, 2, (400, 5)).astype(np.float32), rng.normal(size=(400, 50)).astype(np.float32)]
    reference = TapStatistics.of(taps)
    assert np.mean(reference.distance(taps) ** 2) == pytest.approx(1, abs=0.03)
    far = [taps[0] + 100, taps[1]]
    assert np.mean(reference.distance(far) ** 2) == pytest.approx((16 + 1) / 2, abs=0.05)
    assert np.isfinite(reference.distance([np.full((1, 5), 3e38, np.float32), taps[1][:1]])).all()


def test_distance_of_values_that_never_changed_is_finite() -> None:
    reference = TapStatistics.of([np.zeros((10, 3), np.float32), np.empty((10, 0), np.float32)])
    assert reference.distance([np.ones((2, 3), np.float32), np.empty((2, 0), np.float32)]) == pytest.approx([4, 4])


def test_world_is_learnt_then_watched() -> None:
    rng = np.random.default_rng(2)

    def add(world: World, shift: float, doubt: float) -> str | None:
        return world.add(doubt, [rng.normal(shift, 1, (1, 30)).astype(np.float32)])

    for shift, doubt, by in ((0.0, 0.5, "confidence"), (1.5, 0.1, "taps")):
        world = World()
        assert not any(add(world, 0.0, 0.1 + 0.05 * rng.random()) for _ in range(WARM + 500))
        found = [add(world, shift, doubt + 0.05 * rng.random()) for _ in range(100)]
        assert by in found
        assert found.index(by) < 60
        assert world.score >= 1


def seen() -> Seen:
    return Seen.by(get_engine(), trained(), world(0, 500)[0], *world(0, 300, seed=1))


def test_what_was_seen_is_kept_as_text() -> None:
    before = seen()
    after = Seen.read(before.text(), trained().spec.tap_widths)
    assert after is not None
    assert (after.accuracy, after.samples) == (before.accuracy, 300)
    assert before.accuracy is not None
    assert before.accuracy > 0.95
    assert (after.distance, after.doubt) == (before.distance, before.doubt)
    taps = [np.ones((2, n), np.float32) for n in trained().spec.tap_widths]
    assert (after.taps.distance(taps) == before.taps.distance(taps)).all()
    assert before.distance.mean == pytest.approx(1, abs=0.1)


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(["accuracy", "samples", "distance", "doubt", "taps"]),
    value=st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=9)
    | st.lists(st.floats(), max_size=3),
)
def test_nonsense_in_a_base_file_is_no_knowledge(key: str, value: object) -> None:
    held = {**json.loads(seen().text()), key: value}
    found = Seen.read(json.dumps(held), trained().spec.tap_widths)
    if found is not None:
        assert np.isfinite([found.distance.mean, found.doubt.deviation]).all()
        assert found.samples > 0
    assert Seen.read(json.dumps(held)[:-3], trained().spec.tap_widths) is None
    assert Seen.read(seen().text(), (6, 5)) is None


def test_the_base_file_keeps_it_and_is_the_same_network(tmp_path: Path) -> None:
    network = replace(trained(), seen=seen().text())
    network.save(tmp_path / "base.safetensors")
    again = Network.load(tmp_path / "base.safetensors")
    assert again.hash == trained().hash
    assert again.seen == network.seen


def test_a_world_that_is_known_needs_no_warming_up() -> None:
    known = World(seen())
    x = np.concatenate([world(0, 200, seed=3)[0], world(0, 200, seed=4)[0] + 2]).astype(np.float32)
    found = []
    for row in x:
        records = get_engine().records(trained().spec, trained().tensors, row[None])
        taps, c = lift.taps_of(trained().spec, row[None], records)
        found.append(known.add(1 - float(softmax(c).max()), taps))
    alarms = [i for i, by in enumerate(found) if by]
    assert 200 <= alarms[0] < 240

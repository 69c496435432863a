"""The gate: cases by hand, its error rate on made data, and blocks of samples that resemble each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.errors import UsageError
from instantft.solvers.factor import runs
from instantft.solvers.gate import ENOUGH, INTERVAL, Decision, gate, wider


def counted(won: int, lost: int, same: int) -> Decision:
    """Every sample a block of its own."""
    before = np.r_[np.zeros(won, bool), np.ones(lost, bool), np.ones(same, bool)]
    after = np.r_[np.ones(won, bool), np.zeros(lost, bool), np.ones(same, bool)]
    return gate(before, after, [np.array([i]) for i in range(len(before))])


@pytest.mark.parametrize("same", [30, 100, 1000])
def test_few_won_and_none_lost(same: int) -> None:
    assert counted(6, 0, same).accepted
    assert not counted(3, 0, same).accepted
    assert not counted(0, 0, same).accepted
    assert not counted(0, 6, same).accepted


def test_few_samples_need_a_large_gain() -> None:
    assert not counted(3, 0, 27).accepted
    assert not counted(4, 1, 25).accepted
    assert counted(5, 0, 25).accepted


def test_many_changed_minds_need_more() -> None:
    assert not counted(56, 50, 900).accepted
    assert not counted(66, 50, 900).accepted
    assert counted(75, 50, 900).accepted


def test_numbers() -> None:
    d = counted(30, 10, 60)
    assert d.before == pytest.approx(0.7)
    assert d.after == pytest.approx(0.9)
    assert d.gain == pytest.approx(0.2)
    low, high = d.interval
    assert low < 0.2 < high + 0.01
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt((40 - 100 * 0.2**2) / 100) / 10, rel=0.06)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), seed=st.integers(0, 999), p=st.floats(0, 1), q=st.floats(0, 1))
def test_always_a_sensible_answer(n: int, seed: int, p: float, q: float) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.random(n) < p, rng.random(n) < q
    d = gate(before, after)
    assert -1 <= d.interval[0] <= d.interval[1] <= 1
    assert 0 <= d.before <= 1
    assert 0 <= d.after <= 1
    if d.accepted:
        assert d.after > d.before
        assert not gate(after, before).accepted


@pytest.mark.parametrize("n", [30, 300])
def test_error_rate(n: int) -> None:
    """Models equally good: accepted in about the 3.6 % that 1.8 standard errors stand for."""
    rng = np.random.default_rng(0)
    wrongly = sum(gate(rng.random(n) < 0.8, rng.random(n) < 0.8).accepted for _ in range(2000))
    assert wrongly / 2000 < 0.045


def test_interval_covers() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        low, high = gate(rng.random(200) < 0.6, rng.random(200) < 0.7).interval
        inside += low <= 0.1 <= high
    assert 920 <= inside <= 980


def test_samples_that_resemble_each_other_count_as_one() -> None:
    """Runs of 20 equal outcomes are no more evidence than one of each."""
    rng = np.random.default_rng(0)
    naive = blocked = 0
    for _ in range(500):
        before, after = (np.repeat(rng.random(16) < 0.8, 20) for _ in range(2))
        naive += gate(before, after, [np.array([i]) for i in range(320)]).accepted
        blocked += gate(before, after, runs(320, 16)).accepted
    assert naive > 120
    assert blocked < 40


@pytest.mark.parametrize("count", [2, 4, 8])
def test_few_blocks_are_no_certainty(count: int) -> None:
    """Two models as good as each other, but not on every block: 95 % covered; without `wider`, 66 to 88 %."""
    rng = np.random.default_rng(count)
    blocks = np.split(np.arange(60 * count), count)
    covered = accepted = 0
    for _ in range(500):
        share = np.repeat(rng.uniform(0.35, 0.65, count), 60)
        before = rng.random(60 * count) < 0.5
        found = gate(before, rng.random(60 * count) < share, blocks)
        covered += found.interval[0] <= 0 <= found.interval[1]
        accepted += found.accepted
    assert covered >= 0.93 * 500
    assert accepted <= 0.06 * 500


def test_one_block_decides_nothing() -> None:
    found = gate(np.zeros(50, bool), np.ones(50, bool), [np.arange(50)])
    assert not found.accepted
    assert found.interval == (-1, 1)


def test_width_of_student() -> None:
    """Quantiles from a table of Student's t."""
    for blocks, t in ((3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (21, 2.086)):
        assert INTERVAL * wider(blocks) == pytest.approx(t, rel=0.04)
    assert wider(ENOUGH) == 1


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match=r"two rows of one length, at least 1, not \[2\], \[3\]"):
        gate(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(UsageError, match="at least 1"):
        gate(np.ones(0, bool), np.ones(0, bool))
    with pytest.raises(UsageError, match="must hold all 3 samples, not 2"):
        gate(np.ones(3, bool), np.ones(3, bool), [np.array([0, 1])])

"""A few trials of each test of tests/torture; and a trial that fails, hangs or crashes is seen."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .torture.crashes import kills, power_cuts
from .torture.inputs import garbage_stdin
from .torture.mutations import mutated_files
from .torture.privacy import wiped
from .torture.work import Seen, trials


def bad(i: int, folder: Path) -> str:
    if i == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 2:
        time.sleep(60)
    assert i != 3, "three"
    return "fine"


def test_what_goes_wrong_is_seen() -> None:
    found = trials(bad, 6, limit=1.0, jobs=1)
    assert found.outcomes == {"fine": 3}
    assert [failure.split(" at ")[0] for failure in found.failures] == [
        "trial 1: the process ended with -9", "trial 2: hung", "trial 3: AssertionError",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("test", "count"),
    [(kills, 6), (power_cuts, 6), (garbage_stdin, 40), (mutated_files, 80), (wiped, 4)],
)
def test_a_few_trials(test: Callable[[int], Seen], count: int) -> None:
    found = test(count)
    assert found.failures == []
    assert sum(found.outcomes.values()) >= count

"""hw/rtl/quantise.py against the golden model: every byte of every entry, and the cycles it takes."""

from __future__ import annotations

import numpy as np

from .rtl_frozen import CASES, cases, run

from instantft.hw.rtl.quantise import FLUSH, SLOT  # isort: skip  (needs Amaranth, without which rtl_frozen skips)


@cases
def test_entries(name: str) -> None:
    got, want = run(name)
    assert got.entries.shape == want.entries.shape
    np.testing.assert_array_equal(got.entries, want.entries)


@cases
def test_sixteen_cycles_a_beat(name: str) -> None:
    """… and twice that for maps of up to 16 pixels, whose thresholds take longer than their codes."""
    case = CASES[name]
    beats = case.build.scale_beats + case.build.output_beats
    for tap in case.build.taps[1:]:
        beats += -(-tap.blocks // 2) * (2 if tap.groups > 1 and tap.group_blocks == 1 else 1)
    assert run(name)[0].working == len(case.groups) * (SLOT * beats + FLUSH + 1)

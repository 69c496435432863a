"""hw/rtl/backbone.py against the golden model: every value of the record, every saturation, the cycles it takes."""

from __future__ import annotations

import numpy as np

from instantft.hw.layout import CHANNELS

from .rtl_frozen import CASES, QUICK, cases, run

from instantft.hw.rtl.backbone import SETTLE  # isort: skip  (needs Amaranth, without which rtl_frozen skips)

BETWEEN = 8
"""Cycles of a layer beside its products and its last output's way: plan, start, first gap."""

LOAD = 4
"""Cycles of a beat of x^0: two in the core, and the harness lets the stream wait now and then."""


@cases
def test_values_and_saturations(name: str) -> None:
    got, want = run(name)
    assert got.written.shape == want.written.shape
    np.testing.assert_array_equal(got.written, want.written)
    assert got.saturated == want.saturated


def test_cases_cut_values_off_and_do_not() -> None:
    """… so that the count above says something."""
    cut = {run(name)[1].saturated for name in QUICK}
    assert 0 in cut
    assert len(cut) > 1


@cases
def test_a_product_a_cycle(name: str) -> None:
    """None is lost but between layers, where an output has fewer than 16 products, and where x^0 is awaited."""
    case, got = CASES[name], run(name)[0]
    products = 0
    for layer in case.build.layers:
        pool = layer.spec.pool
        rows, columns = layer.geometry.linear_shape[1:] if layer.spec.kind == "conv" else (1, 1)
        outputs = (rows // pool * pool) * (columns // pool * pool) // (2 if layer.pair else 1) * layer.channel_groups
        products += outputs * max(layer.inputs, CHANNELS)
    spent = got.busy - got.working
    most = len(case.groups) * (products + case.net.L * (SETTLE + BETWEEN))
    assert len(case.groups) * products <= spent <= most + LOAD * sum(case.groups) * case.build.input_beats

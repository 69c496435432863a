"""Softmax with tables against hw/fixed.py: samples as close as they may come, and far apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.hw import fixed
from instantft.hw.formats import PROFILES
from instantft.hw.layout import Build
from instantft.spec import dnn

pytest.importorskip("amaranth", reason="Amaranth is not here: pip install instantft[hw]")

from amaranth.sim import Simulator

from instantft.hw.rtl.softmax import Softmax


@pytest.mark.parametrize(("classes", "profile"), [(2, "q18"), (3, "q24"), (10, "q24"), (16, "q18")])
def test_p_is_the_models(classes: int, profile: str) -> None:
    formats = PROFILES[profile]
    build = Build(dnn(16, classes), 16, 4, formats, "q")
    rng = np.random.default_rng(classes)
    top = 1 << (formats.width - 1)
    scales = 2.0 ** rng.integers(4, formats.width + 1, (60, 1))
    y = np.clip(rng.normal(0, 1, (60, classes)) * scales, -top, top - 1).astype(np.int64)
    y[0], y[1] = 0, top - 1  # all alike: the largest Z
    y[2], y[3, 0] = -top, top - 1  # one class alone
    got: list[int] = []
    dut = Softmax(build)

    async def watch(ctx: Any) -> None:
        async for _, _, valid, last, p in ctx.tick().sample(dut.p_valid, dut.p_last, dut.p):
            if valid:
                assert last == (len(got) % classes == classes - 1)
                got.append(p)

    async def feed(ctx: Any) -> None:
        for sample in y.tolist():
            ctx.set(dut.valid, 1)
            for c, value in enumerate(sample):
                ctx.set(dut.y, value)
                ctx.set(dut.last, c == classes - 1)
                await ctx.tick()
            ctx.set(dut.valid, 0)
            ctx.set(dut.y, int(rng.integers(-top, top)))
            await ctx.tick().repeat(1 if rng.random() < 0.7 else int(rng.integers(2, 40)))
        await ctx.tick().repeat(3 * classes + 30)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_process(watch)
    sim.add_testbench(feed)
    sim.run()
    assert np.array_equal(np.reshape(got, y.shape), fixed.softmax(y, formats))

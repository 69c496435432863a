"""The lane array against sums of products in Python's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.hw.formats import PROFILES
from instantft.hw.layout import Build
from instantft.spec import LayerSpec, NetSpec, dnn

pytest.importorskip("amaranth", reason="Amaranth is not here: pip install instantft[hw]")

from amaranth.sim import Simulator

from instantft.hw.rtl.array import LATENCY, START_DELAY, LaneArray, sum_width


def small(lanes: int, rank: int, profile: str) -> Build:
    return Build(dnn(40, 3, hidden=20), lanes, rank, PROFILES[profile], "q", 4)


@pytest.mark.parametrize(
    ("lanes", "rank", "profile"), [(16, 4, "q24"), (16, 4, "q18"), (32, 2, "q24"), (16, 1, "q18"), (16, 16, "q24")]
)
def test_sums_of_both_clients_and_the_chain(lanes: int, rank: int, profile: str) -> None:
    """Extremes among the operands, gaps among the cycles, sums of several lengths, from 0 and from a parameter."""
    build = small(lanes, rank, profile)
    rng = np.random.default_rng(lanes + rank)
    width, count = build.formats.width, lanes * rank
    dut = LaneArray(build)

    def draw(bits: int, n: int) -> list[int]:
        v = rng.integers(-(1 << bits - 1), 1 << bits - 1, n)
        v[rng.random(n) < 0.2] = -(1 << bits - 1)
        v[rng.random(n) < 0.1] = (1 << bits - 1) - 1
        return [int(i) for i in v]

    async def bench(ctx: Any) -> None:
        for turn in range(12):
            backbone, update = turn % 2 == 1, turn % 4 == 2
            ctx.set(dut.select, backbone)
            port = dut.backbone if backbone else dut.adapters
            a = draw(16, count)
            ctx.set(dut.adapters.a, a)
            want = np.zeros(count, object)
            if update:
                s = build.formats.update_shift
                want += [(v << s) + (1 << (s - 1)) for v in a]
            for term in range(1 + turn % 4):
                ctx.set(port.valid, 1)
                ctx.set(port.start, term == 0)
                if backbone:
                    x, w = draw(width, 2 * build.samples), draw(16, 16)
                    ctx.set(port.x, x)
                    ctx.set(port.w, w)
                    want += [x[2 * (i // 16) + (i % 16) // 8] * w[i % 16] for i in range(count)]
                else:
                    ctx.set(port.update, update)
                    x, u = draw(width, lanes), draw(18, rank)
                    ctx.set(port.x, x)
                    ctx.set(port.u, u)
                    if not update:
                        a = draw(16, count)
                        ctx.set(port.a, a)
                    want += [x[i // rank] * (u[i % rank] if update else a[i]) for i in range(count)]
                await ctx.tick()
                if rng.random() < 0.5:
                    ctx.set(port.valid, 0)
                    await ctx.tick()
            ctx.set(port.valid, 0)
            await ctx.tick().repeat(LATENCY - 2)
            ctx.set(port.capture, 1)
            await ctx.tick()
            assert [ctx.get(dut.p[i]) for i in range(count)] == list(want)
            ctx.set(port.capture, 0)
            ctx.set(port.shift, 1)
            await ctx.tick()
            for place in range(16):
                if place < rank:
                    assert [ctx.get(dut.lane_heads[n]) for n in range(lanes)] == list(want[place::rank])
                assert [ctx.get(dut.sample_heads[s]) for s in range(build.samples)] == list(want[place::16])
                await ctx.tick()
            ctx.set(port.shift, 0)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


def test_the_start_value_is_taken_where_the_product_meets_the_sum() -> None:
    build = small(16, 4, "q24")
    dut = LaneArray(build)

    async def bench(ctx: Any) -> None:
        ctx.set(dut.adapters.valid, 1)
        ctx.set(dut.adapters.start, 1)
        ctx.set(dut.adapters.update, 1)
        for cycle in range(LATENCY):
            ctx.set(dut.adapters.a, [5 if cycle == START_DELAY else 77] * 64)
            await ctx.tick()
        assert ctx.get(dut.p[3]) == (5 << 24) + (1 << 23)

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


def test_the_largest_sums_fit() -> None:
    """A layer of 1000 inputs at -2^23 · -2^15 makes 1000·2^38: 49 bits with the sign; narrow ones take fewer."""
    wide = NetSpec((1000,), (LayerSpec("fc", 2), LayerSpec("fc", 2)))
    assert sum_width(Build(wide, 16, 1, PROFILES["q24"])) == 49
    assert sum_width(Build(dnn(256, 3), 64, 4, PROFILES["q24"])) <= 48
    assert sum_width(Build(dnn(256, 3), 64, 4, PROFILES["q18"])) == 42

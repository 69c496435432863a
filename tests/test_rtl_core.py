"""hw/rtl/core.py: its ports, and what it refuses. Whole launches, bit for bit, are in test_hw_sim.py."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("amaranth", reason="needs the extra hw (amaranth)")

from amaranth.sim import Simulator

from instantft.hw.formats import PROFILES
from instantft.hw.layout import Build
from instantft.hw.rtl.axi import REGISTERS
from instantft.hw.rtl.core import Core, Error
from instantft.spec import LayerSpec, NetSpec

NET = NetSpec((4,), (LayerSpec("fc", 3, relu=True), LayerSpec("fc", 2)))

RIGHT = {"mode": 1, "samples": 5, "epochs": 1, "batch": 3}

WRONG = [
    {"samples": 0},
    {"batch": 0},
    {"batch": 4},
    {"epochs": 0},
    {"epochs": 1 << 16},
    {"params": 8},
    {"logits": 1},
    {"mode": 0b10100},
]


def test_the_core_refuses_what_cannot_be_and_reads_what_can() -> None:
    """A configuration error (§8) ends a launch with error 3, no transfer; then PARAMS is read, a bad answer told."""
    build = Build(NET, 16, 1, PROFILES["q24"], "q", 3)
    core = Core(build)

    async def send(ctx: Any, offset: int, value: int) -> None:
        ctx.set(core.s_axi_control_awaddr, offset)
        ctx.set(core.s_axi_control_wdata, value)
        ctx.set(core.s_axi_control_wstrb, 15)
        ctx.set(core.s_axi_control_bready, 1)
        for name in ("aw", "w"):
            ctx.set(getattr(core, f"s_axi_control_{name}valid"), 1)
        await tick(ctx)
        for name in ("aw", "w"):
            ctx.set(getattr(core, f"s_axi_control_{name}valid"), 0)
        while not ctx.get(core.s_axi_control_bvalid):
            await tick(ctx)

    async def status(ctx: Any) -> int:
        ctx.set(core.s_axi_control_araddr, 4)
        ctx.set(core.s_axi_control_rready, 1)
        ctx.set(core.s_axi_control_arvalid, 1)
        await tick(ctx)
        ctx.set(core.s_axi_control_arvalid, 0)
        while not ctx.get(core.s_axi_control_rvalid):
            await tick(ctx)
        word = ctx.get(core.s_axi_control_rdata)
        await tick(ctx)
        return int(word)

    async def tick(ctx: Any) -> None:
        await ctx.delay(5e-9)
        ctx.set(core.ap_clk, 1)
        await ctx.delay(5e-9)
        ctx.set(core.ap_clk, 0)

    async def finish(ctx: Any) -> int:
        for _ in range(50):
            if (word := await status(ctx)) & 2:
                return word >> 8
        raise AssertionError("it does not finish")

    async def configure(ctx: Any, values: dict[str, int]) -> None:
        for name, value in values.items():
            await send(ctx, REGISTERS[name][0], value)
        await send(ctx, 0, 1)

    async def bench(ctx: Any) -> None:
        ctx.set(core.ap_rst_n, 0)
        await tick(ctx)
        ctx.set(core.ap_rst_n, 1)
        for wrong in WRONG:
            await configure(ctx, RIGHT | {"params": 0x1000, "logits": 0} | wrong)
            assert await finish(ctx) == Error.CONFIGURATION
            assert not ctx.get(core.m_axi_gmem0_arvalid)
        for answer, code in ((2, Error.READ), (0, Error.NONE)):
            await configure(ctx, RIGHT | {"params": 0x1000, "logits": 0})
            ctx.set(core.m_axi_gmem0_arready, 1)
            while not ctx.get(core.m_axi_gmem0_arvalid):
                await tick(ctx)
            assert ctx.get(core.m_axi_gmem0_araddr) == 0x1000
            assert ctx.get(core.m_axi_gmem0_arlen) == build.parameter_beats - 1
            await tick(ctx)
            assert await status(ctx) == 1
            ctx.set(core.m_axi_gmem0_rvalid, 1)
            for i in range(build.parameter_beats):
                ctx.set(core.m_axi_gmem0_rlast, i == build.parameter_beats - 1)
                ctx.set(core.m_axi_gmem0_rresp, answer if i == 2 else 0)
                while not ctx.get(core.m_axi_gmem0_rready):
                    await tick(ctx)
                await tick(ctx)
            ctx.set(core.m_axi_gmem0_rvalid, 0)
            assert await finish(ctx) == code

    simulator = Simulator(core)
    simulator.add_testbench(bench)
    simulator.run()

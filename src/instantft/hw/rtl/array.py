"""The lane array: every product of activations in the core (docs/hardware.md §6, §10).

Letters: N lanes, R rank, S samples side by side, W width of activations, F their fraction.
"""

from __future__ import annotations

from amaranth import Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..formats import PARAMETER_WIDTH, SCALED_WIDTH
from ..layout import CHANNELS, Build

__all__ = ["LATENCY", "AdaptersPort", "BackbonePort", "LaneArray", "sum_width", "values"]

LATENCY = 3
"""Cycles from an operand to the sum that has it: operands of cycle t are in `p` in cycle t + 3 (operand, product,
sum registers), so that `capture` in cycle t + 2 takes them."""

START_DELAY = 2
"""Cycles from the operands with `start` to `a`, which is taken where the product meets the sum."""


def values(width: int, count: int) -> data.ArrayLayout:
    """`count` signed numbers."""
    return data.ArrayLayout(signed(width), count)


def sum_width(build: Build) -> int:
    """Bits of a sum, from the largest that any client can make: 48 at most for the networks of the paper."""
    top = 1 << (build.formats.width - 1)
    forward = top * (1 << (PARAMETER_WIDTH - 1)) * max(t.chunks for t in build.taps)
    layer = top * (1 << (PARAMETER_WIDTH - 1)) * max(layer.inputs for layer in build.layers)
    start = ((1 << PARAMETER_WIDTH) + 1) << (build.formats.update_shift - 1)
    update = top * (1 << (SCALED_WIDTH - 1)) * build.batch + start
    return max(forward, layer, update).bit_length() + 1


class AdaptersPort(wiring.Signature):
    """What the adapters give the array, cycle by cycle.

    Attributes:
        valid: there are operands; without, every sum stays.
        start: with valid: the sums start here, with this product.
        update: the other operand of the multipliers of rank r is `u[r]`, not their parameter, and sums start from
            `(a << (F+8)) + 2^(F+7)` instead of from 0.
        x: (N,) activations.
        a: (N·R,) parameters (lane n, rank r at n·R + r); with update, START_DELAY cycles after their start.
        u: (R,) the operands of an update, 18 bits.
        capture: the hold chain takes all sums (those in `p` in the next cycle).
        shift: the hold chain moves on one place in the next cycle.
    """

    def __init__(self, build: Build) -> None:
        super().__init__(
            {
                "valid": Out(1),
                "start": Out(1),
                "update": Out(1),
                "x": Out(values(build.formats.width, build.lanes)),
                "a": Out(values(PARAMETER_WIDTH, build.lanes * build.rank)),
                "u": Out(values(SCALED_WIDTH, build.rank)),
                "capture": Out(1),
                "shift": Out(1),
            }
        )


class BackbonePort(wiring.Signature):
    """What the frozen network gives the array: valid, start, capture, shift as in `AdaptersPort`; sums start at 0.

    Attributes:
        x: (S·2,) activations; of sample s, 2·s for channels 0–7 and 2·s + 1 for channels 8–15.
        w: (16,) weights, the same for all samples.
    """

    def __init__(self, build: Build) -> None:
        super().__init__(
            {
                "valid": Out(1),
                "start": Out(1),
                "x": Out(values(build.formats.width, 2 * build.samples)),
                "w": Out(values(PARAMETER_WIDTH, CHANNELS)),
                "capture": Out(1),
                "shift": Out(1),
            }
        )


class LaneArray(wiring.Component):
    """N·R multipliers with accumulators, p = x·b + (start ? start value : p), and a chain that holds the sums.

    Ports:
        select: 1 while the frozen network is the client, 0 for the adapters. The other one's strobes must be low.
        adapters, backbone: the clients.
        p: (N·R,) sums, LATENCY cycles after their operands.
        lane_heads: (N,) the hold chain's slot (n, 0) of each lane: after `capture`, rank 0, after s < R shifts rank s.
        sample_heads: (S,) slot 0 of each sample: after `capture`, channel 0, after s < 16 shifts channel s.
            Both are there two cycles after `capture`; `shift` in the cycle after it brings the next a cycle later.
    """

    def __init__(self, build: Build) -> None:
        self.build = build
        self.width = sum_width(build)
        super().__init__(
            {
                "select": In(1),
                "adapters": In(AdaptersPort(build)),
                "backbone": In(BackbonePort(build)),
                "p": Out(values(self.width, build.lanes * build.rank)),
                "lane_heads": Out(values(self.width, build.lanes)),
                "sample_heads": Out(values(self.width, build.samples)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        build, rank, shift = self.build, self.build.rank, self.build.formats.update_shift
        one, two, select = self.adapters, self.backbone, self.select
        count = build.lanes * rank

        # Whether a sum goes on, and whether it starts from a parameter: registers, which every bit of every sum reads.
        valid, start, update, goes_on, from_a = Signal(2), Signal(), Signal(), Signal(), Signal()
        m.d.sync += [
            valid.eq(Mux(select, two.valid, one.valid) | valid << 1),
            start.eq(Mux(select, two.start, one.start)),
            update.eq(one.update & ~select),
            goes_on.eq(~start),
            from_a.eq(start & update),
        ]

        # What many multipliers share is chosen before it goes out to them.
        shared = [Signal(signed(SCALED_WIDTH), name=f"shared_{c}") for c in range(CHANNELS)]
        m.d.comb += [s.eq(Mux(select, two.w[c], one.u[c % rank])) for c, s in enumerate(shared)]
        use_shared = select | one.update

        # One operand register for the R multipliers of a lane, or two where a lane has both halves of the channels.
        x: dict[tuple[int, int], Signal] = {}
        for i in range(count):
            lane, sample, half = i // rank, i // CHANNELS, i % CHANNELS // (CHANNELS // 2)
            if (lane, half) not in x:
                x[lane, half] = Signal.like(one.x[lane], name=f"x_{lane}_{half}", reset_less=True)
                m.d.sync += x[lane, half].eq(Mux(select, two.x[2 * sample + half], one.x[lane]))
            b = Signal(signed(SCALED_WIDTH), name=f"b_{i}", reset_less=True)
            product = Signal.like(x[lane, half] * b, name=f"product_{i}", reset_less=True)
            total = Signal.like(self.p[i], name=f"sum_{i}", reset_less=True)
            begin = Mux(from_a, (one.a[i] << shift) | Const(1 << (shift - 1)), 0)
            origin = (Mux(goes_on, total, 0) | begin).as_signed()
            m.d.sync += [b.eq(Mux(use_shared, shared[i % CHANNELS], one.a[i])), product.eq(x[lane, half] * b)]
            with m.If(valid[1]):
                m.d.sync += total.eq(product + origin)
            m.d.comb += self.p[i].eq(total)

        hold = [Signal.like(self.p[0], name=f"hold_{i}", reset_less=True) for i in range(count)]
        take, move = Signal(), Signal()
        m.d.sync += [take.eq(one.capture | two.capture), move.eq(one.capture | two.capture | one.shift | two.shift)]
        with m.If(move):
            for i in range(count):
                m.d.sync += hold[i].eq(Mux(take, self.p[i], hold[i + 1] if i % CHANNELS != CHANNELS - 1 else hold[i]))
        m.d.comb += [self.lane_heads[n].eq(hold[n * rank]) for n in range(build.lanes)]
        m.d.comb += [self.sample_heads[s].eq(hold[s * CHANNELS]) for s in range(build.samples)]
        return m

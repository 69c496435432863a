"""Softmax with tables (docs/hardware.md §5): one class a cycle, three passes, each of them a sample apart."""

from __future__ import annotations

from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from ..formats import EXP_HIGH, EXP_LOW, INVERSE, Ints
from ..layout import Build
from .pieces import again, later

__all__ = ["Softmax"]

E_BITS = 16
"""Of an e. Z is at least the largest e, so that its leading bit is bit 15 or higher."""

P_BITS = 13
"""Of a p: 2^12 is 1, and I is up to one part in 2049 too large."""


class Softmax(wiring.Component):
    """p of a sample's y, in order of the classes. Samples must start at least C + 1 cycles apart.

    Ports:
        valid, last, y: one y a cycle; last: of the sample's last class.
        p_valid, p_last, p: the p, later.
    """

    def __init__(self, build: Build) -> None:
        self.formats, self.classes = build.formats, build.net.C
        super().__init__(
            {
                "valid": In(1),
                "last": In(1),
                "y": In(signed(build.formats.width)),
                "p_valid": Out(1),
                "p_last": Out(1),
                "p": Out(P_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        C, width = self.classes, self.formats.width

        def buffer(name: str, bits: int) -> tuple[Any, Any]:
            """Two samples' values, address (sample's parity, class)."""
            m.submodules[name] = cells = memory.Memory(shape=unsigned(bits), depth=32, init=[])
            return cells.write_port(), cells.read_port()

        def rom(name: str, table: Ints, bits: int, address: Any) -> Any:
            m.submodules[name] = cells = memory.Memory(
                shape=unsigned(bits), depth=len(table), init=[int(v) for v in table]
            )
            port = cells.read_port()
            m.d.comb += port.addr.eq(address)
            return port.data

        # 1: keep y, find the largest.
        y_in, y_out = buffer("kept_y", width)
        where, largest, first, found = Signal(5), Signal(signed(width)), Signal(init=1), Signal()
        m.d.comb += [y_in.addr.eq(where), y_in.data.eq(self.y), y_in.en.eq(self.valid)]
        m.d.sync += found.eq(self.valid & self.last)
        with m.If(self.valid):
            m.d.sync += [first.eq(self.last), where.eq(Mux(self.last, Cat(Const(0, 4), ~where[4]), where + 1))]
            with m.If(first | (self.y > largest)):
                m.d.sync += largest.eq(self.y)

        # 2: e of every class, their sum.
        peak, half = Signal(signed(width)), Signal()
        with m.If(found):
            m.d.sync += [peak.eq(largest), half.eq(~where[4])]
        running, index, last = again(m, found, C, "second")
        m.d.comb += y_out.addr.eq(Cat(index, Const(0, 4 - len(index)), half))
        d = Signal(width)
        m.d.sync += d.eq(peak - y_out.data.as_signed())
        delta = d[self.formats.fraction - 10 :]
        high = rom("exp_high", EXP_HIGH, E_BITS, delta[7:14])
        low = rom("exp_low", EXP_LOW, E_BITS, delta[:7])
        product = Signal(2 * E_BITS, reset_less=True)
        e = Signal(E_BITS, reset_less=True)
        m.d.sync += product.eq(high * low)
        m.d.sync += e.eq(Mux(later(m, delta[14:] != 0, 2), 0, (product + (1 << (E_BITS - 1))) >> E_BITS))
        e_valid, e_class, e_last, e_half = (later(m, s, 5) for s in (running, index, last, half))
        e_in, e_out = buffer("kept_e", E_BITS)
        m.d.comb += [
            e_in.addr.eq(Cat(e_class, Const(0, 4 - len(e_class)), e_half)),
            e_in.data.eq(e),
            e_in.en.eq(e_valid),
        ]
        extra = ceil_log2(C)
        Z = Signal(E_BITS + extra)
        with m.If(e_valid):
            m.d.sync += Z.eq(Mux(e_class == 0, 0, Z) + e)

        # n - 15 and f, then I[f] held for the third pass, which starts when it comes.
        n, f = Signal(range(extra + 1)), Signal(10)
        with m.Switch(Z[E_BITS:]):
            for above in range(1 << extra):
                with m.Case(above):
                    m.d.sync += [n.eq(above.bit_length()), f.eq(Z >> (5 + above.bit_length()))]
        inverse = rom("inverse", INVERSE, E_BITS, f)
        begin = later(m, e_last, 3)
        n_then, half_then = later(m, n, 1), later(m, e_half, 3)
        scale, factor, third_half = Signal.like(n), Signal(E_BITS), Signal()
        with m.If(begin):
            m.d.sync += [scale.eq(n_then), factor.eq(inverse), third_half.eq(half_then)]

        # 3: p.
        running, index, last = again(m, begin, C, "third")
        m.d.comb += e_out.addr.eq(Cat(index, Const(0, 4 - len(index)), third_half))
        share, rounded = Signal(2 * E_BITS, reset_less=True), Signal(2 * E_BITS + 1, reset_less=True)
        m.d.sync += share.eq(e_out.data * factor)
        half_unit = Signal(range(1 << (E_BITS + 2 + extra + 1)))
        m.d.sync += half_unit.eq(Const(1 << (E_BITS + 2)) << scale)
        m.d.sync += [rounded.eq(share + half_unit), self.p.eq((rounded >> (E_BITS + 3)) >> later(m, scale, 2))]
        m.d.sync += [self.p_valid.eq(later(m, running, 3)), self.p_last.eq(later(m, last, 3))]
        return m

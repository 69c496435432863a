"""Memories of the core: one write port, one registered read port, in as many banks as the device wants.

A bank is as deep as a memory block of its style, so that tools need not find the cut themselves (yosys never finishes
with one huge memory): of UltraRAM where it is widest, of block RAM where it is deepest, for what chooses among banks
takes more wires than an ECP5 has to spare. The last bank, where little is left for it, takes the next smaller style.
"""

from __future__ import annotations

from amaranth import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..configs import Style

__all__ = ["LATENCY", "Store", "Style"]

LATENCY = 2
"""Cycles from `read_address` to `read_data`."""

DEPTH: dict[Style, int] = {"distributed": 64, "block": 4096, "ultra": 4096}
DEEPEST: dict[Style, tuple[int, int]] = {"block": (2048, 4)}
"""A bank of more words than the first is cut into memories of the second's bits, as a block has at its deepest."""
SMALLER: dict[Style, tuple[tuple[int, Style], ...]] = {
    "block": ((64, "distributed"),),
    "ultra": ((128, "distributed"), (512, "block")),
}
"""The last bank's style where it has at most so many words: the first that fits."""


class Store(wiring.Component):
    """A memory.

    Args:
        width: bits of a word.
        depth: words.
        style: what it is made of.

    Ports:
        write, write_address, write_data: a word, written at the end of the cycle.
        read_address: of the word that is in read_data LATENCY cycles later. For one that is written while it is
            read, or beyond the depth, any word (an ECP5 does not say which); the core uses none such.
    """

    def __init__(self, width: int, depth: int, style: Style) -> None:
        self.width, self.depth, self.style = width, depth, style
        super().__init__(
            {
                "write": In(1),
                "write_address": In(range(depth)),
                "write_data": In(width),
                "read_address": In(range(depth)),
                "read_data": Out(width),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        each = DEPTH[self.style]
        bits = each.bit_length() - 1
        write_bank, read_bank = self.write_address[bits:], Signal.like(self.read_address[bits:], reset_less=True)
        m.d.sync += read_bank.eq(self.read_address[bits:])
        words = []
        for i, first in enumerate(range(0, self.depth, each)):
            style, size = self.style, min(each, self.depth - first)
            if i:
                style = next((smaller for most, smaller in SMALLER.get(style, ()) if size <= most), style)
            above, cut = DEEPEST.get(style, (size, 0))
            cut, word = cut if size > above else self.width, []
            for low in range(0, self.width, cut):
                data = self.write_data[low : low + cut]
                made = Memory(shape=len(data), depth=size, init=[], attrs={"ram_style": style})
                m.submodules[f"bank{i}_{low}"] = made
                write, read = made.write_port(), made.read_port()
                m.d.comb += [
                    write.en.eq(self.write & (write_bank == i)),
                    write.addr.eq(self.write_address[:bits]),
                    write.data.eq(data),
                    read.addr.eq(self.read_address[:bits]),
                ]
                word.append(read.data)
            words.append(Cat(word))
        out = Signal(self.width, reset_less=True)
        with m.Switch(read_bank):
            for i, word in enumerate(words):
                with m.Case(i):
                    m.d.sync += out.eq(word)
        m.d.comb += self.read_data.eq(out)
        return m

"""What the units share: saturation, trees with registers, delays, passes over a range (docs/hardware.md §1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amaranth import Const, Module, Mux, Signal, signed

__all__ = ["again", "later", "saturate", "tree"]


def saturate(v: Any, width: int) -> tuple[Any, Any]:
    """sat(v, width) of a signed v, and whether that changes it."""
    top = v[width - 1 :]
    cut = top.any() & ~top.all()
    least, most = Const(-(1 << (width - 1)), signed(width)), Const((1 << (width - 1)) - 1, signed(width))
    return Mux(cut, Mux(v[-1], least, most), v[:width].as_signed()), cut


def tree(m: Module, terms: Sequence[Any]) -> tuple[Any, int]:
    """Σ terms, a register after every addition.

    Returns:
        The sum, and how many cycles after the terms it comes.
    """
    level, depth = list(terms), 0
    while len(level) > 1:
        depth += 1
        sums = [a + b for a, b in zip(level[::2], level[1::2], strict=False)] + level[len(level) & ~1 :]
        level = [Signal.like(s, name=f"tree_{depth}_{i}", reset_less=True) for i, s in enumerate(sums)]
        m.d.sync += [r.eq(s) for r, s in zip(level, sums, strict=True)]
    return level[0], depth


def later(m: Module, signal: Any, cycles: int) -> Any:
    """A signal some cycles ago. Not to be called within an `m.If`, whose condition would hold for the registers too."""
    for i in range(cycles):
        after = Signal.like(signal, name=f"later_{i}")
        m.d.sync += after.eq(signal)
        signal = after
    return signal


def again(m: Module, begin: Any, count: int, name: str) -> tuple[Any, Any, Any]:
    """0, 1, … count - 1, one a cycle, from the cycle after the pulse `begin` on.

    Returns:
        Whether there is one this cycle, which, whether it is the last.
    """
    running, index = Signal(name=f"{name}_running"), Signal(range(count), name=f"{name}_index")
    last = running & (index == count - 1)
    m.d.sync += index.eq(Mux(begin | last, 0, index + running))
    with m.If(begin | last):
        m.d.sync += running.eq(begin)
    return running, index, last

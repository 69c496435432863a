"""What Yosys leaves undone for an ECP5: registers around a multiplier go into it, small functions before an adder too.

Both make fewer wires, which are what an ECP5 lacks (decision 0032). They work on a module of Yosys' JSON.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

__all__ = ["improve"]

Bit = int | str
"""A net's number, or a constant: ``0``, ``1``, ``x``."""

ADDS = "1001011010101010"
"""INIT of half a CCU2C as Yosys' adders have it: with D = 1, A + (C ? ~B : B); a carry is generated where A is."""

BITS = range(18)
PRODUCT = range(36)


class _Nets:
    """Who drives each net, and who reads it."""

    def __init__(self, module: dict[str, Any]) -> None:
        self.cells: dict[str, Any] = module["cells"]
        self.driver: dict[Bit, tuple[str, str]] = {}
        self.readers: dict[Bit, list[tuple[str, str]]] = defaultdict(list)
        for name, cell in self.cells.items():
            for port, bits in cell["connections"].items():
                for bit in bits:
                    if isinstance(bit, int):
                        if cell["port_directions"][port] == "output":
                            self.driver[bit] = name, port
                        else:
                            self.readers[bit].append((name, port))
        for port in module["ports"].values():
            if port["direction"] == "output":
                for bit in port["bits"]:
                    self.readers[bit].append(("", ""))

    def driven_by(self, bit: Bit, kind: str) -> str | None:
        """The cell of a kind whose output a net is."""
        name = self.driver.get(bit, ("", ""))[0]
        return name if name and self.cells[name]["type"] == kind else None

    def move(self, name: str, port: str, bit: Bit) -> None:
        """Let a cell's input read another net."""
        old = self.cells[name]["connections"][port][0]
        if isinstance(old, int):
            self.readers[old].remove((name, port))
        self.cells[name]["connections"][port] = [bit]
        if isinstance(bit, int):
            self.readers[bit].append((name, port))

    def remove(self, name: str) -> None:
        """Take a cell out."""
        cell = self.cells.pop(name)
        for port, bits in cell["connections"].items():
            for bit in bits:
                if isinstance(bit, int):
                    if cell["port_directions"][port] == "output":
                        self.driver.pop(bit, None)
                    else:
                        self.readers[bit].remove((name, port))


def improve(module: dict[str, Any]) -> dict[str, int]:
    """Change a module in place. Returns how many registers went into multipliers, and how many LUTs into adders."""
    nets = _Nets(module)
    return {"registers": _registers(nets), "functions": _functions(nets)}


def _clock(nets: _Nets, name: str | None) -> Bit | None:
    """The clock of a register that a multiplier could hold: no enable, no reset, starts at 0, on a rising edge."""
    if name is None:
        return None
    cell = nets.cells[name]
    p, c = cell["parameters"], cell["connections"]
    # Yosys writes a space behind a string that could be read as a number.
    always = p.get("CEMUX", "CE").strip() == "1" or c.get("CE", ["x"]) == ["1"]
    unset = p.get("LSRMUX", "LSR") == "LSR" and c.get("LSR", ["0"]) == ["0"]
    plain = p.get("CLKMUX", "CLK") == "CLK" and p.get("REGSET", "RESET") == "RESET"
    bit: Bit = c["CLK"][0]
    return bit if always and unset and plain else None


def _registers(nets: _Nets) -> int:
    """Input registers and output registers into MULT18X18D.

    Inputs only where every bit of both operands is registered (nextpnr knows no timing of one side alone), and
    where nobody but multipliers that take theirs in as well reads such a register: else nothing would be saved.
    """
    multipliers = [name for name, cell in nets.cells.items() if cell["type"] == "MULT18X18D"]
    inputs = [f"{side}{i}" for side in "AB" for i in BITS]

    def sources(name: str) -> set[Bit]:
        return {b for port in inputs for b in nets.cells[name]["connections"][port] if b not in ("0", "x")}

    candidates = {
        name for name in multipliers if all(_clock(nets, nets.driven_by(b, "TRELLIS_FF")) for b in sources(name))
    }
    while True:
        out = {
            name
            for name in candidates
            if any(reader not in candidates for b in sources(name) for reader, _ in nets.readers[b])
        }
        if not out:
            break
        candidates -= out
    taken = set()
    for name in candidates:
        clock: Bit | None = None
        for port in inputs:
            register = nets.driven_by(nets.cells[name]["connections"][port][0], "TRELLIS_FF")
            if register is not None:
                taken.add(register)
                clock = _clock(nets, register)
                nets.move(name, port, nets.cells[register]["connections"]["DI"][0])
        if clock is not None:
            _clocked(nets, name, clock, "INPUTA", "INPUTB")
    for register in taken:
        nets.remove(register)
    count = len(taken)
    for name in multipliers:
        cell = nets.cells[name]
        products = {p: cell["connections"][f"P{p}"][0] for p in PRODUCT if f"P{p}" in cell["connections"]}
        products = {p: b for p, b in products.items() if nets.readers[b]}
        readers = {p: nets.readers[b] for p, b in products.items()}
        if not all(len(r) == 1 and r[0][1] == "DI" for r in readers.values()):
            continue
        clocks = {_clock(nets, r[0][0]) for r in readers.values()}
        if len(clocks) != 1 or None in clocks:
            continue
        for p, ((register, _),) in readers.items():
            out_bit = nets.cells[register]["connections"]["Q"][0]
            nets.remove(register)
            cell["connections"][f"P{p}"] = [out_bit]
            nets.driver[out_bit] = name, f"P{p}"
        count += len(readers)
        _clocked(nets, name, next(c for c in clocks if c is not None), "OUTPUT")
    return count


def _clocked(nets: _Nets, name: str, clock: Bit, *registers: str) -> None:
    """Let registers of a multiplier run."""
    cell = nets.cells[name]
    for port, bit in {"CLK0": clock, "CE0": "1", "RST0": "0"}.items():
        cell["connections"][port], cell["port_directions"][port] = [bit], "input"
    nets.readers[clock].append((name, "CLK0"))
    for register in registers:
        cell["parameters"] |= {
            f"REG_{register}_CLK": "CLK0",
            f"REG_{register}_CE": "CE0",
            f"REG_{register}_RST": "RST0",
        }
    cell["parameters"] |= {"RESETMODE": "SYNC", "GSR": "DISABLED"}


def _functions(nets: _Nets) -> int:
    """A LUT of two inputs that only feeds an adder becomes part of the adder's own LUT."""
    count = 0
    for name in [n for n, cell in nets.cells.items() if cell["type"] == "CCU2C"]:
        for half in "01":
            cell = nets.cells[name]
            c, p = cell["connections"], cell["parameters"]
            flip = c[f"C{half}"][0]
            if p[f"INIT{half}"] != ADDS or p[f"INJECT1_{half}"] != "NO" or flip not in ("0", "1"):
                continue
            if c[f"D{half}"] != ["1"]:
                continue
            for side, other in ("BA", "AB") if flip == "0" else ("BA",):
                bit = c[f"{side}{half}"][0]
                lut = nets.driven_by(bit, "LUT4")
                if lut is None or len(nets.readers[bit]) != 1:
                    continue
                function = _of_two(nets.cells[lut])
                if function is None:
                    continue
                (first, second), table = function
                kept = c[f"{other}{half}"][0]
                nets.remove(lut)
                nets.move(name, f"A{half}", kept)
                nets.move(name, f"B{half}", first)
                nets.move(name, f"C{half}", second)
                # With D = 1: A xor f(B, C); where D = C = 0 stands what generates a carry, A.
                high = [a ^ table[2 * z + b] ^ int(flip) for z in (0, 1) for b in (0, 1) for a in (0, 1)]
                low = [int(bit) for bit in reversed(ADDS[8:])]
                p[f"INIT{half}"] = "".join(map(str, reversed(low + high)))
                count += 1
                break
    return count


def _of_two(lut: dict[str, Any]) -> tuple[tuple[Bit, Bit], list[int]] | None:
    """The inputs of a LUT4 that reads two nets at most, and its table: of (first, second), first fastest."""
    table = [int(bit) for bit in reversed(lut["parameters"]["INIT"].rjust(16, "0"))]
    bits = [lut["connections"].get(port, ["0"])[0] for port in "ABCD"]
    nets = list(dict.fromkeys(b for b in bits if isinstance(b, int)))
    if not 1 <= len(nets) <= 2:
        return None
    first, second = nets[0], nets[-1]
    out = []
    for y in (0, 1):
        for x in (0, 1):
            given = {first: x, second: y if len(nets) == 2 else x}
            index = sum(given.get(b, int(b == "1")) << i for i, b in enumerate(bits))
            out.append(table[index])
    if len(nets) == 1:
        return (first, "0"), [out[0], out[3], out[0], out[3]]
    return (first, second), out

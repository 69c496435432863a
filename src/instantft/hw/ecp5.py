"""What Yosys and nextpnr leave undone for an ECP5, whose wires are what the core is short of (decisions 0032, 0036).

`improve` moves registers around a multiplier into it, and small functions before an adder too, and copies what has
thousands of readers. `arrange` gives places. Both work on a module of Yosys' JSON.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import product
from typing import Any

from .formats import PARAMETER_WIDTH

__all__ = ["arrange", "improve"]

Bit = int | str
"""A net's number, or a constant: ``0``, ``1``, ``x``."""

ADDS = "1001011010101010"
"""INIT of half a CCU2C as Yosys' adders have it: with D = 1, A + (C ? ~B : B); a carry is generated where A is."""

OUTPUT = {"TRELLIS_FF": "Q", "LUT4": "Z"}
MOST, EACH = 1000, 336
"""Readers above which a cell is copied, and of each copy: a sum has 42 bits, and eight sums stand together."""

MULTIPLIERS, MEMORIES = (10, 34, 58), (22, 46, 70, 82)
"""Rows of an LFE5U-85F that have no look-up tables."""

COLUMNS = (4, 13, 22, 31, 40, 49, 58, 69, 78, 87, 96, 105, 114)
"""Where four multipliers, or four block memories, begin in such a row."""

TILES_X, TILES_Y = (2, 125), (2, 95)
"""From, to: columns and rows that have tiles of eight look-up tables."""

EIGHT = 8
"""Parameters of a beat."""

ROUTER = {
    "router2/initCurrCongWeight": "5.0",
    "router2/histCongWeight": "2.0",
    "router2/currCongWeightMult": "0.5",
    "router2/estimateWeight": "1.0",
    "router2/bbMargin/x": "8",
    "router2/bbMargin/y": "8",
}
"""What a wire costs that others want too: more than by router2's own choice, and ways farther around may be gone."""

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
    """Change a module in place. Returns how many registers went into multipliers, how many LUTs into adders,
    and how many cells were copied."""
    nets = _Nets(module)
    named = (bit for net in module.get("netnames", {}).values() for bit in net["bits"])
    free = 1 + max(bit for bit in (*nets.driver, *nets.readers, *named) if isinstance(bit, int))
    return {"registers": _registers(nets), "functions": _functions(nets), "copies": _copies(nets, free)}


def arrange(module: dict[str, Any]) -> int:
    """Give the lane array and A places, keep rows of tiles free, and say how to route.

    nextpnr's placer draws connected cells together until three places of four are taken, and so leaves half of the chip
    empty and the other half with too few wires. Here in every third row of tiles all places of look-up tables are taken
    by such as nothing reads; the wires there are left to others.

    Returns:
        How many look-up tables that nothing reads there are now.
    """
    _places(module)
    module["settings"] = {**module.get("settings", {}), **ROUTER}
    rows = [y for y in range(*TILES_Y) if y not in (*MULTIPLIERS, *MEMORIES)][2::3]
    unread = list(product(range(*TILES_X), rows, (f"SLICE{s}.K{k}" for s in "ABCD" for k in "01")))
    for x, y, place in unread:
        module["cells"][f"free_{x}_{y}_{place}"] = {
            "type": "LUT4",
            "parameters": {"INIT": "0" * 16},
            "attributes": {"BEL": f"X{x}/Y{y}/{place}"},
            "port_directions": {"A": "input", "B": "input", "C": "input", "D": "input", "Z": "output"},
            "connections": {"A": [], "B": [], "C": [], "D": [], "Z": []},
        }
    return len(unread)


def _places(module: dict[str, Any]) -> None:
    """The array's multipliers, and A's memories, in columns over the whole width of the chip.

    A beat brings eight parameters, and A takes them in from eight to eight: an eight has a column, one side of it a row
    of multipliers. Without such an array, or with more eights than columns, nothing is given a place.
    """
    cells = module["cells"]
    owner = {cell["connections"]["P0"][0]: name for name, cell in cells.items() if cell["type"] == "MULT18X18D"}
    array = {
        int(name.rsplit("_", 1)[1]): owner[net["bits"][0]]
        for name, net in module["netnames"].items()
        if re.fullmatch(r"core\.array\.product_\d+", name) and net["bits"][0] in owner
    }
    eights = -(-(max(array, default=-1) + 1) // EIGHT)
    if not 0 < eights <= len(COLUMNS):
        return
    columns = [COLUMNS[round(i * (len(COLUMNS) - 1) / max(1, eights - 1))] for i in range(eights)]
    for i, name in array.items():
        eight, place = divmod(i, EIGHT)
        row, z = MULTIPLIERS[eight % 2 + place // 4], (0, 4, 1, 5)[place % 4]
        cells[name]["attributes"]["BEL"] = f"X{columns[eight] + z}/Y{row}/MULT18_{z}"
    left = {column: [(e, row) for e in (1, 2, 0) for row in MEMORIES[:2]] for column in columns}
    for name, cell in sorted(cells.items()):
        found = re.fullmatch(r"core\.adapters\.a(?:\$\d+)?\.memory\.0\.(\d+)", name)
        if found and cell["type"] == "DP16KD":
            middle = int(cell["parameters"]["DATA_WIDTH_A"], 2) * (2 * int(found[1]) + 1) // 2
            column = columns[min(eights - 1, middle // (PARAMETER_WIDTH * EIGHT))]
            if left[column]:
                e, row = left[column].pop(0)
                cell["attributes"]["BEL"] = f"X{column + 2 * e}/Y{row}/EBR{e}"


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


def _copies(nets: _Nets, free: int) -> int:
    """What more than MOST inputs read is made several times, each for up to EACH of them, which stand together.

    Args:
        free: a number from which on no net has one.
    """
    count = 0
    for name in [n for n, cell in nets.cells.items() if cell["type"] in OUTPUT]:
        cell = nets.cells[name]
        port = OUTPUT[cell["type"]]
        (bit,) = cell["connections"][port]
        readers = sorted(nets.readers[bit], key=lambda reader: [_natural(word) for word in reader])
        if len(readers) <= MOST:
            continue
        for i, first in enumerate(range(EACH, len(readers), EACH), 1):
            copy = {**cell, "connections": {**cell["connections"], port: [free]}}
            nets.cells[f"{name}_copy_{i}"] = copy
            nets.driver[free] = f"{name}_copy_{i}", port
            for taken, (given,) in ((p, b) for p, b in cell["connections"].items() if p != port and b):
                nets.readers[given].append((f"{name}_copy_{i}", taken))
            for reader, side in readers[first : first + EACH]:
                if reader:
                    nets.move(reader, side, free)
            free, count = free + 1, count + 1
    return count


def _natural(word: str) -> list[tuple[int, str]]:
    """Of a name, for sorting, so that a10 comes after a9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", word)]

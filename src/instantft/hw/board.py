"""The core on a board under PYNQ, with the methods of the simulator; it takes the place of the paper's host code.

`instantft hw generate` puts this file beside the design that it drives. NOT TRIED ON A BOARD: what it does to registers
and buffers is tested against a stand-in for `pynq`; Overlay, clock and cache maintenance are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np

from instantft.errors import EngineError, MismatchError
from instantft.hw.image import BUFFERS, BUILD, CTRL, ID, IDENTITY, STATUS, STEPS, Launch, Outcome, outcome, writes
from instantft.hw.layout import Build

__all__ = ["Board"]

TIMEOUT = 60.0
"""Seconds after which a launch is given up; the longest of the paper takes a tenth of a second."""

LOOK = 0.001
"""Seconds between looks at the status."""


class Board:
    """A core in programmable logic.

    Args:
        build: what the design was generated for.
        bitfile: ``instantft.bit``, with ``instantft.hwh`` beside it.

    Raises:
        EngineError: `pynq` is not installed (it comes with the board's image).
        MismatchError: the design in the bit file is another build.
    """

    def __init__(self, build: Build, bitfile: str | PathLike[str] = "instantft.bit") -> None:
        try:
            import pynq
        except ImportError:
            raise EngineError("a board must run PYNQ's Linux image, whose Python has the package pynq") from None
        self.build = build
        self._allocate: Callable[..., Any] = pynq.allocate
        self._overlay = pynq.Overlay(str(bitfile))
        self._core = self._overlay.instantft_0
        found, known = self._core.read(BUILD), self._core.read(IDENTITY) == ID
        if not known or found != build.id:
            raise MismatchError(f"{bitfile} must hold the build {build.id:#010x} of the core, not {found:#010x}")

    def run(self, job: Launch, progress: Callable[[int], None] | None = None) -> Outcome:
        """As `sim.Simulator.run`.

        Raises:
            EngineError: the core stops with an error, or does not finish.
        """
        buffers = {name: self._allocate(shape=(max(16, job.buffers[name].size),), dtype=np.uint8) for name in BUFFERS}
        try:
            for name, data in job.buffers.items():
                buffers[name][: data.size] = data
                buffers[name].flush()
            for offset, value in writes(job, {name: b.physical_address for name, b in buffers.items()}):
                self._core.write(offset, value)
            self._core.write(CTRL, 1)
            began = time.monotonic()
            while not self._core.read(STATUS) & 2:
                if time.monotonic() - began > TIMEOUT:
                    raise EngineError(f"the core must finish within {TIMEOUT:g} s, but did not")
                if progress is not None:
                    progress(self._core.read(STEPS))
                time.sleep(LOOK)
            result = outcome(self._core.read)
            for name in ("cache", "out", "logits"):
                buffers[name].invalidate()
                job.buffers[name][:] = buffers[name][: job.buffers[name].size]
        finally:
            for buffer in buffers.values():
                buffer.freebuffer()
        return result

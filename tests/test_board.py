"""The driver against a stand-in for `pynq`: what it writes, in what order, and what it gives back."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from instantft.errors import EngineError, MismatchError
from instantft.hw import image
from instantft.hw.board import Board
from instantft.hw.formats import PROFILES
from instantft.hw.image import Launch
from instantft.hw.layout import Build
from instantft.spec import dnn

BUILD = Build(dnn(16, 3, 16), 16, 1, PROFILES["q24"], "q")


class Buffer(np.ndarray):
    """What `pynq.allocate` gives: an array with an address, which the core sees once it is flushed."""

    physical_address: int
    seen: np.ndarray
    free = False

    def flush(self) -> None:
        self.seen[:] = self

    def invalidate(self) -> None:
        self[:] = self.seen

    def freebuffer(self) -> None:
        self.free = True


class Core:
    """Copies PARAMS to OUT as soon as it is started."""

    def __init__(self, build: int, status: int = 2) -> None:
        self.buffers: list[Buffer] = []
        self.registers = {0x08: image.ID, 0x0C: build, 0x04: 0}
        self.status = status

    def allocate(self, shape: tuple[int], dtype: type) -> Buffer:
        made = np.full(shape, 0xEE, dtype).view(Buffer)
        made.physical_address, made.seen = 0x1_0000_0000 + 0x10000 * len(self.buffers), np.zeros(shape, dtype)
        self.buffers.append(made)
        return made

    def write(self, offset: int, value: int) -> None:
        assert 0 <= value < 1 << 32
        self.registers[offset] = value
        if offset == 0 and value == 1:
            at = {b.physical_address: b for b in self.buffers}
            source, target = (at[self.registers[a] | self.registers[a + 4] << 32] for a in (0x30, 0x50))
            target.seen[:] = source.seen
            self.registers[4] = self.status

    def read(self, offset: int) -> int:
        return self.registers.get(offset, 7)


def board(core: Core, monkeypatch: pytest.MonkeyPatch) -> Board:
    pynq: Any = SimpleNamespace(allocate=core.allocate, Overlay=lambda _: SimpleNamespace(instantft_0=core))
    monkeypatch.setitem(sys.modules, "pynq", pynq)
    return Board(BUILD)


def job() -> Launch:
    data, nothing = np.arange(64, dtype=np.uint8), np.zeros(16, np.uint8)
    others = {name: nothing.copy() for name in ("x0", "cache", "order", "logits")}
    return Launch(BUILD, {"params": data, "out": np.zeros(64, np.uint8), **others}, {"MODE": 15, "T": 3})


def test_a_launch_goes_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(BUILD.id)
    done = job()
    result = board(core, monkeypatch).run(done)
    np.testing.assert_array_equal(done.buffers["out"], np.arange(64))
    assert result.steps == 7
    assert core.registers[0x10] == 15
    assert all(buffer.free for buffer in core.buffers)


def test_errors_and_other_builds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MismatchError, match="must hold the build"):
        board(Core(BUILD.id ^ 1), monkeypatch)
    core = Core(BUILD.id, status=2 | 4 << 8)
    with pytest.raises(EngineError, match="error 4: a sample's number or class is out of range"):
        board(core, monkeypatch).run(job())
    assert all(buffer.free for buffer in core.buffers)


def test_without_pynq_it_says_so() -> None:
    with pytest.raises(EngineError, match="PYNQ's Linux image"):
        Board(BUILD)

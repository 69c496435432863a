"""An exported folder, compiled for this machine and called from Python."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["WARNINGS", "Device", "compiled", "constants"]

WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wno-psabi", "-Werror")


def constants(folder: Path) -> dict[str, int]:
    """What the generated headers define, by name."""
    text = "".join((folder / f).read_text() for f in ("include/instantft_model.h", "src/instantft_config.h"))
    return {name: int(value) for name, value in re.findall(r"^\s*((?:INSTANTFT|IFT)_\w+) = (\d+),", text, re.MULTILINE)}


def compiled(folder: Path, *flags: str) -> Path:
    """A shared library of it."""
    library = folder / "device.so"
    sources = sorted(str(p) for p in (folder / "src").glob("*.c"))
    command = [os.environ.get("CC", "cc"), "-std=c11", "-O1", *WARNINGS, "-fPIC", "-shared", *flags]
    subprocess.run([*command, *sources, "-lm", "-o", str(library)], check=True)
    return library


class Device:
    """The exported API, on an arena of its own."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.constants = constants(folder)
        self._lib = ctypes.CDLL(str(compiled(folder, *flags)))
        self._lib.instantft_init.restype = ctypes.c_void_p
        size = self.constants["INSTANTFT_ARENA"]
        raw = np.zeros(size + 16, np.uint8)
        skip = -raw.ctypes.data % 16
        self.arena = raw[skip : skip + size]
        self._t = ctypes.c_void_p(
            self._lib.instantft_init(ctypes.c_void_p(self.arena.ctypes.data), ctypes.c_size_t(size))
        )
        assert self._t

    def add(self, x: NDArray[Any], y: NDArray[np.int32]) -> int:
        x, y = np.ascontiguousarray(x), np.ascontiguousarray(y, np.int32)
        pointer = ctypes.c_void_p
        return int(self._lib.instantft_add_samples(self._t, pointer(x.ctypes.data), pointer(y.ctypes.data), len(y)))

    def train(self) -> int:
        while (status := int(self._lib.instantft_train(self._t, 3))) == 1:
            pass
        return status

    def commit(self) -> int:
        return int(self._lib.instantft_commit(self._t))

    def logits(self, x: NDArray[Any]) -> NDArray[np.float32]:
        out = np.empty((len(x), self.constants["INSTANTFT_C"]), np.float32)
        for i, sample in enumerate(np.ascontiguousarray(x)):
            status = self._lib.instantft_infer(
                self._t, ctypes.c_void_p(sample.ctypes.data), ctypes.c_void_p(out[i:].ctypes.data)
            )
            assert status >= 0
        return out

    def part(self, name: str, size: int) -> NDArray[np.uint8]:
        """Bytes of the arena."""
        at = self.constants[f"IFT_AT_{name}"]
        return self.arena[at : at + size]

    def records(self, n: int) -> NDArray[np.uint8]:
        stride = self.constants["IFT_STRIDE"]
        return self.part("CACHE", n * stride).reshape(n, stride)

    def adapter(self, which: int) -> NDArray[np.float32]:
        return self.part(f"ADAPTER{which}", self.constants["IFT_ADAPTER_BYTES"]).view(np.float32)

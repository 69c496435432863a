"""DRAM images and registers of a launch, for the simulator and for a board alike (docs/hardware.md §7, §8).

A `Launch` is what the core is given; `parameters_of`, `logits_of` and `outcome` read what it gives back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, EngineError, UsageError
from .fixed import Frozen, Parameters, step_size
from .formats import Ints, nearest
from .layout import BEAT, CHANNELS, Build

__all__ = [
    "BUFFERS",
    "BUILD",
    "CTRL",
    "FILL",
    "ID",
    "IDENTITY",
    "LOAD",
    "PAGE",
    "PREDICT",
    "REGISTERS",
    "STATUS",
    "STEPS",
    "STORE",
    "TRAIN",
    "Launch",
    "Outcome",
    "adapter_bytes",
    "holds_pixels",
    "launch",
    "logits_of",
    "outcome",
    "parameters_of",
    "writes",
]

Bytes = NDArray[np.uint8]

PAGE = 4096
"""Buffers start at multiples of this."""

LOAD, FILL, TRAIN, STORE, PREDICT = 1, 2, 4, 8, 16
"""Bits of MODE."""

CTRL, STATUS, IDENTITY, BUILD = 0x00, 0x04, 0x08, 0x0C
"""Offsets of the registers that no launch sets, but for CTRL to start it."""

ID = 0x49465431

REGISTERS = {
    "MODE": (0x10, 5),
    "T": (0x14, 24),
    "E": (0x18, 32),
    "B": (0x1C, 32),
    "ETA": (0x20, 24),
    "ETA_LAST": (0x24, 24),
    "GAIN": (0x28, 16),
    "PARAMS": (0x30, 64),
    "X0": (0x38, 64),
    "CACHE": (0x40, 64),
    "ORDER": (0x48, 64),
    "OUT": (0x50, 64),
    "LOGITS": (0x58, 64),
}
"""Offset and bits of what a launch sets; the core keeps no bits beyond them, so that `launch` refuses such values."""

BUFFERS = ("params", "x0", "cache", "order", "out", "logits")
"""In DRAM; each has a register with its address."""

CYCLES = ("total", "load", "fill", "quantise", "forward", "backward", "store", "waiting")
FIRST_COUNTER = 0x80
STEPS = FIRST_COUNTER + 4 * len(CYCLES)

SATURATIONS = ("activations", "gradients", "parameters")
FIRST_SATURATION = 0xA4

ERRORS = {
    1: "a read from DRAM was answered with an error",
    2: "a write to DRAM was answered with an error",
    3: "the registers do not fit the build",
    4: "a sample's number or class is out of range",
}

MAX_SAMPLES = 1 << 24
"""Sample numbers in ORDER have 24 bits."""

MAX_EPOCHS = 1 << 16
"""Epochs are counted in 16 bits."""

PIXEL_ERROR = 1e-5
"""How far from p/255 a pixel may be: float32 is off by 6e-8, a mean or a std by far more."""


@dataclass(frozen=True)
class Launch:
    """What the core is given.

    Attributes:
        build: the core it is for.
        buffers: DRAM by name (`BUFFERS`), bytes; the core writes to ``cache``, ``out`` and ``logits``.
        registers: values by name (`REGISTERS`), addresses excepted.
    """

    build: Build
    buffers: dict[str, Bytes]
    registers: dict[str, int]

    @property
    def steps(self) -> int:
        """Batches that it trains on."""
        return self.registers["E"] * math.ceil(self.registers["T"] / self.registers["B"])


@dataclass(frozen=True)
class Outcome:
    """What the core's counters say after a launch.

    Attributes:
        cycles: by phase (`CYCLES`); ``total`` is the whole launch.
        steps: batches trained on.
        saturations: values that were cut off, by kind (`SATURATIONS`).
    """

    cycles: dict[str, int]
    steps: int
    saturations: dict[str, int]


def launch(
    build: Build,
    frozen: Frozen,
    parameters: Parameters,
    x: NDArray[np.float32],
    order: NDArray[np.integer],
    labels: NDArray[np.integer],
    *,
    lr: float | None,
    batch_size: int,
    cache: Bytes | None = None,
) -> Launch:
    """A launch that fills the cache, trains, and gives the adapter back; or, without a learning rate, predicts.

    Args:
        frozen: the frozen network in Q4.12.
        parameters: the adapter to start from.
        x: (T, N) samples as the network takes them; for a build with pixels p/255.
        order: (E, T) sample numbers in the order of training; for prediction (1, T).
        labels: (T,) classes.
        lr: the learning rate; None: predict, nothing is trained.
        batch_size: B.
        cache: entries of an earlier launch on the same samples, (T·entry,) bytes; None: this launch fills it.

    Raises:
        UsageError: a limit of the build or of a format is passed; it is named.
        DataError: samples that the build's input does not hold.
    """
    (E, T), net = order.shape, build.net
    if not 1 <= batch_size <= build.batch:
        raise UsageError(f"batch size must be 1 to {build.batch} for this build of the core, not {batch_size}")
    if not 1 <= T < MAX_SAMPLES:
        raise UsageError(f"samples must be 1 to {MAX_SAMPLES - 1} for the core, not {T}")
    if not 1 <= E < MAX_EPOCHS:
        raise UsageError(f"epochs must be 1 to {MAX_EPOCHS - 1} for the core, not {E}")
    if x.shape != (T, build.taps[0].size):
        raise UsageError(f"samples must have {build.taps[0].size} values for this build, not {list(x.shape[1:])}")
    if parameters.A[0].shape[1] != build.rank:
        raise UsageError(f"rank must be {build.rank}, that of this build of the core, not {parameters.A[0].shape[1]}")
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < net.C:
        raise UsageError(f"classes must be 0 to {net.C - 1}, not {int(labels.min())} to {int(labels.max())}")
    entries = T * build.entry_beats * BEAT
    if cache is not None and cache.size != entries:
        raise UsageError(f"a cache of these samples must have {entries} bytes for this build, not {cache.size}")
    numbers = order.reshape(-1).astype(np.int64)
    words = (numbers | labels[numbers].astype(np.int64) << 24).astype("<u4")
    eta = eta_last = 0
    if lr is not None:
        eta, eta_last = step_size(lr, min(batch_size, T)), step_size(lr, T % batch_size or min(batch_size, T))
    mode = LOAD | (0 if cache is not None else FILL) | (PREDICT if lr is None else TRAIN | STORE)
    return Launch(
        build,
        {
            "params": _parameters(build, frozen, parameters),
            "x0": _inputs(build, x),
            "cache": np.zeros(entries, np.uint8) if cache is None else cache.copy(),
            "order": _beats(words),
            "out": np.zeros(BEAT * (build.a_beats + build.b_beats), np.uint8),
            "logits": np.zeros(64 * T * E if lr is None else 0, np.uint8),
        },
        {
            "MODE": mode,
            "T": T,
            "E": E,
            "B": batch_size,
            "ETA": eta,
            "ETA_LAST": eta_last,
            "GAIN": parameters.gain & 0xFFFF,
        },
    )


def writes(job: Launch, addresses: Mapping[str, int]) -> list[tuple[int, int]]:
    """(offset, value) of all registers of a launch whose buffers are at these addresses, CTRL excepted."""
    made = [(REGISTERS[name][0], value) for name, value in job.registers.items()]
    for name in BUFFERS:
        offset, address = REGISTERS[name.upper()][0], addresses[name]
        made += [(offset, address & 0xFFFFFFFF), (offset + 4, address >> 32)]
    return made


def outcome(read: Callable[[int], int]) -> Outcome:
    """What the counters say once a launch is done.

    Args:
        read: gives the register at an offset.

    Raises:
        EngineError: the core stopped with an error.
    """
    status = read(STATUS)
    error = status >> 8 & 255
    if error or not status & 2:
        raise EngineError(f"the core must finish, but stopped with error {error}: {ERRORS.get(error, 'not done')}")
    return Outcome(
        {name: read(FIRST_COUNTER + 4 * i) for i, name in enumerate(CYCLES)},
        read(STEPS),
        {name: read(FIRST_SATURATION + 4 * i) for i, name in enumerate(SATURATIONS)},
    )


def parameters_of(build: Build, out: Bytes) -> tuple[list[Ints], list[Ints]]:
    """A and B of each tap out of ``out``, or out of what `trace` ports gave in its form."""
    words = out.view("<i2").astype(np.int64)
    A, B = [], []
    chunks = words[: build.chunks * build.lanes * build.rank].reshape(build.chunks, build.lanes, build.rank)
    rows = words[build.a_beats * BEAT // 2 :].reshape(len(build.taps), build.rank, CHANNELS)
    for tap, row in zip(build.taps, rows, strict=True):
        lanes = chunks[tap.first_chunk : tap.first_chunk + tap.chunks].reshape(-1, build.rank)
        a = np.zeros((tap.size, build.rank), np.int64)
        columns = tap.columns
        a[columns[columns >= 0]] = lanes[: len(columns)][columns >= 0]
        A.append(a)
        B.append(row[:, : build.net.C])
    return A, B


def logits_of(build: Build, logits: Bytes) -> Ints:
    """(samples, C) y, activations, in ORDER's order."""
    return logits.view("<i4").astype(np.int64).reshape(-1, CHANNELS)[:, : build.net.C]


def adapter_bytes(build: Build, A: Sequence[Ints], B: Sequence[Ints]) -> Bytes:
    """A and B as in PARAMS and OUT; `parameters_of` undoes it."""
    chunks = np.zeros((build.chunks * build.lanes, build.rank), np.int64)
    rows = np.zeros((len(build.taps), build.rank, CHANNELS), np.int64)
    for tap, row, a, b in zip(build.taps, rows, A, B, strict=True):
        columns = tap.columns
        at = tap.first_chunk * build.lanes + np.flatnonzero(columns >= 0)
        chunks[at] = a[columns[columns >= 0]]
        row[:, : b.shape[1]] = b
    return np.concatenate([_beats(chunks.astype("<i2")), _beats(rows.astype("<i2"))])


def _parameters(build: Build, frozen: Frozen, parameters: Parameters) -> Bytes:
    weights, biases = [], []
    for layer, w, b in zip(build.layers, frozen.weights, frozen.biases, strict=True):
        rows = w if layer.spec.kind == "fc" else w.reshape(len(w), -1).T  # inputs, outputs
        weights.append(_groups(rows, layer.pair))
        biases.append(_groups(b[None], layer.pair))
    bias = np.zeros(CHANNELS, "<i4")
    bias[: build.net.C] = parameters.bias
    frozen_bytes = [np.concatenate(words).astype("<i2").reshape(-1).view(np.uint8) for words in (weights, biases)]
    return np.concatenate([*frozen_bytes, adapter_bytes(build, parameters.A, parameters.B), bias.view(np.uint8)])


def _groups(rows: Ints, pair: bool) -> Ints:
    """(groups·inputs, 16) words of rows (inputs, outputs)."""
    inputs, outputs = rows.shape
    padded = np.pad(rows, ((0, 0), (0, -outputs % CHANNELS)))
    if pair:
        padded[:, CHANNELS // 2 :] = padded[:, : CHANNELS // 2]
    return np.ascontiguousarray(padded.reshape(inputs, -1, CHANNELS).transpose(1, 0, 2)).reshape(-1, CHANNELS)


def holds_pixels(x: NDArray[np.float32]) -> bool:
    """Whether all values are p/255."""
    scaled = 255 * x.astype(np.float64)
    pixels = np.clip(np.rint(scaled), 0, 255)
    return bool(np.abs(pixels - scaled).max(initial=0) <= 255 * PIXEL_ERROR)


def _inputs(build: Build, x: NDArray[np.float32]) -> Bytes:
    """X0, a row a sample."""
    if build.input == "u8":
        if not holds_pixels(x):
            raise DataError(
                "samples must be pixels (0/255 … 255/255) for this build of the core, without a mean or std taken off"
            )
        rows = np.rint(255 * x.astype(np.float64)).astype(np.uint8)
    else:
        q = np.clip(nearest(np.clip(x, -256, 256), 16), -(1 << 23), (1 << 23) - 1)
        rows = q.astype("<i4").view(np.uint8).reshape(len(x), -1)
    made = np.zeros((len(x), build.input_beats * BEAT), np.uint8)
    made[:, : rows.shape[1]] = rows
    return made.reshape(-1)


def _beats(words: NDArray[np.generic]) -> Bytes:
    data = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
    return np.pad(data, (0, -len(data) % BEAT))

"""Where everything lies, in the core and in DRAM: blocks, chunks, lanes, entries (docs/hardware.md §3, §6, §7).

A `Build` is all that a generated core is made from; what follows from it is computed here and nowhere else, for the
RTL, for the images that a driver writes, and for the counts of cycles.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..spec import Geometry, LayerSpec, NetSpec
from .formats import Formats

__all__ = ["BEAT", "BLOCK", "CHANNELS", "Build", "Layer", "Tap"]

BEAT = 16
"""Bytes of a beat on the AXI ports."""

BLOCK = 16
"""Columns that share a scale; 8 bytes of codes."""

CHANNELS = 16
"""Output channels of the frozen network computed at once for each sample; also the most classes."""

MAX_BATCH = 32


@dataclass(frozen=True)
class Tap:
    """One tap's columns: blocks of 16, chunks of N lanes."""

    k: int
    size: int
    """N_k, values."""
    groups: int
    """Scales; 0 for x^0, which is not cached."""
    group_blocks: int
    """Blocks of each group (of all of x^0)."""
    first_block: int
    """Of its blocks among x^0's, or among those of the cache entry."""
    first_scale: int
    first_chunk: int
    """Among the chunks of all taps."""
    chunks: int

    @property
    def blocks(self) -> int:
        return max(1, self.groups) * self.group_blocks

    @property
    def columns(self) -> NDArray[np.int64]:
        """(16·blocks,) which value of x^k each column holds; -1 for padding."""
        each = self.size // max(1, self.groups)
        out = np.full((max(1, self.groups), BLOCK * self.group_blocks), -1, np.int64)
        out[:, :each] = np.arange(self.size).reshape(-1, each)
        return out.reshape(-1)


@dataclass(frozen=True)
class Layer:
    """One layer of the frozen network as the sequencer runs it."""

    spec: LayerSpec
    geometry: Geometry
    pair: bool
    """Two neighbouring pixels at once."""
    channel_groups: int
    inputs: int
    """Products of an output: channels·kernel² or N."""
    first_word: int
    """Of its weight words."""
    first_bias: int


@dataclass(frozen=True)
class Build:
    """A core.

    Args:
        net: shape of the network; convolutions, then fully connected layers.
        lanes: N, columns a cycle: a multiple of 16, up to 96.
        rank: R, divides 16.
        formats: of the numbers.
        input: "u8" pixels or "q" numbers.
        batch: largest B.

    Raises:
        UsageError: the core cannot be so.
    """

    net: NetSpec
    lanes: int
    rank: int
    formats: Formats
    input: Literal["u8", "q"] = "u8"
    batch: int = 20

    def __post_init__(self) -> None:
        if self.lanes not in range(16, 97, 16):
            raise UsageError(f"lanes must be 16, 32, 48, 64, 80 or 96, not {self.lanes}")
        if self.rank not in (1, 2, 4, 8, 16):
            raise UsageError(f"rank of the core must divide {CHANNELS}, not be {self.rank}")
        if not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"batch size of the core must be 1 to {MAX_BATCH}, not {self.batch}")
        if not self.net.own:
            raise UsageError("the core must run a network of our own (dnn, lenet5), not a foreign one")
        if self.net.L < 2:
            raise UsageError("the core must run a network of two layers or more: one has nothing to cache")
        if self.net.C > CHANNELS:
            raise UsageError(f"the core holds up to {CHANNELS} classes, not {self.net.C}")
        if self.samples < 1:
            raise UsageError(f"lanes times rank must be at least {CHANNELS}, not {self.lanes * self.rank}")

    @cached_property
    def description(self) -> dict[str, Any]:
        """The build in plain values."""
        return {
            "net": self.net.to_json(),
            "lanes": self.lanes,
            "rank": self.rank,
            "formats": self.formats.name,
            "input": self.input,
            "batch": self.batch,
        }

    @property
    def id(self) -> int:
        """What the core answers in its register BUILD."""
        return zlib.crc32(json.dumps(self.description, sort_keys=True).encode())

    @property
    def samples(self) -> int:
        """S, samples that the frozen network runs side by side."""
        return self.lanes * self.rank // CHANNELS

    @property
    def lane_blocks(self) -> int:
        """Blocks of a chunk."""
        return self.lanes // BLOCK

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """x^0 … x^{L-1}."""
        out: list[Tap] = []
        n0 = self.net.geometry[0].N
        blocks = -(-n0 // BLOCK)
        chunk = -(-blocks // self.lane_blocks)
        out.append(Tap(0, n0, 0, blocks, 0, 0, 0, chunk))
        block = scale = 0
        for k, s in enumerate(self.net.record.segments[:-1], 1):
            each = -(-(s.size // s.groups) // BLOCK)
            chunks = -(-s.groups * each // self.lane_blocks)
            out.append(Tap(k, s.size, s.groups, each, block, scale, chunk, chunks))
            block += -(-s.groups * each // 2) * 2
            scale += s.groups
            chunk += chunks
        return tuple(out)

    @cached_property
    def chunks(self) -> int:
        """Chunks of all taps: cycles of a sample going backward."""
        return sum(t.chunks for t in self.taps)

    @property
    def multipliers(self) -> int:
        """Of the lane array, of `Small` and `Softmax`, of `Records`, of `Quantise` (§10)."""
        return self.lanes * self.rank + 2 * self.net.C + 5 + self.lanes + self.samples

    @property
    def scales(self) -> int:
        """Groups of a record; c has none."""
        return sum(t.groups for t in self.taps)

    @property
    def scale_beats(self) -> int:
        return -(-4 * self.scales // BEAT)

    @property
    def code_beats(self) -> int:
        return sum(-(-t.blocks // 2) for t in self.taps[1:])

    @property
    def output_beats(self) -> int:
        """Of c, a word a class."""
        return -(-4 * self.net.C // BEAT)

    @property
    def entry_beats(self) -> int:
        """Beats of a cache entry: 71 for LeNet-5."""
        return self.scale_beats + self.code_beats + self.output_beats

    @property
    def input_beats(self) -> int:
        """Beats of a row of X0."""
        return self.taps[0].blocks * (1 if self.input == "u8" else 4)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        out: list[Layer] = []
        word = bias = 0
        for spec, geometry in zip(self.net.layers, self.net.geometry, strict=True):
            conv = spec.kind == "conv"
            inputs = geometry.in_shape[0] * spec.kernel[0] * spec.kernel[1] if conv else geometry.N
            groups = -(-spec.out // CHANNELS)
            pair = conv and spec.out <= CHANNELS // 2 and geometry.linear_shape[2] % 2 == 0 and spec.pool in (1, 2)
            out.append(Layer(spec, geometry, pair, groups, inputs, word, bias))
            word += groups * inputs
            bias += groups
        return tuple(out)

    @property
    def weight_words(self) -> int:
        return sum(layer.channel_groups * layer.inputs for layer in self.layers)

    @property
    def bias_words(self) -> int:
        return sum(layer.channel_groups for layer in self.layers)

    @property
    def a_beats(self) -> int:
        """Beats of A in PARAMS: chunks of N·R parameters, each padded to a beat."""
        return self.chunks * self.chunk_beats

    @property
    def chunk_beats(self) -> int:
        return self.lanes * self.rank * 2 // BEAT

    @property
    def b_beats(self) -> int:
        return 2 * len(self.taps) * self.rank

    @property
    def parameter_beats(self) -> int:
        """Beats of PARAMS."""
        return 2 * (self.weight_words + self.bias_words) + self.a_beats + self.b_beats + 4

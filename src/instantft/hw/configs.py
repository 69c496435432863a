"""Named builds of the core, and what the devices they are for have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from ..spec import NetSpec
from .formats import PROFILES, Formats
from .layout import Build

__all__ = ["BLOCK", "CONFIGS", "DEVICES", "Config", "Device", "Style", "Styles", "configured", "named"]


Style = Literal["distributed", "block", "ultra"]
"""What Xilinx' and Lattice's tools call LUT RAM, block RAM (RAMB36, EBR) and UltraRAM."""


@dataclass(frozen=True)
class Styles:
    """What memories are made of.

    Attributes:
        weights, activations, pixels: of the frozen network; x^1 … c, x^0.
        entries: cache entries on their way out.
        records: batches on their way in.
        a: A.
    """

    weights: Style = "block"
    activations: Style = "block"
    pixels: Style = "block"
    entries: Style = "block"
    records: Style = "block"
    a: Style = "block"


BLOCK = Styles()
"""All in block RAM."""


@dataclass(frozen=True)
class Device:
    """What a device has.

    Attributes:
        part: as its maker's tools call it.
        family: of Yosys: ``xcup`` or ``ecp5``.
        has: resources by name.
        memory: bits of its block memories.
        styles: where the memories of a core go.
    """

    part: str
    family: str
    has: dict[str, int]
    memory: int
    styles: Styles = BLOCK


DEVICES = {
    "k26": Device(
        "xck26-sfvc784-2LV-c",
        "xcup",
        {"LUT": 117_120, "FF": 234_240, "DSP": 1_248, "BRAM36": 144, "URAM": 64},
        144 * 36_864 + 64 * 294_912,
        # A is 5,120 bits wide and x^0 in forty pieces, each of few words: block RAM is cut finer than URAM, which takes
        # what is deep.
        Styles(weights="ultra", activations="ultra", entries="ultra", records="ultra"),
    ),
    "ecp5-85f": Device(
        "LFE5U-85F-8BG756C", "ecp5", {"LUT": 83_640, "FF": 83_640, "MULT18": 156, "EBR": 208}, 208 * 18_432
    ),
}


@dataclass(frozen=True)
class Config:
    """A build but for its network: what a device has room for.

    Attributes:
        lanes, rank, formats, batch: as in `Build`.
        device: in `DEVICES`.
        clock_mhz: the clock that times are stated at.
    """

    name: str
    lanes: int
    formats: Formats
    device: Device
    clock_mhz: float
    rank: int = 4
    batch: int = 20


CONFIGS = {
    c.name: c
    for c in (
        Config("k26", 80, PROFILES["q24"], DEVICES["k26"], 200.0),
        Config("k26-small", 16, PROFILES["q24"], DEVICES["k26"], 200.0),
        Config("ecp5-85f", 16, PROFILES["q18"], DEVICES["ecp5-85f"], 60.0),
    )
}


def named(name: str) -> Config:
    """The configuration called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in CONFIGS:
        raise UsageError(f"the core's configuration must be one of {', '.join(CONFIGS)}, not {name!r:.60}")
    return CONFIGS[name]


def configured(config: str, net: NetSpec, values: Literal["u8", "q"] = "u8") -> Build:
    """The build of a configuration for a network.

    Args:
        config: a name in `CONFIGS`.
        values: what its input takes.

    Raises:
        UsageError: there is no such configuration, or it cannot hold the network.
    """
    c = named(config)
    build = Build(net, c.lanes, c.rank, c.formats, values, c.batch)
    if memory(build) > c.device.memory:
        raise UsageError(
            f"the network and its adapters must fit the {c.device.memory // 8000:,} kB of block memory of {config}, "
            f"but need at least {memory(build) // 8000:,} kB"
        )
    return build


def memory(build: Build) -> int:
    """Bits that a build keeps on chip at least: weights, A, and of each of S samples x^0 and a layer's two sides."""
    widest = max(g.N + g.n_out for g in build.net.geometry)
    each = (build.taps[0].size + widest) * build.formats.width
    return 16 * (16 * build.weight_words + build.chunks * build.lanes * build.rank) + build.samples * each

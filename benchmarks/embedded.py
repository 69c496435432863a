"""What `export c` takes on a device: flash and RAM, instructions a step on a Cortex-M4F in QEMU, a Cortex-A53's time.

    python -m benchmarks.embedded
    python -m benchmarks.embedded --accuracy     also what 8-bit weights of the frozen network cost, on the papers' data

The time is an estimate, not a measurement: each hot loop is compiled for a Cortex-A53 with vectors of four, by clang
and by GCC, -O3, and given to llvm-mca, which tells cycles a turn with everything in the L1 cache; turns follow from the
shapes. The bytes that do not stay in the L1 cache move at BANDWIDTH. Two figures: the longer of cycles and bytes, and
both one after the other; a Cortex-A53, in order but with a prefetcher and loads that do not wait, is between them. What
surrounds the loops is not counted, but for the first turn of a run of codes and its tables. llvm-mca lets this
processor finish in order only: a load of one register behind a multiply-add waits six cycles.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.data import Samples
from instantft.engine import get_engine
from instantft.export.c import COLUMNS, HELD, LANE_TILE, Footprint, coded, export_c, sources
from instantft.solvers.sgd import fit
from instantft.spec import NetSpec, dnn, lenet5, pad

from .common import ROOT, save_json, spread

CLOCK = 1e9
BANDWIDTH = 2e9
"""Bytes a second from beyond the L1 cache; of a board with LPDDR2, where caches further away are faster."""

L1 = 32 << 10
RANK, BATCH, EPOCHS = 4, 20, 10

CASES = {
    "LeNet-5": (lenet5((1, 28, 28)), 192, "uint8", 512 << 10),
    "fan DNN": (dnn(256, 3), 100, "float32", 64 << 10),
}

LOOPS = r"""
#include "codecs.c"
__attribute__((flatten)) void encode_loop(const float *x, int n, float inv, uint8_t *code) {
    encode_bins(x, x + 16, n, inv, code);
}
void encode_run_loop(const float *x, int n, float inv, uint8_t *code) {
    for (int i = 0; i < 256; i++) encode_bins(x, x + i, (n & 255) | 32, inv, code + i);
}
__attribute__((flatten)) float peak_loop(const float *x, int n) { return peak(x, n, 0); }
#include "linalg.h"
#include "panels.h"
void dot_loop(const float *const *x, const float *a, ptrdiff_t lda, int n, float *h, ptrdiff_t ldh) {
    dot_tile(DOT_S, x, 0, a, lda, n, 0, h, ldh);
}
void rank_loop(const float *x, ptrdiff_t pitch, const float *w, ptrdiff_t w_pitch, ptrdiff_t groups, float *sum) {
    neon_rank(x, pitch, w, w_pitch, groups, sum, 256);
}
void decode_loop(const float *scales, const uint8_t *codes, int turns, float *out) {
    neon_look_up(nf4_levels, scales, codes, codes + 99, 0, turns, out, 256);
}
void odd_loop(const float *scales, const uint8_t *codes, int turns, float *out) {
    neon_look_up(nf4_levels, scales, codes, codes + 99, 1, turns, out, 256);
}
void run_loop(const float *scales, const uint8_t *codes, float *out) {
    for (int i = 0; i < 256; i++) neon_look_up(nf4_levels, scales + i, codes + i, codes + i + 99, 0, 1, out + i, 256);
}
void odd_run_loop(const float *scales, const uint8_t *codes, float *out) {
    for (int i = 0; i < 256; i++) neon_look_up(nf4_levels, scales + i, codes + i, codes + i + 99, 1, 1, out + i, 256);
}
void bytes_loop(const uint8_t *x, float *row, int n) {
    for (int i = 0; i + 64 <= n; i += 64) vbytes(4, x + i, (float)(1.0 / 255), row + i);
}
""" + "".join(
    f"void {name}_loop(const conv_args *g, const float *x, const float *w, const float *bias, float *y) "
    f"{{ conv_args h = *g; h.kh = h.kw = 5; conv_pool_{call}, &h, x, w, bias, y); }}\n"
    for name, call in (
        *((f"conv{n}x{columns}", f"tile_4({n}, {columns}") for n in (2, 3, 4) for columns in (2, 4)),
        ("square", "square_4(4"),
    )
)

COMPILERS = {
    "clang": [
        *("clang", "--target=aarch64-linux-gnu", "-I/usr/aarch64-linux-gnu/include"),
        *("-mllvm", "-inline-threshold=10000"),  # loops stay where they are looked for
    ],
    "gcc": ["aarch64-linux-gnu-gcc"],
}


def loop_cycles(folder: Path, compiler: Sequence[str]) -> dict[str, float]:
    """Cycles a turn of each hot loop, by name, on a Cortex-A53."""
    source, assembly = folder / "loops.c", folder / "loops.s"
    source.write_text(LOOPS)
    flags = ["-O3", "-mcpu=cortex-a53", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"]
    defines = ["-DIFT_VL=4", "-DIFT_CORE=loops", f"-DLANE_TILE={LANE_TILE[4]}", "-Dbits_of=bits_of_float"]
    flags += ["-ffp-contract=fast", "-w", *defines, f"-I{sources()}", "-S"]
    subprocess.run([*compiler, *flags, source, "-o", assembly], check=True)
    cycles = {}
    text = assembly.read_text()
    for loop in re.findall(r"\b(\w+)_loop\(", LOOPS, re.MULTILINE):
        body = re.search(rf"^{loop}_loop:[^\n]*\n(.*?)^\s*\.size\s+{loop}_loop", text, re.MULTILINE | re.DOTALL)
        assert body, loop
        loop_code = _loop(body[1].splitlines(), around=loop.endswith("run"))
        named = [re.sub(r"(?<=\s)\d[bf]$", ".Lthere", line) for line in loop_code]  # llvm-mca knows no "1b"
        (folder / "one.s").write_text("\n".join(named) + "\n")
        found = subprocess.run(
            ["llvm-mca", "-march=aarch64", "-mcpu=cortex-a53", "-iterations=200", folder / "one.s"],
            capture_output=True,
            text=True,
            check=True,
        )
        total = re.search(r"Total Cycles:\s+(\d+)", found.stdout)
        assert total
        assert "error" not in found.stderr, found.stderr
        cycles[loop] = int(total[1]) / 200
        at_once = 1  # turns that the compiler made one
        if loop == "bytes":
            at_once = sum(1 for x in loop_code if re.match(r"(str\s+q|st1\s+\{v\d+\.4s)", x))
            at_once += 2 * sum(1 for x in loop_code if re.match(r"stp\s+q", x))
        elif loop in ("dot", "rank"):
            at_once = sum(x.startswith("fmla") for x in loop_code) // 16
        assert at_once, loop_code
        cycles[loop] /= at_once
    return cycles


def _loop(lines: Sequence[str], around: bool = False) -> list[str]:
    """The instructions of the loop without another in it that has most vector arithmetic, or of the outermost one
    around it, without it."""
    code = [line.split("//")[0].strip() for line in lines]
    labels: dict[str, int] = {}
    loops = []
    for i, line in enumerate(code):
        if line.endswith(":"):
            labels[line[:-1]] = labels[f"{line[:-1]}b"] = i  # "1b" is the last "1" above
        target = line.split()[-1] if re.match(r"(b\.?\w*|cbn?z|tbn?z)\s", line) else ""
        if target in labels:
            loops.append((labels[target], i))
    assert loops, lines[0]
    counted = ("fmla", "fmul", "fcmgt", "fabs", "bsl", "bif", "bit", "tbl")
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    first, last = max(inner, key=lambda x: sum(line.startswith(counted) for line in code[x[0] : x[1] + 1]))
    taken = [*range(first, last + 1)]
    if around:
        a, b = max(((a, b) for a, b in loops if a < first and last < b), key=lambda x: x[1] - x[0])
        taken = [*range(a, first), *range(last + 1, b + 1)]
    return [line for line in (code[i] for i in taken) if line and line[0] not in ".#" and line[-1] != ":"]


@dataclass(frozen=True)
class Phase:
    """Seconds on a Cortex-A53 at CLOCK and BANDWIDTH."""

    products: float
    """The multiply-adds alone, four a cycle."""

    cycles: float
    """The loops by llvm-mca, their data in the L1 cache."""

    bytes: float
    """What moves from beyond it."""

    def __mul__(self, times: float) -> Phase:
        return Phase(times * self.products, times * self.cycles, times * self.bytes)

    @property
    def apart(self) -> float:
        return self.cycles + self.bytes

    @property
    def together(self) -> float:
        return max(self.cycles, self.bytes)


def fill(spec: NetSpec, cycles: dict[str, float]) -> Phase:
    """The cache's record of one sample: frozen network and codec."""
    turns = dict.fromkeys(cycles, 0.0)
    weights, products = 0, 0
    for layer, g in zip(spec.layers, spec.geometry, strict=True):
        if layer.kind == "conv":  # four samples, up to four channels and a row of four outputs: a turn a kernel's row
            assert (layer.kernel[1], layer.pool) == (5, 2)
            taps = g.in_shape[0] * math.prod(layer.kernel)
            rows = g.in_shape[0] * layer.kernel[0] * (g.linear_shape[1] // 2 * 2)
            columns = g.linear_shape[2] // 2
            for tile in tiles(layer.out):
                turns[f"conv{tile}x4"] += rows * (columns // 2) / 4
                if tile == 4:  # two rows at once
                    turns["square"] += rows / 2 * (columns % 2) / 4
                else:
                    turns[f"conv{tile}x2"] += rows * (columns % 2) / 4
            products += taps * math.prod(g.linear_shape)
        else:
            turns["rank"] += g.N * pad(layer.out) / 16 / 4
            weights += 4 * g.N * pad(layer.out)
            products += g.N * layer.out
    if spec.layers[0].kind == "conv":
        turns["bytes"] += spec.geometry[0].N / 4
    for segment in spec.record.segments:
        blocks = math.ceil(segment.size / segment.groups / 16)
        turns["encode_run"] += segment.groups
        turns["encode"] += segment.groups * (blocks - 1)
        turns["peak"] += segment.groups * blocks
    moved = weights / HELD + 2 * spec.geometry[0].N + spec.record.size / 2
    return Phase(products / 4 / CLOCK, sum(turns[k] * cycles[k] for k in cycles) / CLOCK, moved / BANDWIDTH)


def tiles(channels: int) -> list[int]:
    """How conv_pack of native/panels.h cuts them."""
    found: list[int] = []
    while channels:
        found.append(math.ceil(channels / math.ceil(channels / LANE_TILE[4])))
        channels -= found[-1]
    return found


def step(spec: NetSpec, cycles: dict[str, float]) -> Phase:
    """A batch of BATCH cached samples, forward and backward, each of which decodes them."""
    N, input_width = sum(pad(g.N) for g in spec.geometry), spec.geometry[0].N
    turns = dict.fromkeys(cycles, 0.0)
    turns["dot"] = math.ceil(BATCH / 4) * N / 4
    turns["rank"] = BATCH * N / 16
    turns["bytes"] = 2 * BATCH * input_width / 4
    for segment in spec.record.segments:
        n = segment.size // segment.groups
        for first in range(0, segment.size, n):  # a group, cut where a part of COLUMNS ends
            ends = {first, first + n, *range(-(-first // COLUMNS) * COLUMNS, first + n, COLUMNS)}
            for a, b in pairwise(sorted(ends)):
                turns["odd" if a % 2 else "decode"] += BATCH * (math.ceil((b - a) / 32) - 1)
                turns["odd_run" if a % 2 else "run"] += BATCH
    A, columns = 4 * RANK * N, min(COLUMNS, pad(max(g.N for g in spec.geometry)))
    assert 4 * columns * (BATCH + RANK) < L1
    moved = 2 * BATCH * (spec.record.size / 2 + input_width)  # codes
    if A > L1:
        moved += 3 * A  # read forward, read and written backward
    return Phase(2 * BATCH * RANK * N / 4 / CLOCK, sum(turns[k] * cycles[k] for k in cycles) / CLOCK, moved / BANDWIDTH)


def estimate(compiler: str, cycles: dict[str, float]) -> dict[str, object]:
    """What it comes to, printed and by name."""
    print(f"Cortex-A53 (llvm-mca, {compiler}), cycles a turn: {', '.join(f'{k} {v:.1f}' for k, v in cycles.items())}")
    lenet = CASES["LeNet-5"][0]
    phases = {
        "fill": fill(lenet, cycles) * 1024,
        "train": step(lenet, cycles) * (EPOCHS * math.ceil(1024 / BATCH)),
    }
    print(f"LeNet-5, 1,024 samples, {EPOCHS} epochs at {CLOCK / 1e9:g} GHz and {BANDWIDTH / 1e9:g} GB/s, seconds:")
    for name, x in phases.items():
        print(
            f"  {name:5}  multiply-adds alone {x.products:.3f}, loops {x.cycles:.3f}, bytes {x.bytes:.3f}; "
            f"together {x.together:.3f}, one after the other {x.apart:.3f}"
        )
    together, apart = (sum(getattr(x, how) for x in phases.values()) for how in ("together", "apart"))
    print(f"  whole  {together:.3f} to {apart:.3f} (the paper: 3.9 on the board's CPU, 0.36 on the FPGA)")
    fan = step(CASES["fan DNN"][0], cycles).apart
    print(f"fan DNN, a cached batch of {BATCH}: {fan * 1e3:.3f} ms (the paper: 0.45 ms)")
    return {
        "cycles": cycles,
        **{name: asdict(x) for name, x in phases.items()},
        "together": together,
        "apart": apart,
        "fan batch": fan,
    }


def instructions(folder: Path) -> dict[str, int] | None:
    """Instructions of add, train (a step) and infer on a Cortex-M4F in QEMU; None without it."""
    if not shutil.which("arm-none-eabi-gcc") or not shutil.which("qemu-system-arm"):
        return None
    run = [str(ROOT / "tools" / "embedded" / "run"), str(folder), "m4"]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    line = next(line for line in out.splitlines() if line.startswith("= instructions"))
    return {name: int(n) for n, name in re.findall(r"(\d+) (add|train|infer)", line)}


def export(folder: Path, name: str, method: str, T: int | None = None) -> Footprint:
    """The case `name` with a network and samples that were never trained: sizes and times do not depend on numbers."""
    spec, samples, inputs, ram = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, spec.geometry[0].N)).astype(np.float32) / np.float32(255)
    data = Samples(x, (np.arange(60) % spec.C).astype(np.int32), spec.input_shape)
    count = samples if T is None else T
    settings = {"samples": count, "method": method, "inputs": inputs, "ram": ram, "data": data, "epochs": 2}
    if method == "skip2-lora":
        settings["lr"] = 1e-3
    return export_c(Network.init(spec, 0), None, folder, **settings)  # type: ignore[arg-type]


def accuracies(seeds: int) -> dict[str, dict[str, list[float]]]:
    """Percent correct of unseen samples before and after SGD on nf4 records, with weights of 32 and of 8 bits."""
    from .accuracy import BATCH, TASKS, accuracy, base, drifted

    engine = get_engine()
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("fashion", "damage2"):
        task, results = TASKS[name], found.setdefault(name, {})
        for seed in range(seeds):
            net = base(engine, name, task, seed)
            tune, test = drifted(task, seed)
            for weights, used in (("fp32", net), ("int8", coded(net))):
                store = memory_store("nf4", used.spec.record, len(tune[0]))
                made = fit(
                    engine, used, "skip2-lora", *tune,
                    epochs=task.epochs, batch_size=BATCH, lr=task.lr, momentum=0.0, seed=seed, store=store,
                )  # fmt: skip
                for when, tensors in (("before", {}), ("after", made.adapter.tensors)):
                    percent = accuracy(engine.forward(used.spec, {**used.tensors, **tensors}, test[0]), test[1])
                    assert percent is not None
                    results.setdefault(f"{weights} {when}", []).append(percent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--accuracy", action="store_true", help="of the two tasks, with 8-bit weights and without")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    results: dict[str, object] = {"clock": CLOCK, "bandwidth": BANDWIDTH}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (_, T, _, ram) in CASES.items():
            takes = export(folder / "c", name, "skip2-lora")
            total = sum(takes.ram.values())
            print(f"{name}, SGD, {T} samples: RAM {total:,} of {ram:,} bytes, flash {sum(takes.flash.values()):,}")
            for part, n in takes.ram.items():
                if n:
                    print(f"  {n:>10,}  {part}")
            largest = export(folder / "r", name, "skip-ridge", 8).largest
            print(f"  closed form: at most {largest} samples in the same RAM")
            counted = instructions(folder / "c")
            if counted:
                print(f"  Cortex-M4F in QEMU, instructions: {counted}")
            results[name] = {"ram": takes.ram, "flash": takes.flash, "ridge_samples": largest, "instructions": counted}
        for compiler, command in COMPILERS.items():
            if shutil.which("llvm-mca") and shutil.which(command[0]):
                results[f"cortex-a53, {compiler}"] = estimate(compiler, loop_cycles(folder, command))
    if arguments.accuracy:
        results["accuracy"] = found = accuracies(arguments.seeds)
        for name, by_weights in found.items():
            print(f"{name}: " + ", ".join(f"{key} {spread(values)}" for key, values in by_weights.items()))
    if arguments.json:
        save_json(arguments.json, results)


if __name__ == "__main__":
    main()

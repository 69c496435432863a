"""What `export c` takes on a device: flash and RAM, instructions a step on a Cortex-M4F in QEMU, a Cortex-A53's time.

    python -m benchmarks.embedded

The time is an estimate, not a measurement: each hot loop is compiled for a Cortex-A53 with vectors of four (GCC, -O3)
and given to llvm-mca, which tells cycles a turn with everything in the L1 cache; turns follow from the
shapes. To the cycles, at CLOCK, is added the time to move the bytes that do not stay in the L1 cache, at BANDWIDTH, as
if nothing overlapped. What surrounds the loops is not counted.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instantft.backbones.builtin import Network
from instantft.data import Samples
from instantft.export.c import Footprint, export_c, sources
from instantft.spec import NetSpec, dnn, lenet5, pad

from .common import ROOT, save_json

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
#include "linalg.h"
#include "panels.h"
void dot_loop(const float *const *x, const float *a, ptrdiff_t lda, int n, float *h, ptrdiff_t ldh) {
    dot_tile(DOT_S, x, 0, a, lda, n, h, ldh);
}
void outer_loop(int S, const float *g, ptrdiff_t ldg, const float *const *x, float *a, ptrdiff_t lda) {
    outer_tile(OUTER_V, S, g, ldg, x, NULL, 0, a, lda);
}
void conv_loop(const conv_args *g, const float *x, const float *w, const float *bias, v4 *y) {
    v4 acc[6][2][4];
    conv_tile_4(6, 2, 2, g, x, w, 0, g->kh, bias, acc);
    for (int o = 0; o < 6; o++) for (int r = 0; r < 2; r++) for (int c = 0; c < 2; c++) *y++ = acc[o][r][c];
}
void gemm_loop(const gemm_args *g, const float *a, const float *b, float *c, const float *bias) {
    gemm_tile(4, 4, g, a, b, c, bias);
}
int decode_loop(const ift_run *u, const uint8_t *codes, float scale, float *out, int room) {
    return decode_vectors(u, codes, 4, scale, out, room);
}
void bytes_loop(const uint8_t *x, float *row, int n) {
    for (int i = 0; i < n; i++) row[i] = (float)x[i] * (float)(1.0 / 255);
}
"""


def loop_cycles(folder: Path) -> dict[str, float]:
    """Cycles a turn of each hot loop, by name, on a Cortex-A53."""
    source, assembly = folder / "loops.c", folder / "loops.s"
    source.write_text(LOOPS)
    gcc = ["aarch64-linux-gnu-gcc", "-O3", "-mcpu=cortex-a53", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"]
    defines = ["-DIFT_VL=4", "-DIFT_CORE=loops", "-DLANE_TILE=6", "-Dbits_of=bits_of_float"]
    flags = ["-ffp-contract=fast", "-w", *defines, f"-I{sources()}", "-S"]
    subprocess.run([*gcc, *flags, source, "-o", assembly], check=True)
    cycles = {}
    text = assembly.read_text()
    for name in re.findall(r"^void (\w+)_loop|^int (\w+)_loop", LOOPS, re.MULTILINE):
        loop = "".join(name)
        body = re.search(rf"^{loop}_loop:\n(.*?)^\s*\.size\s+{loop}_loop", text, re.MULTILINE | re.DOTALL)
        assert body, loop
        loop_code = _innermost(body[1].splitlines())
        (folder / "one.s").write_text("\n".join(loop_code) + "\n")
        found = subprocess.run(
            ["llvm-mca", "-march=aarch64", "-mcpu=cortex-a53", "-iterations=200", folder / "one.s"],
            capture_output=True,
            text=True,
            check=True,
        )
        total = re.search(r"Total Cycles:\s+(\d+)", found.stdout)
        assert total
        cycles[loop] = int(total[1]) / 200
        if loop in ("decode", "bytes"):  # of four values, however many the compiler takes at a time
            stored = sum(1 for x in loop_code if re.match(r"(str\s+q|st1\s+\{v\d+\.4s)", x))
            stored += 2 * sum(1 for x in loop_code if re.match(r"stp\s+q", x))
            assert stored, loop_code
            cycles[loop] /= stored
    return cycles


def _innermost(lines: Sequence[str]) -> list[str]:
    """The instructions of the loop without another in it that has most vector arithmetic."""
    code = [line.split("//")[0].strip() for line in lines]
    labels = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    loops = []
    for i, line in enumerate(code):
        target = line.split()[-1] if re.match(r"(b\.?\w*|cbn?z|tbn?z)\s", line) else ""
        if target in labels and labels[target] < i:
            loops.append((labels[target], i))
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    kept = [[x for x in code[a : b + 1] if x and not x.endswith(":") and x[0] != "."] for a, b in inner]
    return max(kept, key=lambda loop: sum(x.startswith(("fmla", "fmul", "fadd")) for x in loop))


def estimate(spec: NetSpec, T: int, cycles: dict[str, float]) -> tuple[float, float]:
    """Seconds of filling the cache and of EPOCHS epochs on T samples, on a Cortex-A53 at CLOCK."""
    turns = dict.fromkeys(cycles, 0.0)
    weights = 0
    for layer, g in zip(spec.layers, spec.geometry, strict=True):
        if layer.kind == "conv":  # four samples, six channels and 2×2 outputs at a time
            taps = g.in_shape[0] * math.prod(layer.kernel)
            tiles = math.ceil(layer.out / 6) * math.ceil(g.linear_shape[1] / 2) * math.ceil(g.linear_shape[2] / 2)
            turns["conv"] += T / 4 * tiles * taps
        else:
            turns["gemm"] += T / 4 * g.N * math.ceil(pad(layer.out) / 16)
            weights += 4 * g.N * pad(layer.out)
    if spec.layers[0].kind == "conv":
        turns["bytes"] += T * spec.geometry[0].N / 4
    fill = sum(turns[k] * cycles[k] for k in cycles) / CLOCK + T / 4 * weights / BANDWIDTH

    N, groups = sum(pad(g.N) for g in spec.geometry), math.ceil(BATCH / 4)
    A, record = 4 * RANK * N, spec.record.size / 2 + spec.geometry[0].N
    step = groups * N / 4 * cycles["dot"] + N / 16 * BATCH * cycles["outer"]
    step += BATCH * (spec.record.size / 4 * cycles["decode"] + spec.geometry[0].N / 4 * cycles["bytes"])
    decoded = 4 * BATCH * (spec.record.width + pad(spec.geometry[0].N))
    moved = BATCH * record  # codes; then what does not stay in the L1 cache: A for each four samples and to be updated
    if A + 4 * decoded / BATCH > L1:
        moved += (groups + 2) * A
    if decoded > L1:
        moved += 3 * decoded  # written, read forward, read backward
    return fill, EPOCHS * math.ceil(T / BATCH) * (step / CLOCK + moved / BANDWIDTH)


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
    settings = {"samples": count, "method": method, "inputs": inputs, "ram": ram, "data": data, "epochs": 2, "lr": 1e-3}
    return export_c(Network.init(spec, 0), None, folder, **settings)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
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
        if shutil.which("llvm-mca") and shutil.which("aarch64-linux-gnu-gcc"):
            cycles = loop_cycles(folder)
            print(f"Cortex-A53 (llvm-mca), cycles a turn: {', '.join(f'{k} {v:.1f}' for k, v in cycles.items())}")
            fill, train = estimate(CASES["LeNet-5"][0], 1024, cycles)
            print(
                f"LeNet-5, 1,024 samples, {EPOCHS} epochs at {CLOCK / 1e9:g} GHz and {BANDWIDTH / 1e9:g} GB/s: "
                f"fill {fill:.3f} s + train {train:.3f} s = {fill + train:.3f} s (the paper: 3.9 s on the board's CPU, "
                "0.36 s on the FPGA)"
            )
            _, fan = estimate(CASES["fan DNN"][0], BATCH, cycles)
            print(f"fan DNN, a cached batch of {BATCH}: {fan / EPOCHS * 1e3:.3f} ms (the paper: 0.45 ms)")
            results["cortex-a53"] = {"cycles": cycles, "lenet5": [fill, train], "fan batch": fan / EPOCHS}
    if arguments.json:
        save_json(arguments.json, results)


if __name__ == "__main__":
    main()

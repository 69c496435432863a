"""Peak memory: what `finetune` states ahead beside what it takes, each run in a process of its own.

    PYTHONPATH=src python -m benchmarks.memory [--quick] [--json FILE]

What is measured is the largest memory of the process from the moment at which Python, NumPy and the package are loaded;
with a cache file, that of its own (anonymous): the pages of the file are the system's to drop. Then: what the package
adds to a process that has onnxruntime, and no torch, for the same model and the same batch. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instantft.backbones.builtin import Network
from instantft.engine import get_engine
from instantft.export.onnx import export_onnx
from instantft.solvers import sgd
from instantft.spec import NetSpec, dnn, lenet5

from .common import announce, save_json, table

__all__ = ["ADDED", "Case", "added_to_onnxruntime", "measured"]

ADDED = 60 << 20
"""Bytes that the package may add to a process that runs the same model with onnxruntime: what is asked for."""

CHILD = """
import json, sys, time
sys.modules["torch"] = None
import numpy as np
import instantft.acceptance, instantft.cli, instantft.cli.adapting, instantft.data, instantft.engine.native
import instantft.solvers.holdout, instantft.solvers.ridge, instantft.tuner

def status(key):
    with open("/proc/self/status") as f:
        return 1024 * int(next(line.split()[1] for line in f if line.startswith(key + ":")))

np.ones((64, 64)) @ np.ones((64, 64))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak begins here
print(json.dumps([status("VmRSS"), status("RssAnon")]), flush=True)
code = instantft.cli.run(sys.argv[1:])
print(json.dumps([status("VmHWM"), code]), flush=True)
"""

RUNTIME = """
import sys
sys.modules["torch"] = None
import numpy as np
x = np.load(sys.argv[2])
if sys.argv[3] == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    for start in range(0, len(x), 32):
        session.run(None, {session.get_inputs()[0].name: x[start:start + 32]})
else:
    import instantft
    network = instantft.from_onnx(sys.argv[1])
    tuner = instantft.FineTuner(network).fit(x, np.arange(len(x)) % network.spec.C)
    tuner.predict(x)
with open("/proc/self/status") as f:
    print(1024 * int(next(line.split()[1] for line in f if line.startswith("VmHWM:"))))
"""


@dataclass(frozen=True)
class Case:
    """A run: the network's shape, samples, and options of `finetune`."""

    spec: NetSpec
    T: int
    options: tuple[str, ...]

    @property
    def on_disk(self) -> bool:
        """Whether the cache is a file."""
        return "--cache-file" in self.options


def _made_up(folder: Path, spec: NetSpec, T: int) -> tuple[str, str]:
    """A base file and a sample file of noisy points around a centre a class."""
    rng = np.random.default_rng(0)
    data, base = folder / f"{spec.geometry[0].N}-{T}.npz", folder / f"{spec.geometry[0].N}-{spec.C}.safetensors"
    N, y = spec.geometry[0].N, rng.integers(0, spec.C, T)
    x = rng.standard_normal((spec.C, N), np.float32)[y] + 2 * rng.standard_normal((T, N), np.float32)
    if not data.exists():
        np.savez(data, x=x, y=np.where(rng.random(T) < 0.3, rng.integers(0, spec.C, T), y))
    if not base.exists():
        few = min(T, 200)
        trained, _ = sgd.pretrain(get_engine(), spec, x[:few], y[:few].astype(np.int32), epochs=1, lr=1e-3)
        trained.save(base)
    return str(base), str(data)


def measured(case: Case, folder: Path) -> tuple[int, int, dict[str, Any]]:
    """Bytes stated and taken by one run of `finetune`, and what it printed.

    Args:
        folder: where files may go; made-up ones are used again.
    """
    base, data = _made_up(folder, case.spec, case.T)
    out = folder / "adapter"
    options = [o.replace("{folder}", str(folder)) for o in case.options]
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, "finetune", base, "--data", data, "--out", str(out), "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        before, own = json.loads(child.stdout.readline())
        peak = 0
        while case.on_disk and child.poll() is None:
            peak = max(peak, _anonymous(child.pid))
            time.sleep(0.001)
        result, last = child.stdout.read().splitlines()
        highest, code = json.loads(last)
    if code:
        raise SystemExit(f"finetune ended with status {code}")
    found = json.loads(result)
    return found["memory"]["peak"], peak - own if case.on_disk else highest - before, found


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def added_to_onnxruntime(folder: Path) -> tuple[int, int]:
    """Peak bytes of a process that runs a model with onnxruntime alone, and of one that adapts it with the package."""
    spec = lenet5((1, 28, 28))
    base, data = _made_up(folder, spec, 256)
    model, x = folder / "model.onnx", folder / "x.npy"
    export_onnx(Network.load(base), None, model)
    with np.load(data) as z:
        np.save(x, z["x"].reshape(-1, 1, 28, 28))
    peaks = []
    for who in ("onnxruntime", "instantft"):
        command = [sys.executable, "-c", RUNTIME, str(model), str(x), who]
        peaks.append(int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
    return peaks[0], peaks[1]


def _cases(quick: bool) -> list[Case]:
    small, net = dnn(256, 3), lenet5((1, 28, 28))
    if quick:
        return [Case(small, 470, ("--method", "skip-ridge"))]
    cases = [Case(small, 470, ("--method", "skip2-lora")), Case(small, 40_000, ("--method", "skip-ridge"))]
    for name in ("ft-all", "ft-last", "ft-bias", "ft-all-lora", "lora-all", "lora-last", "skip-lora", "skip2-lora"):
        cases += [Case(net, T, ("--method", name, "--epochs", "2")) for T in (1024, 8192)]
    cases += [Case(net, T, ("--method", "skip-ridge")) for T in (1024, 2500, 8192)]
    cases += [Case(net, 8192, ("--method", "skip2-lora", "--cache", "nf4", "--epochs", "2"))]
    cases += [Case(net, 2500, ("--method", "skip-ridge", "--cache", "relu4"))]
    for codec in ("fp32", "int8"):
        file = ("--cache", codec, "--cache-file", f"{{folder}}/{codec}.cache")
        cases += [Case(net, 20_000, ("--method", "skip2-lora", "--epochs", "2", *file))]
        cases += [Case(net, 20_000, ("--method", "skip-ridge", *file))]
    many = lenet5((3, 224, 224))  # 273,000 features of 256 samples
    for more in (("skip-ridge",), ("skip-ridge", "--cache", "nf4"), ("skip2-lora", "--epochs", "2")):
        cases += [Case(many, 256, ("--method", *more))]
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small run")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    chosen = parser.parse_args(arguments)
    rows, found = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in _cases(chosen.quick):
            shape = "×".join(map(str, case.spec.input_shape))
            announce(f"{shape} {case.T} {' '.join(case.options)}")
            stated, taken, _ = measured(case, Path(folder))
            options = " ".join(o for o in case.options if "{" not in o)
            sizes = f"{stated / 1e6:.1f}", f"{taken / 1e6:.1f}", f"{stated / taken:.2f}"
            rows.append((f"{shape}, {options}", f"{case.T:,}", *sizes))
            found.append({"shape": shape, "options": options, "samples": case.T, "stated": stated, "taken": taken})
        announce("")
        print(table(("network, options", "samples", "stated MB", "taken MB", "stated / taken"), rows))
        try:
            import onnxruntime  # noqa: F401 - only whether it is there
        except ImportError:
            print("\nonnxruntime is not installed.")
            added = None
        else:
            alone, both = added_to_onnxruntime(Path(folder))
            added = both - alone
            print(
                f"\nLeNet-5 in ONNX, 256 samples: onnxruntime alone {alone / 1e6:.1f} MB, adapting with the package "
                f"{both / 1e6:.1f} MB: {added / 1e6:.1f} MB more (asked for: at most {ADDED / 1e6:.1f})"
            )
    save_json(chosen.json, {"runs": found, "added_to_onnxruntime": added})


if __name__ == "__main__":
    main()

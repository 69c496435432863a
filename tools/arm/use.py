"""The installed package on this machine, as a user meets it: import, then the command line from samples to accuracy."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import instantft
from instantft.engine.native import isas

C, N = 3, 16


def samples(path: Path, T: int, shift: float, seed: int) -> Path:
    """Three clouds of points; `shift` moves them all."""
    centres = np.random.default_rng(0).normal(size=(C, N))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, T)
    np.savez(path, x=(centres[y] + shift + 0.4 * rng.normal(size=(T, N))).astype(np.float32), y=y)
    return path


def instantft_json(isa: str, *arguments: object) -> dict[str, Any]:
    """What one command prints with --json."""
    command = [sys.executable, "-m", "instantft", *map(str, arguments), "--json"]
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, text=True, env=os.environ | {"INSTANTFT_ISA": isa}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])}: status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    assert platform.machine() == "aarch64", platform.machine()
    assert isas() == ["neon", "scalar"], isas()
    print(f"instantft {instantft.__version__} on {platform.machine()}: {', '.join(isas())}")
    with tempfile.TemporaryDirectory() as folder:
        d = Path(folder)
        train = samples(d / "train.npz", 240, 0.0, 1)
        drifted, test = samples(d / "drifted.npz", 120, 1.0, 2), samples(d / "test.npz", 240, 1.0, 3)
        base, adapter = d / "base.safetensors", d / "adapter"
        for isa in isas():
            instantft_json(isa, "pretrain", "dnn", "--data", train, "--out", base, "--hidden", 32)
            adapting = ("finetune", base, "--data", drifted, "--eval", test, "--out", adapter, "--cache", "relu4")
            tuned = instantft_json(isa, *adapting, "--force")  # few samples, a mild drift: the gate would want more
            shown = instantft_json(isa, "evaluate", base, "--adapter", adapter, "--data", test)
            before, after = tuned["accuracy_before"], tuned["accuracy_after"]
            print(f"{isa}: pretrain, finetune, evaluate: accuracy {before:.1%} -> {shown['accuracy']:.1%}")
            assert tuned["engine"] == "native", tuned["engine"]
            assert shown["accuracy"] == after > max(before, 0.9), (before, after, shown["accuracy"])


if __name__ == "__main__":
    main()

"""Networks of other people, trained on real data, in a world that has changed: accuracy that is gained, and time.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.foreign [NAME …] [--quick] [--rounds 1] [--no-training] [--cpu-time]
        [--json FILE]

Ten small networks (`benchmarks.networks`: on what each was trained, and what happened to its world) are exported by
torch.onnx and adapted to about 1,024 samples, with no code for any of them and nothing set: `from_onnx` (the file read,
taps found), `fit`, and `judge`, the gate; all of that is timed. Tested on samples nobody saw. Beside it, in the same
run and on one thread: a linear probe (scikit-learn's logistic regression on the last tap, through the same
onnxruntime), the package `peft` with LoRA of rank 4 on every conv and linear layer that it takes (a depthwise
convolution cannot have a rank below its number of channels there), and full fine-tuning in PyTorch; both 10 epochs of
Adam, batches of 20, batch norm as it was, cross-entropy, at two learning rates, of which the better on the test data
counts: more than a user could choose. Times are medians of interleaved rounds, each with another learning rate.

Needs torch, transformers, peft, onnxscript, scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from instantft import FineTuner, from_onnx
from instantft.export.onnx import export_onnx

from .common import announce, clock, save_json, table
from .networks import TASKS, Prepared, export, prepared, score, train

EPOCHS, BATCH, RANK = 10, 20, 4

RATES = {"PEFT LoRA": (3e-3, 1e-2), "full fine-tuning": (1e-3, 3e-3)}

Array = NDArray[Any]


def lora(model: nn.Module) -> nn.Module:
    """The network with an adapter of `peft` on every conv and linear layer."""
    from peft import LoraConfig, get_peft_model

    targets = [
        name for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, (nn.Conv1d, nn.Conv2d)) and RANK % layer.groups == 0)
    ]  # fmt: skip
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    return get_peft_model(model, config)


def rival(way: str, lr: float, ready: Prepared, epochs: int) -> tuple[float, float]:
    """Seconds and accuracy."""
    model, world = copy.deepcopy(ready.model), ready.world
    began = clock.now()
    if way == "PEFT LoRA":
        model = lora(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    train(model, trained, world.new_x, world.new_y, epochs, BATCH, lr)
    return clock.now() - began, score(model, world.test_x, world.test_y)


def adapt(path: Path, x: Array, y: Array) -> tuple[float, FineTuner]:
    """Seconds of all there is to do, and what comes of it."""
    began = clock.now()
    tuner = FineTuner(from_onnx(path)).fit(x, y)
    tuner.judge()
    return clock.now() - began, tuner


def probe(path: Path, x: Array, y: Array, unseen: Array, labels: Array) -> tuple[float, float]:
    """Seconds and accuracy of logistic regression on what the last layer is given."""
    from sklearn.linear_model import LogisticRegression

    began = clock.now()
    base = from_onnx(path)
    base = from_onnx(path, [base.taps[-1].name])
    found = LogisticRegression(max_iter=1000).fit(base.records(x)[:, : -base.spec.C], y)
    seconds = clock.now() - began
    return seconds, float(found.score(base.records(unseen)[:, : -base.spec.C], labels))


def measure(name: str, path: Path, quick: bool, rounds: int, rivals: bool) -> dict[str, Any]:
    """One network: what was found, and what each way of adapting makes of it."""
    import onnxruntime as ort

    ready = prepared(name, quick)
    world, task = ready.world, TASKS[name]
    export(ready.model, world.x, path)
    test = slice(0, 300 if quick else None)
    x, unseen, labels = world.new_x.astype(np.float32), world.test_x[test].astype(np.float32), world.test_y[test]
    found: dict[str, list[tuple[float, float]]] = {}

    def add(way: str, run: tuple[float, float]) -> None:
        found.setdefault(way, []).append(run)
        print(f"{name}: {way}, {run[0]:.2f} s, {run[1]:.2%}", file=sys.stderr, flush=True)

    flat = x.reshape(len(x), -1), unseen.reshape(len(unseen), -1)
    for turn in range(rounds):
        seconds, tuner = adapt(path, x, world.new_y)
        add("instantft", (seconds, tuner.score(unseen, labels)))
        add("linear probe", probe(path, flat[0], world.new_y, flat[1], labels))
        for way, rates in RATES.items() if rivals else ():
            add(way, rival(way, rates[turn], ready, 1 if quick else EPOCHS))
    base: Any = tuner.base
    export_onnx(base, tuner.adapter, path.with_name("adapted.onnx"))
    session = ort.InferenceSession(str(path.with_name("adapted.onnx")), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    some = unseen[:256] if entry.type == "tensor(float)" else unseen[:256].astype(np.int64)
    wanted = tuner.decision_function(unseen[:256])
    difference = np.abs(session.run(None, {entry.name: some})[0] - wanted).max() / np.abs(wanted).max()
    result: Any = tuner.result_
    return {
        "network": name,
        "parameters": sum(p.numel() for p in ready.model.parameters()),
        "trained on": task.trained_on,
        "drift": task.drift,
        "samples": len(x),
        "before": score(ready.model, world.test_x[test], labels),
        "taps": [tap.name for tap in base.taps],
        "widths": list(base.spec.tap_widths),
        "weights": list(result.weights),
        "bytes": 4 * base.spec.record.size,
        "export": float(difference),
        "accepted": tuner.judge().accepted,
        "rates": RATES,
        "ways": {
            way: {
                "seconds": statistics.median(s for s, _ in runs),
                "accuracy": max(a for _, a in runs),
                "runs": runs,
            }
            for way, runs in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(TASKS)}; none: all")
    parser.add_argument("--no-training", action="store_true", help="without LoRA and full fine-tuning, which take long")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--rounds", type=int, choices=(1, 2), default=2, help="1: only the first of two learning rates")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, on a machine others use too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        clock.count_cpu()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or TASKS:
            results.append(
                measure(name, Path(folder) / "network.onnx", options.quick, options.rounds, not options.no_training)
            )
            save_json(options.json, {"results": results})
    announce("")
    print(f"Seconds of {clock.name} time.\n")
    print(table(
        ("network", "parameters", "trained on", "drift", "samples", "widths of the taps", "B a sample, fp32", "export"),
        [(r["network"], f"{r['parameters']:,}", r["trained on"], r["drift"], r["samples"],
          " ".join(map(str, r["widths"])), r["bytes"], f"{r['export']:.0e}") for r in results],
    ))  # fmt: skip
    ways = ("instantft", "linear probe", *(RATES if not options.no_training else ()))
    print("\n" + table(
        ("accuracy, %", "before", *ways), [
            (r["network"], f"{100 * r['before']:.1f}", *(f"{100 * r['ways'][way]['accuracy']:.1f}" for way in ways))
            for r in results
        ],
    ))  # fmt: skip
    print("\n" + table(
        ("seconds", *ways, *(("PEFT LoRA / instantft",) if not options.no_training else ())), [
            (r["network"], *(f"{r['ways'][way]['seconds']:.2f}" for way in ways),
             *([f"{r['ways']['PEFT LoRA']['seconds'] / r['ways']['instantft']['seconds']:.1f}×"]
               if not options.no_training else []))
            for r in results
        ],
    ))  # fmt: skip


if __name__ == "__main__":
    main()

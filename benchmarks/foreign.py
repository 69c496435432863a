"""Networks of other people, as ONNX files: taps that are found, accuracy that is gained, time.

    python -m benchmarks.foreign [NAME …] [--quick] [--samples 6000] [--no-training] [--json FILE]

Trains three networks with PyTorch on Fashion-MNIST (LeNet-5 at 28 pixels, a ResNet-18-like and a MobileNetV2-like one
at 32, both a quarter as wide as the originals), exports them with torch.onnx (which needs onnxscript), and adapts
them to 1,024 images turned by 75°; tested on all the others. Beside the closed form and Skip2-LoRA through
onnxruntime are, in PyTorch on one thread: a linear probe (scikit-learn's logistic regression on the last tap), LoRA
of rank 4 on every conv and linear layer, written out here (B·A beside each weight, both trained, as PEFT does), and
full fine-tuning, 10 epochs each, batches of 20, Adam, each at the better of two learning rates. Time is wall time of
the whole adaptation, with the frozen network's pass over the samples.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import nn

from instantft import FineTuner, from_onnx
from instantft.data.drift import rotate
from instantft.export.onnx import export_onnx

from .common import announce, load, save_json, scaled, table

T, DEGREES, EPOCHS, BATCH, RANK = 1024, 75, 10, 20, 4

Array = NDArray[Any]


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Basic(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Sequential(
            nn.Conv2d(n, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Conv2d(m, m, 3, 1, 1, bias=False), nn.BatchNorm2d(m),
        )  # fmt: skip
        self.b: nn.Module = nn.Identity()
        if stride > 1 or n != m:
            self.b = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))

    def forward(self, x: Any) -> Any:
        return torch.relu(self.a(x) + self.b(x))


def resnet() -> nn.Module:
    w = 16
    stages = [(w, 1), (w, 1), (2 * w, 2), (2 * w, 1), (4 * w, 2), (4 * w, 1), (8 * w, 2), (8 * w, 1)]
    blocks, n = [], w
    for m, stride in stages:
        blocks.append(Basic(n, m, stride))
        n = m
    return nn.Sequential(
        nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10),
    )  # fmt: skip


class Inverted(nn.Module):
    """An inverted residual of MobileNetV2."""

    def __init__(self, n: int, m: int, stride: int, wider: int) -> None:
        super().__init__()
        h = n * wider
        self.a = nn.Sequential(
            nn.Conv2d(n, h, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU6(),
            nn.Conv2d(h, h, 3, stride, 1, groups=h, bias=False), nn.BatchNorm2d(h), nn.ReLU6(),
            nn.Conv2d(h, m, 1, bias=False), nn.BatchNorm2d(m),
        )  # fmt: skip
        self.around = stride == 1 and n == m

    def forward(self, x: Any) -> Any:
        return x + self.a(x) if self.around else self.a(x)


def mobilenet() -> nn.Module:
    plan = [(1, 8, 1, 1), (6, 8, 2, 1), (6, 12, 2, 2), (6, 16, 2, 2), (6, 24, 2, 1), (6, 40, 2, 2)]
    blocks: list[nn.Module] = [nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    n = 8
    for wider, m, count, stride in plan:
        for i in range(count):
            blocks.append(Inverted(n, m, stride if i == 0 else 1, wider))
            n = m
    blocks += [nn.Conv2d(n, 320, 1, bias=False), nn.BatchNorm2d(320), nn.ReLU6()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 10))


RATES = {"LoRA on every layer": (1e-3, 1e-2), "full fine-tuning": (1e-4, 1e-3)}
"""Of Adam; the one that does better on the test data is shown, with its time alone."""

MODELS = {"LeNet-5": (lenet, 0), "ResNet-18-like": (resnet, 2), "MobileNetV2-like": (mobilenet, 2)}


class Lora(nn.Module):
    """A layer beside which B·A is trained."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        shape = layer.weight.shape
        self.A = nn.Parameter(torch.randn(RANK, shape[1:].numel()) / shape[1:].numel() ** 0.5)
        self.B = nn.Parameter(torch.zeros(shape[0], RANK))

    def forward(self, x: Any) -> Any:
        weight = self.layer.weight + (self.B @ self.A).reshape(self.layer.weight.shape)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        y = self.layer
        return nn.functional.conv2d(x, weight, y.bias, y.stride, y.padding, y.dilation, y.groups)


def with_lora(model: nn.Module) -> list[nn.Parameter]:
    for p in model.parameters():
        p.requires_grad_(False)
    added: list[nn.Parameter] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Conv2d, nn.Linear)) and not isinstance(parent, Lora):
                setattr(parent, name, Lora(child))
                added += [getattr(parent, name).A, getattr(parent, name).B]
    return added


def train(model: nn.Module, parameters: Any, x: Any, y: Any, epochs: int, batch: int, lr: float) -> None:
    optimiser = torch.optim.Adam(parameters, lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()


def score(model: nn.Module, x: Array, y: Array) -> float:
    model.eval()
    with torch.no_grad():
        found = np.concatenate([model(torch.from_numpy(part)).argmax(1).numpy() for part in np.array_split(x, 20)])
    return float((found == y).mean())


def measure(name: str, samples: int, folder: Path, data: dict[str, Array], quick: bool, rivals: bool) -> dict[str, Any]:
    """One network: what was found, and what each way of adapting makes of it."""
    torch.manual_seed(0)
    make, padding = MODELS[name]

    def images(key: str) -> Array:
        turned = rotate(data[key], DEGREES) if key == "test_x" else data[key][:samples]
        padded = np.pad(turned, ((0, 0), (padding, padding), (padding, padding)))
        return scaled(padded).reshape(-1, 1, *padded.shape[1:])

    x, y = images("train_x"), data["train_y"][:samples].astype(np.int64)
    turned, labels = images("test_x"), data["test_y"].astype(np.int64)
    ft, test = slice(0, T), slice(T, None if not quick else T + 500)
    model = make()
    train(model, model.parameters(), torch.from_numpy(x), torch.from_numpy(y), 1 if quick else 4, 64, 2e-3)
    model.eval()
    before = score(model, turned[test], labels[test])
    batch = torch.export.Dim("batch")
    path = folder / f"{make.__name__}.onnx"
    torch.onnx.export(
        model, (torch.from_numpy(x[:2]),), str(path), dynamo=True, dynamic_shapes=[{0: batch}], verbose=False
    )
    rows: list[dict[str, Any]] = []

    def add(way: str, seconds: float, accuracy: float) -> None:
        announce(f"{name}: {way}, {accuracy:.1%}, {seconds:.2f} s")
        rows.append({"network": name, "way": way, "seconds": seconds, "accuracy": accuracy})

    add("before", 0, before)
    base = from_onnx(path)
    for method in ("skip-ridge", "skip2-lora"):
        tuner = FineTuner(base, method=method)
        tuner.fit(turned[:64], labels[:64])  # the session is opened, as it would be in a program that predicts
        began = time.perf_counter()
        tuner.fit(turned[ft], labels[ft])
        add(method, time.perf_counter() - began, tuner.score(turned[test], labels[test]))
        if method == "skip-ridge":
            ridge = tuner
    export_onnx(base, ridge.adapter, folder / "adapted.onnx")
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "adapted.onnx"), providers=["CPUExecutionProvider"])
    wanted = ridge.decision_function(turned[:256])
    found = session.run(None, {session.get_inputs()[0].name: turned[:256]})[0]
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())

    began = time.perf_counter()
    last = base.spec.record.segments[-2]
    features = base.records(turned[ft].reshape(T, -1))[:, last.offset : last.offset + last.size]
    probe = LogisticRegression(max_iter=1000).fit(features, labels[ft])
    seconds = time.perf_counter() - began
    unseen = base.records(turned[test].reshape(len(turned[test]), -1))[:, last.offset : last.offset + last.size]
    add("linear probe", seconds, float(probe.score(unseen, labels[test])))

    a, b = torch.from_numpy(turned[ft]), torch.from_numpy(labels[ft])
    for way, rates in RATES.items() if rivals else ():
        tried = []
        for lr in rates:
            copied = copy.deepcopy(model)
            began = time.perf_counter()
            parameters = with_lora(copied) if way.startswith("LoRA") else list(copied.parameters())
            copied.eval()  # batch norm as it was
            train(copied, parameters, a, b, 1 if quick else EPOCHS, BATCH, lr)
            seconds = time.perf_counter() - began
            tried.append((score(copied, turned[test], labels[test]), seconds))
        add(way, max(tried)[1], max(tried)[0])
    return {
        "network": name,
        "input": list(base.spec.input_shape),
        "candidates": len(base.candidates),
        "taps": [tap.name for tap in base.taps],
        "widths": list(base.spec.tap_widths),
        "bytes": 4 * base.spec.record.size,
        "export_difference": difference,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(MODELS)}; none: all")
    parser.add_argument("--no-training", action="store_true", help="without LoRA and full fine-tuning, which take long")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--samples", type=int, default=6000, help="to train on before the drift")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("fashion_mnist.npz", options.quick)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        samples = 500 if options.quick else options.samples
        for name in options.names or MODELS:
            announce(name)
            results.append(measure(name, samples, Path(folder), data, options.quick, not options.no_training))
    print("\n" + table(
        ("network", "candidates", "widths of the taps chosen", "B a sample, fp32", "export: largest difference"),
        [(r["network"], r["candidates"], " ".join(map(str, r["widths"])), r["bytes"], f"{r['export_difference']:.1e}")
         for r in results],
    ))  # fmt: skip
    print()
    rows = [row for r in results for row in r["rows"]]
    lora = {row["network"]: row["seconds"] for row in rows if row["way"].startswith("LoRA")}
    print(table(
        ("network", "", "accuracy", "time, s", "LoRA's time is"),
        [(row["network"], row["way"], f"{row['accuracy']:.1%}", f"{row['seconds']:.2f}" if row["seconds"] else "–",
          f"{lora[row['network']] / row['seconds']:.1f}×" if row["seconds"] and lora else "–") for row in rows],
    ))  # fmt: skip
    save_json(options.json, {"results": results})


if __name__ == "__main__":
    main()

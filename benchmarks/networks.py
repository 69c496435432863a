"""Networks that are trained on real data and then see a world that has changed: small ones of ten architectures.

Written here are LeNet-5, a ResNet-18-like and a MobileNetV2-like network (a quarter as wide as the originals), an
MLP-Mixer, a GRU over rows of pixels, a convolutional network over spectra and a residual MLP; ViT, ConvNeXt and BERT
are transformers' own, built from configurations. `prepared` trains one on what it knows, once, and keeps its weights in
build/foreign; `TASKS` says on what, and what happens to its world afterwards.

Text: the source of ten packages of Python's standard library (of the Python that runs this, if it has its tests). A
sample is 32 consecutive words, numbers and signs, its class the package. The network is trained on the packages and
adapted to their tests.
"""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from instantft.data.drift import rotate

from .common import ROOT, announce, load, scaled

__all__ = ["TASKS", "Prepared", "Task", "export", "prepared", "score", "train"]

T = 1024
"""Samples to adapt to; there are 470 spectra and 1,050 windows."""

Array = NDArray[Any]


# -- architectures ---------------------------------------------------------------------------------------------------


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


class Mixing(nn.Module):
    """A layer of MLP-Mixer: across positions, then across channels."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(positions, 64), nn.GELU(), nn.Linear(64, positions))
        self.along = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Any) -> Any:
        x = x + self.across(self.one(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.two(x))


class Mixer(nn.Module):
    """MLP-Mixer on patches of 4×4 pixels of 28×28."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 4, 4)
        self.layers = nn.Sequential(*(Mixing(49, 64) for _ in range(3)))
        self.last = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 10))

    def forward(self, x: Any) -> Any:
        x = self.layers(self.patches(x).flatten(2).transpose(1, 2))
        return self.last[1](self.last[0](x).mean(1))


class Recurrent(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(28, 64)
        self.gru = nn.GRU(64, 96, batch_first=True)
        self.last = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Any) -> Any:
        states, _ = self.gru(torch.relu(self.rows(x.flatten(1, 2))))
        return self.last(states[:, -1])


def spectral() -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 256))]
    for n, m in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv1d(n, m, 7, padding=3, bias=False), nn.BatchNorm1d(m), nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 3))


class Around(nn.Module):
    """A residual block of fully connected layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Any) -> Any:
        return torch.relu(x + self.a(x))


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(561, 96), nn.BatchNorm1d(96), nn.ReLU(), Around(96), Around(96), nn.Linear(96, 6))


class Logits(nn.Module):
    """A network of transformers that takes one tensor and yields logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x).logits


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    return Logits(ViTForImageClassification(
        ViTConfig(**size, image_size=28, patch_size=4, num_channels=1, num_labels=10, hidden_act="gelu")
    ))  # fmt: skip


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return Logits(ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=3, patch_size=2, hidden_sizes=[24, 48, 96], depths=[1, 1, 2], num_stages=3, num_labels=10,
            image_size=32, layer_scale_init_value=1.0,
        )
    ))  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return Logits(BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=10, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, **size,
        )
    ))  # fmt: skip


# -- worlds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What a network is trained on, what it is adapted to, and what it is tested on."""

    x: Array
    y: Array
    new_x: Array
    new_y: Array
    test_x: Array
    test_y: Array


def _world(x: Array, y: Array, drifted: Array, labels: Array, few: int) -> World:
    """Adapted to the first `few` of the drifted samples, tested on the rest."""
    y, labels = y.astype(np.int64), labels.astype(np.int64)
    return World(x, y, drifted[:few], labels[:few], drifted[few:], labels[few:])


def _turned(name: str, degrees: float, samples: int, padding: int = 0, channel: bool = True) -> World:
    data = load(f"{name}.npz")

    def images(x: Array) -> Array:
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        return scaled(padded).reshape(-1, 1, *padded.shape[1:])

    x, turned = images(data["train_x"][:samples]), images(rotate(data["test_x"], degrees))
    return _world(x, data["train_y"][:samples], turned, data["test_y"], T)


def _noisy(samples: int) -> World:
    data, rng = load("fashion_mnist.npz"), np.random.default_rng(0)
    x, seen = (scaled(data[key])[:, None] for key in ("train_x", "test_x"))
    noisy = np.clip(0.5 * seen + rng.normal(0, 0.2, seen.shape), 0, 1).astype(np.float32)
    return _world(x[:samples], data["train_y"][:samples], noisy, data["test_y"], T)


def _blurred(images: Array) -> Array:
    """Means of 3×3 pixels."""
    wide = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    h, w = images.shape[2:]
    moved = [wide[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.asarray(np.mean(moved, axis=0, dtype=np.float32))


def _colours(samples: int) -> World:
    data = load("cifar100_10class_standin.npz")
    x, seen = (scaled(data[key]).transpose(0, 3, 1, 2) for key in ("train_x", "test_x"))
    mixed = np.random.default_rng(0).permutation(len(seen))  # they lie sorted by class
    drifted = np.ascontiguousarray(_blurred(seen[mixed])[:, ::-1])
    return _world(np.ascontiguousarray(x), data["train_y"], drifted, data["test_y"][mixed], T)


def _fan(samples: int) -> World:
    d, rng = load("fan_damage1.npz"), np.random.default_rng(0)
    order = rng.permutation(len(d["finetune_x"]))
    parts = (d["pretrain_x"], d["pretrain_y"], d["finetune_x"][order], d["finetune_y"][order], d["test_x"], d["test_y"])
    return World(*(a if a.ndim > 1 else a.astype(np.int64) for a in parts))


def _persons(samples: int) -> World:
    d = load("har_features561.npz")
    rows = [d[key] for key in ("pretrain_idx", "finetune_idx", "test_idx")]
    return World(*(a for at in rows for a in (d["x"][at], d["y"][at].astype(np.int64))))


LIBRARY = {
    "asyncio": "test/test_asyncio", "ctypes": "ctypes/test", "distutils": "distutils/tests",
    "email": "test/test_email", "idlelib": "idlelib/idle_test", "importlib": "test/test_importlib",
    "lib2to3": "lib2to3/tests", "multiprocessing": "test/_test_multiprocessing.py", "tkinter": "tkinter/test",
    "unittest": "unittest/test",
}  # fmt: skip
"""Packages of Python's standard library, and where their tests lie."""

VOCABULARY, LENGTH = 4096, 32


def _tokens(files: Iterable[Path]) -> Array:
    """(n, LENGTH): words, numbers and signs of these files one after the other, each as a number below VOCABULARY."""
    texts = (path.read_text("utf-8", "replace") for path in sorted(files))
    words = [word for text in texts for word in re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9\s]", text)]
    codes = np.array([zlib.crc32(word.encode()) % VOCABULARY for word in words], np.int64)
    return codes[: len(codes) // LENGTH * LENGTH].reshape(-1, LENGTH)


def _texts(samples: int) -> World:
    library, rng = Path(sysconfig.get_paths()["stdlib"]), np.random.default_rng(0)
    parts: tuple[list[Array], list[Array]] = [], []
    for label, (package, place) in enumerate(LIBRARY.items()):
        tests = {library / place} if place.endswith(".py") else set((library / place).rglob("*.py"))
        for part, files in zip(parts, (set((library / package).rglob("*.py")) - tests, tests), strict=True):
            rows = _tokens(files)
            part.append(np.hstack([rows, np.full((len(rows), 1), label)]))
    old, new = (rng.permutation(np.concatenate(part)) for part in parts)
    return _world(old[:samples, :-1], old[:samples, -1], new[: T + 9000, :-1], new[: T + 9000, -1], T)


@dataclass(frozen=True)
class Task:
    """A network, its world, and how it was trained.

    Attributes:
        make: the network.
        world: of so many samples to train on, where there are more.
        trained_on, drift: in words.
        samples, epochs, lr: of the training; Adam, batches of 64.
    """

    make: Callable[[], nn.Module]
    world: Callable[[int], World]
    trained_on: str
    drift: str
    samples: int
    epochs: int
    lr: float


TASKS = {
    "LeNet-5": Task(lenet, lambda n: _turned("fashion_mnist", 75, n), "Fashion-MNIST", "turned by 75°", 12000, 4, 2e-3),
    "ResNet-18-like": Task(
        resnet, lambda n: _turned("fashion_mnist", 75, n, 2), "Fashion-MNIST, 32×32", "turned by 75°", 6000, 3, 2e-3
    ),
    "MobileNetV2-like": Task(
        mobilenet, lambda n: _turned("fashion_mnist", 75, n, 2), "Fashion-MNIST, 32×32", "turned by 75°", 6000, 4, 2e-3
    ),
    "ViT": Task(vit, lambda n: _turned("mnist", 90, n), "MNIST", "turned by 90°", 12000, 4, 1e-3),
    "ConvNeXt": Task(convnext, _colours, "colour images, 32×32", "blurred, red and blue swapped", 4000, 10, 1e-3),
    "BERT": Task(bert, _texts, "source of Python packages", "source of their tests", 20000, 4, 1e-3),
    "MLP-Mixer": Task(Mixer, _noisy, "Fashion-MNIST", "dark and noisy", 12000, 4, 1e-3),
    "GRU": Task(Recurrent, lambda n: _turned("mnist", 45, n), "MNIST", "turned by 45°", 12000, 4, 2e-3),
    "1-D CNN": Task(spectral, _fan, "fan, silent room", "noisy room", 470, 60, 2e-3),
    "residual MLP": Task(residual, _persons, "HAR, 25 persons", "5 other persons", 5894, 8, 1e-3),
}


# -- training --------------------------------------------------------------------------------------------------------


def train(model: nn.Module, parameters: Any, x: Array, y: Array, epochs: int, batch: int, lr: float) -> None:
    """Adam at a constant rate, in whatever mode the model is."""
    optimiser = torch.optim.Adam(list(parameters), lr=lr)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    for epoch in range(epochs):
        announce(f"epoch {epoch + 1} of {epochs}")
        for rows in torch.randperm(len(a), generator=generator).split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(a[rows]), b[rows]).backward()
            optimiser.step()


def score(model: nn.Module, x: Array, y: Array) -> float:
    """Accuracy, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found = [model(torch.from_numpy(part)).argmax(1).numpy() for part in np.array_split(x, max(1, len(x) // 256))]
    return float((np.concatenate(found) == y).mean())


@dataclass(frozen=True)
class Prepared:
    """A trained network and its world."""

    model: nn.Module
    world: World


def prepared(name: str, quick: bool = False) -> Prepared:
    """The network of a task, trained or fetched from build/foreign, in evaluation mode."""
    torch.manual_seed(0)
    task = TASKS[name]
    samples, epochs = (min(task.samples, 500), 1) if quick else (task.samples, task.epochs)
    world, model = task.world(samples), task.make()
    kept = ROOT / "build" / "foreign" / f"{name}-{samples}-{epochs}.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
    else:
        model.train()
        train(model, model.parameters(), world.x[:samples], world.y[:samples], epochs, 64, task.lr)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, kept)
    return Prepared(model.eval(), world)


def export(model: nn.Module, x: Array, path: Path) -> None:
    """Write the network as ONNX for batches of any size; by the older exporter where the newer refuses."""
    model.eval()
    batch, example = torch.export.Dim("batch", min=1, max=4096), (torch.from_numpy(x[:2]),)
    try:
        torch.onnx.export(
            model, example, str(path), dynamo=True, dynamic_shapes=[{0: batch}], external_data=False, verbose=False
        )
    except Exception:  # the older exporter takes what the newer does not
        torch.onnx.export(model, example, str(path), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})

"""The papers' drifts: what a network is trained on, what it is adapted to, what it is tested on.

Settings the papers state are theirs (epochs, B=20, R=4, lr 0.1 for grey images, 0.025 for colour). For the DNN they
state no learning rate. Of 0.01, 0.02, 0.05 and 0.1, fine-tuning has 0.02: the largest at which no method diverges on
any of the three sets (LoRA-All does at 0.05 on HAR and at 0.1 on the fan); Skip2-LoRA moves by less than a point
between 0.01 and 0.1. Pre-training has 0.05, at which the accuracies after fine-tuning come closest to the papers'; from
0.01 to 0.05 they move by up to 3 points on Damage2 and HAR, and by less than 1 on Damage1.

This file reads the data folder; it downloads nothing.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FileError
from ..spec import NetSpec, dnn, lenet5
from .drift import rotate
from .triples import shuffled

__all__ = [
    "BATCH", "RANK", "TASKS", "Samples", "Task", "drifted", "load_set", "network", "pretraining", "quick", "read_set",
    "scaled",
    "set_folder",
]  # fmt: skip

BATCH, RANK = 20, 4

Floats = NDArray[np.float32]
Samples = tuple[Floats, NDArray[np.int32]]
"""x (T, N) float32, y (T,) int32."""


@dataclass(frozen=True)
class Task:
    """A drift: what the network was trained on, what it is adapted to, and with which settings.

    Attributes:
        file: in the data folder.
        degrees: by which the images are turned; None: the file holds the drifted samples.
        pretrain: images or rows to pre-train on; 0: all.
        finetune: test images to fine-tune on.
        paper: the papers' figures by method ("none": before fine-tuning; codec names: with that cache).
        source: where they stand.
    """

    title: str
    file: str
    degrees: float | None
    pretrain_epochs: int
    pretrain_lr: float
    epochs: int
    lr: float
    paper: tuple[tuple[str, str], ...]
    source: str
    pretrain: int = 0
    finetune: int = 1024

    @property
    def colour(self) -> bool:
        """Whether they are colour images (T, 32, 32, 3), which are split rather than turned."""
        return self.file.startswith(("cifar", "svhn"))


TASKS: dict[str, Task] = {
    "fashion": Task(
        "Fashion-MNIST turned by 75°", "fashion_mnist.npz", 75, 10, 0.1, 10, 0.1,
        (
            ("none", "9.2"), ("ft-last", "60.9"), ("lora-all", "75.6"), ("lora-last", "53.8"),
            ("skip-lora", "73.5"), ("skip2-lora", "73.5"), ("fp32", "73.5"), ("nf4-block64", "74.0"),
        ),
        "poster",
    ),
    "mnist": Task(
        "MNIST turned by 90°", "mnist.npz", 90, 10, 0.1, 10, 0.1,
        (("lora-all", "91.2"), ("skip2-lora", "91.8")),
        "InstantFT §5.2",
    ),
    "damage1": Task(
        "Cooling fan, Damage1", "fan_damage1.npz", None, 100, 0.05, 300, 0.02,
        (
            ("none", "60.6 ± 13.7"), ("ft-all", "98.7 ± 2.1"), ("ft-last", "94.2 ± 2.2"), ("ft-bias", "79.4 ± 7.5"),
            ("ft-all-lora", "98.6 ± 2.1"), ("lora-all", "98.3 ± 1.3"), ("lora-last", "94.7 ± 2.9"),
            ("skip-lora", "96.1 ± 2.1"), ("skip2-lora", "96.2 ± 2.3"),
        ),
        "Skip2-LoRA, Tables 3 and 4",
    ),
    "damage2": Task(
        "Cooling fan, Damage2", "fan_damage2.npz", None, 100, 0.05, 300, 0.02,
        (
            ("none", "51.9 ± 8.0"), ("ft-all", "88.1 ± 6.1"), ("ft-last", "92.4 ± 3.7"), ("ft-bias", "79.6 ± 6.5"),
            ("ft-all-lora", "88.9 ± 5.7"), ("lora-all", "86.5 ± 4.9"), ("lora-last", "93.6 ± 3.5"),
            ("skip-lora", "93.2 ± 3.9"), ("skip2-lora", "93.5 ± 3.2"),
        ),
        "Skip2-LoRA, Tables 3 and 4",
    ),
    "har": Task(
        "Human activity (HAR)", "har_features561.npz", None, 300, 0.05, 600, 0.02,
        (
            ("none", "80.0 ± 5.6"), ("ft-all", "91.0 ± 1.9"), ("ft-last", "89.3 ± 1.1"), ("ft-bias", "82.2 ± 1.3"),
            ("ft-all-lora", "90.4 ± 2.5"), ("lora-all", "91.1 ± 1.3"), ("lora-last", "89.8 ± 1.5"),
            ("skip-lora", "92.1 ± 1.1"), ("skip2-lora", "92.0 ± 1.0"),
        ),
        "Skip2-LoRA, Tables 3 and 4",
    ),
}  # fmt: skip


def quick(task: Task) -> Task:
    """The same with next to no training."""
    return replace(task, pretrain_epochs=1, epochs=2, pretrain=200, finetune=60)


def set_folder(folder: str | None = None) -> Path:
    """Where the data sets are: `folder`, else $INSTANTFT_DATA, else ``../shared/data`` if there, else ``data``."""
    beside = Path("../shared/data")
    return Path(folder or os.environ.get("INSTANTFT_DATA") or (beside if beside.is_dir() else "data"))


@lru_cache(maxsize=2)
def load_set(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """The arrays of a data set, which the next caller gets too: they are not to be changed.

    Raises:
        FileError: it is not there, or no ``.npz``.
    """
    path = folder / name
    if not path.is_file():
        raise FileError(
            f"the data folder must hold {name}, but {folder} does not: `instantft data fetch` gets the papers' sets; "
            "or name another folder with --data-dir or INSTANTFT_DATA; docs/guide.md says what must be in the file"
        )
    return read_set(path)


def read_set(path: Path, keys: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz``; of `keys` those that are there, or all.

    Raises:
        FileError: it is none.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            return {key: z[key] for key in z.files if keys is None or key in keys}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise FileError(f"a data set must be an .npz of arrays, but {path} is not: {e}") from None


def scaled(images: NDArray[Any]) -> Floats:
    """Pixels 0 … 255 as float32 in 0 … 1, as samples from files are."""
    return np.asarray(images.astype(np.float32) / np.float32(255), np.float32)


def network(task: Task) -> NetSpec:
    """The papers' network for the task."""
    if task.colour:
        return lenet5((3, 32, 32))
    if task.degrees is not None:
        return lenet5((1, 28, 28))
    return dnn(561, 6) if "har" in task.file else dnn(256, 3)


def pretraining(task: Task, folder: Path) -> Samples:
    """What the base network is trained on."""
    data = load_set(folder, task.file)
    if task.colour:
        part = "extra" if "extra_x" in data else "train"
        n = task.pretrain or len(data[f"{part}_x"])
        x, y = _planes(data[f"{part}_x"][:n]), data[f"{part}_y"]
    elif task.degrees is not None:
        x, y = scaled(data["train_x"].reshape(-1, 784)), data["train_y"]
    elif "har" in task.file:
        x, y = data["x"][data["pretrain_idx"]], data["y"][data["pretrain_idx"]]
    else:
        x, y = data["pretrain_x"], data["pretrain_y"]
    n = task.pretrain or len(x)
    return np.ascontiguousarray(x[:n], np.float32), y[:n].astype(np.int32)


@lru_cache(maxsize=2)
def _turned(folder: Path, file: str, degrees: float) -> tuple[Floats, NDArray[Any]]:
    """The test images, turned, and their labels."""
    data = load_set(folder, file)
    return rotate(scaled(data["test_x"]), degrees).reshape(-1, 784), data["test_y"]


def _planes(images: NDArray[Any]) -> Floats:
    """Colour images (T, h, w, 3) of pixels as rows (T, 3·h·w), plane by plane."""
    return scaled(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def drifted(task: Task, folder: Path, seed: int) -> tuple[Samples, Samples]:
    """What it is fine-tuned on, and what it is tested on: samples that nobody trained on."""
    if task.colour and "extra_x" in (data := load_set(folder, task.file)):
        parts = [(_planes(data[f"{part}_x"]), data[f"{part}_y"]) for part in ("train", "test")]
    elif task.degrees is not None or task.colour:
        if task.colour:
            x, y = _planes(data["test_x"]), data["test_y"]
        else:
            x, y = _turned(folder, task.file, task.degrees or 0.0)
        order = shuffled(len(x), seed)
        parts = [(x[i], y[i]) for i in (order[: task.finetune], order[task.finetune :])]
    elif "har" in task.file:
        data = load_set(folder, task.file)
        parts = [(data["x"][data[i]], data["y"][data[i]]) for i in ("finetune_idx", "test_idx")]
    else:
        data = load_set(folder, task.file)
        parts = [(data["finetune_x"], data["finetune_y"]), (data["test_x"], data["test_y"])]
    tune, test = ((np.ascontiguousarray(x, np.float32), y.astype(np.int32)) for x, y in parts)
    return tune, test

"""The whole story in under a minute: real scans of digits, a network, drift, and every way to adapt to it.

Everything made on the way is left in a directory, so that a reader can go on from there by hand.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files
from .adapters import check_target
from .backbones.builtin import Network
from .cost import network_parameters
from .data import as_samples
from .data.drift import rotate
from .engine import Engine
from .errors import UsageError
from .methods import METHODS
from .solvers import sgd
from .spec import lenet5
from .table import format_table
from .tuner import FineTuner
from .watch.detectors import Seen

__all__ = ["Row", "make_digits", "picture", "run_demo"]

ANGLE = 65.0
PRETRAIN, FINETUNE = 800, 500
EPOCHS = 30
LR = 0.02
PRETRAIN_LR = 0.05
PRETRAIN_EPOCHS = {"native": 20, "reference": 6}

CONTESTANTS: tuple[tuple[str, str | None], ...] = (
    ("ft-all", None),
    ("ft-all-lora", None),
    ("lora-all", None),
    ("ft-bias", None),
    ("ft-last", None),
    ("lora-last", None),
    ("skip-lora", None),
    ("skip2-lora", "fp32"),
    ("skip2-lora", "nf4"),
    ("skip2-lora", "relu4"),
    ("skip-ridge", "fp32"),
    ("skip-ridge", "relu4"),
)


Stage = Callable[[str, int], AbstractContextManager[sgd.Progress]]
"""From what is done, and how many pieces it has, to something that is told how many of them are done."""

FILES = ("base.safetensors", "pretrain.npz", "finetune.npz", "test.npz", "time-against-accuracy.png")


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    method: str
    title: str
    codec: str | None
    accuracy: float
    seconds: float
    trainable_parameters: int
    cache_bytes: int
    cache_bytes_per_sample: int


def make_digits(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's 1,797 scanned digits, upsampled to 28x28 (bilinear), in an order that `seed` decides.

    Returns:
        images (1797, 28, 28) uint8, labels (1797,).

    Raises:
        UsageError: scikit-learn is not installed.
    """
    digits = _extra("sklearn.datasets").load_digits()
    images = digits.images.astype(np.float32) * (255 / 16)
    weights = _bilinear(8, 28)
    large = weights @ images @ weights.T
    order = np.random.default_rng([seed, 4]).permutation(len(large))
    return np.rint(large[order]).clip(0, 255).astype(np.uint8), digits.target[order].astype(np.int64)


@contextmanager
def _silent(_: str, __: int) -> Iterator[sgd.Progress]:
    yield lambda _: None


def run_demo(
    out: Path, seed: int, engine: Engine, say: Callable[[str], None], stage: Stage = _silent
) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: directory for base, adapter, samples and picture; made if it is not there.
        seed: decides everything but the times.
        engine: who computes.
        say: gets the text, bit by bit.
        stage: shows progress.

    Returns:
        What was said, for machines.

    Raises:
        UsageError: an extra is not installed, or the seed is out of range.
        FileError: `out` is no place to write to.
    """
    began = time.perf_counter()
    sgd.check_arguments(seed=seed)  # all of this now rather than after all the work
    files.check_directory(out, "the demo's files")
    for name in FILES:
        files.check_file(out / name, "a file of the demo")
    check_target(out / "adapter")
    _extra("matplotlib")
    images, labels = make_digits(seed)
    drifted = rotate(images, ANGLE)
    first, second = slice(0, PRETRAIN), slice(PRETRAIN, PRETRAIN + FINETUNE)
    test = slice(PRETRAIN + FINETUNE, None)

    say(f"1. Pre-train LeNet-5 on {PRETRAIN} scanned digits.")
    spec = lenet5((1, 28, 28))
    x, _ = as_samples(images[first], spec)
    started = time.perf_counter()
    epochs = PRETRAIN_EPOCHS.get(engine.name, PRETRAIN_EPOCHS["native"])
    y = labels[first].astype(np.int32)
    with stage("pre-training", epochs) as progress:
        base, _ = sgd.pretrain(
            engine, spec, x, y, epochs=epochs, lr=PRETRAIN_LR, momentum=0.5, seed=seed, progress=progress
        )
    trained = time.perf_counter() - started
    upright = _accuracy(engine, base, images[test], labels[test])
    say(
        f"   {network_parameters(spec):,} parameters, {epochs} epochs in {trained:.1f} s; "
        f"accuracy on {len(labels[test])} other digits: {upright:.1%}\n"
    )

    before = _accuracy(engine, base, drifted[test], labels[test])
    say(f"2. The camera turns by {ANGLE:.0f}°. Accuracy falls to {before:.1%}.\n")

    say(
        f"3. Adapt to {FINETUNE} turned digits, one thread; test on {len(labels[test])} others. "
        f"Methods that make steps make {EPOCHS} epochs."
    )
    rows, adapter = _contest(engine, base, drifted, labels, second, test, seed, stage)
    say(
        "\n"
        + format_table(
            ("method", "accuracy", "time", "parameters", "cache a sample", "cache"),
            [
                (
                    r.title,
                    f"{r.accuracy:.1%}",
                    f"{r.seconds * 1e3:,.1f} ms",
                    f"{r.trainable_parameters:,}",
                    f"{r.cache_bytes_per_sample:,} B" if r.codec else "–",
                    f"{r.cache_bytes / 1000:,.0f} kB" if r.codec else "–",
                )
                for r in rows
            ],
        )
    )

    base_path, adapter_path = out / "base.safetensors", out / "adapter"
    x_test, _ = as_samples(images[test], spec)
    base = replace(
        base, seen=Seen.by(base.bind(engine), base, x, x_test, labels[test].astype(np.int32)).text()
    )  # for `watch`
    base.save(base_path)
    adapter.save(adapter_path)
    for name, part, source in (
        ("pretrain", first, images),
        ("finetune", second, drifted),
        ("test", test, drifted),
    ):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=source[part], y=labels[part])
        files.write_whole(out / f"{name}.npz", buffer.getvalue(), "samples")
    picture_path = out / "time-against-accuracy.png"
    files.write_whole(picture_path, picture(rows, before, upright), "a picture")
    elapsed = time.perf_counter() - began
    program = _program()
    say(
        f"\n4. All of it took {elapsed:.0f} s. The picture is {picture_path}. Go on with:\n\n"
        f"   {program} evaluate {base_path} --adapter {adapter_path} --data {out / 'test.npz'}\n"
        f"   {program} finetune {base_path} --data {out / 'finetune.npz'} --eval {out / 'test.npz'} "
        f"--out {out / 'mine'}\n"
        f"   {program} inspect  {base_path}"
    )
    return {
        "accuracy_upright": upright,
        "accuracy_before": before,
        "angle": ANGLE,
        "rows": [asdict(r) for r in rows],
        "base": str(base_path),
        "adapter": str(adapter_path),
        "picture": str(picture_path),
        "seconds": elapsed,
        "engine": engine.name,
    }


def _program() -> str:
    """What to type to run instantft again: it may live in an environment that is not on the PATH."""
    here = Path(sys.argv[0])
    if shutil.which("instantft") or here.name != "instantft":
        return "instantft"
    return os.path.relpath(here)


def _contest(
    engine: Engine,
    base: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    tuned: slice,
    test: slice,
    seed: int,
    stage: Stage,
) -> tuple[list[Row], Any]:
    """Every contestant in turns, three rounds of them where the engine is fast; the median of its times counts."""
    steps: dict[str, dict[str, Any]] = {"sgd": {"epochs": EPOCHS, "lr": LR}, "ridge": {}}
    tuners = [
        FineTuner(base, m, cache=c or "none", seed=seed, engine=engine, **steps[METHODS[m].solver])
        for m, c in CONTESTANTS
    ]
    times: list[list[float]] = [[] for _ in tuners]
    turns = [(i, tuner) for _ in range(3 if engine.name == "native" else 1) for i, tuner in enumerate(tuners)]
    with stage("adapting", len(turns)) as progress:
        for done, (i, tuner) in enumerate(turns):
            tuner.fit(images[tuned], labels[tuned])
            times[i].append(tuner.result_.seconds.total)
            progress(done + 1)
    rows = []
    for tuner, seconds, (name, codec) in zip(tuners, times, CONTESTANTS, strict=True):
        store = tuner.store_
        title = METHODS[name].title + (f" {codec}" if codec else "")
        rows.append(
            Row(
                name,
                title,
                codec,
                tuner.score(images[test], labels[test]),
                median(seconds),
                tuner.adapter.parameters,
                store.nbytes if store else 0,
                store.codec.bytes_per_sample(store.record) if store else 0,
            )
        )
    best = [name for name, _ in CONTESTANTS].index("skip-ridge")
    return rows, tuners[best].adapter


def picture(rows: list[Row], before: float, upright: float) -> bytes:
    """Time against accuracy, as in InstantFT's Figure 1: a PNG."""
    _extra("matplotlib").use("Agg")
    plt = _extra("matplotlib.pyplot")
    groups = {
        "whole network": ("#7f8c8d", "s", ("ft-all", "ft-all-lora", "ft-bias", "lora-all")),
        "last layer only": ("#2980b9", "^", ("ft-last", "lora-last")),
        "Skip-LoRA, no cache": ("#e67e22", "D", ("skip-lora",)),
        "Skip2-LoRA, cached": ("#c0392b", "o", ("skip2-lora",)),
        "closed form, cached": ("#8e44ad", "*", ("skip-ridge",)),
    }
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
    for label, (color, marker, names) in groups.items():
        points = [r for r in rows if r.method in names]
        axes.scatter(
            [r.seconds * 1e3 for r in points],
            [100 * r.accuracy for r in points],
            s=140 if marker == "*" else 70,
            c=color,
            marker=marker,
            label=label,
            zorder=3,
            edgecolors="white",
            linewidths=0.8,
        )
    axes.set_xscale("log")
    low, high = min(r.seconds for r in rows) * 1e3, max(r.seconds for r in rows) * 1e3
    axes.set_xlim(low / 3, high * 2)
    ticks = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5) if low / 3 <= m * 10.0**e <= high * 2]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    bottom = 100 * min([before, *(r.accuracy for r in rows)])
    axes.set_ylim(max(0, bottom - 10), 106)
    lines = []
    for value, text in ((before, "not adapted"), (upright, "upright digits, before the drift")):
        axes.axhline(100 * value, color="#95a5a6", linestyle=":", linewidth=1.2, zorder=1)
        lines.append(
            axes.annotate(
                f"{text}: {value:.1%}",
                (low / 3, 100 * value),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8.5,
                color="#5d6d7e",
            )
        )
    axes.set_xlabel("time of the whole fine-tuning (ms, one thread, log scale)")
    axes.set_ylabel("accuracy on other turned digits (%)")
    axes.set_title(f"Digits turned by {ANGLE:.0f}°: up and to the left is better", fontsize=11, loc="left", pad=28)
    axes.grid(True, which="major", color="#ecf0f1", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=5,
        frameon=False,
        fontsize=8,
        handletextpad=0.1,
        columnspacing=0.8,
    )
    figure.tight_layout()
    _label(figure, axes, rows, lines)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _label(figure: Any, axes: Any, rows: list[Row], lines: list[Any]) -> None:
    """Name every point, each name where it covers neither points nor other names."""
    renderer = figure.canvas.get_renderer()
    taken = [
        (px - 7, py - 7, px + 7, py + 7)
        for px, py in axes.transData.transform([(r.seconds * 1e3, 100 * r.accuracy) for r in rows])
    ]
    scale = figure.dpi / 72
    taken = [(a - 2 * scale, b - 2 * scale, c + 2 * scale, d + 2 * scale) for a, b, c, d in taken]
    taken += [tuple(line.get_window_extent(renderer).extents) for line in lines]
    frame = axes.get_window_extent()
    spots = [
        (9, -3, "left"),
        (-9, -3, "right"),
        (0, 9, "center"),
        (0, -15, "center"),
        (9, 8, "left"),
        (9, -14, "left"),
        (-9, 8, "right"),
        (-9, -14, "right"),
        (14, 20, "left"),
        (14, -26, "left"),
        (-14, 20, "right"),
        (-14, -26, "right"),
        (0, 24, "center"),
        (0, -32, "center"),
    ]
    for r in sorted(rows, key=lambda r: r.seconds):
        best: tuple[float, Any] | None = None
        for rank, (dx, dy, align) in enumerate(spots):
            text = axes.annotate(
                r.title,
                (r.seconds * 1e3, 100 * r.accuracy),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=align,
                fontsize=8.5,
                arrowprops={"arrowstyle": "-", "color": "#bdc3c7", "lw": 0.7} if abs(dy) > 16 else None,
            )
            # An annotation's own box includes its arrow; only the words matter.
            box = text.get_window_extent(renderer) if abs(dy) <= 16 else _words(text, renderer)
            edges = (box.x0, box.y0, box.x1, box.y1)
            cost = sum(_overlap(edges, t) for t in taken) + 0.5 * rank
            cost += 1e4 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text)
                kept = edges
            else:
                text.remove()
        taken.append(kept)


def _words(text: Any, renderer: Any) -> Any:
    text.update_positions(renderer)
    return import_module("matplotlib.text").Text.get_window_extent(text, renderer)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _accuracy(engine: Engine, base: Network, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    x, _ = as_samples(images, base.spec)
    return float((engine.forward(base.spec, base.tensors, x).argmax(axis=1) == labels).mean())


def _bilinear(small: int, large: int) -> NDArray[np.float32]:
    """(large, small): each row says which of the small pixels a large one is made of, edges repeated."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    low = np.minimum(at.astype(np.int64), small - 2)
    weights = np.zeros((large, small), np.float32)
    weights[np.arange(large), low] = 1 - (at - low)
    weights[np.arange(large), low + 1] = at - low
    return weights


def _extra(module: str) -> Any:
    """A module of the extra [demo]."""
    try:
        return import_module(module)
    except ImportError:
        package = {"sklearn": "scikit-learn"}.get(module.split(".", maxsplit=1)[0], "matplotlib")
        raise UsageError(f"the demo needs {package}, which is not installed: pip install 'instantft[demo]'") from None

"""Real drift as a stream, with the watcher's loop and without it.

    python -m benchmarks.replay                     # prints tables, draws docs/images/replay.png with --picture
    python -m benchmarks.replay --quick

- fan, Damage1 and Damage2: the network was trained on the silent recordings silentA_1. The stream is another silent
  pair of recordings, silentA_2, then noisy_1, then noisy_2, 470 spectra each; those of a pair are mixed, as if the fan
  were stopped and changed now and then.
- Fashion-MNIST: 2,000 upright test images, then 5,000 that turn steadily to 75°, then 3,000 that stay there.

Three ways: every label right after its prediction; one label in five, and 200 samples late; the frozen network. Nothing
is tuned on these streams: the loop has its defaults. Adaptations are run where they are asked for, so that the result
does not depend on the machine. Milliseconds of an adaptation are wall time, microseconds a sample the process's own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import TASKS, base, network
from benchmarks.common import load, machine, save_json, table
from instantft.backbones.builtin import Network
from instantft.data import as_samples
from instantft.data.drift import rotate
from instantft.engine import forward, get_engine
from instantft.watch.journal import Journal
from instantft.watch.loop import Event, Label, Loop, Message, Sample

SEEDS = 3
LATE, FEW = 200, 5
"""Samples by which a label is late, and one in how many has one."""
WINDOW = 200
"""Samples over which accuracy is averaged in the picture."""

Stream = tuple[np.ndarray, np.ndarray, dict[str, int]]
"""x (T, N), y (T,), and where each part ends."""


def fan(name: str, seed: int, quick: bool) -> Stream:
    data = load(f"fan_{name}.npz", quick)
    rng = np.random.default_rng(seed)
    parts = {"silent": "pretrain_silentA_2", "noisy, 1": "finetune", "noisy, 2": "test"}
    xs, ys, ends = [], [], {}
    for title, part in parts.items():
        here = part if f"{part}_x" in data else "pretrain"  # of made-up data
        order = rng.permutation(len(data[f"{here}_y"]))
        xs.append(data[f"{here}_x"][order].astype(np.float32))
        ys.append(data[f"{here}_y"][order].astype(np.int32))
        ends[title] = sum(map(len, ys))
    return np.concatenate(xs), np.concatenate(ys), ends


def fashion(seed: int, quick: bool) -> Stream:
    data = load("fashion_mnist.npz", quick)
    lengths = {"upright": 2000, "turning": 5000, "75°": 3000}
    if quick:
        lengths = {title: n // 40 for title, n in lengths.items()}
    order = np.random.default_rng(seed).permutation(len(data["test_y"]))[: sum(lengths.values())]
    images, y = data["test_x"][order], data["test_y"][order].astype(np.int32)
    first, turning, last = lengths.values()
    angles = np.concatenate([np.zeros(first), np.linspace(0, 75, turning), np.full(last, 75.0)]).round()
    for angle in np.unique(angles[angles > 0]):
        images[angles == angle] = rotate(images[angles == angle], float(angle))
    ends = dict(zip(lengths, np.cumsum(list(lengths.values())).tolist(), strict=True))
    return as_samples(images)[0], y, ends


def messages(x: np.ndarray, y: np.ndarray, late: bool, seed: int) -> Iterator[Message]:
    """The stream, with every label at once, or with few and late ones."""
    if not late:
        for i, (row, label) in enumerate(zip(x, y.tolist(), strict=True)):
            yield Sample(row, str(i), label)
        return
    labelled, waiting = np.random.default_rng(seed).random(len(y)) < 1 / FEW, deque[int]()
    for i, row in enumerate(x):
        yield Sample(row, str(i))
        waiting.append(i)
        if len(waiting) > LATE:
            j = waiting.popleft()
            if labelled[j]:
                yield Label(str(j), int(y[j]))


def at_once(job: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(job())
    return future


def replay(net: Network, stream: Stream, late: bool, seed: int) -> tuple[np.ndarray, list[Event], float]:
    """What was predicted (T,), what happened, and seconds in all."""
    x, y, _ = stream
    predicted: list[int] = []
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), net, net.mean, net.std, keep=2000)
        loop = Loop(net, get_engine(), journal, at_once, seed=seed)
        began = time.process_time()
        for message in messages(x, y, late, seed):
            for event in (*loop.feed([message]), *loop.poll()):
                if event["event"] == "prediction":
                    predicted.append(event["label"])
                else:
                    events.append({"at": len(predicted), **event})
        seconds = time.process_time() - began
        journal.close()
    return np.array(predicted), events, seconds


def smoothed(right: np.ndarray) -> tuple[list[float], list[float]]:
    """Accuracy in % over the last WINDOW samples, at every tenth."""
    window = min(WINDOW, len(right))
    means = np.convolve(right, np.ones(window) / window, "valid") * 100
    places = np.arange(window - 1, len(right))
    return places[::10].tolist(), means[::10].tolist()


def picture(path: Path, curves: dict[str, dict[str, np.ndarray]], switches: dict[str, list[int]], ends: Any) -> None:
    from matplotlib import pyplot

    colours = {"frozen": "#7f8c8d", "loop, all labels": "#c0392b", "loop, one label in 5, late": "#2980b9"}
    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.9), dpi=110, sharey=True)
    for ax, (title, ways) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        for way, right in ways.items():
            ax.plot(*smoothed(right), color=colours[way], linewidth=1.6, label=way)
        for at in switches[title]:
            ax.axvline(at, color=colours["loop, all labels"], linewidth=0.8, linestyle=":")
        start = 0
        for name, end in ends[title].items():
            ax.axvspan(start, end, color="#000000", alpha=0.04 if list(ends[title]).index(name) % 2 else 0)
            ax.text((start + end) / 2, 2, name, ha="center", fontsize=9)
            start = end
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("samples (dotted: a new adapter goes live, all labels)", fontsize=9)
        ax.set_ylim(0, 101)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel(f"accuracy of the last {WINDOW}, %")
    np.atleast_1d(axes)[0].legend(loc="lower left", bbox_to_anchor=(0, 0.06), fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="where the picture of the first seed goes")
    parser.add_argument("--quick", action="store_true", help="networks that were not trained, and short streams")
    args = parser.parse_args()
    engine = get_engine()
    tasks = {"fan, Damage1": "damage1", "fan, Damage2": "damage2", "Fashion-MNIST, turning": "fashion"}
    if args.quick:
        tasks.pop("fan, Damage2")
    rows, kept = [], []
    curves: dict[str, dict[str, np.ndarray]] = {}
    switches: dict[str, list[int]] = {}
    ends: dict[str, dict[str, int]] = {}
    for title, name in tasks.items():
        found: dict[str, list[Any]] = {}
        for seed in range(1 if args.quick else args.seeds):
            stream = fashion(seed, args.quick) if name == "fashion" else fan(name, seed, args.quick)
            x, y, ends[title] = stream
            net = Network.init(network(TASKS[name]), 0) if args.quick else base(engine, name, TASKS[name], seed)
            frozen = forward(engine, net.spec, net.tensors, x).argmax(axis=1) == y
            found.setdefault("frozen", []).append((frozen, [], 0.0))
            for way, late in (("loop, all labels", False), ("loop, one label in 5, late", True)):
                predicted, events, seconds = replay(net, stream, late, seed)
                found.setdefault(way, []).append((predicted == y, events, seconds))
            if seed == 0:
                curves[title] = {way: runs[0][0] for way, runs in found.items()}
                switches[title] = [e["at"] for e in found["loop, all labels"][0][1] if e["event"] == "adapted"]
        for way, runs in found.items():
            parts, start = [], 0
            for end in ends[title].values():
                parts.append(np.mean([right[start:end].mean() for right, _, _ in runs]) * 100)
                start = end

            def count(kind: str, runs: list[Any] = runs) -> float:
                return float(np.mean([sum(e["event"] == kind for e in events) for _, events, _ in runs]))

            times = [
                e["seconds"]["total"] for _, events, _ in runs for e in events if e["event"] in ("adapted", "kept")
            ]
            sample = np.mean([s / len(right) for right, _, s in runs])
            rows.append(
                [
                    title,
                    way,
                    " / ".join(f"{p:.1f}" for p in parts),
                    f"{np.mean([right.mean() for right, _, _ in runs]) * 100:.1f}",
                    f"{count('drift'):.1f}",
                    f"{count('adapted'):.1f} of {count('adapting'):.1f}",
                    f"{count('rolled back'):.1f}",
                    f"{1000 * np.median(times):.0f}" if times else "–",
                    f"{1e6 * sample:.0f}" if sample else "–",
                ]
            )
            kept.append({"stream": title, "way": way, "parts": parts, "events": [events for _, events, _ in runs]})
    head = ["stream", "way", "accuracy by part, %", "all, %", "drifts", "went live", "back", "ms each", "µs a sample"]
    print(table(head, rows))
    print("\nParts: " + "; ".join(f"{title}: {' / '.join(parts)}" for title, parts in ends.items()))
    print("Microseconds a sample are the process's own time for everything, milliseconds of an adaptation wall time.")
    save_json(args.json, {"machine": machine(), "rows": kept})
    if args.picture:
        picture(args.picture, curves, switches, ends)


if __name__ == "__main__":
    main()

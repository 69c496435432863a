"""Every drift and several sizes: the closed form beside SGD, and beside full fine-tuning tuned as well as it can be.

    python -m benchmarks.drifts --json build/drifts.json                everything; goes on where it stopped
    python -m benchmarks.drifts --tasks fashion-75 --sizes 0 --seeds 3
    python -m benchmarks.drifts --cells --tasks har                     how much FT-All depends on its settings
    python -m benchmarks.drifts --json build/drifts.json --seeds 0 --pictures build    pictures of what is there

Base networks, fine-tuning samples and test samples are those of `benchmarks.accuracy`, seed by seed. Columns: before;
`fit_ridge` with its defaults; Skip2-LoRA, LoRA-All and FT-All with the papers' settings (`accuracy.TASKS`); FT-All
tuned. Means over the seeds, in percent, on unseen test data.

Tuning: SGD with momentum 0.9 and a cosine schedule, or plain; learning rate and epochs from RATES × EPOCHS. A fifth of
the fine-tuning samples, in RUNS runs of consecutive ones, is held out; the setting with most of them right wins (ties:
the smaller log loss) and is trained again on all samples. Plain SGD has no schedule, so its 10 and 20 epochs are seen
on the way to 100. With 1,024 images only the best rate of each schedule at 20 epochs goes on to 100, but for the first
seeds of Fashion-MNIST 75° and MNIST 90°; `halved` is what that shortcut yields where the whole grid was run. Seeds
from 2 on take over, with images, what seed 0 or 1 has chosen in turn, on another draw of the samples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import BATCH, TASKS, Samples, base, ours
from benchmarks.closed_form import ANGLES, NAMES, adapted, fitted, right, samples, task
from benchmarks.common import machine, orders, save_json, spread, table
from instantft.backbones.builtin import Network
from instantft.engine import Engine, Floats, get_engine
from instantft.methods import METHODS
from instantft.solvers.calibration import log_loss

RATES = (0.01, 0.02, 0.05, 0.1)
EPOCHS = (10, 20, 100)
MOMENTUM = 0.9
RUNS = 8
"""Runs of consecutive samples that are held out together: neighbours in time resemble each other."""
SHARE = 5
"""One of so many samples is held out."""
FINALISTS = 1
"""Rates of each schedule that go on to the most epochs where not all do."""
TOO_FEW = 5
"""A last batch of fewer samples is left out where batch norm is trained: its statistics mean nothing."""

SIZED = ("fashion-75", "fashion-15", "mnist-90")
SIZES = (0, 300, 100, 50)
"""Fine-tuning samples of those; 0: all there are, for every task."""
WHOLE = (("fashion-75", 0), ("fashion-75", 1), ("mnist-90", 0), ("mnist-90", 1))
"""Tasks with 1,024 images, and seeds, for which all of the grid is run."""

SEARCHED = 2
"""Seeds of images that search; those above take over."""

COLUMNS = ("before", "auto", "skip2-lora", "lora-all", "ft-all", "tuned")
WITHIN = 0.5
"""Points that `auto` may be below tuned FT-All."""


@dataclass(frozen=True)
class Setting:
    """How FT-All is trained; with cosine the rate falls from `lr` towards 0, epoch by epoch."""

    cosine: bool
    lr: float
    epochs: int

    @property
    def name(self) -> str:
        return f"{'cosine' if self.cosine else 'plain'} {self.lr:g} {self.epochs}"

    @classmethod
    def named(cls, name: str) -> Setting:
        schedule, lr, epochs = name.split()
        return cls(schedule == "cosine", float(lr), int(epochs))

    @property
    def momentum(self) -> float:
        return MOMENTUM if self.cosine else 0.0

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, from 0."""
        return self.lr / 2 * (1 + math.cos(math.pi * epoch / self.epochs)) if self.cosine else self.lr


def train(
    engine: Engine, net: Network, tune: Samples, setting: Setting, seed: int, stops: Sequence[int] = ()
) -> Iterator[tuple[int, dict[str, Floats] | None]]:
    """Train all of `net`; yield the epoch and the tensors at every stop and at the end, None once it has diverged."""
    x, y = tune
    trainer = engine.trainer(
        net.spec, net.tensors, METHODS["ft-all"], 1, x, y,
        numbers=np.arange(len(x)), store=None, batch_size=BATCH, lr=setting.lr, momentum=setting.momentum,
    )  # fmt: skip
    order = orders(len(x), setting.epochs, seed)
    if len(x) > BATCH and len(x) % BATCH < TOO_FEW and any(layer.batch_norm for layer in net.spec.layers):
        order = np.ascontiguousarray(order[:, : len(x) // BATCH * BATCH])
    well = True
    for epoch in range(setting.epochs):
        if well:
            well = trainer.epochs(order[epoch : epoch + 1], setting.rate(epoch)).diverged_at is None
        if epoch + 1 in stops or epoch + 1 == setting.epochs:
            tensors = trainer.tensors() if well else {}
            well = well and all(np.isfinite(t).all() for t in tensors.values())
            yield epoch + 1, {**net.tensors, **tensors} if well else None


def held_out(T: int) -> NDArray[np.bool_]:
    """(T,): which samples are held out, RUNS runs spread evenly."""
    mask = np.zeros(T, bool)
    for part in np.array_split(np.arange(T), RUNS):
        n = max(1, round(len(part) / SHARE))
        start = (len(part) - n) // 2
        mask[part[start : start + n]] = True
    return mask


Score = tuple[float, float]
"""Share of the held-out samples that are right, and their mean log probability."""


def search(engine: Engine, net: Network, tune: Samples, seed: int, whole: bool) -> dict[Setting, Score]:
    """The held-out score of every setting that is tried."""
    x, y = tune
    out = held_out(len(x))
    rest = np.ascontiguousarray(x[~out]), y[~out]
    scores: dict[Setting, Score] = {}

    def score(tensors: dict[str, Floats] | None) -> Score:
        if tensors is None:
            return 0.0, -math.inf
        logits = engine.forward(net.spec, tensors, np.ascontiguousarray(x[out]))
        return right(logits, y[out]), -float(log_loss(logits.astype(np.float64), y[out]).mean())

    *short, most = EPOCHS
    for cosine in (True, False):
        if cosine:
            for lr in RATES:
                for epochs in short:
                    setting = Setting(cosine, lr, epochs)
                    [(_, tensors)] = train(engine, net, rest, setting, seed)
                    scores[setting] = score(tensors)
            for lr in RATES if whole else _finalists(scores, cosine):
                setting = Setting(cosine, lr, most)
                [(_, tensors)] = train(engine, net, rest, setting, seed)
                scores[setting] = score(tensors)
        else:
            running = {lr: train(engine, net, rest, Setting(cosine, lr, most), seed, short) for lr in RATES}
            for lr, states in running.items():
                for _ in short:
                    epoch, tensors = next(states)
                    scores[Setting(cosine, lr, epoch)] = score(tensors)
            for lr in RATES if whole else _finalists(scores, cosine):
                epoch, tensors = next(running[lr])
                scores[Setting(cosine, lr, epoch)] = score(tensors)
    return scores


def _finalists(scores: dict[Setting, Score], cosine: bool) -> list[float]:
    """The better rates at the last of the short trainings."""
    return sorted(RATES, key=lambda lr: scores[Setting(cosine, lr, EPOCHS[-2])], reverse=True)[:FINALISTS]


def halved(scores: dict[Setting, Score]) -> dict[Setting, Score]:
    """What would have been tried of the whole grid otherwise."""
    return {s: v for s, v in scores.items() if s.epochs < EPOCHS[-1] or s.lr in _finalists(scores, s.cosine)}


def best(scores: dict[Setting, Score]) -> Setting:
    return max(scores, key=lambda s: scores[s])


def tuned(
    engine: Engine, net: Network, tune: Samples, seed: int, settings: Sequence[Setting]
) -> list[dict[str, Floats]]:
    """Tensors of FT-All with each setting; one that diverges on all samples leaves the base network as it is."""
    found: dict[Setting, dict[str, Floats]] = {}
    for setting in settings:
        if setting not in found:
            [(_, tensors)] = train(engine, net, tune, setting, seed)
            found[setting] = dict(net.tensors) if tensors is None else tensors
    return [found[setting] for setting in settings]


Result = dict[str, Any]


def measure(name: str, seed: int, size: int, taken_over: str | None = None) -> Result:
    """All columns of one task, seed and size; fractions, and the name of the setting that was chosen or taken over."""
    engine = get_engine()
    key, t = task(name)
    net = base(engine, key, TASKS[key], seed)
    tune, (x, y) = samples(name, seed, size)
    found: Result = {"before": right(engine.forward(net.spec, net.tensors, x), y)}
    result = fitted(engine, net, tune, seed=seed)
    found |= {"auto": right(adapted(engine, net, result, x), y), "accepted": result.decide().accepted}
    for m in ("skip2-lora", "lora-all", "ft-all"):
        percent = ours(engine, t, net, METHODS[m], tune, (x, y), seed, "fp32")
        found[m] = None if percent is None else percent / 100
    whole = t.degrees is None or (name, seed) in WHOLE or 0 < size < t.finetune
    if taken_over:
        settings = [Setting.named(taken_over)]
    else:
        scores = search(engine, net, tune, seed, whole)
        settings = [best(scores), best(halved(scores))]
    accuracies = [right(engine.forward(net.spec, made, x), y) for made in tuned(engine, net, tune, seed, settings)]
    found |= {"tuned": accuracies[0], "setting": settings[0].name}
    if whole and not taken_over:
        found["halved"] = accuracies[1]
    return found


Results = dict[str, dict[str, dict[str, Result]]]
"""Task, size, seed."""


def _column(results: Results, name: str, size: int, column: str) -> list[float]:
    """Percent, of the seeds that have it and have not diverged."""
    seeds = results.get(name, {}).get(str(size), {})
    return [100 * r[column] for _, r in sorted(seeds.items()) if r.get(column) is not None]


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}" if values else "–"


def report(results: Results) -> str:
    parts = []
    for size in SIZES:
        rows: list[list[object]] = []
        gains = []
        for name in NAMES:
            seeds = results.get(name, {}).get(str(size), {})
            if not seeds:
                continue
            cells: list[object] = []
            for column in COLUMNS:
                values = _column(results, name, size, column)
                lost = len(seeds) - len(values)
                shown = spread(values) if values and column in ("auto", "tuned") else _mean(values)
                cells.append(shown + (f" ({lost} diverged)" if lost else ""))
            gain = statistics.fmean(_column(results, name, size, "auto"))
            gain -= statistics.fmean(_column(results, name, size, "tuned"))
            gains.append(gain)
            both = [r for r in seeds.values() if "halved" in r]
            shortcut = f"{100 * statistics.fmean(r['halved'] - r['tuned'] for r in both):+.1f}" if both else "–"
            rows.append([name, *cells, f"{gain:+.1f}", shortcut, len(seeds)])
        if rows:
            title = f"{size} samples" if size else "all samples"
            head = [title, *COLUMNS, "auto − tuned", "halved − tuned", "seeds"]
            verdict = (
                f"auto − tuned FT-All: {statistics.fmean(gains):+.2f} on average, {min(gains):+.2f} at worst "
                f"({'within' if min(gains) >= -WITHIN else 'NOT within'} {WITHIN:g})."
            )
            parts += [table(head, rows), verdict]
    return "\n\n".join(parts)


def cells(name: str, seeds: int) -> dict[str, float]:
    """Test accuracy, percent, of FT-All with every setting of the grid, means over the seeds."""
    engine = get_engine()
    key, _ = task(name)
    grid = [Setting(cosine, lr, epochs) for cosine in (True, False) for lr in RATES for epochs in EPOCHS]
    sums = dict.fromkeys((setting.name for setting in grid), 0.0)
    for seed in range(seeds):
        net = base(engine, key, TASKS[key], seed)
        tune, (x, y) = samples(name, seed, 0)
        for setting, made in zip(grid, tuned(engine, net, tune, seed, grid), strict=True):
            sums[setting.name] += 100 * right(engine.forward(net.spec, made, x), y) / seeds
    return sums


STYLE = {
    "auto": ("ridge (auto)", "C3", "-"),
    "tuned": ("FT-All, tuned", "C0", "-"),
    "ft-all": ("FT-All, papers' settings", "C0", ":"),
    "lora-all": ("LoRA-All", "C2", "--"),
    "skip2-lora": ("Skip2-LoRA", "C1", "--"),
}


def pictures(results: Results, folder: Path) -> list[Path]:
    """Accuracy against angle, and against samples, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def draw(ax: Any, title: str, points: Sequence[tuple[int, str, int]]) -> None:
        """One line a column through points (place, task, size)."""
        for key, (label, colour, line) in STYLE.items():
            columns = [(place, _column(results, name, size, key)) for place, name, size in points]
            seen = [(place, values) for place, values in columns if values]
            means = [statistics.fmean(values) for _, values in seen]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in seen]
            places = [place for place, _ in seen]
            ax.errorbar(places, means, errors, label=label, color=colour, linestyle=line, marker="o", ms=3, capsize=2)
        ax.set_title(title)
        ax.grid(alpha=0.3)

    made = []
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (key, title) in zip(axes, (("fashion", "Fashion-MNIST"), ("mnist", "MNIST")), strict=True):
        draw(ax, title, [(angle, f"{key}-{angle}", 0) for angle in ANGLES])
        ax.set_xticks(ANGLES)
        ax.set_xlabel("angle, degrees")
    axes[0].set_ylabel("accuracy on unseen images, %")
    axes[1].legend(loc="lower left", fontsize=8)
    made.append(folder / "angles.png")
    fig.savefig(made[-1], dpi=110)
    plt.close(fig)

    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, name in zip(axes, SIZED, strict=True):
        t = task(name)[1]
        counts = sorted((size or t.finetune, size) for size in SIZES)
        draw(ax, f"{t.title.split(' turned')[0]}, {t.degrees:g}°", [(count, name, size) for count, size in counts])
        ax.set_xscale("log")
        ax.set_xticks([count for count, _ in counts], [str(count) for count, _ in counts])
        ax.minorticks_off()
        ax.set_xlabel("fine-tuning samples")
        frozen = _column(results, name, 0, "before")
        if frozen:
            ax.axhline(statistics.fmean(frozen), color="0.5", lw=1, label="before")
    axes[0].set_ylabel("accuracy on unseen images, %")
    axes[0].legend(loc="lower right", fontsize=8)
    made.append(folder / "sizes.png")
    fig.savefig(made[-1], dpi=110)
    plt.close(fig)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="0: all samples; others on three tasks")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="written after every run; results that are there are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cells", action="store_true", help="every setting of FT-All on the test data instead")
    parser.add_argument("--pictures", type=Path, help="folder to draw in")
    args = parser.parse_args()
    if args.cells:
        for name in args.tasks:
            found = cells(name, args.seeds)
            worst, *_, most = sorted(found, key=lambda setting: found[setting])
            print(f"{name}: from {found[worst]:.1f} ({worst}) to {found[most]:.1f} ({most})", flush=True)
        return
    results: Results = {}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text())["results"]
    searching: list[tuple[str, int, int]] = []
    following: list[tuple[str, int, int]] = []
    for seed in range(args.seeds):
        for size in args.sizes:
            for name in sorted(args.tasks, key=lambda n: n not in (*SIZED, "har", "damage1", "damage2")):
                wanted = size == 0 or name in SIZED
                if wanted and str(seed) not in results.get(name, {}).get(str(size), {}):
                    follows = seed >= SEARCHED and task(name)[1].degrees is not None
                    (following if follows else searching).append((name, seed, size))
    with ProcessPoolExecutor(args.jobs) as pool:
        for jobs in (searching, following):
            futures: dict[Future[Result], tuple[str, int, int]] = {}
            for name, seed, size in jobs:
                seen = results.get(name, {}).get(str(size), {}).get(str(seed % SEARCHED), {})
                setting = seen["setting"] if jobs is following else None
                futures[pool.submit(measure, name, seed, size, setting)] = name, seed, size
            for n, future in enumerate(as_completed(futures), 1):
                name, seed, size = futures[future]
                results.setdefault(name, {}).setdefault(str(size), {})[str(seed)] = future.result()
                save_json(args.json, {"machine": machine(), "results": results})
                print(f"{n}/{len(jobs)}: {name}, size {size}, seed {seed}", file=sys.stderr, flush=True)
    print(report(results))
    if args.pictures:
        print("\n".join(str(path) for path in pictures(results, args.pictures)), file=sys.stderr)


if __name__ == "__main__":
    main()

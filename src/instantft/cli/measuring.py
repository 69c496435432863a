"""`demo`, `bench` and `reproduce`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from .. import files
from ..errors import UsageError
from .bar import Bar
from .options import batch_option, engine_of, engine_option, json_option, seed_option, threads_option
from .show import percent, print_json, time_text


@click.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="Where picture and files go.")
@seed_option
@engine_option
@json_option
def demo(out: str, seed: int, engine: str | None, as_json: bool) -> None:
    """The whole story on scikit-learn's digits, in under a minute: pre-train, drift, adapt, compare."""
    from ..demo import run_demo

    def say(text: str) -> None:
        click.echo(text, err=as_json)

    result = run_demo(Path(out), seed, engine_of(engine), say, Bar)
    if as_json:
        print_json(result)


@click.command()
@click.argument("base", required=False)
@click.option("--data", metavar="NPZ", help="Samples and labels. [default: random ones]")
@click.option("--samples", default=1024, show_default=True, help="How many random samples.")
@click.option("--epochs", default=10, show_default=True)
@batch_option
@click.option("--lr", default=0.05, show_default=True, help="Learning rate.")
@click.option("--rank", default=4, show_default=True)
@click.option("--repeat", default=3, show_default=True, help="Interleaved rounds; medians are shown.")
@click.option("--calibrate", is_flag=True, help="Measure this machine instead, for the times of inspect --cost.")
@threads_option
@seed_option
@engine_option
@json_option
def bench(
    base: str | None,
    data: str | None,
    samples: int,
    epochs: int,
    batch_size: int,
    lr: float,
    rank: int,
    repeat: int,
    calibrate: bool,
    threads: int,
    seed: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Time every method side by side, with what one would use instead: PyTorch eager, logistic regression.

    Without BASE, the network is an untrained lenet5 on 28x28.
    """
    import numpy as np

    from ..backbones.builtin import Network
    from ..bench import run_bench
    from ..data import load_samples
    from ..solvers import sgd
    from ..spec import lenet5
    from ..table import format_table
    from ..tuner import load as load_base

    sgd.check_arguments(rank=rank, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, threads=threads)
    for name, value, high in (("--samples", samples, 1 << 20), ("--repeat", repeat, 1000)):
        if not 1 <= value <= high:
            raise UsageError(f"{name} must be 1 to {high}, not {value}")
    if calibrate:
        return _calibrate(engine, as_json)
    network = load_base(base) if base else Network.init(lenet5((1, 28, 28)), seed)
    if not network.spec.own:
        raise UsageError(f"bench must have a network of our own, which PyTorch can run beside it, not {base}")
    if data:
        loaded = load_samples(data, network.spec, network.mean, network.std)
        x, y = loaded.x, loaded.labels
    else:
        rng = np.random.default_rng([seed, 3])
        if samples * network.spec.tap_widths[0] > 1 << 28:
            raise UsageError(f"--samples must leave at most {1 << 28} values, not {samples} samples")
        x = rng.random((samples, network.spec.tap_widths[0]), np.float32)
        y = rng.integers(0, network.spec.C, samples).astype(np.int32)
    chosen = engine_of(engine)
    with Bar("benchmark", repeat) as bar:
        rows = run_bench(
            chosen,
            network,
            x,
            y,
            rank=rank,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            threads=threads,
            repeat=repeat,
            progress=bar.update,
        )
    if as_json:
        return print_json({"engine": chosen.name, "samples": len(x), "epochs": epochs, "rows": rows})
    click.echo(f"{len(x):,} samples, {epochs} epochs, batches of {batch_size}, median of {repeat} rounds\n")
    click.echo(
        format_table(
            ("", "time", "fill", "skip2-lora is", "B a sample", "accuracy"),
            [
                (
                    r["name"],
                    time_text(r["seconds"]),
                    time_text(r["fill"]) if r["fill"] else "–",
                    f"{r['ratio']:.2f}×",
                    r["bytes_per_sample"] or "–",
                    percent(r["accuracy"]),
                )
                for r in rows
            ],
        )
    )
    click.echo(
        "\n“skip2-lora is” says how many times as fast Skip2-LoRA with its fp32 cache is. "
        "Accuracy is on the samples adapted to."
    )


def _calibrate(engine: str | None, as_json: bool) -> None:
    from ..calibrating import ROUNDS, calibrate
    from ..speed import calibration_file, save_calibration

    files.check_file(calibration_file(), "a calibration")
    chosen, began = engine_of(engine), time.perf_counter()
    with Bar("calibrating", ROUNDS) as bar:
        found = calibrate(chosen, bar.update)
    path, seconds = save_calibration(found), time.perf_counter() - began
    if as_json:
        return print_json({"calibration": str(path), "seconds": seconds, "error": found.error, "rates": found.rates})
    click.echo(
        f"calibrated in {time_text(seconds)}: nine in ten of what was timed are within {percent(found.error)}\n"
        f"calibration {path}"
    )


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET …]")
@click.option("--quick", is_flag=True, help="Next to nothing of everything, in under three minutes.")
@click.option("--out", default="reproduction", show_default=True, metavar="DIR", help="Report, pictures and results.")
@click.option("--data-dir", metavar="DIR", help="Data sets. [default: $INSTANTFT_DATA or ../shared/data]")
@click.option("--trials", type=int, metavar="N", help="Seeds behind every mean. [default: as many as the papers]")
@click.option("--jobs", type=int, metavar="N", help="Trials at a time. [default: one a processor]")
@engine_option
@json_option
def reproduce(
    targets: tuple[str, ...],
    quick: bool,
    out: str,
    data_dir: str | None,
    trials: int | None,
    jobs: int | None,
    engine: str | None,
    as_json: bool,
) -> None:
    """Make the papers' tables and figures again, and a report of them beside ours: report.md, .html and .json.

    Finished trials are kept in DIR: a run that was stopped goes on where it stopped. Without TARGET: all of them.
    """
    from ..experiments.catalogue import RESULTS, chosen
    from ..experiments.catalogue import reproduce as run_all
    from ..experiments.core import extra

    chosen(targets)
    if jobs is not None and not 1 <= jobs <= 1024:
        raise UsageError(f"--jobs must be 1 to 1024, not {jobs}")
    engine_of(engine)
    joblib = extra("joblib", "joblib")

    @contextlib.contextmanager
    def stage(label: str) -> Iterator[Callable[[float], None]]:
        with Bar(label, 100) as bar:
            yield lambda share: bar.update(100 * share)

    try:
        with joblib.parallel_config(n_jobs=jobs or os.cpu_count() or 1):
            made = run_all(targets, Path(out), quick=quick, trials=trials, data=data_dir, engine=engine, stage=stage)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished trials are in {Path(out) / RESULTS}, and the same command goes on"
        ) from None
    report = [str(path) for path in made.files]
    if as_json:
        return print_json({"targets": list(made.sections), "ran": made.ran, "kept": made.kept, "files": report})
    for name, section in made.sections.items():
        click.echo(f"{name}: {' '.join(section.note.split())}\n")
    click.echo(f"{made.ran} trials run, {made.kept} kept from before; the report is {Path(out) / 'report.html'}")

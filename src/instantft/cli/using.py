"""`evaluate` and `predict`."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .options import (
    adapter_option,
    check_file_target,
    core_options,
    engine_or_core,
    json_option,
    preprocessing_options,
    source_options,
    task_option,
    threads_option,
)
from .running import forward_samples
from .show import core_text, percent, print_json


@click.command()
@click.argument("base")
@adapter_option
@click.option("--data", required=True, metavar="NPZ|CSV|FOLDER", help="Samples and labels.")
@source_options
@task_option
@preprocessing_options("that of BASE")
@threads_option
@core_options
@json_option
def evaluate(
    base: str,
    adapter: str | None,
    data: str,
    size: int | None,
    label: str | None,
    task: str | None,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    hw_config: str | None,
    as_json: bool,
) -> None:
    """How well labelled samples are told: accuracy, per class, and the confusion matrix; or what else fits the task."""
    from ..solvers.metrics import measured
    from ..tasks import targets

    who, core = engine_or_core(engine, hw_config)
    found, chosen, samples, logits = forward_samples(
        base, adapter, data, mean, std, threads, who, labels=True, task=task, size=size, label=label
    )
    goal = targets(samples.labels, logits.shape[1], found)
    result = {**measured(goal, logits), "task": found, "engine": chosen.name}
    if core is not None:
        result["hardware"] = core.report()
    for entry, name in zip(result.get("per_class", ()), samples.classes, strict=False):
        entry["name"] = name
    if as_json:
        return print_json(result)
    {"classification": _print_classes, "regression": _print_numbers, "multi-label": _print_labels}[found](result)
    if core is not None:
        click.echo(f"\n{core_text(core.report())}")


def _print_classes(r: dict[str, Any]) -> None:
    from ..table import format_table

    C, per_class = len(r["per_class"]), r["per_class"]
    click.echo(
        f"accuracy {r['accuracy']:.2%}   balanced {r['balanced_accuracy']:.2%}   macro F1 {r['macro_f1']:.2%}   "
        f"loss {r['loss']:.4f}   calibration error {r['calibration_error']:.1%}   n {r['n']:,}\n"
    )
    if C > 30:
        rows = [(p.get("name", p["class"]), p["n"], percent(p["accuracy"])) for p in per_class]
        click.echo(format_table(("class", "n", "accuracy"), rows))
        return click.echo(f"\nThe confusion matrix ({C}x{C}) is in --json.")
    cells = [
        (
            f"{p['class']} {p['name']}" if "name" in p else p["class"],
            *(n or "·" for n in row),
            p["n"],
            percent(p["accuracy"]),
        )
        for p, row in zip(per_class, r["confusion_matrix"], strict=True)
    ]
    click.echo("Rows are the true class, columns the predicted one.")
    click.echo(format_table(("true", *map(str, range(C)), "n", "accuracy"), cells))


def _print_numbers(r: dict[str, Any]) -> None:
    from ..table import format_table

    click.echo(f"R² {_number(r['r2'])}   RMSE {r['rmse']:.4g}   MAE {r['mae']:.4g}   n {r['n']:,}\n")
    rows = [(p["output"], _number(p["r2"]), f"{p['rmse']:.4g}", f"{p['mae']:.4g}") for p in r["per_output"]]
    click.echo(format_table(("output", "R²", "RMSE", "MAE"), rows))


def _print_labels(r: dict[str, Any]) -> None:
    from ..table import format_table

    click.echo(
        f"labels right {r['label_accuracy']:.2%}   samples wholly right {r['exact_match']:.2%}   "
        f"macro F1 {r['macro_f1']:.2%}   balanced {r['balanced_accuracy']:.2%}   loss {r['loss']:.4f}   n {r['n']:,}\n"
    )
    names = ("accuracy", "balanced_accuracy", "f1")
    rows = [(p["label"], p["n"], *(percent(p[name]) for name in names)) for p in r["per_label"]]
    click.echo(format_table(("label", "n", "accuracy", "balanced", "F1"), rows))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


@click.command()
@click.argument("base")
@adapter_option
@click.option("--data", required=True, metavar="NPZ|CSV|FOLDER", help="Samples.")
@source_options
@click.option("--out", required=True, metavar="NPZ", help="Where predictions go.")
@task_option
@preprocessing_options("that of BASE")
@threads_option
@core_options
@json_option
def predict(
    base: str,
    adapter: str | None,
    data: str,
    size: int | None,
    label: str | None,
    out: str,
    task: str | None,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    hw_config: str | None,
    as_json: bool,
) -> None:
    """Predict samples; write logits, probabilities and label to an .npz, or what else fits the task."""
    import io

    import numpy as np

    from .. import files
    from ..adapters import CONFIG_FILE, TENSOR_FILE
    from ..solvers.calibration import probabilities

    inputs = {"--data": data, "BASE": base}
    if adapter:
        inputs |= {
            "the adapter": str(Path(adapter, TENSOR_FILE)),
            "the adapter's config": str(Path(adapter, CONFIG_FILE)),
        }
    check_file_target(out, inputs)
    _check_replaceable(Path(out))
    who, core = engine_or_core(engine, hw_config)
    found, chosen, samples, logits = forward_samples(
        base, adapter, data, mean, std, threads, who, labels=False, task=task, size=size, label=label
    )
    made: dict[str, Any]
    if found == "regression":
        made = {"value": logits}
    else:
        told = logits.argmax(axis=1) if found == "classification" else (logits > 0).astype(np.int64)
        made = {"logits": logits, "probabilities": probabilities(found, logits), "label": told}
    if samples.classes:
        made["classes"] = np.array(samples.classes)
    if samples.names:
        made["image"] = np.array(samples.names)
    buffer = io.BytesIO()
    np.savez(buffer, **made)
    files.write_whole(Path(out), buffer.getvalue(), "predictions")
    if as_json:
        names = list(samples.classes) or None
        said: dict[str, Any] = {"task": found, "keys": list(made), "classes": names, "engine": chosen.name}
        if core is not None:
            said["hardware"] = core.report()
        return print_json({"n": len(logits), "out": out, **said})
    click.echo(f"{len(logits):,} predictions ({', '.join(made)}) in {out}")
    if core is not None:
        click.echo(core_text(core.report()))


_PREDICTED = {f"{key}.npy" for key in ("logits", "probabilities", "label", "value", "classes", "image")}


def _check_replaceable(out: Path) -> None:
    """Refuse to write predictions over what are no predictions: samples, say."""
    try:
        if not out.exists() or out.stat().st_size == 0:
            return
        with zipfile.ZipFile(out) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        names = set()
    if not names or not names <= _PREDICTED:
        raise UsageError(f"--out must be a new file or earlier predictions, but {out} is something else")

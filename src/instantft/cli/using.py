"""`evaluate` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    adapter_option,
    check_file_target,
    engine_option,
    json_option,
    preprocessing_options,
    threads_option,
)
from .running import forward_samples
from .show import percent, print_json


@click.command()
@click.argument("base")
@adapter_option
@click.option("--data", required=True, metavar="NPZ", help="Samples x and labels y.")
@preprocessing_options("that of BASE")
@threads_option
@engine_option
@json_option
def evaluate(
    base: str,
    adapter: str | None,
    data: str,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Accuracy and loss on labelled samples, per class, and the confusion matrix."""
    import numpy as np

    from ..solvers.calibration import expected_calibration_error, log_loss, softmax
    from ..table import format_table

    network, chosen, samples, logits = forward_samples(base, adapter, data, mean, std, threads, engine, labels=True)
    y, C = samples.labels, network.spec.C
    predicted = logits.argmax(axis=1)
    confusion = np.zeros((C, C), np.int64)
    np.add.at(confusion, (y, predicted), 1)
    counts, right = confusion.sum(axis=1), confusion.diagonal()
    result: dict[str, Any] = {
        "accuracy": float(right.sum() / len(y)),
        "loss": float(log_loss(logits.astype(np.float64), y).mean()),
        "calibration_error": expected_calibration_error(softmax(logits), y),
        "n": len(y),
        "per_class": [
            {"class": c, "n": int(counts[c]), "accuracy": float(right[c] / counts[c]) if counts[c] else None}
            for c in range(C)
        ],
        "confusion_matrix": confusion.tolist(),
        "engine": chosen.name,
    }
    if as_json:
        return print_json(result)
    click.echo(
        f"accuracy {result['accuracy']:.2%}   loss {result['loss']:.4f}   "
        f"calibration error {result['calibration_error']:.1%}   n {len(y):,}\n"
    )
    if C > 30:
        click.echo(
            format_table(
                ("class", "n", "accuracy"),
                [(p["class"], p["n"], percent(p["accuracy"])) for p in result["per_class"]],
            )
        )
        return click.echo(f"\nThe confusion matrix ({C}x{C}) is in --json.")
    rows = [
        (
            c,
            *(n or "·" for n in confusion[c].tolist()),
            int(counts[c]),
            percent(result["per_class"][c]["accuracy"]),
        )
        for c in range(C)
    ]
    click.echo("Rows are the true class, columns the predicted one.")
    click.echo(format_table(("true", *map(str, range(C)), "n", "accuracy"), rows))


@click.command()
@click.argument("base")
@adapter_option
@click.option("--data", required=True, metavar="NPZ", help="Samples x.")
@click.option("--out", required=True, metavar="NPZ", help="Where logits, probabilities and label go.")
@preprocessing_options("that of BASE")
@threads_option
@engine_option
@json_option
def predict(
    base: str,
    adapter: str | None,
    data: str,
    out: str,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Predict samples; write logits, probabilities and label to an .npz."""
    import io

    import numpy as np

    from .. import files
    from ..adapters import CONFIG_FILE, TENSOR_FILE
    from ..solvers.calibration import softmax

    inputs = {"--data": data, "BASE": base}
    if adapter:
        inputs |= {
            "the adapter": str(Path(adapter, TENSOR_FILE)),
            "the adapter's config": str(Path(adapter, CONFIG_FILE)),
        }
    check_file_target(out, inputs)
    _, chosen, _, logits = forward_samples(base, adapter, data, mean, std, threads, engine, labels=False)
    label = logits.argmax(axis=1)
    buffer = io.BytesIO()
    np.savez(buffer, logits=logits, probabilities=softmax(logits), label=label)
    files.write_whole(Path(out), buffer.getvalue(), "predictions")
    if as_json:
        return print_json({"n": len(label), "out": out, "engine": chosen.name})
    click.echo(f"{len(label):,} predictions in {out}")

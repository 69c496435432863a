"""How results are shown: numbers as people write them, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..engine import EpochStats


def print_json(result: dict[str, Any]) -> None:
    click.echo(json.dumps(_plain(result), allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has no NaN or Inf; they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def flops_text(n: int | None) -> str:
    if n is None:
        return "–"
    if n >= 1e9:
        return f"{n / 1e9:.2f} G"
    return f"{n / 1e6:.3f} M" if n >= 1e6 else f"{n / 1e3:.1f} k"


def time_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.1%}"


def core_text(report: dict[str, Any]) -> str:
    """What the hardware core did, in a line or two."""
    cut = [f"{n:,} {kind}" for kind, n in report["saturations"].items() if n]
    text = f"core     {report['config']}; saturated: {', '.join(cut) or 'nothing'}"
    if "cycles" in report:
        c = report["cycles"]
        phases = ", ".join(f"{name} {n:,}" for name, n in c.items() if name != "total")
        clock = f"{time_text(report['simulated_seconds'])} at {report['clock_mhz']:g} MHz, simulated"
        text += f"\ncycles   {c['total']:,} ({phases}): {clock}"
    return text


def history_of(stats: EpochStats, T: int, told: bool = True) -> list[dict[str, Any]]:
    """A row an epoch; told: whether samples are told rightly or wrongly, as numbers are not."""
    pairs = zip(stats.loss.tolist(), stats.correct.tolist(), strict=True)
    return [
        {"epoch": e + 1, "loss": loss, "accuracy": correct / T if told else None}
        for e, (loss, correct) in enumerate(pairs)
    ]


def print_history(history: Any) -> None:
    from ..table import format_table

    rows = [(h["epoch"], f"{h['loss']:.4f}", "–" if h["accuracy"] is None else f"{h['accuracy']:.2%}") for h in history]
    click.echo(format_table(("epoch", "loss", "accuracy"), rows) + "\n")

"""What `inspect --cost` says: what a run of each method would take, before it is run."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .show import flops_text, time_text

if TYPE_CHECKING:
    from ..backbones.builtin import Network
    from ..methods import Method


def costs_of(
    network: Network,
    only: Method | None,
    cache: str | None,
    T: int,
    epochs: int,
    batch_size: int,
    rank: int | None,
    memory_limit: str | None,
) -> dict[str, Any]:
    """FLOPs, bytes, seconds on this machine and peak memory of fine-tuning by each method, or by one.

    Raises:
        UsageError: the one method would not keep within the limit.
    """
    from ..cache.codecs import codec
    from ..cost import closed_form, cost, parts
    from ..memory import Plan, check_limit, peak_memory, size_of
    from ..methods import METHODS, own_rank
    from ..solvers.ridge import MAX_SYSTEM
    from ..speed import calibration_file, fill_work, load_calibration, train_work

    spec = network.spec
    limit = None if memory_limit is None else size_of(memory_limit)
    calibration, why = load_calibration("native")
    foreign_seconds, foreign_bytes = network.runtime_cost()
    runs = []
    for m in METHODS.values() if only is None else (only,):
        if not (m.rows_only or spec.own) or (m.solver == "ridge" and min(T, sum(spec.tap_widths) + 1) > MAX_SYSTEM):
            continue
        R = own_rank(m, spec) if rank is None else rank
        named = cache if cache is not None and m.cacheable else ("fp32" if m.cached else None)
        name = None if named == "none" else named
        c, each, steps = cost(spec, m, R), parts(spec, m, R), epochs * math.ceil(T / batch_size)
        frozen = sum(part.forward for part in each if part.name[0] != "x")
        kept = 0 if name is None else codec(name).bytes_per_sample(spec.record)
        if m.solver == "ridge":
            flops = T * frozen + closed_form(spec, T).flops
            moved = T * sum(part.forward_bytes for part in each if part.name[0] != "x") + 2 * T * kept
        else:
            step = (c.forward if name is None else c.forward_cached or 0) + c.backward
            flops = epochs * T * step + steps * sum(part.update for part in each) + (T * frozen if name else 0)
            read = sum(part.forward_bytes for part in each if name is None or part.name[0] == "x")
            read += sum(part.backward_bytes for part in each)
            moved = epochs * T * (read + kept) + steps * sum(part.update_bytes for part in each) + T * kept
        plan = Plan(spec, m, T, R, epochs, batch_size, codec=name, foreign=foreign_bytes)
        if only is not None and limit is not None:
            plan = check_limit(plan, limit)
        seconds = None
        if calibration is not None:
            train = train_work(spec, m, T, rank=R, epochs=epochs, batch_size=batch_size, codec=name)
            times = [calibration.seconds(work) for work in (train, *([fill_work(spec, T, name)] if name else []))]
            seconds = None if None in times else sum(t for t in times if t is not None)
            if seconds is not None and not spec.own:
                seconds += T * foreign_seconds
        peak = peak_memory(plan)
        runs.append(
            {
                "method": m.name,
                "rank": R if m.adapters != "none" else None,
                "cache": name,
                "parameters": c.parameters,
                "flops": flops,
                "bytes": moved,
                "cache_bytes": T * kept,
                "seconds": seconds,
                "memory": peak,
                "peak": sum(peak.values()),
                "fits": None if limit is None else sum(peak.values()) <= limit,
                "layers": [asdict(part) for part in each],
            }
        )
    return {
        "samples": T,
        "epochs": epochs,
        "batch_size": batch_size,
        "limit": limit,
        "runs": runs,
        "flops_of_the_network": "counted" if spec.own else "not counted",
        "seconds_a_sample_of_the_network": None if spec.own else foreign_seconds,
        "calibration": {"file": str(calibration_file()), "missing": why or None},
    }


def print_costs(r: dict[str, Any], one: bool) -> None:
    """The same, for people; of one method, each layer."""
    from ..memory import size_text
    from ..table import format_table

    click.echo(f"\n{r['samples']:,} samples, {r['epochs']} epochs of SGD in batches of {r['batch_size']}:")
    rows = [
        (
            run["method"],
            run["cache"] or "–",
            f"{run['parameters']:,}",
            flops_text(run["flops"]),
            size_text(run["bytes"]),
            time_text(run["seconds"]) if run["seconds"] is not None else "–",
            size_text(run["peak"]) + ("" if run["fits"] in (None, True) else " too much"),
        )
        for run in r["runs"]
    ]
    click.echo(format_table(("method", "cache", "parameters", "FLOPs", "moved", "time", "peak memory"), rows))
    if r["flops_of_the_network"] != "counted":
        each = time_text(r["seconds_a_sample_of_the_network"])
        click.echo(
            f"FLOPs and bytes of the network itself are not counted: onnxruntime runs it, in {each} a sample here."
        )
    if r["calibration"]["missing"]:
        click.echo(f"No times, because {r['calibration']['missing']}: make one with instantft bench --calibrate")
    if not one:
        return click.echo("--method M shows what each of its layers takes.")
    for run in r["runs"]:
        click.echo(f"\n{run['method']}, a sample (an update: a step):")
        rows = [
            (
                part["name"],
                part["type"],
                *(flops_text(part[key]) if part[key] else "–" for key in ("forward", "backward", "update")),
                *(
                    f"{part[key]:,}" if part[key] else "–"
                    for key in ("forward_bytes", "backward_bytes", "update_bytes")
                ),
            )
            for part in run["layers"]
        ]
        head = ("layer", "type", "forward", "backward", "update", "bytes forward", "backward", "update")
        click.echo(format_table(head, rows))
        held = ", ".join(f"{name} {size_text(n)}" for name, n in run["memory"].items())
        click.echo(f"peak memory: {held}")

"""`inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import batch_option, input_shape_option, json_option, memory_option, sizes, taps_option
from .show import flops_text, print_json, shape_text

if TYPE_CHECKING:
    from ..backbones.builtin import Network
    from ..lift import LiftCost
    from ..spec import NetSpec


@click.command()
@click.argument("path", metavar="BASE|DIR")
@click.option("--rank", type=int, help="Of the adapters whose cost is shown. [default: 4; full for skip-ridge]")
@click.option("--samples", default=1024, show_default=True, help="For the cost of skip-ridge, which has no steps.")
@click.option("--cost", is_flag=True, help="What a run would take: FLOPs, bytes, time here, peak memory; of BASE.")
@click.option("--method", metavar="M", help="With --cost: this method only, and each of its layers.")
@click.option("--cache", metavar="CODEC", help="With --cost: of the methods that can have one, or none.")
@click.option("--epochs", default=10, show_default=True, help="With --cost.")
@batch_option
@memory_option
@taps_option
@input_shape_option
@json_option
def inspect(
    path: str,
    rank: int | None,
    samples: int,
    cost: bool,
    method: str | None,
    cache: str | None,
    epochs: int,
    batch_size: int,
    memory_limit: str | None,
    taps: str | None,
    input_shape: str | None,
    as_json: bool,
) -> None:
    """Layers, taps, shapes, parameters, FLOPs, and bytes a sample in the cache; with --cost, what a run would take."""
    from .. import lift
    from ..adapters import Adapter
    from ..cache.codecs import codec
    from ..methods import method as row
    from ..solvers import lifting, sgd
    from ..tuner import load as load_base
    from .costing import costs_of, print_costs

    sgd.check_arguments(rank=1 if rank is None else rank, epochs=epochs, batch_size=batch_size)
    only = None if method is None else row(method)
    if cache not in (None, "none"):
        codec(cache)
    if not cost and (method, cache, memory_limit) != (None, None, None):
        raise UsageError("--method, --cache and --memory-limit must go with --cost")
    if not 1 <= samples <= 1 << 40:
        raise UsageError(f"--samples must be 1 to {1 << 40}, not {samples}")
    result: dict[str, Any]
    if Path(path).is_dir():
        if cost:
            raise UsageError(f"--cost must be asked of a BASE, not of the adapter in {path}")
        adapter = Adapter.load(path)
        spec = adapter.spec
        result = {
            "kind": "adapter",
            "method": adapter.method,
            "rank": adapter.rank,
            "base_hash": adapter.base_hash,
            "trainable_parameters": adapter.parameters,
            "tensors": {name: list(t.shape) for name, t in adapter.tensors.items()},
            "training": {name: value for name, value in adapter.config.items() if name != "left_out"},
            "lift": lift_cost_of(spec, adapter.lift_cost),
        }
        rank = adapter.rank
    else:
        network = load_base(path, taps, input_shape=sizes("--input-shape", input_shape))
        spec = network.spec
        result = {"kind": "base", "hash": network.hash, "mean": list(network.mean), "std": list(network.std)}
        if not spec.own:
            result["candidates"] = _candidates(network)
        result["lifts"] = {
            kind: lift_cost_of(spec, lift.cost(spec, *lifting.size(kind, samples)))
            for kind in lifting.LIFTS
            if kind != "arccos" or samples <= lift.MAX_LANDMARKS
        }
        if cost:
            result["cost"] = costs_of(network, only, cache, samples, epochs, batch_size, rank, memory_limit)
    result |= (_described if spec.own else _described_foreign)(spec, rank, samples)
    if as_json:
        return print_json(result)
    if cost:
        return print_costs(result["cost"], method is not None)
    (_print_inspection if spec.own else _print_foreign)(path, result)


def _described(spec: NetSpec, rank: int | None, T: int) -> dict[str, Any]:
    from ..cache.codecs import CODECS
    from ..cost import cost, linear_macs, network_parameters
    from ..methods import METHODS, own_rank

    layers = [
        {
            "layer": k,
            "kind": y.kind,
            "in": list(g.in_shape),
            "out": list(g.out_shape),
            "kernel": list(y.kernel) if y.kind == "conv" else None,
            "padding": list(y.padding) if y.kind == "conv" else None,
            "batch_norm": y.batch_norm,
            "relu": y.relu,
            "pool": y.pool,
            "macs": macs,
        }
        for k, (y, g, macs) in enumerate(zip(spec.layers, spec.geometry, linear_macs(spec), strict=True))
    ]
    methods = []
    for m in METHODS.values():
        R = own_rank(m, spec) if rank is None else rank
        c = cost(spec, m, R)
        methods.append(
            {
                "method": m.name,
                "rank": R if m.adapters != "none" else None,
                "trainable_parameters": c.parameters,
                "forward_flops": c.forward,
                "forward_flops_cached": c.forward_cached,
                "backward_flops": c.backward,
                "memory_bytes": c.memory,
            }
        )
    return {
        "input_shape": list(spec.input_shape),
        "classes": spec.C,
        "parameters": network_parameters(spec),
        "layers": layers,
        "taps": [{"name": f"x{k}", "size": n} for k, n in enumerate(spec.tap_widths)],
        "record_floats": spec.record.size,
        "cache_bytes_per_sample": {name: c.bytes_per_sample(spec.record) for name, c in CODECS.items()},
        "methods": methods,
        "closed_form": _solve(spec, T),
    }


def _candidates(network: Network) -> list[dict[str, Any]]:
    """Every value of an ONNX model that could be a tap."""
    from ..backbones.onnx import OnnxNetwork

    assert isinstance(network, OnnxNetwork)
    entry, chosen = network.model.inputs[0].name, {tap.value: tap for tap in network.taps}
    return [
        {
            "name": tap.value,
            "shape": list(tap.shape),
            "bytes": 4 * tap.width,
            "chosen": chosen[tap.value].name
            if tap.value in chosen
            else (entry if tap.value == entry and network.spec.input_tap else None),
        }
        for tap in network.candidates
    ]


def _solve(spec: NetSpec, T: int) -> dict[str, Any]:
    """What the closed form takes for T samples with its fp32 cache, beside what a foreign runtime does."""
    from ..cost import closed_form
    from ..memory import Plan, peak_memory
    from ..methods import method

    peak = peak_memory(Plan(spec, method("skip-ridge"), T, spec.C, codec="fp32"))
    return {"samples": T, **asdict(closed_form(spec, T)), "memory": sum(peak.values())}


def _described_foreign(spec: NetSpec, rank: int | None, T: int) -> dict[str, Any]:
    """What is known of a network that somebody else runs."""
    from ..cache.codecs import CODECS
    from ..methods import METHODS, own_rank, parameters

    methods = []
    for m in METHODS.values():
        if m.rows_only:
            R = own_rank(m, spec) if rank is None else rank
            methods.append({"method": m.name, "rank": R, "trainable_parameters": parameters(m, spec, R)})
    return {
        "input_shape": list(spec.input_shape),
        "classes": spec.C,
        "taps": [
            {"name": f"x{k}", "size": n, "value": spec.layers[k - 1].name if k else "the input"}
            for k, n in enumerate(spec.tap_widths)
            if k >= spec.first_tap
        ],
        "logits": spec.layers[-1].name,
        "record_floats": spec.record.size,
        "cache_bytes_per_sample": {name: c.bytes_per_sample(spec.record) for name, c in CODECS.items()},
        "methods": methods,
        "closed_form": _solve(spec, T),
    }


def _print_foreign(path: str, r: dict[str, Any]) -> None:
    from ..table import format_table

    what = "adapter" if r["kind"] == "adapter" else "ONNX model"
    click.echo(f"{what} {path}: input {shape_text(r['input_shape'])}, {r['classes']} classes in {r['logits']}")
    click.echo(f"of base {r['base_hash']}" if r["kind"] == "adapter" else f"hash {r['hash']} (with these taps)")
    if "candidates" in r:
        rows = [(c["name"], shape_text(c["shape"]), f"{c['bytes']:,}", c["chosen"] or "–") for c in r["candidates"]]
        click.echo("\nCandidates for --taps:")
        click.echo(format_table(("value", "shape", "bytes a sample", "chosen"), rows))
    click.echo("\nTaps:")
    click.echo(format_table(("tap", "value", "width"), [(t["name"], t["value"], f"{t['size']:,}") for t in r["taps"]]))
    click.echo()
    methods = [(m["method"], m["rank"], f"{m['trainable_parameters']:,}") for m in r["methods"]]
    click.echo(format_table(("method", "rank", "parameters"), methods))
    solve = r["closed_form"]
    click.echo(
        f"\nskip-ridge solves one system ({solve['space']}): {flops_text(solve['flops'])} and "
        f"{solve['memory'] / 1e6:,.1f} MB for {solve['samples']:,} samples."
    )
    click.echo(f"\nCache, {r['record_floats']:,} values a sample:")
    click.echo(format_table(("codec", "bytes"), [(k, f"{v:,}") for k, v in r["cache_bytes_per_sample"].items()]))


def lift_cost_of(spec: NetSpec, c: LiftCost | None) -> dict[str, Any] | None:
    """What a lift adds to the prediction of one sample, beside the network's own."""
    from ..cost import linear_macs, network_parameters

    if c is None:
        return None
    return {
        "directions": c.directions,
        "landmarks": c.landmarks,
        "macs": c.macs,
        "bytes": c.bytes,
        "network_macs": sum(linear_macs(spec)) if spec.own else None,
        "network_bytes": 4 * network_parameters(spec) if spec.own else None,
    }


def _print_lifts(lifts: Mapping[str, dict[str, Any]]) -> None:
    from ..table import format_table

    rows = [
        (
            name,
            f"{c['directions']:,}",
            f"{c['landmarks']:,}",
            f"{c['macs']:,}",
            f"{c['macs'] / c['network_macs']:.2f}×",
            f"{c['bytes'] / 1000:,.1f} kB",
            f"{c['bytes'] / c['network_bytes']:.2f}×",
        )
        for name, c in lifts.items()
    ]
    head = ("lift", "directions", "landmarks", "multiply-adds", "the network's", "tensors", "the network's")
    click.echo(format_table(head, rows))


def _print_inspection(path: str, r: dict[str, Any]) -> None:
    from ..table import format_table

    if r["kind"] == "adapter":
        idle = "" if r["training"].get("trained", True) else "; it changes nothing: the gate said no"
        click.echo(f"adapter {path}: {r['method']}, rank {r['rank']}, {r['trainable_parameters']:,} parameters{idle}")
        click.echo(f"of base {r['base_hash']}")
        for name, shape in r["tensors"].items():
            click.echo(f"  {name:<28} {shape_text(shape)}")
    else:
        click.echo(f"base {path}: {r['parameters']:,} parameters, {r['classes']} classes\nhash {r['hash']}")
        for name in ("mean", "std"):
            if r[name]:
                click.echo(f"{name} {', '.join(f'{v:g}' for v in r[name])}")
    click.echo(
        "\n"
        + format_table(
            ("layer", "tap", "in", "out", "then", "multiply-adds"),
            [
                (
                    f"{y['layer']} {y['kind']}" + (f" {shape_text(y['kernel'])}" if y["kernel"] else ""),
                    f"x{y['layer']}: {r['taps'][y['layer']]['size']:,}",
                    shape_text(y["in"]),
                    shape_text(y["out"]),
                    " ".join(
                        [
                            *(["norm"] if y["batch_norm"] else []),
                            *(["relu"] if y["relu"] else []),
                            *([f"pool {y['pool']}"] if y["pool"] > 1 else []),
                        ]
                    )
                    or "–",
                    f"{y['macs']:,}",
                )
                for y in r["layers"]
            ],
        )
    )
    click.echo("\nCost a sample (FLOPs; memory of training with batches of one):")
    click.echo(
        format_table(
            ("method", "rank", "parameters", "forward", "cached", "backward", "memory"),
            [
                (
                    m["method"],
                    m["rank"] or "–",
                    f"{m['trainable_parameters']:,}",
                    flops_text(m["forward_flops"]),
                    flops_text(m["forward_flops_cached"]),
                    flops_text(m["backward_flops"]) if m["backward_flops"] else "–",
                    f"{m['memory_bytes'] / 1000:,.1f} kB",
                )
                for m in r["methods"]
            ],
        )
    )
    solve = r["closed_form"]
    click.echo(
        f"\nskip-ridge solves one system ({solve['space']}) instead: {flops_text(solve['flops'])} and "
        f"{solve['memory'] / 1e6:,.1f} MB for {solve['samples']:,} samples."
    )
    if r.get("lift"):
        click.echo("\nThe lift adds to every prediction, beside the network:")
        _print_lifts({"": r["lift"]})
    elif "lifts" in r:
        click.echo(
            f"\nA lift by {r['closed_form']['samples']:,} samples would add to every prediction, beside the network:"
        )
        _print_lifts(r["lifts"])
    click.echo(f"\nCache, {r['record_floats']:,} values a sample:")
    click.echo(format_table(("codec", "bytes"), [(k, f"{v:,}") for k, v in r["cache_bytes_per_sample"].items()]))

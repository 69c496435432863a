"""`export`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import adapter_option, batch_option, check_file_target, json_option, seed_option
from .running import adapted
from .show import print_json


@click.group()
def export() -> None:
    """An adapted network for other programs."""


@export.command("onnx")
@click.argument("base")
@adapter_option
@click.option("--out", required=True, metavar="FILE", help="Where the ONNX model goes.")
@json_option
def export_onnx(base: str, adapter: str | None, out: str, as_json: bool) -> None:
    """One ONNX file of the network BASE with its adapter as ordinary nodes.

    Any runtime can run it; it needs nothing of instantft.
    """
    from ..export.onnx import export_onnx

    check_file_target(out, {"BASE": base})
    network, loaded = adapted(base, adapter)
    export_onnx(network, loaded, out)
    size = Path(out).stat().st_size
    if as_json:
        return print_json({"out": out, "bytes": size, "method": loaded.method if loaded else None})
    click.echo(f"{out}: {size:,} bytes")


@export.command("c")
@click.argument("base")
@adapter_option
@click.option("--out", required=True, metavar="DIR", help="Folder of its own; an earlier export is replaced.")
@click.option("--samples", required=True, type=int, help="Most samples kept on the device.")
@click.option("--method", metavar="skip2-lora|skip-ridge", default="skip2-lora", show_default=True)
@click.option("--cache", metavar="CODEC", default="nf4", show_default=True, help="How records are kept.")
@click.option("--weights", metavar="fp32|int8", default="fp32", show_default=True, help="Of the frozen network.")
@click.option("--input", "inputs", metavar="float32|uint8", default="float32", show_default=True, help="Of a sample.")
@click.option("--rank", default=4, show_default=True)
@batch_option
@click.option("--epochs", type=int, help="Of SGD. [default: as many as 500 steps of --samples take, at least 10]")
@click.option("--lr", type=float, help="Learning rate. [default: from the samples of --data; without them 0.1]")
@click.option("--momentum", default=0.0, show_default=True)
@seed_option
@click.option("--neon", is_flag=True, help="Vectors of four, for Cortex-A; otherwise plain C.")
@click.option("--flash", type=int, metavar="BYTES", help="Refuse what needs more.")
@click.option("--ram", type=int, metavar="BYTES", help="Refuse what needs more; the stack counts.")
@click.option("--data", metavar="NPZ", help="Samples and labels for the example on the board.")
@json_option
def export_c(
    base: str,
    adapter: str | None,
    out: str,
    samples: int,
    method: str,
    cache: str,
    weights: str,
    inputs: str,
    rank: int,
    batch_size: int,
    epochs: int | None,
    lr: float | None,
    momentum: float,
    seed: int,
    neon: bool,
    flash: int | None,
    ram: int | None,
    data: str | None,
    as_json: bool,
) -> None:
    """A folder of C11 of the network BASE that adapts itself on a microcontroller.

    Sources, headers, tests, and files for make, CMake, Arduino and Zephyr. No dependency but libm, no malloc.
    """
    from ..data import load_samples
    from ..export.c import export_c

    network, loaded = adapted(base, adapter)
    takes = export_c(
        network,
        loaded,
        out,
        samples=samples,
        method=method,
        cache=cache,
        weights=weights,
        inputs=inputs,
        rank=rank,
        batch_size=batch_size,
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        seed=seed,
        lanes=4 if neon else 1,
        flash=flash,
        ram=ram,
        data=load_samples(data, network.spec) if data else None,
    )
    if as_json:
        flash_bytes, ram_bytes = sum(takes.flash.values()), sum(takes.ram.values())
        return print_json(
            {
                "out": out,
                "flash": {**takes.flash, "total": flash_bytes},
                "ram": {**takes.ram, "total": ram_bytes},
                "largest_samples": takes.largest,
                "lr": takes.lr,
            }
        )
    for name, parts, limit in (("flash", takes.flash, flash), ("RAM", takes.ram, ram)):
        total = sum(parts.values())
        click.echo(f"{name:5} {total:>10,} bytes" + (f" of {limit:,}" if limit is not None else ""))
        for part, n in parts.items():
            if n:
                click.echo(f"      {n:>10,}  {part}")
    if takes.largest is not None:
        click.echo(f"up to {takes.largest} samples would fit into RAM")
    if takes.lr is not None:
        click.echo(f"step size {takes.lr:.4g}" + (", from the samples of --data" if lr is None and data else ""))
    click.echo(f"written to {out}")

"""`export`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import adapter_option, check_file_target, json_option
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

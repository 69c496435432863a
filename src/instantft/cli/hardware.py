"""`hw generate`, `hw synth`, `hw route`: the core as files, and what it takes of a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .bar import Bar
from .options import json_option
from .show import print_json

if TYPE_CHECKING:
    from ..hw.configs import Config
    from ..hw.layout import Build

WIDTH = 30
"""Characters of a bar that is full."""


@click.group()
def hw() -> None:
    """The FPGA core: its Verilog, and what open tools make of it (docs/hardware.md)."""


config_option = click.option("--config", required=True, metavar="k26|k26-small|ecp5-85f", help="Which build.")
base_option = click.option(
    "--base", metavar="FILE", help="Base file whose network it is for. [default: a LeNet-5 on 28x28]"
)


def _chosen(config: str, base: str | None) -> tuple[Config, Build]:
    from ..hw import configs
    from ..spec import lenet5
    from ..tuner import load as load_base

    net = load_base(base).spec if base else lenet5((1, 28, 28))
    return configs.named(config), configs.configured(config, net, "u8" if len(net.input_shape) == 3 else "q")


@hw.command()
@config_option
@base_option
@click.option("--out", required=True, metavar="DIR", help="Folder to write; one of these that is there is replaced.")
@json_option
def generate(config: str, base: str | None, out: str, as_json: bool) -> None:
    """A folder with the core in Verilog, constraints, scripts for Vivado, and the driver for PYNQ."""
    from ..hw.generate import generate as made

    chosen, build = _chosen(config, base)
    with Bar("generating", 1):
        names = made(chosen, build, Path(out))
    if as_json:
        return print_json({"config": config, "build": build.id, "out": out, "files": names})
    click.echo(f"build {build.id:#010x}: {build.lanes} lanes, rank {build.rank}, {build.formats.name}")
    for name in names:
        click.echo(f"  {name}")
    untried = "scripts for Vivado and the driver were" if chosen.device.family == "xcup" else "it was"
    click.echo(f"written to {out}; {untried} not tried on a board")


@hw.command()
@config_option
@base_option
@click.option("--out", required=True, metavar="DIR", help="Folder for Verilog, netlist and log.")
@json_option
def synth(config: str, base: str | None, out: str, as_json: bool) -> None:
    """What the core takes of its device, by Yosys: some minutes."""
    from ..hw.synthesis import synthesise

    chosen, build = _chosen(config, base)
    with Bar("synthesising", 1):
        made = synthesise(chosen, build, Path(out))
    has = chosen.device.has
    if as_json:
        used = {name: {"used": n, "available": has[name]} for name, n in made.used.items()}
        return print_json(
            {"config": config, "used": used, "soft_products": made.soft_products, "levels": made.levels, "out": out}
        )
    click.echo(f"{config} on {chosen.device.part}, synthesised by Yosys")
    for name, n in made.used.items():
        click.echo(_bar(name, n, has[name]))
    click.echo(
        f"{made.soft_products} products in look-up tables, {made.levels} look-up tables between registers at most"
    )


@hw.command()
@config_option
@base_option
@click.option("--out", required=True, metavar="DIR", help="Folder for Verilog, netlist, bit stream and logs.")
@click.option("--seed", default=1, show_default=True, help="Of the placer.")
@json_option
def route(config: str, base: str | None, out: str, seed: int, as_json: bool) -> None:
    """Place and route by nextpnr, for the ECP5: half an hour or more. The bit stream is in DIR.

    A nextpnr-ecp5 on the PATH is taken, which is some times as fast as the one of the extra [hw].
    """
    from ..hw.synthesis import route as routed

    chosen, build = _chosen(config, base)
    with Bar("synthesising, placing, routing", 1):
        made = routed(chosen, build, Path(out), seed=seed)
    if as_json:
        used = {name: {"used": n, "available": made.available[name]} for name, n in made.used.items()}
        return print_json(
            {"config": config, "used": used, "fmax_mhz": made.fmax_mhz, "bitstream": str(made.bitstream), "seed": seed}
        )
    click.echo(f"{config} on {chosen.device.part}, placed and routed by nextpnr")
    for name, n in made.used.items():
        click.echo(_bar(name, n, made.available[name]))
    click.echo(f"Fmax {made.fmax_mhz:.1f} MHz ({chosen.clock_mhz:g} asked for)")
    click.echo(f"bit stream {made.bitstream}")


def _bar(name: str, used: float, available: int) -> str:
    share = used / available
    full = "█" * min(WIDTH, round(WIDTH * share))
    return f"{name:14} {used:>9,g} / {available:>9,} {full:·<{WIDTH}} {share:6.1%}"

"""The group of commands, the options that several of them share, and what is made of their values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import EngineError, FileError, UsageError

if TYPE_CHECKING:
    from ..adapters import Adapter
    from ..backbones.builtin import Network
    from ..engine import Engine
    from ..hw.engine import FixedEngine

Command = TypeVar("Command", bound=Callable[..., Any])


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the story, not of the alphabet


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import instantft

        click.echo(f"instantft {instantft.__version__}")
        ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def commands() -> None:
    """Adapt a trained network on the device, in milliseconds, from about a thousand labelled samples."""


engine_option = click.option("--engine", metavar="native|reference", help="Who computes. [default: native]")


def core_options(command: Command) -> Command:
    """Who computes, where the hardware core may be asked for as well."""
    configs = "Of the core: k26, k26-small or ecp5-85f. [default: k26]"
    command = click.option("--hw-config", metavar="NAME", help=configs)(command)
    who = "Who computes; fixed: the hardware core's arithmetic; rtl-sim: the core, to finetune. [default: native]"
    return click.option("--engine", metavar="native|reference|fixed|rtl-sim", help=who)(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


threads_option = click.option("--threads", default=1, show_default=True, help="For running the frozen network.")


seed_option = click.option("--seed", default=0, show_default=True, help="Decides the whole result.")


batch_option = click.option("--batch-size", default=20, show_default=True)


adapter_option = click.option("--adapter", metavar="DIR", help="Adapter to use with it. [default: none]")


input_shape_option = click.option(
    "--input-shape",
    metavar="N[,N…]",
    help="Of an ONNX model that leaves sizes open: C,H,W, or the length of its sequences.",
)
taps_option = click.option(
    "--taps", metavar="T[,T…]", help="Of an ONNX model: names, patterns, NAME@GRID, or auto[:BYTES]. [default: auto]"
)


def source_options(command: Command) -> Command:
    """How samples that are no .npz are read."""
    size = "Images: the shorter side is scaled to this, the middle cut out. [default: as large as the network's input]"
    command = click.option("--size", type=int, metavar="PIXELS", help=size)(command)
    label = "CSV: name or number of the label's column. [default: the last]"
    return click.option("--label", metavar="NAME|INDEX", help=label)(command)


task_option = click.option(
    "--task", help="classification, regression or multi-label. [default: that of the adapter, or classification]"
)


memory_option = click.option(
    "--memory-limit", metavar="SIZE", help="Refuse ahead of time what would take more: 64M, 1.5G, … [default: none]"
)


history_option = click.option("--history", is_flag=True, help="Loss and accuracy of every epoch.")


def preprocessing_options(instead: str) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for name, what in (("--std", "Divide by this, per channel"), ("--mean", "Subtract this, per channel")):
            command = click.option(name, metavar="V[,V…]", help=f"{what}. [default: {instead}]")(command)
        return command

    return add


def engine_of(name: str | None) -> Engine:
    from ..engine import get_engine

    if name is not None:
        return get_engine(name)
    try:
        return get_engine("native")
    except EngineError as e:
        if os.environ.get("INSTANTFT_ISA"):
            raise  # who asks for one instruction set does not want another engine
        click.echo(f"warning: {' '.join(str(e).split())}; the slow NumPy engine computes", err=True)
        return get_engine("reference")


def engine_or_core(name: str | None, config: str | None, trains: bool = False) -> tuple[Engine, FixedEngine | None]:
    """The engine called `name`, and once more if it is the hardware core; it is simulated only where it trains."""
    from ..engine import ENGINES

    if name == "fixed":
        from ..hw.engine import FixedEngine

        core = FixedEngine(config or "k26")
        return core, core
    if name == "rtl-sim":
        if not trains:
            raise UsageError("--engine rtl-sim must go with finetune; fixed predicts the same, bit for bit")
        from ..hw.sim.engine import SimulatedEngine

        simulated = SimulatedEngine(config or "k26")
        return simulated, simulated
    if config is not None:
        raise UsageError(f"--hw-config must go with --engine fixed or rtl-sim, not {name or 'native'}")
    if name is not None and name not in ENGINES:
        raise UsageError(f"engine must be one of {', '.join(ENGINES)}, fixed, rtl-sim, not {name!r:.60}")
    return engine_of(name), None


def values(option: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be numbers with commas between them, not {text!r:.60}") from None


def sizes(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 and int(part) > 0 for part in parts):
        raise UsageError(f"{option} must be whole numbers above 0 with commas between them, not {text!r:.60}")
    return tuple(int(part) for part in parts)


def preprocessing(
    network: Network, mean: str | None, std: str | None, adapter: Adapter | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What to take off samples and divide them by: the options, else what the adapter was made with, else the base."""
    from ..backbones.builtin import check_preprocessing

    kept = adapter.config if adapter is not None else {}
    try:
        made = [
            tuple(float(v) for v in kept.get(name, of)) for name, of in (("mean", network.mean), ("std", network.std))
        ]
    except (TypeError, ValueError):
        raise FileError(
            f"an adapter's mean and std must be lists of numbers, not {str(kept.get('mean'))[:40]!r} "
            f"and {str(kept.get('std'))[:40]!r}"
        ) from None
    means = made[0] if mean is None else values("--mean", mean)
    stds = made[1] if std is None else values("--std", std)
    return check_preprocessing(means, stds, network.spec.input_shape)


def check_file_target(out: str, inputs: Mapping[str, str | None]) -> None:
    """Refuse, before any work is done, a place where no file can come to be, and a file that is read as well."""
    from .. import files

    files.check_file(Path(out), "--out")
    for name, path in inputs.items():
        if path and os.path.realpath(out) == os.path.realpath(path):
            raise UsageError(f"--out must be another file than {name}, not {out}")

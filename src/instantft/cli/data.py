"""`data`: the papers' data sets, and their drifts as sample files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import FileError, UsageError
from .bar import Bar
from .options import json_option, seed_option
from .show import print_json

if TYPE_CHECKING:
    from ..data.triples import Triple

__all__ = ["data"]

Command = TypeVar("Command", bound=Callable[..., Any])

folder_option = click.option(
    "--data-dir", metavar="DIR", help="Data sets. [default: $INSTANTFT_DATA, ../shared/data or data]"
)
_out_option = click.option(
    "--out", required=True, metavar="DIR", help="Where pretrain.npz, finetune.npz and test.npz go."
)


@click.group()
def data() -> None:
    """The papers' data sets, from their public homes; and their drifts as sample files."""


@data.command("list")
@folder_option
@json_option
def list_sets(data_dir: str | None, as_json: bool) -> None:
    """Names, licences, sizes and hashes of the sets, and which are in the data folder."""
    from ..data.protocols import set_folder
    from ..data.sets import SETS

    folder = set_folder(data_dir)
    rows: list[dict[str, Any]] = [
        {
            "name": s.name,
            "title": s.title,
            "licence": s.licence,
            "home": s.home,
            "bytes": s.size,
            "hosts": list(s.hosts),
            "sources": [{"name": f.name, "bytes": f.size, "sha256": f.sha256} for f in s.sources],
            "files": [m.file for m in s.makes],
            "there": all((folder / m.file).is_file() for m in s.makes),
        }
        for s in SETS.values()
    ]
    if as_json:
        return print_json({"folder": str(folder), "sets": rows})
    for row in rows:
        there = "there" if row["there"] else "not there"
        click.echo(f"{row['name']}: {row['title']}")
        click.echo(f"  licence  {row['licence']}")
        click.echo(f"  home     {row['home']}")
        click.echo(f"  download {row['bytes'] / 1e6:,.1f} MB from {row['hosts'][0]}")
        for source in row["sources"]:
            click.echo(f"    {source['sha256']} {source['bytes']:>13,} {source['name']}")
        click.echo(f"  makes    {', '.join(row['files'])} ({there} in {folder})")


@data.command()
@click.argument("sets", nargs=-1, required=True, metavar="SET …")
@folder_option
@json_option
def fetch(sets: tuple[str, ...], data_dir: str | None, as_json: bool) -> None:
    """Download sets and make the .npz files of the data folder of them.

    What is there and right is left alone; a download that was stopped goes on where it stopped.
    """
    from ..data.protocols import set_folder
    from ..data.sets import check_made, chosen_sets, make
    from ..data.sets import fetch as fetch_set

    folder, result = set_folder(data_dir), []
    for s in chosen_sets(sets):
        paths = [folder / m.file for m in s.makes]
        with Bar(f"{s.name}: looking", 1):
            there = all(check_made(path, m) is None for path, m in zip(paths, s.makes, strict=True))
        if not there:
            try:
                with Bar(f"{s.name}: {s.size / 1e6:,.1f} MB", s.size) as bar:
                    fetch_set(s, folder, bar.update)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted; what has come is kept, and the same command goes on") from None
            with Bar(f"{s.name}: reading", 1) as bar:
                make(s, folder, bar.update)
        result.append({"name": s.name, "fetched": not there, "files": [str(path) for path in paths]})
        if not as_json:
            click.echo(f"{s.name}: {', '.join(map(str, paths))}{' (there already)' if there else ''}")
    if as_json:
        print_json({"folder": str(folder), "sets": result})


@data.command()
@click.argument("sets", nargs=-1, metavar="[SET …]")
@folder_option
@json_option
def check(sets: tuple[str, ...], data_dir: str | None, as_json: bool) -> None:
    """See whether what is in the data folder is what it should be.

    Sources (DIR/raw) by their SHA-256; .npz files by the types and shapes of their arrays and, where the contents are
    known beforehand (all but har and svhn), by a digest of them. Without SET whatever is there is looked at.
    """
    from ..data.protocols import set_folder
    from ..data.sets import check_made, check_source, chosen_sets

    folder, found = set_folder(data_dir), []
    for s in chosen_sets(sets):
        for made in s.makes:
            path = folder / made.file
            if sets or path.is_file():
                known = "contents" if made.digest else "shapes and types"
                with Bar(path.name, 1):
                    found.append({"file": str(path), "checked": known, "wrong": check_made(path, made)})
        for source in s.sources:
            path = s.folder(folder) / source.name
            if path.is_file():
                with Bar(path.name, source.size) as bar:
                    wrong = check_source(path, source, bar.update)
                found.append({"file": str(path), "checked": "SHA-256", "wrong": wrong})
    bad = [f for f in found if f["wrong"] is not None]
    if as_json:
        print_json({"folder": str(folder), "files": found, "right": not bad})
    else:
        for f in found:
            click.echo(f"{f['file']}: " + (f"right ({f['checked']})" if f["wrong"] is None else f"WRONG: {f['wrong']}"))
        if not found:
            click.echo(f"{folder} holds none of the sets; `instantft data fetch SET` gets them")
    if bad:
        raise FileError(
            f"what is in {folder} must be right, but {len(bad)} of {len(found)} files are not: "
            "remove those, and `instantft data fetch SET` gets them anew"
        )


@data.group()
def prepare() -> None:
    """Write a drift as sample files: to pre-train on, to fine-tune on, to test on."""


def _set_option(default: str | None, example: str) -> Callable[[Command], Command]:
    return click.option(
        "--set", "name", required=default is None, default=default, show_default=default is not None, metavar="NAME",
        help=f"The set: NAME.npz in the data folder{example}.",
    )  # fmt: skip


@prepare.command()
@_set_option(None, ", as in mnist, fashion_mnist, svhn")
@click.option("--angle", type=float, required=True, help="Degrees, counter-clockwise.")
@click.option("--samples", default=1024, show_default=True, help="Turned test images to fine-tune on.")
@seed_option
@_out_option
@folder_option
@json_option
def rotation(
    name: str, angle: float, samples: int, seed: int, out: str, data_dir: str | None, as_json: bool
) -> None:  # fmt: skip
    """Images turned by an angle (InstantFT): pretrain.npz is upright; --seed deals out the turned test images."""
    from ..data.triples import rotation as make
    from ..solvers.sgd import check_arguments

    check_arguments(seed=seed)
    _write(name, data_dir, out, lambda held: make(held, angle, samples, seed), as_json)


@prepare.command()
@_set_option("har_features561", "")
@click.option(
    "--subjects", "who", default="9,14,16,19,25", show_default=True, metavar="S[,S…]", help="Those who drift."
)
@click.option("--windows", default=210, show_default=True, help="First windows of each to fine-tune on; others test.")
@_out_option
@folder_option
@json_option
def subjects(name: str, who: str, windows: int, out: str, data_dir: str | None, as_json: bool) -> None:
    """Other persons (Skip2-LoRA's HAR): trained without them, adapted to their first windows.

    The files also hold `subject`, for `finetune --groups subject`.
    """
    from ..data.triples import subjects as make

    try:
        drifted = [int(part) for part in who.split(",")]
    except ValueError:
        raise UsageError(f"--subjects must be whole numbers with commas between them, not {who!r:.60}") from None
    _write(name, data_dir, out, lambda held: make(held, drifted, windows), as_json)


@prepare.command()
@_set_option(None, ", fan_damage1 or fan_damage2")
@click.option("--recording", default="silentA_1", show_default=True, help="The silent recording to pre-train on.")
@_out_option
@folder_option
@json_option
def noise(name: str, recording: str, out: str, data_dir: str | None, as_json: bool) -> None:
    """A silent room, then a noisy one (Skip2-LoRA's cooling fan)."""
    from ..data.triples import silent_to_noisy as make

    _write(name, data_dir, out, lambda held: make(held, recording), as_json)


def _write(name: str, data_dir: str | None, out: str, made: Callable[[Any], Triple], as_json: bool) -> None:
    """Read a set, make a triple of it, write its files."""
    import numpy as np

    from .. import files
    from ..data.protocols import load_set, set_folder

    if Path(name).name != name:
        raise UsageError(f"--set must be the name of a file in the data folder, without .npz, not {name!r:.60}")
    folder, target = set_folder(data_dir), Path(out)
    files.check_directory(target, "--out")
    if (target / f"{name}.npz").resolve() == (folder / f"{name}.npz").resolve():
        raise UsageError(f"--out must be another folder than that of the set, not {out}")
    result: dict[str, dict[str, Any]] = {}
    with Bar(f"{name}: reading", 1):
        triple = made(load_set(folder, f"{name}.npz"))
    with Bar(f"{name}: writing", len(triple)) as bar:
        for k, (part, arrays) in enumerate(triple.items()):
            path = target / f"{part}.npz"
            files.write_through(path, partial(np.savez, **arrays), "sample files")  # type: ignore[arg-type]
            result[part] = {"file": str(path), "samples": len(arrays["y"]), "shape": list(arrays["x"].shape[1:])}
            bar.update(k + 1)
    if as_json:
        return print_json(result)
    for part, row in result.items():
        click.echo(f"{part:<9}{row['samples']:>8,} samples {'×'.join(map(str, row['shape']))}  {row['file']}")

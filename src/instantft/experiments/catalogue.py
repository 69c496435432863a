"""The targets of `instantft reproduce`, and the run from their names to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .. import files
from ..data.protocols import set_folder
from ..errors import UsageError
from . import counting, features, hardware, images, sensors, timing, tinytl
from .core import Section, Settings, Store, Target, Trial, Where, extra, run_trials
from .report import Entry, write_report

__all__ = ["RESULTS", "TARGETS", "Reproduction", "reproduce"]

TARGETS: dict[str, Target] = {
    "skip2-table2": timing.TABLE_2,
    "skip2-table3": features.TABLE_3,
    "skip2-table4": features.TABLE_4,
    "skip2-table5": tinytl.TABLE_5,
    "skip2-table6": timing.TABLE_6,
    "skip2-table7": timing.TABLE_7,
    "skip2-fig3": features.FIG_3,
    "skip2-fig4": sensors.FIG_4,
    "skip2-cache": timing.SKIP2_CACHE,
    "poster-table": images.POSTER,
    "instantft-table1": counting.TABLE_1,
    "instantft-fig1": images.FIG_1,
    "instantft-fig7a": images.FIG_7A,
    "instantft-fig7b": images.FIG_7B,
    "instantft-fig7c": hardware.FIG_7C,
    "instantft-fpga": hardware.FPGA,
    "instantft-cache": counting.CACHE,
}

TAKES_MINUTES = ("instantft-fig7c", "instantft-fpga")
"""Whose core is compiled or synthesised, however small: --quick leaves them out unless they are named."""

RESULTS = "trials.jsonl"
"""File of results in the output directory."""

Stage = Callable[[str], AbstractContextManager[Callable[[float], None]]]
"""From what is done to something that is told which share of it is done."""


@dataclass(frozen=True)
class Reproduction:
    """What a run has made: sections by target, how many trials were run and how many were there, the report's files."""

    sections: dict[str, Section]
    ran: int
    kept: int
    files: list[Path]


def chosen(names: Iterable[str]) -> list[str]:
    """The targets asked for, in the order of the catalogue; where none is named, all that can be made here.

    Raises:
        UsageError: there is no such target.
    """
    asked = list(names)
    for name in asked:
        if name not in TARGETS:
            raise UsageError(f"TARGET must be one of {', '.join(TARGETS)}, not {name!r:.60}")
    return [name for name in TARGETS if name in asked or (not asked and not _lacking(TARGETS[name]))]


def _lacking(target: Target) -> list[str]:
    """Packages without which it cannot be made, and which are not installed."""
    return [package for module, package in target.extras if find_spec(module) is None]


def reproduce(
    names: Sequence[str],
    out: Path,
    *,
    quick: bool = False,
    trials: int | None = None,
    data: str | None = None,
    engine: str | None = None,
    command: str = "instantft reproduce",
    stage: Stage,
) -> Reproduction:
    """Run what is missing, and write the report.

    Trials that do not measure time go through joblib: inside ``joblib.parallel_config(...)`` its backend spreads them.

    Args:
        names: targets; none: all.
        out: directory of the report, the results and the pre-trained networks.
        quick: next to nothing of everything. trials: seeds a target; None: the papers'.
        data: folder of the data sets; None: $INSTANTFT_DATA or ``../shared/data``.
        engine: who computes. command: what was typed, for the report.
        stage: shows progress.

    Raises:
        UsageError: there is no such target, or an extra is not installed.
        FileError: a data set is missing, or `out` cannot be written.
    """
    targets = [name for name in chosen(names) if names or not (quick and name in TAKES_MINUTES)]
    if trials is not None and not 1 <= trials <= 1000:
        raise UsageError(f"--trials must be 1 to 1000, not {trials}")
    files.check_directory(out, "the report")
    extra("joblib", "joblib")
    extra("matplotlib", "matplotlib")
    for name in targets:
        for module, package in TARGETS[name].extras:
            extra(module, package)
    folder = set_folder(data).absolute()
    settings = Settings(quick, trials, (folder / images.SVHN).is_file())
    where = Where(folder, (out / "bases").absolute(), engine)
    store = Store(out / RESULTS)
    wanted: dict[str, Trial] = {t.key: t for name in targets for t in TARGETS[name].trials(settings)}
    kept = sum(t in store for t in wanted.values())
    _check_data(wanted.values(), folder)
    if kept < len(wanted):
        where.bases.mkdir(parents=True, exist_ok=True)
        with stage("reproducing") as progress:
            run_trials(wanted.values(), store, where, progress)
    entries: list[Entry] = []
    for name in targets:
        target = TARGETS[name]
        own = f"{command} {name}{' --quick' if quick else ''}{f' --trials {trials}' if trials else ''}"
        entries.append(Entry(name, target.title, target.source, own, target.section(settings, store)))
    missing = {name: ", ".join(_lacking(target)) for name, target in TARGETS.items()}
    left = {name: f"left out, {what} is not installed" for name, what in missing.items() if what and not names}
    left |= {name: "left out by --quick unless it is named" for name in TAKES_MINUTES if quick and not names}
    written = write_report(out, entries, quick=quick, left=left)
    return Reproduction({e.name: e.section for e in entries}, len(wanted) - kept, kept, written)


def _check_data(trials: Iterable[Trial], folder: Path) -> None:
    """See, before any work is done, that the data sets are there."""
    from ..errors import FileError

    for name in sorted({t.params["file"] for t in trials if "file" in t.params}):
        if not (folder / name).is_file():
            raise FileError(
                f"the data folder must hold {name}, but {folder} does not: `instantft data fetch` gets the papers' "
                "sets; or name another folder with --data-dir or INSTANTFT_DATA; docs/guide.md says what must be in "
                "the file and where the set comes from"
            )

"""`instantft reproduce`: the store, the runner, the report, the command.

What a target computes and says is in test_reproduce_targets.py.
"""

from __future__ import annotations

import html.parser
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft import cli
from instantft.errors import FileError, UsageError
from instantft.experiments import catalogue, core
from instantft.experiments.catalogue import TARGETS, reproduce
from instantft.experiments.core import Picture, Section, Settings, Store, Table, Target, Trial, Where, run_trials
from instantft.experiments.report import Entry, as_html, as_json, as_markdown

joblib = pytest.importorskip("joblib")

PNG = b"\x89PNG\r\n\x1a\n made up"


@pytest.fixture
def where(tmp_path: Path) -> Where:
    return Where(tmp_path / "data", tmp_path / "bases")


def square(params: core.Params, where: Where) -> core.Numbers:
    """A trial that leaves a trace of every time it is run."""
    trace = Path(params["trace"])
    with trace.open("a") as f:
        f.write(f"{params['n']}\n")
    if params.get("fails"):
        raise KeyboardInterrupt
    return {"square": params["n"] ** 2, "pid": os.getpid()}


def squares(tmp_path: Path, count: int, **more: Any) -> list[Trial]:
    return [Trial(square, {"n": n, "trace": str(tmp_path / "trace"), **more}) for n in range(count)]


def ran(tmp_path: Path) -> list[int]:
    trace = tmp_path / "trace"
    return sorted(int(line) for line in trace.read_text().split()) if trace.exists() else []


# -- trials and their store


def test_a_key_follows_from_function_and_parameters() -> None:
    one = Trial(square, {"a": 1, "b": [2, 3]})
    assert one.key == Trial(square, {"b": [2, 3], "a": 1}, alone=True, seconds=9).key
    assert one.key != Trial(square, {"a": 1, "b": [2, 4]}).key
    assert one.key != Trial(core.machine, {"a": 1, "b": [2, 3]}).key  # type: ignore[arg-type]


def test_numbers_are_there_again(tmp_path: Path) -> None:
    trials, path = squares(tmp_path, 3), tmp_path / "trials.jsonl"
    store = Store(path)
    for t in trials[:2]:
        store.add(t, {"value": t.params["n"] / 7})
    again = Store(path)
    assert len(again) == 2
    assert again(trials[1]) == {"value": 1 / 7}
    assert trials[2] not in again


def test_a_line_cut_off_is_dropped(tmp_path: Path) -> None:
    trials, path = squares(tmp_path, 3), tmp_path / "trials.jsonl"
    store = Store(path)
    store.add(trials[0], {"value": 0})
    store.add(trials[1], {"value": 1})
    path.write_bytes(path.read_bytes()[:-9])
    half = Store(path)
    assert trials[0] in half
    assert trials[1] not in half
    half.add(trials[2], {"value": 2})
    whole = Store(path)
    assert (trials[0] in whole, trials[1] in whole, whole(trials[2])) == (True, False, {"value": 2})


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text('{"key": "a", "numbers": {}}\nhello\n')
    with pytest.raises(FileError, match="must be JSON lines of trials, but line 2 of"):
        Store(path)


def test_numbers_are_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Store(tmp_path / "trials.jsonl").add(squares(tmp_path, 1)[0], {"value": float("nan")})


# -- the runner


def test_only_what_is_missing_runs(tmp_path: Path, where: Where) -> None:
    store, seen = Store(tmp_path / "trials.jsonl"), list[float]()
    run_trials(squares(tmp_path, 2), store, where)
    assert ran(tmp_path) == [0, 1]
    run_trials(squares(tmp_path, 4) * 2, store, where, seen.append)
    assert ran(tmp_path) == [0, 1, 2, 3]
    assert [store(t)["square"] for t in squares(tmp_path, 4)] == [0, 1, 4, 9]
    assert seen == [0.5, 1.0]


def test_an_interrupted_run_goes_on(tmp_path: Path, where: Where) -> None:
    path = tmp_path / "trials.jsonl"
    stopped = Trial(square, {"n": 9, "trace": str(tmp_path / "trace"), "fails": True}, alone=True)
    with pytest.raises(KeyboardInterrupt):
        run_trials([*squares(tmp_path, 3), stopped], Store(path), where)
    assert ran(tmp_path) == [0, 1, 2, 9]
    run_trials(squares(tmp_path, 4), Store(path), where)
    assert ran(tmp_path) == [0, 1, 2, 3, 9]


def test_what_is_timed_runs_here_and_last(tmp_path: Path, where: Where) -> None:
    store = Store(tmp_path / "trials.jsonl")
    alone = [Trial(square, {"n": n, "trace": str(tmp_path / "trace")}, alone=True) for n in (7, 8)]
    with joblib.parallel_config(n_jobs=2):
        run_trials([*alone, *squares(tmp_path, 3)], store, where)
    assert [store(t)["pid"] for t in alone] == [os.getpid()] * 2
    assert (tmp_path / "trace").read_text().split()[-2:] == ["7", "8"]
    assert os.getpid() not in [store(t)["pid"] for t in squares(tmp_path, 3)]


def prepare(params: core.Params, where: Where) -> None:
    with (where.bases / params["base"]).open("a") as f:
        f.write("prepared\n")


def test_a_base_is_prepared_once(tmp_path: Path, where: Where) -> None:
    where.bases.mkdir()
    trials = [
        Trial(square, {"n": n, "trace": str(tmp_path / "trace"), "base": base}, base=base, prepare=prepare)
        for n, base in enumerate("aab")
    ]
    run_trials(trials, Store(tmp_path / "trials.jsonl"), where)
    assert {p.name: p.read_text() for p in where.bases.iterdir()} == {"a": "prepared\n", "b": "prepared\n"}


@pytest.mark.slow
def test_dask_spreads_the_trials(tmp_path: Path, where: Where) -> None:
    """Through joblib alone: the package knows nothing of Dask."""
    distributed = pytest.importorskip("distributed")
    store = Store(tmp_path / "trials.jsonl")
    trials = squares(tmp_path, 8)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        workers = set(distributed.default_client().run(os.getpid).values())
        run_trials(trials, store, where)
    assert [store(t)["square"] for t in trials] == [n * n for n in range(8)]
    assert {store(t)["pid"] for t in trials} <= workers
    assert len(Store(tmp_path / "trials.jsonl")) == 8


# -- the report

SECTION = Section(
    {"row": {"a": 1.5, "b": core.NOT_HERE}},
    {"row": {"a": {"mean": 1.25, "sd": 0.5}, "b": None}},
    "% correct",
    3,
    "They differ <because> & so on.",
    [Table(["", "a|b"], [["row", "1 < 2"]], "A caption")],
    [Picture("a-picture", PNG, 'shows "it"')],
)
ENTRY = Entry("a-target", "A title", "A paper, Table 9", "instantft reproduce a-target", SECTION)


class Reader(html.parser.HTMLParser):
    """Everything that opens must close, and nothing may be fetched."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.sources += [str(found[k]) for k in ("src", "href") if k in found]
        self.ids += [str(found["id"])] if "id" in found else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_json_has_what_scripts_read() -> None:
    assert json.loads(as_json([ENTRY])) == {
        "a-target": {
            "paper": SECTION.paper,
            "ours": SECTION.ours,
            "unit": "% correct",
            "trials": 3,
            "command": "instantft reproduce a-target",
            "note": SECTION.note,
        }
    }


def test_html_is_whole_by_itself() -> None:
    page = as_html([ENTRY], quick=True, left={"later": "comes later"})
    reader = read(page)
    assert reader.ids == ["a-target"]
    assert all(s.startswith(("#", "data:image/png;base64,")) for s in reader.sources)
    assert "They differ <because> & so on." in reader.text
    assert "1 < 2" in reader.text
    assert "QUICK RUN" in reader.text
    assert "comes later" in reader.text
    assert "<script" not in page
    assert "QUICK RUN" not in as_html([ENTRY], quick=False, left={})


def test_markdown_has_tables_pictures_and_notes() -> None:
    text = as_markdown([ENTRY], quick=True, left={"later": "comes later"})
    assert "## a-target" in text
    assert "|  | a\\|b |\n|---|--:|\n| row | 1 < 2 |" in text
    assert '![shows "it"](a-picture.png)' in text
    assert "They differ <because> & so on." in text
    assert "QUICK RUN" in text
    assert "- later: comes later" in text


def test_means_say_what_diverged() -> None:
    assert core.mean([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5)}
    assert core.spread(core.mean([1.0, 3.0, None])) == "2.00 ± 1.41 (1 diverged)"
    assert core.mean([None]) is None
    assert core.spread(None) == "diverged"


# -- all of it


@pytest.fixture
def one_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue of one cheap target; returns the folder it leaves its traces in."""

    def trials(settings: Settings) -> list[Trial]:
        return squares(tmp_path, len(settings.seeds(5)))

    def section(settings: Settings, found: core.Results) -> Section:
        return Section({}, {str(t.params["n"]): found(t)["square"] for t in trials(settings)}, "", 5, "Note.")

    target = Target("Squares", "Nobody's Table 1", trials, section)
    monkeypatch.setattr(catalogue, "TARGETS", {"squares": target})
    return tmp_path


def test_a_run_writes_its_report_and_goes_on(one_target: Path) -> None:
    out = one_target / "out"
    first = reproduce([], out, trials=2, stage=lambda _: nullcontext(lambda _: None))
    assert (first.ran, first.kept) == (2, 0)
    again = reproduce(["squares"], out, stage=lambda _: nullcontext(lambda _: None))
    assert (again.ran, again.kept) == (3, 2)
    assert {p.name for p in again.files} == {"report.md", "report.html", "report.json"}
    report = json.loads((out / "report.json").read_text())
    assert report["squares"]["ours"] == {str(n): n * n for n in range(5)}
    assert ran(one_target) == [0, 1, 2, 3, 4]


def test_the_command_says_what_it_did(one_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["reproduce", "--quick", "--jobs", "1", "--out", str(one_target / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["targets"], said["ran"], said["kept"]) == (["squares"], 1, 0)
    assert all(Path(name).is_file() for name in said["files"])
    assert "QUICK RUN" in (one_target / "out" / "report.md").read_text()


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["reproduce", "skip2-table99", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: TARGET must be one of {', '.join(TARGETS)}, not 'skip2-table99'\n"


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--trials", "0"], "--trials must be 1 to 1000, not 0"),
        (["--jobs", "0"], "--jobs must be 1 to 1024, not 0"),
        (["skip2-table3", "--data-dir", "nowhere"], "the data folder must hold fan_damage1.npz, but"),
    ],
)
def test_bad_options_are_refused(
    words: list[str], rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
    assert rule in capsys.readouterr().err


def test_what_cannot_be_made_is_left_out_unless_it_is_named(one_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needy = replace(catalogue.TARGETS["squares"], extras=(("no_such_module", "no-such-package"),))
    monkeypatch.setitem(catalogue.TARGETS, "needy", needy)
    out = one_target / "out"
    made = reproduce([], out, trials=1, stage=lambda _: nullcontext(lambda _: None))
    assert list(made.sections) == ["squares"]
    assert "- needy: left out, no-such-package is not installed" in (out / "report.md").read_text()
    with pytest.raises(UsageError, match="reproduce needs no-such-package, which is not installed"):
        reproduce(["needy"], out, stage=lambda _: nullcontext(lambda _: None))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(UsageError, match=r"reproduce needs joblib, .* pip install 'instantft\[reproduce\]'"):
        core.extra("joblib", "joblib")


SLOW_RUN = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from instantft import cli
from instantft.experiments import catalogue
from instantft.experiments.core import Section, Target, Trial

def slow(params, where):
    Path(params["trace"]).open("a").write(f"{params['n']}\\n")
    time.sleep(params["seconds"])
    return {"n": params["n"]}

def trials(settings):
    params = [{"n": n, "trace": sys.argv[1], "seconds": 0.0 if n < 2 else 60.0} for n in range(3)]
    return [Trial(slow, p, alone=True) for p in params]

catalogue.TARGETS.clear()
catalogue.TARGETS["slow"] = Target("", "", trials, lambda s, found: Section({}, {}, "", 3, ""))
sys.exit(cli.run(["reproduce", "--out", sys.argv[2]]))
"""


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace", tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(trace), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while ran(tmp_path) != [0, 1, 2]:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(2)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted; finished trials are in" in said
    assert "Traceback" not in said
    assert len(Store(out / "trials.jsonl")) == 2


def test_every_target_has_trials_with_keys_of_their_own() -> None:
    """Two targets may share a trial, but no two trials a key."""
    for settings in (Settings(), Settings(quick=True), Settings(trials=3, svhn=True)):
        trials = [t for target in TARGETS.values() for t in target.trials(settings)]
        by_key: dict[str, list[Any]] = {}
        for t in trials:
            by_key.setdefault(t.key, []).append([t.run.__qualname__, dict(t.params)])
        assert all(same[0] == other for same in by_key.values() for other in same)
        assert len(by_key) < len(trials)
        assert all(np.isfinite(t.seconds) and t.seconds > 0 for t in trials)


def test_the_guide_names_every_target() -> None:
    guide = Path(__file__).parent.parent / "docs" / "guide.md"
    if not guide.is_file():
        pytest.skip("the documents are not part of the installed package")
    section = guide.read_text(encoding="utf-8").split("## The papers, made again")[1]
    assert [name for name in TARGETS if f"`{name}`" not in section] == []

"""The command line of the watcher, run as a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import instantft
from instantft.backbones.builtin import Network
from instantft.cli import run, watching
from instantft.watch.detectors import Seen
from instantft.watch.journal import read_state
from instantft.watch.loop import Command

from .watched import journal_in, loop_on, samples, trained, world
from .watched import run as feed


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    trained().save(path)
    return path


def lines(kind: int, T: int, seed: int = 0, user: str = "anna") -> bytes:
    x, y = world(kind, T, seed)
    return b"".join(
        json.dumps({"x": row.tolist(), "label": int(label), "user": user, "id": f"{seed}:{i}"}).encode() + b"\n"
        for i, (row, label) in enumerate(zip(x, y, strict=True))
    )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "instantft", *map(str, arguments)]


def environment() -> dict[str, str]:
    """What the program runs in: the package that the tests run with."""
    return {**os.environ, "PYTHONPATH": str(Path(instantft.__file__).parents[1])}


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is for a shell's background jobs and what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Watcher:
    """A watcher that runs."""

    def __init__(self, base: Path, state: Path, *more: object) -> None:
        self.process = subprocess.Popen(
            command("watch", base, "--state", state, "--labels", 60, "--keep", 300, *more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        self.events: list[dict[str, Any]] = []

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def until(self, name: str, seconds: float = 60) -> dict[str, Any]:
        """The next event of this name."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            line = self.process.stdout.readline()
            assert line, self.process.stderr and self.process.stderr.read()
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no {name} in {seconds} s")

    def close(self) -> int:
        out, _ = self.process.communicate(timeout=60)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode


@pytest.fixture
def watcher(base_file: Path, tmp_path: Path) -> Iterator[Watcher]:
    found = Watcher(base_file, tmp_path / "state")
    yield found
    if found.process.poll() is None:
        found.process.kill()
        found.process.communicate()


def test_from_samples_to_history(watcher: Watcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watcher.send(lines(0, 200) + b"garbage\n" + lines(1, 300, seed=1))
    assert watcher.close() == 0
    by = {e["event"] for e in watcher.events}
    assert {"prediction", "skipped", "drift", "adapting", "adapted", "status"} <= by
    last = watcher.events[-1]
    assert last["event"] == "status"
    assert (last["samples"], last["skipped"]) == (500, {"not JSON": 1})
    state = str(tmp_path / "state")
    live = read_state(Path(state)).live
    assert live == last["live"] >= 1

    assert run(["history", state]) == 0
    shown = capsys.readouterr().out
    assert f"{live}*" in shown
    assert "standard errors" in shown
    assert run(["history", state, "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["live"] == live
    assert len(held["versions"]) == live

    assert run(["rollback", state, "--to", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"from": live, "live": 0}
    assert run(["rollback", state]) == 2
    assert "frozen network is in use" in capsys.readouterr().err
    assert run(["rollback", state, "--to", str(live)]) == 0
    assert read_state(Path(state)).live == live

    x, _ = world(1, 300, seed=1)
    capsys.readouterr()
    assert run(["forget", state, "--id", "1:299"]) == 0
    assert "1 samples wiped" in capsys.readouterr().out
    assert x[299].tobytes() not in Path(state, "samples.bin").read_bytes()
    assert x[298].tobytes() in Path(state, "samples.bin").read_bytes()
    assert run(["forget", state, "--user", "anna"]) == 0
    assert not any(Path(state, "samples.bin").read_bytes()[4096:])


def test_a_base_that_knows_no_world_is_named(base_file: Path, tmp_path: Path) -> None:
    x, y = world(0, 40)
    np.savez(tmp_path / "before.npz", x=x, y=y)
    for more, warned in (((), True), (("--reference", tmp_path / "before.npz"), False)):
        found = Watcher(base_file, tmp_path / str(warned), *more)
        _, said = found.process.communicate(b'{"id": "nobody", "label": 1}\n', timeout=60)
        assert (b"give --reference" in said) == warned


def test_a_folder_that_goes_away_is_an_error(base_file: Path, tmp_path: Path) -> None:
    drop = tmp_path / "drop"
    drop.mkdir()
    x, y = world(0, 3)
    np.savez(drop / "a.npz", x=x, y=y)
    found = Watcher(base_file, tmp_path / "state", "--from", drop)
    while found.until("prediction")["id"] != "a.npz:2":
        pass
    shutil.rmtree(drop)
    assert found.close() == 2
    assert found.events[-1]["event"] == "status"


def test_who_has_ctrl_c_ignored_keeps_it_so(base_file: Path, tmp_path: Path) -> None:
    """As a shell does for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = Watcher(base_file, tmp_path / "state")
    finally:
        signal.signal(signal.SIGINT, before)
    found.send(lines(0, 1))
    found.until("prediction")
    found.process.send_signal(signal.SIGINT)
    found.send(lines(0, 1, seed=2))
    assert found.until("prediction")
    assert found.close() == 0


def test_commands_reach_a_watcher_that_runs(
    watcher: Watcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher.send(lines(1, 100) + b'{"command": "adapt"}\n')
    watcher.until("adapted")
    state = tmp_path / "state"
    assert run(["rollback", str(state)]) == 0
    assert read_state(state).live == 0
    watcher.until("rolled back")
    assert run(["rollback", str(state), "--to", "7"]) == 2
    assert "it did not" in capsys.readouterr().err
    assert run(["forget", str(state), "--user", "nobody"]) == 0
    assert run(["forget", str(state), "--user", ""]) == 0
    assert len(np.flatnonzero([*(state / "samples.bin").read_bytes()[4096:]]))
    capsys.readouterr()
    assert run(["forget", str(state), "--all"]) == 0
    assert "100 samples wiped" in capsys.readouterr().out
    while watcher.until("forgot")["samples"] != 100:
        pass
    assert not any((state / "samples.bin").read_bytes()[4096:])
    watcher.send(lines(0, 1, seed=4))
    assert watcher.until("prediction")["version"] == 0
    watcher.process.send_signal(signal.SIGTERM)
    assert watcher.close() == 0


@pytest.mark.parametrize("known", [True, False])
def test_what_is_asked_while_it_is_down_lasts(
    base_file: Path, tmp_path: Path, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rollback is not undone by the samples that led to the adapter, and what was forgotten is not known again."""
    state, (x, y) = tmp_path / "state", world(0, 300)
    np.savez(tmp_path / "before.npz", x=x, y=y)
    more = ("--reference", tmp_path / "before.npz") if known else ()
    first = Watcher(base_file, state, *more)
    first.send(lines(1, 100) + b'{"command": "adapt"}\n{"x": [1, 2, 3, 4, 5, 6], "id": "late", "user": "bob"}\n')
    first.until("adapted")
    first.send(b"")
    assert first.close() == 0
    assert read_state(state).live >= 1
    assert run(["rollback", str(state), "--to", "0"]) == 0
    assert run(["forget", str(state), "--user", "bob"]) == 0
    assert "1 samples wiped" in capsys.readouterr().out
    second = Watcher(base_file, state, *more)
    second.send(b'{"id": "late", "label": 1}\n' + lines(1, 150, seed=2))
    assert second.close() == 0
    assert {e["version"] for e in second.events if e["event"] == "prediction"} == {0}
    assert not [e for e in second.events if e["event"] in ("drift", "adapting", "error")]
    assert second.events[-1]["skipped"] == {"unknown id": 1}
    assert second.events[-1]["kept"] == 250


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("arguments", [("rollback",), ("forget", "--all")])
def test_a_watcher_that_dies_before_it_answers(
    base_file: Path, tmp_path: Path, arguments: tuple[str, ...], again: bool
) -> None:
    """What was asked of it is done all the same, by the next one or without one."""
    state = tmp_path / "state"
    first = Watcher(base_file, state)
    first.send(lines(1, 100) + b'{"command": "adapt"}\n')
    first.until("adapted")
    first.process.send_signal(signal.SIGSTOP)
    asking = subprocess.Popen(
        command(arguments[0], state, *arguments[1:]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    end = time.monotonic() + 30
    while not (state / "request.json").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    first.process.kill()
    first.process.communicate()
    second = Watcher(base_file, state) if again else None
    out, err = asking.communicate(timeout=60)
    assert (asking.returncode, err) == (0, b"")
    if second is not None:
        second.send(lines(1, 20, seed=3))
        assert second.close() == 0
    assert not (state / "request.json").exists()
    if arguments[0] == "rollback":
        assert out == b"version 1 \xe2\x86\x92 0\n"
        assert read_state(state).live == 0
    else:
        assert b"samples wiped" in out
        assert world(1, 100)[0][50].tobytes() not in (state / "samples.bin").read_bytes()


def test_what_a_watcher_did_before_it_died_is_not_done_twice(tmp_path: Path) -> None:
    journal = journal_in(tmp_path / "state")
    loop = loop_on(journal)
    for kind in (1, 2):
        feed(loop, [*samples(kind, 150, seed=kind), Command("adapt", {})])
    live = journal.state.live
    assert live >= 2
    asking = subprocess.Popen(command("rollback", tmp_path / "state"), stdout=subprocess.PIPE, env=environment())
    end = time.monotonic() + 30
    while (asked := journal.request()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    feed(loop, [Command(asked.pop("command"), asked)])
    journal.close()  # without an answer
    out, _ = asking.communicate(timeout=60)
    assert asking.returncode == 0
    assert out.decode() == f"version {live} → {live - 1}\n"
    assert read_state(tmp_path / "state").live == live - 1


def test_a_watcher_whose_answers_are_lost_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = journal_in(tmp_path / "state")
    asked = []
    monkeypatch.setattr(watching, "_answer", lambda *_: asked.append(1))
    monkeypatch.setattr(watching, "PATIENCE", 0.2)
    assert run(["forget", str(tmp_path / "state"), "--all"]) == 2
    journal.close()
    assert asked
    assert capsys.readouterr().err.endswith("must answer, but its answers are lost: can they be written?\n")


def test_it_goes_on_after_it_was_killed(base_file: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = Watcher(base_file, state)
    first.send(lines(1, 100) + b'{"command": "adapt"}\n')
    first.until("adapted")
    first.process.kill()
    first.process.communicate()
    second = Watcher(base_file, state)
    second.send(lines(1, 100, seed=2))
    assert second.close() == 0
    shown = [e for e in second.events if e["event"] == "prediction"]
    assert {e["version"] for e in shown} == {1}
    _, y = world(1, 100, seed=2)
    assert np.mean([e["label"] == label for e, label in zip(shown, y.tolist(), strict=True)]) > 0.9
    assert not [e for e in second.events if e["event"] in ("recovered", "error")]
    assert second.events[-1]["kept"] == 200


def test_a_folder_and_csv(base_file: Path, tmp_path: Path) -> None:
    x, y = world(0, 40)
    drop = tmp_path / "drop"
    drop.mkdir()
    np.savez(drop / "a.npz", x=x, y=y)
    found = Watcher(base_file, tmp_path / "a", "--from", drop)
    while found.until("prediction")["id"] != "a.npz:39":
        pass
    found.process.send_signal(signal.SIGINT)  # Ctrl-C, the way to end it by hand
    assert found.close() == 0
    assert found.events[-1]["event"] == "status"
    assert found.events[-1]["kept"] == 40
    assert (drop / "read" / "a.npz").exists()

    found = Watcher(base_file, tmp_path / "b", "--format", "csv", "--no-predictions")
    rows = "\n".join(",".join(map(str, [*row, label])) for row, label in zip(x.tolist(), y.tolist(), strict=True))
    found.send(f"1,2,3,4,5,6,label\n{rows}\n".encode())
    assert found.close() == 0
    assert [e["event"] for e in found.events] == ["status"]
    assert found.events[0]["labels"] == 40
    assert found.events[0]["right"] > 35


def test_the_page_of_a_watcher(base_file: Path, tmp_path: Path) -> None:
    found = Watcher(base_file, tmp_path / "state", "--http", "0")
    assert found.process.stderr is not None
    url = found.process.stderr.readline().decode().split()[1].rstrip(",")
    assert url.startswith("http://127.0.0.1:")
    token = (tmp_path / "state" / "token").read_text().strip()

    def ask(path: str, **more: Any) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(url + path, **more), timeout=30) as answer:
            return bytes(answer.read())

    found.send(lines(1, 100))
    ask("adapt", method="POST", headers={"Authorization": f"Bearer {token}"})
    while found.until("adapted")["version"] != 1:
        pass
    end = time.monotonic() + 30
    while b"instantft_live_version 1\n" not in ask("metrics"):
        assert time.monotonic() < end
        time.sleep(0.1)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask("rollback", method="POST", data=b"{}")
    ask("rollback", method="POST", data=b'{"to": 0}', headers={"Authorization": f"Bearer {token}"})
    assert found.until("rolled back")["version"] == 0
    assert found.close() == 0


@pytest.mark.parametrize("labels", [True, False])
def test_samples_of_the_world_before(base_file: Path, tmp_path: Path, labels: bool) -> None:
    x, y = world(0, 300)
    arrays: dict[str, Any] = {"x": x, "y": y} if labels else {"x": x}
    np.savez(tmp_path / "before.npz", **arrays)
    found = Watcher(base_file, tmp_path / "state", "--reference", tmp_path / "before.npz", "--no-predictions")
    found.send(lines(1, 200, seed=1))
    assert found.close() == 0
    by = [e["by"] for e in found.events if e["event"] == "drift"]
    assert by
    assert ("errors" in by) == labels


def test_pretrain_leaves_what_it_saw(tmp_path: Path) -> None:
    x, y = world(0, 300)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    out = tmp_path / "base.safetensors"
    assert run(["pretrain", "dnn", "--data", str(tmp_path / "train.npz"), "--hidden", "5", "--out", str(out)]) == 0
    network = Network.load(out)
    known = Seen.read(network.seen, network.spec.tap_widths)
    assert known is not None
    assert (known.samples, known.accuracy) == (300, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere"], "--from must be"),
        (["--format", "xml"], "--format must be json or csv"),
        (["--labels", "1"], "labels must be 2"),
        (["--keep", "0"], "keep must be at least 1"),
        (["--status", "0"], "--status must be above 0"),
        (["--method", "ft-all"], "leave the network as it is"),
    ],
)
def test_wrong_usage_is_told_in_a_line(
    base_file: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["watch", str(base_file), "--state", str(tmp_path / "s"), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_other_commands_want_a_state_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["history", str(tmp_path)], ["rollback", str(tmp_path)], ["forget", str(tmp_path), "--all"]):
        assert run(arguments) == 2
        assert "readable journal" in capsys.readouterr().err
    assert run(["forget", str(tmp_path)]) == 2
    assert "one of --id, --user and --all" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

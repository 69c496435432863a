"""The command line: what it prints, where, and with what exit status; and every bad input in one line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft import cli
from instantft.adapters import CONFIG_FILE, Adapter
from instantft.backbones import builtin
from instantft.backbones.builtin import Network
from instantft.cli import bar as bar_module
from instantft.cli.bar import Bar
from instantft.solvers import sgd

from . import samples

X, Y = samples.blobs(60)
BASE = samples.base()

ENV = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a base, an adapter, and samples; the process is in it."""
    monkeypatch.chdir(tmp_path)
    BASE.save("base.safetensors")
    samples.adapter(BASE).save("adapter")
    np.savez("ft.npz", x=X, y=Y)
    np.savez("test.npz", x=X[:30], y=Y[:30])
    return tmp_path


def names(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*")}


FINETUNE = ("finetune", "base.safetensors", "--data", "ft.npz", "--engine", "reference", "--out")


def test_steps_in_the_space_of_samples(here: Path, run: Run) -> None:
    found = {}
    for space in ("primal", "dual"):
        status, _, err = run(*FINETUNE, space, "--method", "skip2-lora", "--space", space, "--force")
        assert status == 0, err
        found[space] = Adapter.load(space)
    a, b = (found[space].tensors for space in ("primal", "dual"))
    assert any((a[k] != b[k]).any() for k in a)  # else it was the same computation
    for k in a:
        np.testing.assert_allclose(a[k], b[k], atol=128 * 2.0**-24 * np.abs(a[k]).max())  # test_dual.ROUNDING
    assert found["dual"].config["momentum"] == 0.8
    status, out, err = run(*FINETUNE, "new", "--method", "ft-all", "--space", "dual")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "space 'dual' must go with" in err


def test_the_main_job(here: Path, run: Run) -> None:
    status, out, err = run(*FINETUNE, "new", "--eval", "test.npz", "--json", "--history", "--epochs", 30)
    assert (status, err) == (0, "")
    got = json.loads(out)
    assert out.count("\n") == 1
    assert set(got) >= {
        "method",
        "accuracy_before",
        "accuracy_after",
        "accepted",
        "seconds",
        "steps",
        "epochs",
        "trainable_parameters",
        "cache",
        "adapter",
        "history",
    }
    assert got["method"] == "skip2-lora"
    assert got["accepted"] is True
    assert got["accuracy_after"] > max(got["accuracy_before"], 0.9)
    assert got["seconds"]["total"] == got["seconds"]["fill"] + got["seconds"]["train"]
    assert got["steps"] == 90
    assert got["cache"] == {
        "codec": "fp32",
        "bytes": got["cache"]["bytes"],
        "bytes_per_sample": 4 * 13,
        "hits": 30 * 60 - 60,
        "misses": 60,
    }
    assert [h["epoch"] for h in got["history"]] == list(range(1, 31))
    assert Adapter.load("new", BASE).parameters == got["trainable_parameters"]

    status, out, err = run("evaluate", "base.safetensors", "--adapter", "new", "--data", "test.npz", "--json")
    judged = json.loads(out)
    assert judged["accuracy"] == got["accuracy_after"]
    assert judged["n"] == 30 == np.sum(judged["confusion_matrix"])
    assert [c["n"] for c in judged["per_class"]] == [10, 10, 10]
    assert judged["loss"] > 0


@pytest.mark.parametrize("arguments", [(), ("--method", "ft-all"), ("--cache", "nf4", "--history")])
def test_text_output(here: Path, run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*FINETUNE, "new", "--eval", "test.npz", *arguments)
    assert (status, err) == (0, "")
    assert "accuracy" in out
    assert "adapter  new" in out
    status, out, _ = run("evaluate", "base.safetensors", "--adapter", "new", "--data", "test.npz")
    assert status == 0
    assert "Rows are the true class" in out


def test_without_eval_accuracies_are_null_and_without_cache_too(here: Path, run: Run) -> None:
    got = json.loads(run(*FINETUNE, "new", "--method", "ft-last", "--json")[1])
    assert got["accuracy_before"] is None
    assert got["accuracy_after"] is None
    assert got["cache"] == {"codec": None, "bytes": 0, "bytes_per_sample": 0, "hits": 0, "misses": 0}
    assert "history" not in got


def test_pretrain_then_finetune(here: Path, run: Run) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 10, 10)).astype(np.uint8)
    np.savez("images.npz", x=x, y=np.arange(40) % 2)
    for net in ("dnn", "lenet5"):
        status, out, err = run(
            "pretrain",
            net,
            "--data",
            "images.npz",
            "--eval",
            "images.npz",
            "--out",
            "new.safetensors",
            "--epochs",
            2,
            "--mean",
            "0.5",
            "--std",
            "0.25",
            "--engine",
            "reference",
            "--json",
        )
        if net == "lenet5":
            assert status == 2  # 10x10 leaves nothing for the second pooling
            assert "layer 1" in err
            continue
        assert (status, err) == (0, "")
        got = json.loads(out)
        network = Network.load("new.safetensors")
        assert got["hash"] == network.hash
        assert network.mean == (0.5,)
        assert network.spec.C == 2
        evaluated = json.loads(run("evaluate", "new.safetensors", "--data", "images.npz", "--json")[1])
        assert evaluated["accuracy"] == got["accuracy"]


def test_lenet5_takes_images(here: Path, run: Run) -> None:
    np.savez("images.npz", x=np.zeros((4, 3, 20, 20), np.uint8), y=np.array([0, 1, 2, 1]))
    status, _, err = run(
        "pretrain", "lenet5", "--data", "images.npz", "--out", "n.safetensors", "--epochs", 1, "--engine", "reference"
    )
    assert status == 0
    assert err == "warning: fewer samples (4) than a batch (20): one batch of 4\n"
    assert Network.load("n.safetensors").spec.input_shape == (3, 20, 20)


def test_predict(here: Path, run: Run) -> None:
    np.savez("x.npz", x=X)
    status, _, err = run(
        "predict",
        "base.safetensors",
        "--adapter",
        "adapter",
        "--data",
        "x.npz",
        "--out",
        "y.npz",
        "--engine",
        "reference",
    )
    assert (status, err) == (0, "")
    with np.load("y.npz", allow_pickle=False) as got:
        assert set(got) == {"logits", "probabilities", "label"}
        assert got["logits"].shape == (60, 3)
        np.testing.assert_allclose(got["probabilities"].sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_array_equal(got["label"], got["logits"].argmax(axis=1))


def test_inspect(here: Path, run: Run) -> None:
    got = json.loads(run("inspect", "base.safetensors", "--json")[1])
    assert got["kind"] == "base"
    assert got["parameters"] == 6 * 5 + 5 + 5 * 5 + 5 + 5 * 3 + 3 + 20
    assert [t["size"] for t in got["taps"]] == [6, 5, 5]
    assert got["cache_bytes_per_sample"]["fp32"] == 52
    assert json.loads(run("inspect", "adapter", "--json")[1])["base_hash"] == BASE.hash
    for what in ("base.safetensors", "adapter"):
        status, out, _ = run("inspect", what)
        assert status == 0
        assert "skip2-lora" in out


def test_bench(here: Path, run: Run) -> None:
    status, out, _ = run(
        "bench", "base.safetensors", "--data", "ft.npz", "--epochs", 1, "--repeat", 1, "--json", "--engine", "reference"
    )
    assert status == 0
    rows = {r["name"]: r for r in json.loads(out)["rows"]}
    assert rows["skip2-lora fp32"]["ratio"] == 1
    assert {"ft-all", "lora-last fp32", "skip2-lora nf4"} <= set(rows)


def test_replacing_an_adapter(here: Path, run: Run) -> None:
    assert run(*FINETUNE, "adapter", "--method", "lora-last", "--force")[0] == 0
    assert Adapter.load("adapter").method == "lora-last"


def test_one_class_is_a_warning(here: Path, run: Run) -> None:
    np.savez("one.npz", x=X, y=np.ones_like(Y))
    status, _, err = run("finetune", "base.safetensors", "--data", "one.npz", "--out", "new", "--engine", "reference")
    assert status == 0
    assert err.startswith("warning: every label is 1")
    assert err.count("\n") == 1


def test_help_and_version(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    found = [line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.strip()]
    story = ["demo", "pretrain", "finetune", "evaluate", "predict", "inspect", "export"]
    assert found == [*story, "watch", "history", "rollback", "forget", "bench", "reproduce", "data", "hw"]
    assert run("--version")[1].startswith("instantft ")
    for command in found:
        assert run(command, "--help")[0] == 0


# -- bad input: exit status 2, one line, nothing half-written ---------------------------------------------------------


def truncate(path: str, n: int) -> None:
    os.truncate(path, n)


def other_adapter() -> None:
    samples.adapter(samples.base(seed=1)).save("other")


def flip() -> None:
    raw = bytearray(Path("base.safetensors").read_bytes())
    raw[-2] ^= 1
    Path("base.safetensors").write_bytes(bytes(raw))


def save(**arrays: Any) -> Callable[[], None]:
    return lambda: np.savez("bad.npz", **arrays)


def foreign() -> None:
    Path("mine").mkdir()
    Path("mine/a.txt").write_text("x")


def negative() -> None:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(builtin, "check_values", lambda *_: None)
        name = "layers.0.bn.running_var"
        Network(BASE.spec, dict(BASE.tensors) | {name: -BASE.tensors[name]}).save("negative.safetensors")


def nothing() -> None:
    pass


BAD_DATA = ("finetune", "base.safetensors", "--data", "bad.npz", "--out", "new", "--engine", "reference")
NAN = np.where(np.arange(360).reshape(60, 6) == 99, np.nan, X)
BAD: list[tuple[str, Callable[[], Any], tuple[Any, ...], str]] = [
    ("missing data", nothing, BAD_DATA, "bad.npz is not: No such file"),
    ("not an npz", lambda: Path("bad.npz").write_text("x,y\n1,2\n"), BAD_DATA, "must be an .npz archive, but bad.npz"),
    ("missing key", save(x=X), BAD_DATA, "bad.npz lacks y"),
    ("wrong shape", save(x=X[:, :4], y=Y), BAD_DATA, "bad.npz: x: a sample must be [6]"),
    ("length", save(x=X, y=Y[:5]), BAD_DATA, "bad.npz: y must be (60,)"),
    ("negative label", save(x=X, y=Y - 1), BAD_DATA, "must be 0 to 2, but the label of sample 0 is -1"),
    ("label C", save(x=X, y=Y + 1), BAD_DATA, "must be 0 to 2, but the label of sample 2 is 3"),
    ("float labels", save(x=X, y=Y + 0.5), BAD_DATA, "y must be integers, not float64"),
    ("NaN", save(x=NAN, y=Y), BAD_DATA, "finite values only, but sample 16"),
    ("empty", save(x=X[:0], y=Y[:0]), BAD_DATA, "at least one sample"),
    ("pickle", save(x=X.astype(object), y=Y), BAD_DATA, "pickled objects are never loaded"),
    ("bad eval", save(x=X, y=Y + 1), (*FINETUNE, "new", "--eval", "bad.npz"), "must be 0 to 2"),
    ("missing base", nothing, ("finetune", "no.safetensors", "--data", "ft.npz", "--out", "new"), "No such file"),
    ("truncated base", lambda: truncate("base.safetensors", 500), (*FINETUNE, "new"), "truncated"),
    (
        "shortened base",
        lambda: truncate("base.safetensors", os.path.getsize("base.safetensors") - 4),
        (*FINETUNE, "new"),
        "bytes, but base.safetensors has",
    ),
    ("wrong hash", flip, (*FINETUNE, "new"), "must match its hash"),
    (
        "other base",
        other_adapter,
        ("evaluate", "base.safetensors", "--adapter", "other", "--data", "ft.npz"),
        BASE.hash,
    ),
    (
        "adapter of predict",
        other_adapter,
        ("predict", "base.safetensors", "--adapter", "other", "--data", "ft.npz", "--out", "y.npz"),
        samples.base(seed=1).hash,
    ),
    (
        "no adapter",
        nothing,
        ("evaluate", "base.safetensors", "--adapter", "nowhere", "--data", "ft.npz"),
        "an adapter must be a directory",
    ),
    (
        "damaged config",
        lambda: truncate(f"adapter/{CONFIG_FILE}", 20),
        ("evaluate", "base.safetensors", "--adapter", "adapter", "--data", "ft.npz"),
        "must hold JSON",
    ),
    ("diverges", nothing, (*FINETUNE, "new", "--lr", "3e38"), "made it NaN or Inf at lr 3e+38"),
    ("keeps the old", nothing, (*FINETUNE, "adapter", "--lr", "3e38", "--epochs", 9), "step 3 made it NaN or Inf"),
    (
        "pretraining diverges",
        nothing,
        ("pretrain", "dnn", "--data", "ft.npz", "--out", "b.safetensors", "--lr", "3e38", "--engine", "reference"),
        "NaN or Inf",
    ),
    ("out under a file", nothing, (*FINETUNE, "ft.npz/new"), "ft.npz is a file"),
    ("out is a file", nothing, (*FINETUNE, "ft.npz"), "ft.npz is a file"),
    ("out in /proc", nothing, (*FINETUNE, "/proc/instantft"), "/proc/instantft"),
    (
        "out holds other files",
        foreign,
        (*FINETUNE, "mine"),
        "mine holds 'a.txt'",
    ),
    ("base to a device", nothing, ("pretrain", "dnn", "--data", "ft.npz", "--out", "/dev/full"), "directory or device"),
    (
        "base to a directory",
        nothing,
        ("pretrain", "dnn", "--data", "ft.npz", "--out", "adapter"),
        "directory or device",
    ),
    (
        "base in /proc",
        nothing,
        ("pretrain", "dnn", "--data", "ft.npz", "--out", "/proc/b.safetensors", "--epochs", 1, "--engine", "reference"),
        "/proc",
    ),
    (
        "predictions under a file",
        nothing,
        ("predict", "base.safetensors", "--data", "ft.npz", "--out", "ft.npz/y.npz"),
        "ft.npz is a file",
    ),
    ("demo seed", nothing, ("demo", "--seed", "-1"), "seed must be an integer from 0"),
    ("demo out is a file", nothing, ("demo", "--out", "ft.npz"), "ft.npz is a file"),
    ("demo out in /proc", nothing, ("demo", "--out", "/proc/demo"), "writable directory, not '/proc/demo'"),
    (
        "demo out holds other files",
        lambda: Path("d/base.safetensors").mkdir(parents=True),
        ("demo", "--out", "d"),
        "d/base",
    ),
    (
        "base over data",
        nothing,
        ("pretrain", "dnn", "--data", "ft.npz", "--out", "./ft.npz"),
        "file than --data, not ./ft",
    ),
    (
        "base over a link to --eval",
        lambda: os.symlink("test.npz", "link"),
        ("pretrain", "dnn", "--data", "ft.npz", "--eval", "test.npz", "--out", "link"),
        "--out must be another file than --eval, not link",
    ),
    (
        "predictions over data",
        nothing,
        ("predict", "base.safetensors", "--data", "ft.npz", "--out", "ft.npz"),
        "--out must be another file than --data, not ft.npz",
    ),
    (
        "predictions over the base",
        nothing,
        ("predict", "base.safetensors", "--data", "ft.npz", "--out", "base.safetensors"),
        "another file than BASE",
    ),
    (
        "predictions over the adapter",
        nothing,
        ("predict", "base.safetensors", "--adapter", "adapter", "--data", "ft.npz", "--out", f"adapter/{CONFIG_FILE}"),
        "another file than the adapter's config",
    ),
    ("cache file is a pipe", lambda: os.mkfifo("pipe"), (*FINETUNE, "new", "--cache-file", "pipe"), "no regular file"),
    ("cache file is a directory", nothing, (*FINETUNE, "new", "--cache-file", "adapter"), "adapter is a directory"),
    ("cache file is a device", nothing, (*FINETUNE, "new", "--cache-file", "/dev/zero"), "no regular file"),
    ("negative variance", negative, ("inspect", "negative.safetensors"), "variances of at least 0"),
    ("cache file in nowhere", nothing, (*FINETUNE, "new", "--cache-file", "no/where"), "no/where"),
    (
        "epochs of a closed form",
        nothing,
        (*FINETUNE, "new", "--method", "skip-ridge", "--epochs", "5"),
        "epochs must be left out for skip-ridge, which makes no steps, but it is 5",
    ),
    (
        "rank without adapters",
        nothing,
        (*FINETUNE, "new", "--method", "ft-last", "--rank", "2"),
        "rank must be left out for ft-last, which has no adapters, but it is 2",
    ),
    ("rank 0", nothing, (*FINETUNE, "new", "--rank", "0"), "rank must be an integer from 1 to 4096, not 0"),
    ("rank -1", nothing, (*FINETUNE, "new", "--rank", "-1"), "rank must be"),
    ("rank 1e12", nothing, (*FINETUNE, "new", "--rank", 10**12), "rank must be"),
    ("rank x", nothing, (*FINETUNE, "new", "--rank", "x"), "'x' is not a valid integer"),
    ("batch 0", nothing, (*FINETUNE, "new", "--batch-size", "0"), "batch_size must be"),
    ("batch -20", nothing, (*FINETUNE, "new", "--batch-size", "-20"), "batch_size must be"),
    ("batch 1e30", nothing, (*FINETUNE, "new", "--batch-size", 10**30), "batch_size must be"),
    ("epochs 0", nothing, (*FINETUNE, "new", "--epochs", "0"), "epochs must be"),
    ("epochs 1e30", nothing, (*FINETUNE, "new", "--epochs", 10**30), "epochs must be"),
    ("lr 0", nothing, (*FINETUNE, "new", "--lr", "0"), "lr must be above 0"),
    ("lr nan", nothing, (*FINETUNE, "new", "--lr", "nan"), "lr must be above 0 and finite in float32, not nan"),
    ("lr 1e300", nothing, (*FINETUNE, "new", "--lr", "1e300"), "lr must be"),
    ("momentum 1", nothing, (*FINETUNE, "new", "--momentum", "1"), "momentum must be"),
    ("threads 0", nothing, (*FINETUNE, "new", "--threads", "0"), "threads must be"),
    ("seed -1", nothing, (*FINETUNE, "new", "--seed", "-1"), "seed must be"),
    ("capacity 0", nothing, (*FINETUNE, "new", "--cache-capacity", "0"), "cache_capacity must be"),
    ("method", nothing, (*FINETUNE, "new", "--method", "magic"), "method must be one of"),
    ("codec", nothing, (*FINETUNE, "new", "--cache", "zip"), "codec must be one of"),
    ("cache and ft-all", nothing, (*FINETUNE, "new", "--cache", "nf4", "--method", "ft-all"), "not ft-all"),
    (
        "engine",
        nothing,
        ("finetune", "base.safetensors", "--data", "ft.npz", "--out", "new", "--engine", "gpu"),
        "engine must be one of native, reference, fixed, rtl-sim, not 'gpu'",
    ),
    ("mean", nothing, (*FINETUNE, "new", "--mean", "a,b"), "--mean must be numbers"),
    ("means", nothing, (*FINETUNE, "new", "--mean", "1,2"), "mean must have one value or one a channel (6), not 2"),
    ("std 0", nothing, (*FINETUNE, "new", "--std", "0"), "std must be finite and above 0, not 0"),
    ("std tiny", nothing, (*FINETUNE, "new", "--std", "1e-45"), "must stay finite"),
    ("hidden", nothing, ("pretrain", "dnn", "--data", "ft.npz", "--out", "b", "--hidden", "-3"), "--hidden must be"),
    ("hidden huge", nothing, ("pretrain", "dnn", "--data", "ft.npz", "--out", "b", "--hidden", 1 << 22), "layer 1"),
    ("net", nothing, ("pretrain", "resnet", "--data", "ft.npz", "--out", "b"), "NET must be dnn or lenet5"),
    ("vectors to lenet5", nothing, ("pretrain", "lenet5", "--data", "ft.npz", "--out", "b"), "use dnn for vectors"),
    ("no option", nothing, ("finetune", "base.safetensors"), "Missing option '--data'"),
    ("no command", nothing, ("finish",), "No such command 'finish'"),
    ("inspect", nothing, ("inspect", "nothing"), "No such file"),
    ("inspect rank", nothing, ("inspect", "base.safetensors", "--rank", "0"), "rank must be"),
    ("bench repeat", nothing, ("bench", "--repeat", "0"), "--repeat must be"),
    ("bench samples", nothing, ("bench", "--samples", 10**20), "--samples must be"),
    ("zero byte", nothing, ("inspect", "a\0b"), "base file"),
]


@pytest.mark.parametrize(("name", "spoil", "arguments", "words"), BAD, ids=[b[0] for b in BAD])
def test_bad_input(
    here: Path, run: Run, name: str, spoil: Callable[[], Any], arguments: tuple[Any, ...], words: str
) -> None:
    spoil()
    before, adapter = names(here), Path("adapter/adapter_model.safetensors").read_bytes()
    status, out, err = run(*arguments)
    assert status == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert names(here) == before
    assert Path("adapter/adapter_model.safetensors").read_bytes() == adapter


def child(*arguments: object, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "instantft", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, text=True, check=False, timeout=60, env=ENV, **{"capture_output": True, **more}
    )


def test_a_full_disk(here: Path) -> None:
    def small() -> None:  # no file may grow beyond 1 KiB, as on a disk with no more room
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    before, adapter = names(here), Path("adapter/adapter_model.safetensors").read_bytes()
    for arguments in (
        (*FINETUNE, "new"),
        (*FINETUNE, "adapter", "--method", "ft-all", "--force"),
        ("pretrain", "dnn", "--data", "ft.npz", "--out", "b.safetensors", "--epochs", 1, "--engine", "reference"),
        ("predict", "base.safetensors", "--data", "ft.npz", "--out", "y.npz", "--engine", "reference"),
        (*FINETUNE, "new", "--cache-file", "cache"),
    ):
        done = child(*arguments, cwd=here, preexec_fn=small)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert names(here) == before
        assert Path("adapter/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_that_is_full(here: Path) -> None:
    with open("/dev/full", "w") as full:
        done = child(
            "inspect", "base.safetensors", "--json", cwd=here, capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr == "error: files must be readable and writable, but the output is not: No space left on device\n"


def test_as_a_module_and_without_a_terminal(here: Path) -> None:
    done = child(*FINETUNE, "new", "--json", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["adapter"] == "new"


def test_unexpected_errors_are_1(here: Path) -> None:
    code = (
        "import instantft.tuner as t; t.FineTuner.fit_prepared = lambda *a, **k: 1/0; "
        "from instantft.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *FINETUNE, "new"], cwd=here, env=ENV, text=True, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_progress_bar_only_on_a_terminal_and_only_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with Bar("work", 3) as bar:
            for done in (1, 2, 3):
                bar.update(done)

    assert on_a_terminal(monkeypatch, work, after=60.0) == ""
    assert "work" in on_a_terminal(monkeypatch, work)
    with Bar("work", 3) as bar:
        bar.update(1)
        assert bar._bar is None


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], after: float = 0.0) -> str:
    """What `work` shows on stderr, if that is a terminal and bars show themselves `after` so many seconds."""
    ours, theirs = pty.openpty()
    read: list[bytes] = []

    def reader() -> None:  # all the while, or a full terminal would make the work wait
        with contextlib.suppress(OSError):  # which is how a terminal says that it was closed
            while data := os.read(ours, 1 << 16):
                read.append(data)

    thread = threading.Thread(target=reader)
    thread.start()
    with monkeypatch.context() as m, os.fdopen(theirs, "w") as terminal:
        m.setattr(bar_module, "BAR_AFTER", after)
        m.setattr(sys, "stderr", terminal)
        work()
    thread.join()
    os.close(ours)
    return b"".join(read).decode()


def test_a_bar_shows_itself_while_one_long_call_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with Bar("work", 1):
            time.sleep(0.3)

    assert "work" in on_a_terminal(monkeypatch, work)


def test_stages_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with Bar("one", 1) as bar:
            bar.update(0.5)
            bar.stage("two", 8)
            bar.update(2)
            bar.stage("two", 8)

    text = on_a_terminal(monkeypatch, work)
    assert "50%" in text
    assert text.rindex("one") < text.index("two")
    assert "25%" in text


def test_every_long_command_has_bars(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = samples.blobs(3000)
    np.savez("large.npz", x=x, y=y)
    more = ("--data", "large.npz", "--engine", "reference")
    monkeypatch.setattr(sgd, "LONG_EPOCH", 500)
    base = "base.safetensors"
    for arguments, labels in (
        (("pretrain", "dnn", "--out", "b", "--epochs", 1, *more), ["pre-training"]),
        (("finetune", base, "--out", "new", "--epochs", 1, *more), ["filling the cache", "fine-tuning (skip2-lora)"]),
        (("finetune", base, "--out", "new", "--epochs", 1, "--method", "ft-all", *more), ["fine-tuning (ft-all)"]),
        (("evaluate", base, *more), ["predicting"]),
        (("predict", base, "--out", "y.npz", *more), ["predicting"]),
    ):
        status: list[int] = []

        def work(arguments: tuple[Any, ...] = arguments, status: list[int] = status) -> None:
            status.append(cli.run([str(a) for a in arguments]))

        text = on_a_terminal(monkeypatch, work)
        assert status == [0]
        assert [label for label in labels if label in text] == labels
        assert "%" in text


def test_damaged_records_of_a_cache_file_are_reported(here: Path, run: Run) -> None:
    command = (*FINETUNE, "new", "--cache-file", "cache", "--json")
    assert "damaged" not in json.loads(run(*command)[1])["cache"]
    raw = bytearray(Path("cache").read_bytes())
    raw[-65] ^= 1
    Path("cache").write_bytes(bytes(raw))
    status, out, err = run(*command)
    assert status == 0
    assert json.loads(out)["cache"]["damaged"] == 1
    assert (
        err == "warning: 1 of 60 records in cache were damaged or unfinished: they were dropped and are computed anew\n"
    )


def test_a_diverged_run_leaves_good_records(here: Path, run: Run) -> None:
    assert run(*FINETUNE, "new", "--cache-file", "cache", "--lr", "3e38")[0] == 2
    status, out, err = run(*FINETUNE, "new", "--cache-file", "cache", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["cache"]["misses"] == 0


def test_a_missing_core_is_a_warning(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from instantft import engine
    from instantft.errors import EngineError

    def missing() -> Any:
        raise EngineError("the compiled core is not built")

    monkeypatch.delenv("INSTANTFT_ISA", raising=False)
    monkeypatch.setitem(engine.ENGINES, "native", missing)
    status, _, err = run("evaluate", "base.safetensors", "--data", "test.npz")
    assert status == 0
    assert err == "warning: the compiled core is not built; the slow NumPy engine computes\n"
    status, _, err = run("evaluate", "base.safetensors", "--data", "test.npz", "--engine", "native")
    assert status == 2
    assert err == "error: the compiled core is not built\n"


def test_a_forced_instruction_set_that_is_not_there_is_an_error(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTANTFT_ISA", "abacus")
    status, _, err = run("evaluate", "base.safetensors", "--data", "test.npz")
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_preprocessing_of_finetune_is_kept_with_the_adapter(here: Path, run: Run) -> None:
    """Else evaluate would quietly feed the adapter other samples than it was made for."""
    assert run(*FINETUNE, "mine", "--mean", "0.3", "--std", "2")[0] == 0
    evaluate = ("evaluate", "base.safetensors", "--adapter", "mine", "--data", "test.npz", "--json")
    kept, named, other = (
        json.loads(run(*evaluate, *more)[1])["loss"]
        for more in ((), ("--mean", "0.3", "--std", "2"), ("--mean", "0", "--std", "1"))
    )
    assert kept == named != other
    config = json.loads(Path("mine/adapter_config.json").read_text())
    config["training"]["mean"] = "much"
    Path("mine/adapter_config.json").write_text(json.dumps(config))
    status, _, err = run(*evaluate)
    assert status == 2
    assert "mean and std must be lists of numbers, not 'much'" in err


def test_auto_is_a_closed_form(here: Path, run: Run) -> None:
    status, out, err = run(*FINETUNE, "new", "--eval", "test.npz", "--json")
    assert (status, err) == (0, "")
    got = json.loads(out)
    assert got["method"] == "skip-ridge"
    assert (got["steps"], got["epochs"]) == (0, 0)
    assert got["accepted"] is True
    assert got["estimate"]["before"] < got["estimate"]["after"] <= 1
    low, high = got["estimate"]["interval"]
    assert low < got["estimate"]["after"] - got["estimate"]["before"] < high
    assert got["accuracy_after"] > 0.9
    assert (got["cache"]["hits"], got["cache"]["misses"]) == (0, 60)
    assert 0 <= got["calibration_error"] < 0.2
    judged = json.loads(run("evaluate", "base.safetensors", "--adapter", "new", "--data", "test.npz", "--json")[1])
    assert judged["accuracy"] == got["accuracy_after"]
    assert 0 <= judged["calibration_error"] < 0.3
    text = run(*FINETUNE, "other")[1]
    assert "in closed form" in text
    assert "samples left out" in text


def noise(T: int = 60) -> None:
    x, _ = samples.blobs(T)
    np.savez("noise.npz", x=x, y=np.random.default_rng(0).integers(0, 3, T))


@pytest.mark.parametrize("method", ["auto", "skip2-lora"])
def test_a_first_adapter_that_is_no_better_changes_nothing(here: Path, run: Run, method: str) -> None:
    noise()
    command = ("finetune", "base.safetensors", "--data", "noise.npz", "--method", method, "--out", "new")
    got = json.loads(run(*command, "--json")[1])
    assert got["accepted"] is False
    outputs = []
    for adapter in ((), ("--adapter", "new")):
        assert run("predict", "base.safetensors", *adapter, "--data", "ft.npz", "--out", "y.npz")[0] == 0
        outputs.append(np.load("y.npz")["logits"])
    np.testing.assert_array_equal(*outputs)
    assert "--force keeps the new one" in run(*command)[1]
    assert json.loads(run(*command, "--force", "--json")[1])["accepted"] is False
    assert run("predict", "base.safetensors", "--adapter", "new", "--data", "ft.npz", "--out", "y.npz")[0] == 0
    assert np.abs(np.load("y.npz")["logits"] - outputs[0]).max() > 0


def test_a_worse_adapter_does_not_replace_a_better_one(here: Path, run: Run) -> None:
    noise()
    assert json.loads(run(*FINETUNE, "new", "--json")[1])["accepted"] is True
    good = Path("new/adapter_model.safetensors").read_bytes()
    worse = ("finetune", "base.safetensors", "--data", "noise.npz", "--out", "new")
    got = json.loads(run(*worse, "--json")[1])
    assert got["accepted"] is False
    assert Path("new/adapter_model.safetensors").read_bytes() == good
    assert "new stays as it was" in run(*worse)[1]
    assert run(*worse, "--force")[0] == 0
    assert Path("new/adapter_model.safetensors").read_bytes() != good


def test_an_adapter_that_cannot_be_compared_is_named(here: Path, run: Run) -> None:
    assert run(*FINETUNE, "new")[0] == 0
    status, _, err = run(*FINETUNE, "new", "--mean", "0.1")
    assert status == 0
    assert "not compared" in err
    assert "--mean" in err
    samples.adapter(samples.base(seed=9)).save("other")
    status, _, err = run(*FINETUNE, "other")
    assert status == 0
    assert "another network" in err
    assert Adapter.load("other").base_hash == BASE.hash
    config = json.loads(Path("other/adapter_config.json").read_text())
    config["training"]["left_out"]["seen"] = "!"
    Path("other/adapter_config.json").write_text(json.dumps(config))
    status, _, err = run(*FINETUNE, "other")
    assert status == 0
    assert "cannot be read (an adapter's fingerprints must be base64" in err
    assert "base64" not in run(*FINETUNE, "other")[2]


def test_groups_come_from_the_file(here: Path, run: Run) -> None:
    x, y = samples.blobs(60)
    np.savez("grouped.npz", x=x, y=y, person=np.arange(60) // 10)
    command = ("finetune", "base.safetensors", "--data", "grouped.npz", "--out", "new", "--groups")
    assert run(*command, "person")[0] == 0
    status, _, err = run(*command, "recording")
    assert status == 2
    assert "lacks recording" in err


def test_lift(here: Path, run: Run) -> None:
    x, y = samples.shells()
    np.savez("shells.npz", x=x, y=y)
    new, labels = samples.shells(300, seed=1)
    np.savez("more.npz", x=new, y=labels)
    command = ("finetune", "base.safetensors", "--data", "shells.npz", "--eval", "more.npz", "--out")
    status, out, err = run(*command, "lifted", "--lift", "nystrom", "--json", "--engine", "reference")
    assert status == 0
    assert "no sample is of class 2" in err  # shells are of two classes
    got = json.loads(out)
    assert got["accepted"]
    assert got["accuracy_after"] > 0.95
    D, P, m, macs = 6 + 5 + 5, got["lift"]["directions"], 256, 6 * 5 + 5 * 5 + 5 * 3
    assert got["lift"] == {
        "directions": P,
        "landmarks": m,
        "macs": D * P + m * P + m * 3,
        "bytes": 4 * (D * P + P + m * P + m * 3),
        "network_macs": macs,
        "network_bytes": 4 * (macs + 5 + 5 + 3 + 20),
    }
    assert 1 <= P <= D
    judged = json.loads(run("evaluate", "base.safetensors", "--adapter", "lifted", "--data", "more.npz", "--json")[1])
    assert judged["accuracy"] == got["accuracy_after"]
    assert run("predict", "base.safetensors", "--adapter", "lifted", "--data", "more.npz", "--out", "p.npz")[0] == 0
    with np.load("p.npz") as z:
        assert (z["label"] == labels).mean() == got["accuracy_after"]

    assert json.loads(run("inspect", "lifted", "--json")[1])["lift"] == got["lift"]
    text = run("inspect", "lifted")[1]
    assert f"{got['lift']['macs']:,}" in text
    assert f"{got['lift']['macs'] / macs:.2f}×" in text
    assert json.loads(run("inspect", "adapter", "--json")[1])["lift"] is None
    forecast = json.loads(run("inspect", "base.safetensors", "--samples", 100, "--json")[1])["lifts"]
    assert forecast["arccos"]["landmarks"] == forecast["nystrom"]["landmarks"] == 100
    assert set(json.loads(run("inspect", "base.safetensors", "--samples", 9999, "--json")[1])["lifts"]) == {"nystrom"}
    assert "arccos" in run("inspect", "base.safetensors")[1]


def test_a_lift_is_printed_or_left_out(here: Path, run: Run) -> None:
    x, y = samples.shells()
    np.savez("shells.npz", x=x, y=y)
    text = run("finetune", "base.safetensors", "--data", "shells.npz", "--out", "lifted", "--lift", "arccos")[1]
    assert "lift     arccos: a prediction takes " in text
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    np.savez("linear.npz", x=x, y=(x @ rng.normal(size=(6, 3))).argmax(axis=1))
    command = ("finetune", "base.safetensors", "--data", "linear.npz", "--out", "linear", "--lift", "arccos")
    assert "lift     arccos does not help here, so there is none" in run(*command)[1]
    assert json.loads(run(*command, "--json")[1])["lift"] is None
    assert "lift.basis" not in Adapter.load("linear").tensors
    status, _, err = run(*command, "--method", "ft-all")
    assert status == 2
    assert "lift must go with skip-ridge, not ft-all" in err

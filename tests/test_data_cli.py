"""`instantft data`: sets that a server on this machine serves in the published formats, and drifts made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft import cli
from instantft.data import load_samples, sets
from instantft.data.drift import rotate
from instantft.data.protocols import TASKS, drifted, read_set
from instantft.data.sets import SETS, Source, digest_of

from .samples import write_npz
from .test_data_raw import write_fan, write_har, write_idx
from .test_data_sets import FOLDER, load
from .test_download import Manners, server

__all__ = ["server"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run(["data", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def serve(monkeypatch: pytest.MonkeyPatch, where: tuple[str, Manners], name: str, folder: Path, **changes: Any) -> None:
    """Let a set come from the server, with the files that are in `folder`."""
    url, manners = where
    manners.content = {f"/{name}/{p.name}": p.read_bytes() for p in folder.iterdir()}
    sources = tuple(
        Source(p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(folder.iterdir())
    )
    changed = replace(SETS[name], hosts=(f"{url}/{name}/",), sources=sources, **changes)
    monkeypatch.setitem(SETS, name, changed)


def write_images(folder: Path, arrays: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", arrays[f"{part}_x"])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", arrays[f"{part}_y"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_images_come_through_as_they_are(
    run: Run, server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """All 70,000, in the published format: the contents are those that are known of the set."""
    made = load(f"{name}.npz")
    write_images(tmp_path / "published", made)
    serve(monkeypatch, server, name, tmp_path / "published")
    status, out, err = run("fetch", name, "--data-dir", tmp_path / "data")
    assert (status, err) == (0, "")
    assert out == f"{name}: {tmp_path / 'data' / name}.npz\n"
    got = read_set(tmp_path / "data" / f"{name}.npz")
    assert set(got) == {"train_x", "train_y", "test_x", "test_y"}
    for key, value in got.items():
        np.testing.assert_array_equal(value, made[key])


@pytest.mark.slow
def test_the_fan_comes_through_as_it_is(
    run: Run, server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 recordings in the published format become the two files whose contents are known."""
    recordings = load("fan_recordings_12cm_hmlo.npz")
    (tmp_path / "published").mkdir()
    for name, values in recordings.items():
        if not name.endswith("onset"):
            write_fan(tmp_path / "published" / f"{name}.zip", values, name)
    serve(monkeypatch, server, "fan", tmp_path / "published")
    status, _, err = run("fetch", "fan", "--data-dir", tmp_path / "data", "--json")
    assert (status, err) == (0, "")
    for file in ("fan_damage1.npz", "fan_damage2.npz"):
        wanted, got = load(file), read_set(tmp_path / "data" / file)
        assert set(got) == set(wanted)
        for key, value in wanted.items():
            np.testing.assert_array_equal(got[key], value)


@pytest.mark.slow
def test_har_comes_through_as_it_is(
    run: Run, server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load("har_features561.npz")
    (tmp_path / "published").mkdir()
    target = tmp_path / "published" / sets.HAR_ARCHIVE
    write_har(target, made["x"], made["y"], made["subject"], made["split"], made["feature_names"])
    serve(monkeypatch, server, "har", tmp_path / "published")
    assert run("fetch", "har", "--data-dir", tmp_path / "data")[0] == 0
    for key, value in read_set(tmp_path / "data" / "har_features561.npz").items():
        np.testing.assert_array_equal(value, made[key])


def test_svhn(run: Run, server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: colour images, the digit 0 written as 10."""
    io = pytest.importorskip("scipy.io", reason="the extra [svhn] is not installed")
    rng, counts = np.random.default_rng(0), {"train": 5, "test": 4, "extra": 7}
    (tmp_path / "published").mkdir()
    x = {part: rng.integers(0, 256, (32, 32, 3, T)).astype(np.uint8) for part, T in counts.items()}
    for part, images in x.items():
        labels = np.arange(1, images.shape[3] + 1)[:, None] + 3
        io.savemat(tmp_path / "published" / f"{part}_32x32.mat", {"X": images, "y": labels.astype(np.uint8)})
    made = replace(SETS["svhn"].makes[0], arrays=sets._images(5, 4, 32, 32, 3, extra=7))
    serve(monkeypatch, server, "svhn", tmp_path / "published", makes=(made,))
    assert run("fetch", "svhn", "--data-dir", tmp_path / "data")[0] == 0
    got = read_set(tmp_path / "data" / "svhn.npz")
    np.testing.assert_array_equal(got["extra_x"][3], x["extra"][..., 3])
    assert got["extra_y"].tolist() == [4, 5, 6, 7, 8, 9, 0]
    status, out, _ = run("prepare", "rotation", "--set", "svhn", "--angle", 90, "--samples", 3, "--data-dir",
                         tmp_path / "data", "--out", tmp_path / "out", "--json")  # fmt: skip
    assert status == 0
    assert json.loads(out)["finetune"]["shape"] == [3, 32, 32]


def small(folder: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, Manners]) -> dict[str, Any]:
    """MNIST in small, served."""
    rng = np.random.default_rng(0)
    arrays = {"train_x": rng.integers(0, 256, (9, 8, 8)), "train_y": np.arange(9), "test_x": rng.integers(
        0, 256, (6, 8, 8)), "test_y": np.arange(6)}  # fmt: skip
    arrays = {key: value.astype(np.uint8) for key, value in arrays.items()}
    write_images(folder / "published", arrays)
    made = replace(SETS["mnist"].makes[0], arrays=sets._images(9, 6, 8, 8), digest=None)
    made = replace(made, digest=digest_of(made, arrays))
    serve(monkeypatch, where, "mnist", folder / "published", makes=(made,))
    return arrays


def test_what_is_there_is_not_fetched_again(
    run: Run, server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path, monkeypatch, server)
    monkeypatch.setenv("INSTANTFT_DATA", str(tmp_path / "data"))
    server[1].cut = [100]
    assert run("fetch", "mnist")[0] == 0
    assert len(server[1].asked) == 5
    status, out, _ = run("fetch", "mnist", "--json")
    assert (status, json.loads(out)["sets"][0]["fetched"]) == (0, False)
    (tmp_path / "data" / "mnist.npz").unlink()
    assert run("fetch", "mnist")[0] == 0
    assert len(server[1].asked) == 5  # made again from what had come
    (tmp_path / "data" / "mnist.npz").unlink()
    source = tmp_path / "data" / "raw" / "mnist" / "t10k-images-idx3-ubyte.gz"
    source.write_bytes(source.read_bytes()[:-1] + b"?")
    assert run("check", "mnist")[0] == 2
    assert run("fetch", "mnist")[0] == 0
    assert len(server[1].asked) == 6
    status, out, _ = run("check")
    assert (status, out.count("right (SHA-256)"), out.count("right (contents)")) == (0, 4, 1)


def test_an_interrupted_fetch_says_that_it_goes_on(
    run: Run, server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path, monkeypatch, server)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sets, "download", stop)
    status, out, err = run("fetch", "mnist", "--data-dir", tmp_path / "data")
    assert (status, out, err.strip()) == (130, "", "interrupted; what has come is kept, and the same command goes on")


def test_nothing_is_made_of_wrong_files(
    run: Run, server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = small(tmp_path, monkeypatch, server)
    path = "/mnist/train-labels-idx1-ubyte.gz"
    good = server[1].content[path]
    server[1].content[path] = good[:-1] + b"?"
    status, out, err = run("fetch", "mnist", "--data-dir", tmp_path / "data")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "must have SHA-256" in err
    assert not (tmp_path / "data" / "mnist.npz").exists()
    # The right file, but other contents than are known: the reader would be wrong, or the table.
    write_images(tmp_path / "published", {**arrays, "train_y": arrays["train_y"][::-1]})
    serve(monkeypatch, server, "mnist", tmp_path / "published")
    status, _, err = run("fetch", "mnist", "--data-dir", tmp_path / "data")
    assert status == 2
    assert "must hold what is known of the set, but its arrays have digest" in err
    assert not (tmp_path / "data" / "mnist.npz").exists()


def test_list(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("list", "--json", "--data-dir", tmp_path)
    rows = json.loads(out)["sets"]
    assert (status, [r["name"] for r in rows]) == (0, ["mnist", "fashion_mnist", "svhn", "har", "fan"])
    for row in rows:
        assert row["licence"]
        assert row["bytes"] == sum(f["bytes"] for f in row["sources"])
        assert all(len(f["sha256"]) == 64 and int(f["sha256"], 16) for f in row["sources"])
        assert not row["there"]
    assert [len(r["sources"]) for r in rows] == [4, 4, 3, 1, 18]
    status, out, _ = run("list", "--data-dir", tmp_path)
    assert status == 0
    for row in rows:
        assert row["licence"] in out
        assert all(f["sha256"] in out for f in row["sources"])


def test_check_finds_what_is_wrong(run: Run, tmp_path: Path) -> None:
    data = load("fan_damage1.npz")
    write_npz(tmp_path / "fan_damage1.npz", **data)
    assert run("check", "--data-dir", tmp_path)[0] == 0
    status, out, _ = run("check", "fan", "--data-dir", tmp_path)  # asked for, so the second must be there too
    assert status == 2
    assert "fan_damage2.npz: WRONG: is not there" in out
    write_npz(tmp_path / "fan_damage1.npz", **{**data, "test_x": data["test_x"] + 1})
    status, out, _ = run("check", "--data-dir", tmp_path, "--json")
    assert (status, json.loads(out)["right"]) == (2, False)
    (tmp_path / "fan_damage1.npz").write_bytes(b"")
    assert run("check", "--data-dir", tmp_path)[0] == 2
    (tmp_path / "fan_damage1.npz").unlink()
    assert "holds none of the sets" in run("check", "--data-dir", tmp_path)[1]
    assert run("check", "cifar")[0] == 2


# -- drifts


def test_a_seed_decides(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = {f"{p}_x": rng.integers(0, 256, (40, 8, 8)).astype(np.uint8) for p in ("train", "test")}
    write_npz(tmp_path / "mine.npz", **x, train_y=np.arange(40), test_y=np.arange(40))
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("prepare", "rotation", "--set", "mine", "--angle", 90, "--samples", 10, "--seed", seed, "--data-dir",
                   tmp_path, "--out", tmp_path / out)[0] == 0  # fmt: skip
    a, b, c = (triple(tmp_path / out) for out in "abc")
    for part, again in zip(a, b, strict=True):
        assert part["x"].tobytes() == again["x"].tobytes()
    assert (a[1]["y"] != c[1]["y"]).any()
    assert sorted([*a[1]["y"], *a[2]["y"]]) == list(range(40))
    np.testing.assert_array_equal(a[1]["x"], rotate(x["test_x"], 90.0)[a[1]["y"]])


def triple(folder: Path) -> list[Any]:
    return [read_set(folder / f"{part}.npz") for part in ("pretrain", "finetune", "test")]


@pytest.mark.slow
def test_rotation(run: Run, tmp_path: Path) -> None:
    held = load("mnist.npz")
    arguments = ("prepare", "rotation", "--set", "mnist", "--angle", "75", "--data-dir", FOLDER)
    assert run(*arguments, "--out", tmp_path / "a", "--seed", 3)[0] == 0
    base, tune, test = triple(tmp_path / "a")
    np.testing.assert_array_equal(base["x"], held["train_x"])
    assert (len(tune["x"]), len(test["x"])) == (1024, 8976)
    # The same images in the same order as `reproduce` takes; bytes are rounded, so half a step apart at most.
    (x, y), (_, test_y) = drifted(replace(TASKS["mnist"], degrees=75), FOLDER, 3)
    np.testing.assert_array_equal(tune["y"], y)
    np.testing.assert_array_equal(test["y"], test_y)
    assert np.abs(tune["x"].reshape(1024, 784) / 255 - x).max() <= 0.5 / 255 + 1e-6
    assert load_samples(tmp_path / "a" / "finetune.npz").shape == (1, 28, 28)


def test_subjects(run: Run, tmp_path: Path) -> None:
    held = load("har_features561.npz")
    assert run("prepare", "subjects", "--data-dir", FOLDER, "--out", tmp_path)[0] == 0
    for part, name in zip(triple(tmp_path), ("pretrain", "finetune", "test"), strict=True):
        rows = held[f"{name}_idx"]
        for key in ("x", "y", "subject"):
            np.testing.assert_array_equal(part[key], held[key][rows])
    assert load_samples(tmp_path / "finetune.npz", groups="subject").groups is not None
    args = ("prepare", "subjects", "--data-dir", FOLDER, "--subjects", "2,30", "--windows", 100, "--out", tmp_path)
    assert run(*args)[0] == 0
    base, tune, test = triple(tmp_path)
    assert set(tune["subject"].tolist()) == set(test["subject"].tolist()) == {2, 30}
    assert not {2, 30} & set(base["subject"].tolist())
    assert len(tune["x"]) == 200


def test_noise(run: Run, tmp_path: Path) -> None:
    held = load("fan_damage2.npz")
    arguments = ("prepare", "noise", "--set", "fan_damage2", "--data-dir", FOLDER, "--out", tmp_path)
    assert run(*arguments)[0] == 0
    for part, name in zip(triple(tmp_path), ("pretrain", "finetune", "test"), strict=True):
        np.testing.assert_array_equal(part["x"], held[f"{name}_x"])
        np.testing.assert_array_equal(part["y"], held[f"{name}_y"])
    assert run(*arguments, "--recording", "silentB_2")[0] == 0
    np.testing.assert_array_equal(triple(tmp_path)[0]["x"], held["pretrain_silentB_2_x"])


def test_bad_drifts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = {f"{p}_x": rng.integers(0, 256, (9, 8, 8)).astype(np.uint8) for p in ("train", "test")}
    write_npz(tmp_path / "test.npz", **x, train_y=np.arange(9), test_y=np.arange(9))
    write_npz(tmp_path / "persons.npz", x=x["train_x"][:, 0] / 1.0, y=np.arange(9), subject=np.arange(9) // 3,
             split=np.arange(9) // 6)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rotation = ("rotation", "--set", "test", "--angle")
    for arguments, words in (
        ((*rotation, 5), "--out must be another folder than that of the set"),
        ((*rotation, 5, "--samples", 9, "--out", tmp_path / "o"), "--samples must be 1 to 8, which leaves one"),
        ((*rotation, "nan", "--samples", 3, "--out", tmp_path / "o"), "angle must be finite"),
        ((*rotation, 5, "--samples", 3, "--seed", -1, "--out", tmp_path / "o"), "seed must be"),
        (("rotation", "--set", "../test", "--angle", 5), "--set must be the name of a file"),
        (("rotation", "--set", "gone", "--angle", 5, "--out", tmp_path / "o"), "the data folder must hold gone.npz"),
        (("noise", "--set", "test", "--out", tmp_path / "o"), "this protocol is for another set"),
        (("subjects", "--subjects", "a", "--out", "o"), "--subjects must be whole numbers"),
        (
            ("subjects", "--set", "persons", "--subjects", "7", "--out", "o"),
            "--subjects must be among [0, 1, 2], not [7]",
        ),
        (("subjects", "--set", "persons", "--subjects", "1", "--windows", 3, "--out", "o"), "--windows must be 1 to 2"),
        (
            ("subjects", "--set", "persons", "--subjects", "0,1", "--windows", 1, "--out", "o"),
            "must leave some of the training part",
        ),
        (("rotation", "--set", "test", "--angle", 5, "--out", "/dev/null/x"), "must be in a directory"),
    ):
        out = () if "--out" in arguments else ("--out", tmp_path)
        status, printed, err = run("prepare", *arguments, *out, "--data-dir", tmp_path)
        assert (status, printed, err.count("\n")) == (2, "", 1), err
        assert words in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["persons.npz", "test.npz"]
    assert rotate(x["test_x"], 0).tolist() == x["test_x"].tolist()

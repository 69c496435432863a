"""Adapters: their start, their files, and what they are bound to."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instantft import adapters, files
from instantft.adapters import CONFIG_FILE, TENSOR_FILE, Adapter, check_target, initial
from instantft.errors import FileError, InstantFTError, MismatchError, UsageError
from instantft.methods import METHODS, method
from instantft.spec import lenet5

from . import samples

BASE = samples.base()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    samples.adapter(BASE).save(directory)
    return directory


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    before = samples.adapter(BASE, name)
    before.save(tmp_path / "a")
    after = Adapter.load(tmp_path / "a", BASE)
    assert (after.method, after.rank, after.base_hash, after.spec) == (name, 2, BASE.hash, BASE.spec)
    assert after.config == {"epochs": 1}
    assert set(after.tensors) == set(before.tensors)
    for key, value in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[key], value)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([CONFIG_FILE, TENSOR_FILE])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_output_gain_and_bias_round_trip(tmp_path: Path) -> None:
    plain = samples.adapter(BASE)
    extra = {"output.gain": np.zeros(1, np.float32), "output.bias": np.ones(3, np.float32)}
    Adapter("skip2-lora", 2, BASE.spec, BASE.hash, {**plain.tensors, **extra}).save(tmp_path / "a")
    assert set(extra) < set(Adapter.load(tmp_path / "a").tensors)


def test_config_says_what_peft_says(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert config["r"] == 2
    assert config["base_model_hash"] == BASE.hash
    assert config["method"] == "skip2-lora"
    assert config["peft_type"] == "SKIP_LORA"
    assert config["trainable_parameters"] == samples.adapter(BASE).parameters


def test_another_base_is_refused_with_both_hashes(saved: Path) -> None:
    other = samples.base(seed=1)
    with pytest.raises(MismatchError) as e:
        Adapter.load(saved, other)
    assert BASE.hash in str(e.value)
    assert other.hash in str(e.value)
    with pytest.raises(MismatchError, match=BASE.hash):
        Adapter.load(saved).check_base(other)


def test_start_is_gaussian_and_zero() -> None:
    spec = lenet5((1, 28, 28))
    start = initial(method("skip2-lora"), spec, 4, seed=0)
    A = start["lora.0-5.A"]
    assert A.dtype == np.float32
    assert A.shape == (784, 4)
    assert abs(A.std() * 28 - 1) < 0.05  # 3,136 draws: four standard errors
    assert not start["lora.0-5.B"].any()
    last = initial(method("lora-last"), spec, 4, seed=0)
    np.testing.assert_array_equal(last["lora.4-5.A"], start["lora.4-5.A"])
    other = initial(method("skip2-lora"), spec, 4, seed=1)
    assert (other["lora.0-5.A"] != A).all()
    assert initial(method("ft-all"), spec, 4, 0) == {}


def test_parameters_are_those_of_table_1() -> None:
    base = samples.base(lenet5((1, 28, 28)))
    assert samples.adapter(base, rank=4).parameters == 10_456
    assert samples.adapter(base, "ft-all", rank=4).parameters == 61_706


@pytest.mark.parametrize("victim", [CONFIG_FILE, TENSOR_FILE])
def test_damage_is_refused(saved: Path, victim: str) -> None:
    file = saved / victim
    raw = file.read_bytes()
    for n in (0, 5, len(raw) // 2, len(raw) - 3):
        file.write_bytes(raw[:n])
        with pytest.raises(FileError):
            Adapter.load(saved)
    file.unlink()
    with pytest.raises(FileError):
        Adapter.load(saved)


def test_a_flipped_bit_is_refused(saved: Path) -> None:
    file = saved / TENSOR_FILE
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(FileError, match="sha256"):
        Adapter.load(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "x"),
        ("format_version", 1),
        ("method", "ft-all"),
        ("r", 3),
        ("base_model_hash", "0"),
        ("sha256", None),
    ],
)
def test_config_must_agree(saved: Path, key: str, value: object) -> None:
    file = saved / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(FileError):
        Adapter.load(saved)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_raise_only_our_errors(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    victim = data.draw(st.sampled_from([CONFIG_FILE, TENSOR_FILE]))
    for name in (CONFIG_FILE, TENSOR_FILE):
        raw = bytearray((saved / name).read_bytes())
        if name == victim:
            for _ in range(data.draw(st.integers(1, 3))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        (copy / name).write_bytes(bytes(raw))
    with contextlib.suppress(InstantFTError):
        Adapter.load(copy, BASE)


def test_replacing_keeps_exactly_one(saved: Path) -> None:
    samples.adapter(BASE, "ft-last", seed=5).save(saved)
    assert Adapter.load(saved).method == "ft-last"
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_replacing_without_renameat2(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        pass

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Bare())
    samples.adapter(BASE, "ft-last").save(saved)
    assert Adapter.load(saved).method == "ft-last"
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failed_write_keeps_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_exchange", full) if failing == "rename" else monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        samples.adapter(BASE, "ft-last").save(saved)
    assert Adapter.load(saved, BASE).method == "skip2-lora"
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_what_a_killed_process_left_is_in_nobodys_way(saved: Path) -> None:
    """Process numbers come again, in containers at once."""
    left = [saved.with_name(f".adapter.{os.getpid()}.{end}") for end in ("new", "old")]
    for directory in left:
        (directory / "deep").mkdir(parents=True)
    samples.adapter(BASE, "ft-last").save(saved)
    assert Adapter.load(saved).method == "ft-last"
    assert {p.name for p in saved.parent.iterdir()} == {"adapter", *(p.name for p in left)}


@pytest.mark.parametrize("at", ["write_and_sync", "sync_directory"])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        samples.adapter(BASE).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_negative_variances_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = samples.adapter(BASE, "ft-all")
    bad = {k: -v if k == "layers.0.bn.running_var" else v for k, v in good.tensors.items()}
    with pytest.raises(UsageError, match=r"layers.0.bn.running_var must hold variances of at least 0, not -"):
        Adapter("ft-all", 2, BASE.spec, BASE.hash, bad)
    with monkeypatch.context() as m:
        m.setattr(adapters, "check_values", lambda *_: None)
        Adapter("ft-all", 2, BASE.spec, BASE.hash, bad).save(tmp_path / "a")
    with pytest.raises(FileError, match="variances of at least 0"):
        Adapter.load(tmp_path / "a")


def test_other_directories_are_left_alone(tmp_path: Path, saved: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("cat")
    (saved / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    for target in (photos, saved, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileError):
            samples.adapter(BASE).save(target)
        with pytest.raises(FileError):
            check_target(target)
    assert (photos / "cat.jpg").read_text() == "cat"
    assert (saved / "notes.txt").read_text() == "mine"


def test_empty_and_new_directories_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "deep"):
        check_target(target)
        samples.adapter(BASE).save(target)
        assert Adapter.load(target, BASE).rank == 2


def test_wrong_tensors_are_refused() -> None:
    good = dict(samples.adapter(BASE).tensors)
    nan = np.full_like(good["lora.0-3.A"], np.nan)
    for tensors in (
        {k: v for k, v in good.items() if k != "lora.0-3.A"},
        good | {"layers.0.weight": BASE.tensors["layers.0.weight"]},
        good | {"lora.0-3.A": good["lora.0-3.A"][:2]},
        good | {"lora.0-3.A": nan},
    ):
        with pytest.raises(UsageError):
            Adapter("skip2-lora", 2, BASE.spec, BASE.hash, tensors)

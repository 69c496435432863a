"""Base files: what is written comes back, and nothing else does."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instantft.backbones import builtin
from instantft.backbones.builtin import Network
from instantft.engine import get_engine
from instantft.errors import FileError, UsageError
from instantft.spec import dnn, lenet5

from . import samples


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "base.safetensors"
    Network.init(samples.SPEC, 0, (0.5,), (2.0,)).save(file)
    return file


def edit(path: Path, change: dict[str, str | None]) -> None:
    """Change metadata of a safetensors file, nothing else."""
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    for key, value in change.items():
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])


def test_round_trip(path: Path) -> None:
    before, after = Network.init(samples.SPEC, 0, (0.5,), (2.0,)), Network.load(path)
    assert after.spec == before.spec
    assert after.hash == before.hash
    assert (after.mean, after.std) == ((0.5,), (2.0,))
    assert list(after.tensors) == list(samples.SPEC.parameters)
    for name, value in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], value)
    assert not [p for p in path.parent.iterdir() if p != path]


def test_hash_depends_on_everything() -> None:
    base = samples.base()
    changed = dict(base.tensors) | {"layers.0.bias": base.tensors["layers.0.bias"] + 1}
    others = [
        Network(base.spec, changed),
        Network(base.spec, base.tensors, (0.5,)),
        Network(base.spec, base.tensors, (), (0.5,)),
        samples.base(seed=1),
    ]
    assert len({base.hash, *(o.hash for o in others)}) == 5


def test_tensors_are_read_only() -> None:
    base = samples.base()
    with pytest.raises(ValueError, match="read-only"):
        base.tensors["layers.0.bias"][0] = 1
    assert copy.deepcopy(base) is base


def test_init_follows_torch_defaults() -> None:
    base = Network.init(lenet5((1, 28, 28)), 3)
    for name, fan_in in (("layers.1", 6 * 25), ("layers.2", 400)):
        for part in ("weight", "bias"):
            values = base.tensors[f"{name}.{part}"]
            assert np.abs(values).max() <= fan_in**-0.5
            assert np.abs(values).max() > 0.7 * fan_in**-0.5
    norm = Network.init(dnn(8, 3), 0).tensors
    assert [float(norm[f"layers.0.bn.{k}"].mean()) for k in ("weight", "bias", "running_mean", "running_var")] == [
        1,
        0,
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format 'instantft-base'"),
        ({"version": "2"}, "version '1'"),
        ({"hash": "0" * 64}, "hash"),
        ({"hash": None}, "hash"),
        ({"spec": "{}"}, "describe its network"),
        ({"spec": "["}, "describe its network"),
        ({"spec": None}, "describe its network"),
        ({"mean": '["a"]'}, "preprocessing"),
        ({"mean": "[NaN]"}, "preprocessing"),
        ({"mean": "[0.25]"}, "hash"),
        ({"std": "[0]"}, "preprocessing"),
        ({"std": "[1,1,1]"}, "preprocessing"),
        ({"spec": json.dumps(dnn(6, 4, 5).to_json())}, "layers.2.weight"),
        ({"spec": json.dumps({"input_shape": [1 << 40], "layers": []})}, "describe its network"),
    ],
)
def test_changed_metadata_is_refused(path: Path, change: dict[str, str | None], words: str) -> None:
    edit(path, change)
    with pytest.raises(FileError, match=words) as e:
        Network.load(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_every_truncation_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    for n in (*range(0, 40), len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:n])
        with pytest.raises(FileError):
            Network.load(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(FileError, match="bytes"):
        Network.load(path)


def test_one_changed_byte_of_data_is_refused(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match="hash"):
        Network.load(path)


def test_values_that_are_not_finite_are_refused(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(raw)
    with pytest.raises(FileError, match="finite"):
        Network.load(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_raise_only_our_errors(path: Path, data: st.DataObject) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    target = path.with_name("mutated.safetensors")
    target.write_bytes(bytes(raw))
    with contextlib.suppress(FileError):  # what loads after all must be the same network
        assert Network.load(target).hash == Network.load(path).hash


@pytest.mark.parametrize("make", ["missing", "directory", "pipe", "huge header", "nested", "text"])
def test_what_is_no_base_file(tmp_path: Path, make: str) -> None:
    file = tmp_path / "x.safetensors"
    if make == "directory":
        file.mkdir()
    elif make == "pipe":
        os.mkfifo(file)  # opening it would wait for ever
    elif make == "huge header":
        file.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    elif make == "nested":
        text = b'{"a":' * 100_000
        file.write_bytes(struct.pack("<Q", len(text)) + text)
    elif make == "text":
        file.write_text("hello, this is no safetensors file")
    with pytest.raises(FileError, match="base file"):
        Network.load(file)


def test_saving_to_what_is_no_file(tmp_path: Path) -> None:
    base = samples.base()
    (tmp_path / "file").write_text("x")
    for target in (tmp_path, tmp_path / "file" / "base.safetensors", Path("/dev/full")):
        with pytest.raises(FileError, match="base file"):
            base.save(target)
    assert not Path("/dev/full").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        samples.base(seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_wrong_tensors_are_refused() -> None:
    good: dict[str, Any] = dict(samples.base().tensors)
    bad: list[dict[str, Any]] = [
        {k: v for k, v in good.items() if k != "layers.0.bias"},
        good | {"extra": np.zeros(1, np.float32)},
        good | {"layers.0.bias": np.zeros(4, np.float32)},
        good | {"layers.0.bias": np.zeros(5)},
        good | {"layers.0.bias": np.full(5, np.nan, np.float32)},
    ]
    for tensors in bad:
        with pytest.raises(UsageError):
            Network(samples.SPEC, tensors)


def test_negative_variances_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = samples.base()
    bad = dict(good.tensors) | {"layers.1.bn.running_var": np.full(5, -1e-3, np.float32)}
    with pytest.raises(UsageError, match=r"layers.1.bn.running_var must hold variances of at least 0, not -0.001"):
        Network(samples.SPEC, bad)
    with monkeypatch.context() as m:
        m.setattr(builtin, "check_values", lambda *_: None)
        Network(samples.SPEC, bad).save(tmp_path / "b")
    with pytest.raises(FileError, match="variances of at least 0") as e:
        Network.load(tmp_path / "b")
    assert "\n" not in str(e.value)
    Network(samples.SPEC, dict(good.tensors) | {"layers.1.bn.running_var": np.zeros(5, np.float32)})


@pytest.mark.parametrize("spec", [samples.SPEC, samples.IMAGES])
def test_a_class_more_is_never_chosen(spec: Any) -> None:
    base = samples.base(spec)
    wide = base.widened()
    x = np.random.default_rng(0).normal(size=(50, spec.tap_widths[0])).astype(np.float32)
    engine = get_engine("reference")
    old, new = (engine.forward(n.spec, n.tensors, x) for n in (base, wide))
    np.testing.assert_allclose(new[:, :-1], old, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new[:, -1], old.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(new.argmax(axis=1), old.argmax(axis=1))
    assert wide.hash != base.hash

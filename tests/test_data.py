"""Sample files: what is right comes out right, what is wrong is refused in one line."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instantft import data
from instantft.data import as_labels, as_samples, load_samples, warn_if_poor
from instantft.errors import DataError, FileError, InstantFTError, UsageError

from . import samples

X, Y = samples.blobs(12)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: str) -> bytes:
    raw = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in members.items():
            z.writestr(f"{name}.npy", raw)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_float_rows(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", x=X, y=Y.astype(np.uint8), other=np.zeros(3))
    got = load_samples(tmp_path / "a.npz", samples.SPEC)
    np.testing.assert_array_equal(got.x, X)
    np.testing.assert_array_equal(got.labels, Y)
    assert got.x.dtype == np.float32
    assert got.labels.dtype == np.int32
    assert got.shape == (6,)


@pytest.mark.parametrize("shape", [(4, 60), (4, 2, 6, 5)])
def test_uint8_is_scaled_and_normalised_by_channel(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.arange(240, dtype=np.uint8).reshape(shape)
    got = load_samples(
        samples.write_npz(tmp_path / "a.npz", x=x, y=np.zeros(4, int)), samples.IMAGES, (0.25, 0.5), (2.0, 4.0)
    )
    wanted = x.reshape(4, 2, 30) / 255
    wanted = (wanted - np.array([[0.25], [0.5]])) / np.array([[2], [4]])
    np.testing.assert_allclose(got.x, wanted.reshape(4, 60), rtol=1e-6, atol=1e-7)
    assert got.shape == (2, 6, 5)
    assert got.x.flags.c_contiguous


def test_grey_images_get_a_channel(tmp_path: Path) -> None:
    path = samples.write_npz(tmp_path / "a.npz", x=np.zeros((3, 5, 4), np.uint8))
    got = load_samples(path, labels=False)
    assert got.shape == (1, 5, 4)
    with pytest.raises(DataError, match="labels"):
        _ = got.labels


def test_fortran_and_big_endian_arrays(tmp_path: Path) -> None:
    path = samples.write_npz(tmp_path / "a.npz", x=np.asfortranarray(X).astype(">f8"), y=Y.astype(">i2"))
    got = load_samples(path, samples.SPEC)
    np.testing.assert_array_equal(got.x, X)
    np.testing.assert_array_equal(got.labels, Y)


BAD_ARRAYS: list[tuple[str, dict[str, Any], str]] = [
    ("no y", {"x": X}, "must hold x and y, but .* lacks y"),
    ("no x", {"y": Y}, "lacks x"),
    ("length", {"x": X, "y": Y[:-1]}, r"y must be \(12,\), one label a sample, not \(11,\)"),
    ("width", {"x": X[:, :5], "y": Y}, r"must be \[6\] as the network's input is, not \[5\]"),
    ("1-d x", {"x": X[:, 0], "y": Y}, r"x must be \(T, N\)"),
    ("5-d x", {"x": X.reshape(12, 1, 1, 1, 6), "y": Y}, r"x must be \(T, N\)"),
    ("2-d y", {"x": X, "y": Y[:, None]}, "one label a sample"),
    ("negative", {"x": X, "y": np.where(np.arange(12) == 7, -1, Y)}, "must be 0 to 2, but the label of sample 7 is -1"),
    ("too high", {"x": X, "y": Y + 1}, "must be 0 to 2, but the label of sample 2 is 3"),
    ("float y", {"x": X, "y": Y.astype(float)}, "y must be integers, not float64"),
    ("bool y", {"x": X, "y": Y > 0}, "y must be integers, not bool"),
    ("NaN", {"x": np.where(np.arange(72).reshape(12, 6) == 20, np.nan, X), "y": Y}, "finite values only, but sample 3"),
    ("Inf", {"x": np.where(np.arange(72).reshape(12, 6) == 20, np.inf, X), "y": Y}, "finite values only, but sample 3"),
    ("overflow", {"x": X.astype(float) * 1e300, "y": Y}, "finite values only"),
    ("empty", {"x": X[:0], "y": Y[:0]}, "at least one sample"),
    ("no values", {"x": X[:, :0], "y": Y}, "at least one sample"),
    ("int x", {"x": Y[:, None], "y": Y}, "x must be float32 or uint8, not int32"),
    ("complex x", {"x": X.astype(complex), "y": Y}, "x must be float32 or uint8"),
    ("text x", {"x": X.astype(str), "y": Y}, "plain numbers"),
    ("objects", {"x": X.astype(object), "y": Y}, "pickled objects are never loaded"),
]


@pytest.mark.parametrize(("name", "arrays", "words"), BAD_ARRAYS, ids=[b[0] for b in BAD_ARRAYS])
def test_bad_arrays(tmp_path: Path, name: str, arrays: dict[str, Any], words: str) -> None:
    path = samples.write_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=words) as e:
        load_samples(path, samples.SPEC)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


BAD_FILES: list[tuple[str, Any, str]] = [
    ("missing", lambda p: None, "No such file"),
    ("pipe", os.mkfifo, "regular file"),
    ("text", lambda p: p.write_text("hello"), "an .npz archive"),
    ("empty", lambda p: p.write_bytes(b""), "an .npz archive"),
    ("npy", lambda p: p.write_bytes(npy(X)), "an .npz archive"),
    ("not npy", lambda p: zipped(p, x=b"hello", y=npy(Y)), "damaged"),
    ("header", lambda p: zipped(p, x=header("{'descr'"), y=npy(Y)), "damaged"),
    ("deep header", lambda p: zipped(p, x=header("(" * 9000), y=npy(Y)), "damaged"),
    ("code", lambda p: zipped(p, x=header("__import__('os').abort()"), y=npy(Y)), "damaged"),
    (
        "huge",
        lambda p: zipped(
            p,
            x=header("{'descr':'<f4','fortran_order':False,'shape':(1099511627776,)}"),
            y=npy(Y),
        ),
        "at most",
    ),
    (
        "lies",
        lambda p: zipped(p, x=header("{'descr':'<f4','fortran_order':False,'shape':(9,6)}"), y=npy(Y)),
        "announces",
    ),
    (
        "negative",
        lambda p: zipped(p, x=header("{'descr':'<f4','fortran_order':False,'shape':(-1,6)}"), y=npy(Y)),
        "sizes of 0 or more",
    ),
    ("trailing", lambda p: zipped(p, x=npy(X) + b"0", y=npy(Y)), "announces"),
]


@pytest.mark.parametrize(("name", "make", "words"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(tmp_path: Path, name: str, make: Any, words: str) -> None:
    path = tmp_path / "bad.npz"
    make(path)
    with pytest.raises(FileError, match=words) as e:
        load_samples(path, samples.SPEC)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_bomb_is_refused_before_it_goes_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_BYTES", 1 << 16)
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((1 << 8, 1 << 10), np.uint8), y=np.zeros(1 << 8, int))
    assert path.stat().st_size < 1 << 12
    with pytest.raises(FileError, match="at most 65536 bytes"):
        load_samples(path)
    np.savez_compressed(path, x=np.zeros((1 << 8, 1 << 7), np.uint8), y=np.zeros(1 << 8, int))
    with pytest.raises(FileError, match="memory"):  # small enough as uint8, but not as float32
        load_samples(path)


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_BYTES", 1 << 16)
    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 20) + b" " * (1 << 20)
    with pytest.raises(FileError, match="at most 65536 bytes a key"):
        load_samples(zipped(tmp_path / "a.npz", x=long, y=npy(Y)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans()
)
def test_mutated_files_raise_only_our_errors(tmp_path: Path, changes: list[tuple[int, int]], cut: bool) -> None:
    path = samples.write_npz(tmp_path / "good.npz", x=X, y=Y)
    raw = bytearray(path.read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    if cut:
        raw = raw[: changes[0][0] % len(raw)]
    target = tmp_path / "mutated.npz"
    target.write_bytes(bytes(raw))
    with contextlib.suppress(InstantFTError):
        assert np.isfinite(load_samples(target, samples.SPEC).x).all()


def test_wrong_image_shape_is_not_flattened_away() -> None:
    with pytest.raises(DataError, match=r"\[2, 6, 5\]"):
        as_samples(np.zeros((3, 6, 5, 2), np.float32), samples.IMAGES)


def test_input_arrays_are_not_changed() -> None:
    x = np.ones((3, 6), np.float32)
    as_samples(x, samples.SPEC, (1.0,), (2.0,))
    assert (x == 1).all()


def test_mean_and_std_must_fit() -> None:
    with pytest.raises(UsageError, match="mean must have one value or one a channel"):
        as_samples(np.zeros((3, 6), np.float32), samples.SPEC, (1.0, 2.0))


def test_labels_without_a_network_are_bounded() -> None:
    with pytest.raises(DataError, match="65535"):
        as_labels(np.array([1 << 40]), 1)
    with pytest.raises(DataError, match="18446744073709551615"):
        as_labels(np.array([2**64 - 1], np.uint64), 1)


def test_warnings() -> None:
    with pytest.warns(UserWarning, match=r"fewer samples \(12\) than a batch \(20\)"):
        warn_if_poor(Y, 20)
    with pytest.warns(UserWarning, match="every label is 1"):
        warn_if_poor(np.ones(30, np.int32), 20)


def test_good_data_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    warn_if_poor(Y, 12)
    assert not recwarn.list


def test_channels_last_is_named() -> None:
    with pytest.raises(DataError, match=r"looks like channels last: use x.transpose\(0, 3, 1, 2\)"):
        as_samples(np.zeros((5, 24, 24, 3), np.uint8))
    assert as_samples(np.zeros((5, 3, 24, 4), np.uint8))[1] == (3, 24, 4)

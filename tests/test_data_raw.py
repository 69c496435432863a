"""The published formats, written by the tests themselves: what goes in comes out, and what is wrong is refused."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from instantft.data.raw import read_fan, read_har, read_idx, read_svhn, stop_onset
from instantft.errors import FileError, InstantFTError

RNG = np.random.default_rng(0)


def write_idx(path: Path, values: NDArray[Any], announce: tuple[int, ...] | None = None) -> Path:
    shape = announce or values.shape
    head = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes(), 1))
    return path


def write_har(path: Path, x: Any, y: Any, subject: Any, split: Any, names: Any, **changes: bytes) -> Path:
    """The archive within an archive that the UCI serves, with numbers as it prints them."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("UCI HAR Dataset/features.txt", "".join(f"{k + 1} {name}\n" for k, name in enumerate(names)))
        for k, part in enumerate(("train", "test")):
            rows = split == k
            for name, values, form in (
                ("X", x[rows], "%16.9e"),
                ("y", y[rows, None].astype(int) + 1, "%d"),
                ("subject", subject[rows, None], "%d"),
            ):
                text = io.BytesIO()
                np.savetxt(text, values, form)
                z.writestr(f"UCI HAR Dataset/{part}/{name}_{part}.txt", changes.get(f"{name}_{part}", text.getvalue()))
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("UCI HAR Dataset.zip", inner.getvalue())
        z.writestr("../UCI HAR Dataset.names", "never read")
    return path


def write_fan(path: Path, spectra: NDArray[Any], name: str = "recording") -> Path:
    """A CSV a spectrum, not in their order, as the authors' archives have them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(f"{name}/", "")
        for k in RNG.permutation(len(spectra)):
            text = "".join(f"{b}, {v:.6f}\n" for b, v in enumerate(spectra[k]))
            z.writestr(f"{name}/2022-02-10-{k // 3600:02}-{k // 60 % 60:02}-{k % 60:02}.csv", text)
        z.writestr("../../outside.csv", "0, 0\n")
    return path


def spectra() -> NDArray[np.float32]:
    """As a fan's: 120 rows at two speeds, 57 slower ones, 58 where it stands still."""
    level = np.repeat([0.4, 0.3, 0.2, 0.05], [60, 60, 57, 58])
    return np.round(RNG.uniform(0.9, 1.1, (235, 512)) * level[:, None], 6).astype(np.float32)


@pytest.mark.parametrize("shape", [(5, 4, 3), (7,)])
def test_idx(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = RNG.integers(0, 256, shape).astype(np.uint8)
    got = read_idx(write_idx(tmp_path / "a.gz", values), len(shape))
    np.testing.assert_array_equal(got, values)
    assert got.dtype == np.uint8


def test_bad_idx(tmp_path: Path) -> None:
    values, path = np.zeros((5, 4, 3)), tmp_path / "a.gz"
    for announce, words in (
        ((5, 4, 4), "must hold what it announces"),
        ((5, 4, 2), "must hold what it announces"),
        ((2**31, 4, 4), "must hold 1 to"),
        ((0, 4, 4), "must hold 1 to"),
        ((60,), "must be of 3 dimensions of bytes"),
    ):
        with pytest.raises(FileError, match=words):
            read_idx(write_idx(path, values, announce), 3)
    raw = write_idx(path, values).read_bytes()
    for damaged in (raw[:-9], b"plain", b"", raw[:10] + b"???" + raw[13:]):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"an IDX file must be (whole|readable)"):
            read_idx(path, 3)


def test_svhn(tmp_path: Path) -> None:
    io_ = pytest.importorskip("scipy.io", reason="the extra [svhn] is not installed")
    x, y = RNG.integers(0, 256, (32, 32, 3, 6)).astype(np.uint8), np.array([[10, 1, 2, 9, 10, 5]]).T.astype(np.uint8)
    path = tmp_path / "a.mat"
    for compressed in (False, True):
        io_.savemat(path, {"X": x, "y": y}, do_compression=compressed)
        got, labels = read_svhn(path)
        assert got.shape == (6, 32, 32, 3)
        np.testing.assert_array_equal(got[4], x[:, :, :, 4])
        assert labels.tolist() == [0, 1, 2, 9, 0, 5]
    for held, words in (
        ({"X": x}, "must hold y"),
        ({"X": x[:, :, :2], "y": y}, "must hold X"),
        ({"X": x.astype(float), "y": y}, "must hold X"),
        ({"X": x, "y": y[:5]}, "must hold y"),
        ({"X": x, "y": y + 1}, "labels 1 to 10"),
        ({"X": x, "y": y.astype(float) - 0.5}, "labels 1 to 10"),
    ):
        io_.savemat(path, held)
        with pytest.raises(FileError, match=words):
            read_svhn(path)
    path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(FileError, match="an SVHN file must"):
        read_svhn(path)


def har(T: int = 40) -> dict[str, Any]:
    x = RNG.uniform(-1, 1, (T, 561)).astype(np.float32)
    split = (np.arange(T) >= 30).astype(np.uint8)
    names = np.array([f"f{k}()-X,{k}" for k in range(561)])
    return {"x": x, "y": (np.arange(T) % 6).astype(np.uint8), "subject": (np.arange(T) % 5 + 1).astype(np.uint8),
            "split": split, "names": names}  # fmt: skip


def test_har(tmp_path: Path) -> None:
    made = har()
    seen: list[float] = []
    got = read_har(write_har(tmp_path / "a.zip", **made), seen.append)
    made["feature_names"] = made.pop("names")
    for key, value in made.items():
        np.testing.assert_array_equal(got[key], value)
    assert got["x"].dtype == np.float32
    assert seen[-1] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_bad_har(tmp_path: Path) -> None:
    made, path = har(), tmp_path / "a.zip"
    for changes, words in (
        ({"X_test": b"1 2 3\n"}, "must have 561 features"),
        ({"X_test": b"1 2 x\n"}, "must be whole"),
        ({"y_test": b"7\n" * 10}, "labels 1 to 6"),
        ({"subject_train": b"1\n" * 29}, "must have 561 features, a label and a subject"),
        ({"X_train": (b"nan " * 561 + b"\n") * 30}, "finite"),
    ):
        with pytest.raises(FileError, match=words):
            read_har(write_har(path, **made, **changes), lambda share: None)
    with pytest.raises(FileError, match="must name 561 features"):
        read_har(write_har(path, **{**made, "names": ["a"]}), lambda share: None)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("other", "")
    with pytest.raises(FileError, match=r"must hold UCI HAR Dataset\.zip"):
        read_har(path, lambda share: None)


def test_fan(tmp_path: Path) -> None:
    made = spectra()
    got = read_fan(write_fan(tmp_path / "a.zip", made))
    np.testing.assert_array_equal(got, made)
    assert stop_onset(got) == 177
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_bad_fan(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with pytest.raises(FileError, match=r"must hold 235 CSV files named by time, but .* has 4"):
        read_fan(write_fan(path, spectra()[:4]))
    with pytest.raises(FileError, match="must have bins 0 to 511"):
        read_fan(write_fan(path, spectra()[:, :100]))
    with pytest.raises(FileError, match="finite"):
        read_fan(write_fan(path, np.full((235, 512), np.inf)))
    path.write_bytes(b"PK")
    with pytest.raises(FileError, match="must be whole"):
        read_fan(path)
    with pytest.raises(FileError, match="readable file"):
        read_fan(tmp_path / "missing")


def test_a_member_that_is_too_large_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for k in range(235):
            z.writestr(f"a/2022-02-10-00-{k // 60:02}-{k % 60:02}.csv", b"0" * ((1 << 20) + 1) if k == 0 else b"0")
    with pytest.raises(FileError, match="must have at most 1048576 bytes, not 1048577"):
        read_fan(tmp_path / "a.zip")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans()
)
def test_mutated_files_raise_only_our_errors(tmp_path: Path, changes: list[tuple[int, int]], cut: bool) -> None:
    idx = tmp_path / "idx.gz"
    if not idx.exists():
        write_idx(idx, RNG.integers(0, 9, (50, 6, 6)))
        write_har(tmp_path / "har.zip", **har(35))
    for name, read in (("idx.gz", lambda p: read_idx(p, 3)), ("har.zip", lambda p: read_har(p, lambda share: None))):
        raw = bytearray((tmp_path / name).read_bytes())
        for at, value in changes:
            raw[at % len(raw)] = value
        target = tmp_path / f"mutated-{name}"
        target.write_bytes(bytes(raw[: changes[0][0] % len(raw)] if cut else raw))
        with contextlib.suppress(InstantFTError):
            read(target)

"""What waits for the disk says so when the disk refuses; the formats on top are tested where they are read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from instantft import files
from instantft.errors import FileError


def refuse_folders(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """fsync works for files, and says this error of folders."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_file_systems_that_cannot_synchronise_folders_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_folders(monkeypatch, code)
    files.sync_directory(tmp_path)
    files.write_whole(tmp_path / "a", b"new", "a test")
    files.replace_directory(tmp_path / "d", {"x": b"1", "deep/y": b"2"}, "a test")
    files.replace_directory(tmp_path / "d", {"x": b"3"}, "a test")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [p.read_bytes() for p in (tmp_path / "d").iterdir()] == [b"3"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_folder_that_the_disk_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    words = os.strerror(code)
    files.replace_directory(tmp_path / "d", {"x": b"old"}, "a test")
    with monkeypatch.context() as m:
        refuse_folders(m, code)
        with pytest.raises(OSError, match=words):
            files.sync_directory(tmp_path)
        with pytest.raises(FileError, match=f"a test must be written to a writable place, but .*: {words}"):
            files.write_whole(tmp_path / "a", b"new", "a test")
        with pytest.raises(FileError, match=words):
            files.replace_directory(tmp_path / "d", {"x": b"new"}, "a test")
        with pytest.raises(FileError, match=words):
            files.replace_directory(tmp_path / "none", {"x": b"new"}, "a test")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "d"}
    assert (tmp_path / "a").read_bytes() == b"new"  # whole, if the power stays
    assert (tmp_path / "d" / "x").read_bytes() == b"old"


def once(real: Callable[[Path], None], n: int) -> Callable[[Path], None]:
    """The n-th call fails, the others work."""
    calls = [0]

    def call(path: Path) -> None:
        calls[0] += 1
        if calls[0] == n:
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    return call


def test_a_folder_is_put_back_where_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.replace_directory(tmp_path / "d", {"x": b"old"}, "a test")
    for n, target in ((1, "d"), (2, "d"), (1, "e"), (2, "e")):
        with monkeypatch.context() as m:
            m.setattr(files, "sync_directory", once(files.sync_directory, n))
            with pytest.raises(FileError, match="Input/output error"):
                files.replace_directory(tmp_path / target, {"x": b"new"}, "a test")
        assert [p.name for p in tmp_path.iterdir()] == ["d"]
        assert (tmp_path / "d" / "x").read_bytes() == b"old"

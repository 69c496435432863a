"""One file from the network: resumed where it stopped, and kept only if its size and SHA-256 are the right ones.

What has come so far is in NAME.part beside the target; a stopped download goes on from there. This file knows nothing
of data sets.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from .. import files
from ..errors import FileError

__all__ = ["CHUNK", "TIMEOUT", "TRIES", "download", "sha256_of"]

Progress = Callable[[float], None]

CHUNK = 1 << 16
"""Bytes read at a time."""

TIMEOUT = 30.0
"""Seconds in which a host must send something."""

TRIES = 6
"""Connections to one host that may break before the next host is asked; the next run starts counting anew."""

PAUSE = 1.0
"""Seconds before the second try; they double with every further one."""


class _GoneError(Exception):
    """The host does not have the file, or not the right one: no use in asking it again."""


class _BrokenError(Exception):
    """The connection broke or stalled: what has come is kept, and the next try goes on from there."""


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `progress` is told the bytes read so far.

    Raises:
        FileError: it is no readable regular file.
    """
    files.regular_size(path, "a file to be checked")
    h, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as f:
            while chunk := f.read(1 << 20):
                h.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done)
    except OSError as e:
        raise FileError(f"a file to be checked must be readable, but {path} is not: {files.reason(e)}") from None
    return h.hexdigest()


def download(urls: Sequence[str], target: Path, size: int, sha256: str, progress: Progress | None = None) -> None:
    """Fetch a file whose size and hash are known.

    Args:
        urls: where it is to be had; the next is asked where one fails.
        target: where it goes. The folder is made; `target` appears when the file is whole and right, and not before.
        size: of the file, in bytes. Not one byte more is read.
        sha256: of the file, in hexadecimal.
        progress: is told the bytes that are there, of earlier runs too.

    Raises:
        FileError: no host has it, the connections broke (what came is kept, and the next call goes on), the hash is
            wrong (what came is removed), there is no room, or somebody else is fetching it.
    """
    report = progress or (lambda done: None)
    part = target.with_name(target.name + ".part")
    files.check_directory(target.parent, "downloads")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab+") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FileError(f"a file must be fetched once at a time, but {part} is being written already") from None
            if f.tell() > size:
                f.truncate(0)
            need, free = size - f.tell(), shutil.disk_usage(target.parent).free
            if need > free:
                raise FileError(f"{target.parent} must have room for {need:,} bytes, but has {free:,}")
            _from_any(urls, f, size, report)
            f.flush()
            found = sha256_of(part)
            if found != sha256:
                part.unlink()
                raise FileError(
                    f"{target.name} must have SHA-256 {sha256}, but what came has {found}: it was removed; if this "
                    "happens again, the host has another file than the one known here"
                )
            os.fsync(f.fileno())
            os.replace(part, target)
        files.sync_directory(target.parent)
    except FileError:
        raise
    except OSError as e:
        raise FileError(
            f"downloads must be written to a writable place, but {part} is not: {files.reason(e)}"
        ) from None


def _from_any(urls: Sequence[str], f: IO[bytes], size: int, report: Progress) -> None:
    """The rest of the file, from the first host that has it."""
    reasons = []
    for url in urls:
        tries = 0  # never set back, so that a host that breaks for ever is left
        while True:
            have = f.seek(0, os.SEEK_END)
            report(have)
            if have == size:
                return
            try:
                _one_connection(url, f, have, size, report)
            except _GoneError as e:
                reasons.append(f"{url}: {e}")
                break
            except _BrokenError as e:
                tries += 1
                if tries >= TRIES:
                    reasons.append(f"{url}: {e}")
                    break
                time.sleep(PAUSE * 2 ** (tries - 1))
    have = f.seek(0, os.SEEK_END)
    kept = f"; {have:,} of {size:,} bytes are kept, and the same command goes on from there" if have else ""
    raise FileError(f"a host must have the file, but {'; '.join(reasons)}{kept}")


def _one_connection(url: str, f: IO[bytes], have: int, size: int, report: Progress) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "instantft", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if have and answer.status == 206:
                sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
                if sent is None or int(sent[1]) != have or sent[2] not in (str(size), "*"):
                    raise _GoneError(f"it sends another part than was asked for ({sent[0] if sent else 'unnamed'})")
            elif have:
                f.truncate(0)  # a host that cannot go on starts again
                have = 0
            announced = answer.headers.get("Content-Length")
            if announced is not None and announced.isdigit() and int(announced) != size - have:
                raise _GoneError(f"the file must have {size:,} bytes, but there it has {have + int(announced):,}")
            while chunk := _read(answer):
                if have + len(chunk) > size:
                    f.truncate(0)
                    raise _GoneError(f"the file must have {size:,} bytes, but there it has more")
                f.write(chunk)
                have += len(chunk)
                report(have)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # what is here is not the beginning of what is there
            f.truncate(0)
        words = f"status {e.code} {e.reason}"
        raise (_BrokenError if e.code in (408, 416, 429) or e.code >= 500 else _GoneError)(words) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        raise _BrokenError(_words(getattr(e, "reason", None) or e)) from None
    if have < size:
        raise _BrokenError(f"the connection ended after {have:,} of {size:,} bytes")


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(CHUNK)
    except (OSError, http.client.HTTPException) as e:
        raise _BrokenError(_words(e)) from None


def _words(e: object) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__

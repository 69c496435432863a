"""Downloads, from a server on this machine that stops, stalls, lies and refuses."""

from __future__ import annotations

import fcntl
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft.data import download as module
from instantft.data.download import download, sha256_of
from instantft.errors import FileError

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Manners:
    """How the server behaves, and what it was asked.

    Attributes:
        content: by path.
        cut: after how many bytes each connection ends; once used up, no more.
        announce: what Content-Length says; None: the truth; -1: nothing.
        pause: seconds after every 10,000 bytes.
        stall: seconds before the first byte.
        ranges: whether it can go on in the middle.
        statuses: with which the next requests are refused.
        asked: path and Range of every request.
    """

    content: dict[str, bytes] = field(default_factory=lambda: {"/file": CONTENT})
    cut: list[int] = field(default_factory=list)
    announce: int | None = None
    pause: float = 0.0
    stall: float = 0.0
    ranges: bool = True
    shift: int = 0
    statuses: list[int] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    manners: Manners

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        m, wanted = self.manners, self.headers.get("Range")
        m.asked.append((self.path, wanted))
        if m.statuses:
            return self.send_error(m.statuses.pop(0))
        if self.path not in m.content:
            return self.send_error(404)
        whole = m.content[self.path]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and m.ranges else 0
        if start and start >= len(whole):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + m.shift}-{len(whole) - 1}/{len(whole)}")
        body = whole[start:]
        if m.announce != -1:
            self.send_header("Content-Length", str(len(body) if m.announce is None else m.announce))
        self.end_headers()
        if m.cut:
            body = body[: m.cut.pop(0)]
        time.sleep(m.stall)
        for at in range(0, len(body), 10_000):
            try:
                self.wfile.write(body[at : at + 10_000])
            except OSError:
                return None
            time.sleep(m.pause)
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Manners]]:
    monkeypatch.setattr(module, "PAUSE", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    manners = Manners()
    made = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"manners": manners}))
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}", manners
    made.shutdown()
    made.server_close()
    thread.join()


def get(url: str, target: Path, **changes: Any) -> list[float]:
    seen: list[float] = []
    given: dict[str, Any] = {"size": len(CONTENT), "sha256": SHA256, **changes}
    download([f"{url}/file"], target, given["size"], given["sha256"], seen.append)
    return seen


def test_whole(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    seen = get(url, tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, len(CONTENT))
    assert manners.asked == [("/file", None)]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]


def test_a_broken_connection_is_taken_up_where_it_broke(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.cut = [100_000, 50_000]
    get(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert manners.asked == [("/file", None), ("/file", "bytes=100000-"), ("/file", "bytes=150000-")]


def test_another_run_goes_on(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.cut = [100_000] + [0] * module.TRIES
    with pytest.raises(FileError, match=r"ended after 100,000 of 300,000 .*100,000 of 300,000 bytes are kept"):
        get(url, tmp_path / "file")
    assert (tmp_path / "file.part").stat().st_size == 100_000
    assert not (tmp_path / "file").exists()
    manners.cut, manners.asked = [], []
    seen = get(url, tmp_path / "file")
    assert seen[0] == 100_000
    assert manners.asked == [("/file", "bytes=100000-")]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_host_without_ranges_starts_again(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.cut, manners.ranges = [100_000], False
    get(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("announce", [-1, None])
def test_a_wrong_hash_is_refused_and_removed(server: tuple[str, Manners], tmp_path: Path, announce: int | None) -> None:
    url, manners = server
    manners.content["/file"], manners.announce = CONTENT[:-1] + b"?", announce
    with pytest.raises(FileError, match=rf"must have SHA-256 {SHA256}, but what came has .*: it was removed"):
        get(url, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_rest_of_an_earlier_run_is_refused_and_removed(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, _ = server
    (tmp_path / "file.part").write_bytes(b"?" * 1000)
    with pytest.raises(FileError, match="SHA-256"):
        get(url, tmp_path / "file")
    get(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_not_found(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.content = {}
    with pytest.raises(FileError, match=r"a host must have the file, but http://.*/file: status 404 Not Found$"):
        get(url, tmp_path / "file")
    assert len(manners.asked) == 1
    assert not (tmp_path / "file").exists()


def test_a_host_that_is_busy_is_asked_again(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.statuses = [503, 429]
    get(url, tmp_path / "file")
    manners.statuses = [500] * module.TRIES
    with pytest.raises(FileError, match="status 500"):
        get(url, tmp_path / "other")
    assert len(manners.asked) == 3 + module.TRIES


def test_the_next_host_is_asked(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.cut = [100_000]
    download([f"{url}/gone", "http://127.0.0.1:1/file", f"{url}/file"], tmp_path / "file", len(CONTENT), SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    with pytest.raises(FileError, match=r"gone: status 404 Not Found; http://127.0.0.1:1/x: .*refused"):
        download([f"{url}/gone", "http://127.0.0.1:1/x"], tmp_path / "x", 5, SHA256)


def test_slow_but_steady_is_fine_and_a_stall_is_not(
    server: tuple[str, Manners], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, manners = server
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    manners.pause = 0.02  # 0.6 s in all, three times what a stall may last
    began = time.perf_counter()
    get(url, tmp_path / "file")
    assert time.perf_counter() - began > 0.5
    manners.stall = 1.0
    with pytest.raises(FileError, match="timed out"):
        get(url, tmp_path / "other")


@pytest.mark.parametrize(("size", "announce"), [(300_004, None), (300_004, -1), (299_995, None)])
def test_another_size_is_refused(server: tuple[str, Manners], tmp_path: Path, size: int, announce: int | None) -> None:
    url, manners = server
    manners.content["/file"], manners.announce = (CONTENT + b"more")[:size], announce
    with pytest.raises(FileError, match=r"must have 300,000 bytes, but there it has (300,004|299,995|more)"):
        get(url, tmp_path / "file")
    assert (tmp_path / "file.part").stat().st_size == 0
    assert len(manners.asked) == 1  # where it is announced, nothing is read; else not a byte too many is kept


def test_without_a_length_a_file_that_is_too_short_is_found(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.content["/file"], manners.announce = CONTENT[:-5], -1
    with pytest.raises(FileError, match=r"a host must have the file"):
        get(url, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_part_that_was_not_asked_for_is_refused(server: tuple[str, Manners], tmp_path: Path) -> None:
    url, manners = server
    manners.cut, manners.shift = [100_000], 7
    with pytest.raises(FileError, match=r"another part than was asked for \(bytes 100007-"):
        get(url, tmp_path / "file")


def test_one_at_a_time(server: tuple[str, Manners], tmp_path: Path) -> None:
    with (tmp_path / "file.part").open("wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(FileError, match="once at a time"):
            get(server[0], tmp_path / "file")


def test_no_room_and_no_folder(server: tuple[str, Manners], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="must have room for"):
        get(server[0], tmp_path / "file", size=1 << 60)
    (tmp_path / "plain").write_text("")
    with pytest.raises(FileError, match="must be in a directory"):
        get(server[0], tmp_path / "plain" / "file")
    assert server[1].asked == []


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    seen: list[float] = []
    assert sha256_of(tmp_path / "a", seen.append) == SHA256
    assert seen == [len(CONTENT)]
    with pytest.raises(FileError, match="readable file"):
        sha256_of(tmp_path / "b")

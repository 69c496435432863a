"""What is wiped is gone from the disk; and what the page lets strangers do."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from instantft.cache.store import open_store
from instantft.watch.replay import digest

from ..test_watching import command, environment
from ..watched import journal_in, trained
from .inputs import with_page
from .work import Seen, trials

__all__ = ["page", "wiped"]


def on_disk(folder: Path, piece: bytes) -> bool:
    """Whether these bytes are anywhere in the files of a folder."""
    return any(piece in p.read_bytes() for p in folder.rglob("*") if p.is_file())


def wipe(i: int, folder: Path) -> str:
    """A user's samples, or the records of some, are forgotten; then every file is searched for their bytes."""
    rng = np.random.default_rng([i, 9])
    place = folder / f"w{i}"
    if i % 2:
        path = place / "cache"
        place.mkdir()
        record = trained().spec.record
        codec = str(rng.choice(["fp32", "int8", "nf4"]))
        store = open_store(path, codec, record, 40, "net", "data")
        store.write(np.arange(40), rng.normal(size=(40, record.width)).astype(np.float32))
        store.flush()
        gone = rng.choice(40, 10, replace=False)
        pieces = [store.data[k].tobytes() for k in gone]
        kept = [store.data[k].tobytes() for k in range(40) if k not in gone]
        assert all(on_disk(place, piece) for piece in pieces)
        store.forget(np.sort(gone))
        store.flush()
        what = "records of a cache file"
    else:
        journal = journal_in(place, keep=int(rng.choice([30, 50])))
        x = rng.normal(size=(80, 6)).astype(np.float32)
        for k in range(80):  # more than there is room for
            user = ["anna", "bert"][k % 2]
            samples = journal.waiting if k >= 70 else journal.replay  # and those that wait for their label
            samples.add(k + 1, 1.0, x[k], int(rng.integers(3)), name=f"n{k}", user=user)
        journal.close()
        if rng.random() < 0.5:
            journal_in(place, keep=40).close()  # the file is written anew
        assert any(on_disk(place, x[k].tobytes()) for k in range(0, 80, 2))
        if i < 6:  # as a user does it
            out = subprocess.run(
                command("forget", place, "--user", "anna"), env=environment(), capture_output=True, check=True
            )
            assert b"samples wiped" in out.stdout
        else:
            journal = journal_in(place, keep=40)
            journal.forget(None, "anna")
            journal.close()
        pieces = [x[k].tobytes() for k in range(0, 80, 2)] + [digest("anna")]
        kept = [digest("bert")]
        what = "users' samples"
    assert not any(on_disk(place, piece) for piece in pieces), f"{what} are still on the disk"
    assert all(on_disk(place, piece) for piece in kept), f"other {what} are gone"
    return what


def wiped(count: int) -> Seen:
    return trials(wipe, count)


PATHS = ("/token", "/../token", "/state/token", "/adapters", "//", "/%2e%2e/token", "/samples.bin", "/?/token",
         "/rollback", "/adapt", "/etc/passwd", "/../../../../etc/passwd", "/journal.json", "/./", "")  # fmt: skip


def page(count: int) -> Seen:
    """The program's own page: where it listens, what it gives away, and what it does without the token."""
    seen, rng = Seen(count), np.random.default_rng(10)
    with tempfile.TemporaryDirectory() as scratch:
        program, port = with_page(Path(scratch))
        if not listens(port) or set(listens(port)) != {"127.0.0.1"}:
            seen.failures.append(f"it listens at {listens(port)}")
        token = Path(scratch, "state", "token").read_text(encoding="ascii").strip()
        if Path(scratch, "state", "token").stat().st_mode & 0o077:
            seen.failures.append("others can read the token")
        secrets = [token.encode(), b"root:", b"IFTREPLY", b"instantft-watch"]

        def ask(method: str, path: str, **headers: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            found = answer.status, answer.read()
            connection.close()
            return found

        wrong = ("", "Bearer ", "Bearer x", f"Bearer {token[:-1]}", f"Bearer {token}x", f"Basic {token}", token)
        for _ in range(count):
            path = PATHS[int(rng.integers(len(PATHS)))]
            if rng.random() < 0.3:
                path += f"?to={rng.integers(9)}&token={rng.integers(99)}"
            method = str(rng.choice(["GET", "POST", "PUT", "DELETE"]))
            authorization = wrong[int(rng.integers(len(wrong)))]
            status, body = ask(method, path or "/", Authorization=authorization)
            if status == 202 or (status == 200 and (path.split("?")[0] not in ("", "/", "//"))):
                seen.failures.append(f"{method} {path} with {authorization!r}: {status}")
            if any(secret in body for secret in secrets):
                seen.failures.append(f"{method} {path} gives away what is in the folder")
            seen.outcomes[f"answers {status}"] += 1
        for path in ("/rollback", "/adapt"):
            if ask("POST", path)[0] != 401 or ask("POST", path, Authorization=f"Bearer {token}")[0] != 202:
                seen.failures.append(f"POST {path} does not go by the token")
        program.end()
    return seen


def listens(port: int) -> list[str]:
    """Addresses of this machine at which somebody listens on a port."""
    found = []
    for table, width in (("tcp", 8), ("tcp6", 32)):
        for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
            match = re.match(rf"\s*\d+: ([0-9A-F]{{{width}}}):([0-9A-F]{{4}}) \S+ 0A ", line)
            if match and int(match[2], 16) == port:
                raw = bytes.fromhex(match[1])
                found.append(socket.inet_ntoa(raw[::-1]) if width == 8 else match[1])
    return found

"""Many trials on all cores, each in a process of its own kind that may crash, hang, or ask for too much memory."""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Seen", "Trial", "scratch", "trials", "unexpected"]

Trial = Callable[[int, Path], "str | Counter[str]"]
"""What the i-th trial showed, in a word or two, or how often several things; the folder is the process's own. An
exception is a failure."""

MEMORY = 3 << 30
"""Bytes of address space that a trial may take beyond what its process began with."""

SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where trials work: in memory, for what fsync is worth they know better themselves."""

SHOWN = 300
"""Characters of a failure."""


def unexpected(err: bytes) -> list[bytes]:
    """Lines of a watcher's stderr but for those it always has: where its page is, and that its base knows no world."""
    return [
        line
        for line in err.splitlines()
        if not line.startswith(b"page ") and not (line.startswith(b"warning: ") and b"give --reference" in line)
    ]


def scratch() -> Path:
    """A new folder that goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=SCRATCH))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass
class Seen:
    """What trials showed.

    Attributes:
        count: how many there were.
        outcomes: how often each was seen.
        failures: what must not be, in words.
        skipped: why the test could not be made here; empty: it was.
    """

    count: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"left out: {self.skipped}"
        told = ", ".join(f"{n:,} {what}" for what, n in self.outcomes.most_common())
        return f"{len(self.failures)} failures; {told}" if told else f"{len(self.failures)} failures"

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            self.count + other.count,
            self.outcomes + other.outcomes,
            self.failures + other.failures,
            "; ".join(s for s in (self.skipped, other.skipped) if s),
        )


class _Worker:
    """A process that makes the trials first, first + step, … below count, and says what they showed."""

    def __init__(self, trial: Trial, first: int, step: int, count: int, folder: Path) -> None:
        self.next, self.step, self.folder = first, step, folder
        self.out, write = os.pipe()
        self.held, self.since = b"", time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.out)
            _make(trial, range(first, count, step), folder, write)
        os.close(write)

    def told(self) -> list[dict[str, int] | str] | None:
        """What trials said that have come to an end, how often they saw what or what failed; None at the end."""
        chunk = os.read(self.out, 1 << 16)
        if not chunk:
            return None
        *lines, self.held = (self.held + chunk).split(b"\n")
        if lines:
            self.since = time.monotonic()
        return [json.loads(line) for line in lines]


def _make(trial: Trial, numbers: range, folder: Path, write: int) -> None:
    """The life of a worker."""
    status = 1
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for i in numbers:
            said: dict[str, int] | str
            try:
                shown = trial(i, folder)
                said = {shown: 1} if isinstance(shown, str) else dict(shown)
            except BaseException as e:
                at = traceback.extract_tb(e.__traceback__)[-1]
                said = f"{type(e).__name__} at {Path(at.filename).name}:{at.lineno}: {e}"[:SHOWN]
            os.write(write, json.dumps(said).encode() + b"\n")
        status = 0
    finally:
        os._exit(status)


def trials(trial: Trial, count: int, limit: float = 60.0, jobs: int = 0) -> Seen:
    """Make trials 0 … count − 1.

    Args:
        limit: seconds that one may take.
        jobs: how many at a time; 0: one a core.
    """
    jobs = min(jobs or os.cpu_count() or 1, count)
    seen = Seen(count)
    with tempfile.TemporaryDirectory(prefix="torture-", dir=SCRATCH) as scratch:
        workers = []
        for k in range(jobs):
            folder = Path(scratch, str(k))
            folder.mkdir()
            workers.append(_Worker(trial, k, jobs, count, folder))
        while workers:
            ready, _, _ = select.select([w.out for w in workers], [], [], 1.0)
            for w in list(workers):
                lines = w.told() if w.out in ready else []
                for said in lines or []:
                    if isinstance(said, str):
                        seen.failures.append(f"trial {w.next}: {said}")
                    else:
                        seen.outcomes.update(said)
                    w.next += w.step
                hung = lines is not None and time.monotonic() - w.since > limit
                if not hung and lines is not None:
                    continue
                if hung:
                    os.kill(w.pid, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(w.pid, 0)[1])
                os.close(w.out)
                workers.remove(w)
                if w.next < count:  # it did not live to tell of this one
                    seen.failures.append(f"trial {w.next}: " + ("hung" if hung else f"the process ended with {code}"))
                    shutil.rmtree(w.folder, ignore_errors=True)
                    w.folder.mkdir()
                    if w.next + w.step < count:
                        workers.append(_Worker(trial, w.next + w.step, w.step, count, w.folder))
    return seen

"""`python -m tests.torture [--share S] [--only NAME …]`: every test, as a table; status 1 if anything failed."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from instantft.table import format_table

from .crashes import kills, power_cuts, refusals, small_disks
from .inputs import garbage_http, garbage_mqtt, garbage_stdin
from .mutations import mutated_files
from .privacy import page, wiped
from .streams import stream, wrong_labels
from .work import Seen


@dataclass(frozen=True)
class Row:
    """A test: what it does, how often in full and at least, and what it must show."""

    test: Callable[[int], Seen]
    what: str
    count: int
    least: int
    must: str


ROWS = (
    Row(kills, "kill -9 in fill, train, save, switch", 500, 20, "no adapter lost or unreadable; it goes on"),
    Row(power_cuts, "power cuts", 500, 24, "the last committed adapter loads; damaged records are recomputed"),
    Row(refusals, "every write refused", 6, 1, "a clear error, the old adapter live"),
    Row(small_disks, "a tmpfs that is full, read-only, forbidden", 120, 9, "a clear error, the old adapter live"),
    Row(garbage_stdin, "garbage on standard input", 10_000, 500, "counted and skipped, memory bounded"),
    Row(garbage_mqtt, "garbage over MQTT", 10_000, 500, "counted and skipped, memory bounded"),
    Row(garbage_http, "garbage over HTTP", 10_000, 500, "nothing changes, memory bounded"),
    Row(mutated_files, "mutated adapters, bases, caches, ONNX files", 20_000, 1000, "an error of ours, nothing else"),
    Row(wrong_labels, "wrong labels, streams a case", 20, 3, "within a point of the better of old and new"),
    Row(stream, "a day's stream, samples", 1_000_000, 20_000, "flat memory, bounded files"),
    Row(wiped, "samples and records wiped", 200, 10, "gone from the disk"),
    Row(page, "the page asked by strangers", 1000, 50, "loopback only, token needed, no path taken"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts [1]")
    parser.add_argument("--only", nargs="*", choices=[row.test.__name__ for row in ROWS], help="these tests alone")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    table, failed = [], []
    for row in ROWS:
        if given.only and row.test.__name__ not in given.only:
            continue
        count = max(row.least, round(row.count * given.share))
        began = time.monotonic()
        seen = row.test(count)
        seconds = time.monotonic() - began
        print(f"{row.what}: {seen}, {seconds:.0f} s", file=sys.stderr, flush=True)
        table.append((row.what, f"{count:,}", row.must, str(seen), f"{seconds:.0f}"))
        failed += [f"{row.what}: {failure}" for failure in seen.failures]
    print(format_table(("test", "count", "must show", "seen", "s"), table))
    print("\n".join(failed[:40]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

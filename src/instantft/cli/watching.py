"""The loop on the device, and its journal: watch, history, rollback, forget."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError, FileError, UsageError
from .options import (
    engine_of,
    engine_option,
    json_option,
    preprocessing,
    preprocessing_options,
    seed_option,
    taps_option,
)
from .show import percent, print_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..backbones.builtin import Network
    from ..engine import Engine
    from ..watch.detectors import Seen
    from ..watch.journal import Journal, State
    from ..watch.loop import Event, Loop, Message
    from ..watch.mqtt import Mqtt
    from ..watch.page import Page

__all__ = ["forget", "history", "rollback", "watch"]

WAITING = 256
"""Messages that are read ahead."""

AT_ONCE = 64
"""Messages that are predicted together, if so many are waiting."""

PAUSE = 0.2
"""Seconds without a message after which the loop looks at other things."""

LOOK = 1.0
"""Seconds between two looks into a folder, and at requests of other commands."""

SHOW = 0.5
"""Seconds between two states that the page shows."""

PATIENCE = 30.0
"""Seconds that a command waits for the watcher to do what it asks."""

NICE = 10
"""By how much an adaptation is less urgent than predictions."""

state_argument = click.argument("folder", metavar="STATE")


@click.command()
@click.argument("base")
@click.option("--state", "folder", required=True, metavar="DIR", help="Where adapters and labelled samples are kept.")
@click.option(
    "--from", "source", default="-", metavar="DIR|URL", help="A folder, or mqtt://host/topic. [default: stdin]"
)
@click.option("--format", "form", default="json", show_default=True, metavar="json|csv", help="Of standard input.")
@click.option("--method", default="auto", show_default=True, help="One that leaves the network as it is.")
@click.option("--cache", metavar="CODEC", help="As of finetune. [default: fp32]")
@click.option("--labels", default=100, show_default=True, help="Labelled samples that an adaptation needs.")
@click.option("--keep", default=2000, show_default=True, help="Labelled samples that are kept on disk.")
@click.option("--pending", default=4096, show_default=True, help="Samples that wait for their label at most.")
@click.option("--versions", default=8, show_default=True, help="Adapters that are kept.")
@click.option("--max-bytes", default=64 << 20, show_default=True, help="Of all adapters together.")
@click.option("--allow-missing", is_flag=True, help="Adapt though some class was never seen; it will be forgotten.")
@click.option("--predictions/--no-predictions", default=True, help="Whether to print every prediction.")
@click.option("--status", default=60.0, show_default=True, metavar="SECONDS", help="Between two lines on how it goes.")
@click.option("--reference", metavar="NPZ", help="Samples of the world before. [default: what BASE knows]")
@click.option("--http", metavar="[HOST:]PORT", help="Serve a page and /metrics; HOST if not this machine only.")
@taps_option
@seed_option
@preprocessing_options("that of BASE")
@engine_option
def watch(
    base: str,
    folder: str,
    source: str,
    form: str,
    method: str,
    cache: str | None,
    labels: int,
    keep: int,
    pending: int,
    versions: int,
    max_bytes: int,
    allow_missing: bool,
    predictions: bool,
    status: float,
    reference: str | None,
    http: str | None,
    taps: str | None,
    seed: int,
    mean: str | None,
    std: str | None,
    engine: str | None,
) -> None:
    """Predict what comes in, notice drift, adapt, and go back if that was no good.

    Samples and labels come in as lines of JSON or CSV, as files in a folder, or over MQTT; events go out as lines of
    JSON.
    Adapters are kept in versions: see history and rollback.
    """
    from concurrent.futures import ThreadPoolExecutor

    from .. import power
    from ..tuner import load as load_base
    from ..watch import loop as loops
    from ..watch.journal import TOKEN, Journal
    from ..watch.mqtt import SCHEMES, Mqtt
    from ..watch.page import Page, address, token_in
    from ..watch.sources import JsonLines, longest_line

    where = address(http) if http else None
    if form not in ("json", "csv"):
        raise UsageError(f"--format must be json or csv, not {form!r:.40}")
    if not status > 0:
        raise UsageError(f"--status must be above 0 seconds, not {status:g}")
    network = load_base(base, taps)
    chosen = network.bind(engine_of(engine))
    means, stds = preprocessing(network, mean, std)
    known = _looked_at(reference, network, chosen, means, stds) if reference else None
    messages: queue.Queue[Message | None] = queue.Queue(WAITING)
    over = threading.Event()
    put = _putter(messages, over)
    broker: Mqtt | None = None
    failures: list[Exception] = []
    if source.partition("://")[0] in SCHEMES:
        broker = Mqtt(source, longest_line(network.spec), JsonLines(network.spec, means, stds), put)
        start = broker.start
    else:
        start = _reader(source, form, network.spec, means, stds, put, over, failures).start
    journal = Journal(
        Path(folder), network, means, stds, keep=keep, pending=pending, versions=versions, max_bytes=max_bytes
    )
    page: Page | None = None
    try:
        if where is not None:
            page = Page(*where, token_in(Path(folder, TOKEN)))
            click.echo(f"page     {page.url}, its token is in {Path(folder, TOKEN)}", err=True)
        with ThreadPoolExecutor(1, "adaptation", _less_urgent) as pool:
            loop = loops.Loop(
                network,
                chosen,
                journal,
                pool.submit,
                method=method,
                cache=cache,
                seed=seed,
                labels=labels,
                known=known,
                allow_missing=allow_missing,
                meter=power.meter,
            )
            if not loop.sees_the_start:
                warnings.warn(
                    f"{base} does not say what its training data looked like, so that a drift which was there from the "
                    "first sample is not seen: give --reference, or ask for an adaptation",
                    stacklevel=2,
                )
            with _stopped_by(signal.SIGTERM, over), _stopped_by(signal.SIGINT, over):
                start()
                _run(loop, journal, page, broker, messages, over, predictions, status)
                loop.keep()
    finally:
        over.set()
        if broker is not None:
            broker.close()
        if page is not None:
            page.close()
        journal.close()
    if failures:
        raise FileError(f"what is watched must stay readable, but {failures[0]}")


def _looked_at(
    reference: str, network: Network, engine: Engine, means: tuple[float, ...], stds: tuple[float, ...]
) -> Seen:
    """What the samples in a file look like to the network; with labels, how many it gets right."""
    from ..data import load_samples
    from ..watch.detectors import Seen

    try:
        samples = load_samples(reference, network.spec, means, stds)
    except DataError:
        samples = load_samples(reference, network.spec, means, stds, labels=False)
    return Seen.by(engine, network, samples.x, samples.x, samples.y)


def _putter(messages: queue.Queue[Message | None], over: threading.Event) -> Callable[[Message | None], None]:
    """Puts messages into the queue, and waits where it is full, unless it is over."""

    def put(message: Message | None) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return messages.put(message, timeout=PAUSE)

    return put


def _reader(
    source: str,
    form: str,
    spec: Any,
    means: tuple[float, ...],
    stds: tuple[float, ...],
    put: Callable[[Message | None], None],
    over: threading.Event,
    failures: list[Exception],
) -> threading.Thread:
    """The thread that reads messages, until they end, fail or it is over; then it says None."""
    from ..watch.sources import CsvLines, JsonLines, Lines, longest_line, read_folder

    def lines() -> Iterable[Message]:
        parse = (CsvLines if form == "csv" else JsonLines)(spec, means, stds)
        for line in Lines.of(sys.stdin.buffer, longest_line(spec)):
            message = parse(line)
            if message is not None:
                yield message

    def dropped() -> Iterable[Message]:
        while not over.wait(LOOK):
            yield from read_folder(Path(source), spec, means, stds)

    if source != "-" and not Path(source).is_dir():
        raise UsageError(f"--from must be -, a folder, or mqtt://host/topic, not {source!r:.80}")

    def read() -> None:
        from ..watch.loop import Skipped

        try:
            for message in lines() if source == "-" else dropped():
                put(message)
                if over.is_set():
                    return
        except (OSError, FileError) as e:
            put(Skipped("source", f"reading ends: {e}"))
            failures.append(e)
        put(None)

    return threading.Thread(target=read, name="reader", daemon=True)


def _run(
    loop: Loop,
    journal: Journal,
    page: Page | None,
    broker: Mqtt | None,
    messages: queue.Queue[Message | None],
    over: threading.Event,
    predictions: bool,
    every: float,
) -> None:
    """Feed the loop until the messages end and nothing is going on, or until it is over."""
    from ..watch.loop import Command

    ended, told, looked, shown = False, time.monotonic(), 0.0, 0.0

    def tell(events: list[Event]) -> None:
        wanted = [e for e in events if predictions or e["event"] != "prediction"]
        if wanted:
            sys.stdout.write("".join(json.dumps(e, allow_nan=False) + "\n" for e in wanted))
            sys.stdout.flush()
            if broker is not None:
                broker.publish(wanted)

    def status() -> None:
        summary = loop.summary()
        for long in ("accuracy", "drift", "listed", "versions"):
            del summary[long]
        tell([{"event": "status", "time": round(time.time(), 3), **summary}])

    while not over.is_set() and not (ended and not loop.busy):
        batch: list[Message] = []
        with contextlib.suppress(queue.Empty):
            batch.append(messages.get(timeout=PAUSE))  # type: ignore[arg-type]  # None is taken out below
            while len(batch) < AT_ONCE:
                batch.append(messages.get_nowait())  # type: ignore[arg-type]
        ended = ended or None in batch
        now = time.monotonic()
        if now - looked >= LOOK:
            looked = now
            asked = journal.request()
            if asked is not None:
                name, request = asked.pop("command", None), asked.pop("request", None)
                events = loop.feed([Command(name if isinstance(name, str) else "", asked)])
                tell(events)
                journal.answered({"request": request, **_outcome(events)})
        if page is not None:
            batch += page.commands()
        tell(loop.feed(m for m in batch if m is not None))
        tell(loop.poll())
        if page is not None and now - shown >= SHOW:
            shown = now
            page.publish(loop.summary())
        if now - told >= every:
            told = now
            status()
    status()


def _outcome(events: Iterable[Event]) -> dict[str, Any]:
    """What came of a command, for whoever waits for it."""
    for event in events:
        if event["event"] in ("asked", "rolled back", "forgot"):
            return {"done": True, "samples": event.get("samples")}
        if event["event"] in ("skipped", "error"):
            return {"done": False, "why": event["why"]}
    return {"done": False, "why": "see its events"}


@contextlib.contextmanager
def _stopped_by(number: signal.Signals, over: threading.Event) -> Any:
    """A signal ends the loop in an orderly way; a second one, as it ever did."""
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield  # who has it ignored, as a shell does in the background, wants it so
        return

    def stop(*_: object) -> None:
        over.set()
        signal.signal(number, before)

    signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, before)


def _less_urgent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


@click.command()
@state_argument
@json_option
def history(folder: str, as_json: bool) -> None:
    """Versions of the adapter in a watcher's STATE folder, and every change of the one in use."""
    from dataclasses import asdict

    from ..table import format_table
    from ..watch.journal import FROZEN, read_state

    state = read_state(Path(folder))
    if as_json:
        versions = [asdict(v) for v in state.versions.values()]
        return print_json({**asdict(state), "versions": versions, "switches": [asdict(s) for s in state.switches]})
    rows = [(f"{FROZEN}{_star(state.live == FROZEN)}", "", "", "", "", "", "the frozen network")]
    rows += [
        (
            f"{v.number}{_star(v.number == state.live)}",
            _date(v.made),
            f"{v.samples:,}",
            f"{percent(v.before)} → {percent(v.after)}",
            f"{v.seconds:.3g} s",
            "–" if v.joules is None else f"{v.joules:.3g} J",
            f"{v.size:,} B, after version {v.parent}",
        )
        for v in state.versions.values()
    ]
    click.echo(format_table(("version", "made", "samples", "left out", "time", "energy", ""), rows))
    click.echo("* in use\n")
    for s in state.switches:
        click.echo(f"{_date(s.time)}  {s.old} → {s.new}  {s.why}")
    return None


def _star(live: bool) -> str:
    return "*" if live else ""


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@click.command()
@state_argument
@click.option("--to", type=int, metavar="VERSION", help="Which; 0 is the frozen network. [default: the one before]")
@json_option
def rollback(folder: str, to: int | None, as_json: bool) -> None:
    """Go back to an earlier version of the adapter in a watcher's STATE folder, whether the watcher runs or not."""
    before = _state_of(folder)
    to = before.behind if to is None else to  # so that asking twice is asking once

    def alone(journal: Journal) -> int:
        journal.roll_back(time.time(), "somebody asked for it", to)
        return 0

    def made() -> bool:
        return _state_of(folder).live == to != before.live

    _do(folder, {"command": "rollback", "to": to}, alone, made)
    after = _state_of(folder)
    if as_json:
        return print_json({"from": before.live, "live": after.live})
    return click.echo(f"version {before.live} → {after.live}")


@click.command()
@state_argument
@click.option("--id", "name", metavar="ID", help="The sample of this id.")
@click.option("--user", metavar="NAME", help="Samples of this user.")
@click.option("--all", "everything", is_flag=True, help="All samples.")
@json_option
def forget(folder: str, name: str | None, user: str | None, everything: bool, as_json: bool) -> None:
    """Wipe samples from a watcher's STATE folder, whether the watcher runs or not.

    Adapters that were fitted to them stay: roll back, or let the watcher adapt again, which it does without them.
    """
    if [name is not None, user is not None, everything].count(True) != 1:
        raise UsageError("forget must have one of --id, --user and --all")
    whom = {"id": name} if name is not None else {"user": user} if user is not None else {"all": True}

    def alone(journal: Journal) -> int:
        return sum(journal.forget(name, user))

    wiped = _do(folder, {"command": "forget", **whom}, alone, made=lambda: False)  # doing it twice does no harm
    if as_json:
        return print_json({"samples": wiped})
    return click.echo(f"{wiped:,} samples wiped")


def _state_of(folder: str) -> State:
    from ..watch.journal import read_state

    return read_state(Path(folder))


def _do(folder: str, request: Mapping[str, Any], alone: Callable[[Journal], int], made: Callable[[], bool]) -> int:
    """Ask the watcher that runs on the folder to do something, and wait; where none runs, do it here. If it ends before
    it has answered, or another one takes its place, once more, unless it was `made` already.

    Returns:
        How many samples it was about.

    Raises:
        UsageError: the watcher says why not.
        FileError: it says nothing.
    """
    from ..watch.journal import Journal, ask

    until = time.monotonic() + PATIENCE
    while (name := ask(Path(folder), request)) is not None:
        answer = _answer(Path(folder), name, until)
        if answer is not None:
            if answer.get("done") is not True:
                raise UsageError(f"the watcher must {request['command']}, but it did not: {answer.get('why')}")
            return int(answer.get("samples") or 0)
        if made():
            return 0
        if time.monotonic() > until:
            raise FileError(f"the watcher on {folder} must answer, but its answers are lost: can they be written?")
    journal = Journal(Path(folder), None, pending=None)
    try:
        return 0 if made() else alone(journal)
    finally:
        journal.close()


def _answer(folder: Path, name: str, until: float) -> dict[str, Any] | None:
    """What the watcher says to a request; None if it is not there any more to say it.

    Raises:
        FileError: it says nothing, and it is late.
    """
    from .. import files
    from ..watch.journal import ANSWER, REQUEST, held

    looked = time.monotonic()
    while (folder / REQUEST).exists():
        now = time.monotonic()
        if now - looked >= LOOK:
            looked = now
            if not held(folder):
                return None
        if now > until:
            (folder / REQUEST).unlink(missing_ok=True)
            raise FileError(f"the watcher on {folder} must answer within {PATIENCE:g} s, but it did not: is it stuck?")
        time.sleep(0.05)
    path = folder / ANSWER
    try:
        answer = files.decode_json(files.read_small(path, "an answer"), "an answer", path)
        path.unlink(missing_ok=True)
    except (FileError, OSError):
        return None
    return answer if answer.get("request") == name else None

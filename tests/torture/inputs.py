"""Garbage where messages come in, and files that were changed by chance or by somebody who knows the format."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from instantft.adapters import CONFIG_FILE, TENSOR_FILE, Adapter
from instantft.cache.store import open_store
from instantft.engine import get_engine
from instantft.errors import InstantFTError
from instantft.tuner import FineTuner, load

from ..samples import IMAGES, base
from ..test_watching import command, environment
from ..watched import trained, world
from .crashes import base_file, few, tuned
from .work import Seen, scratch, trials, unexpected

__all__ = ["garbage_http", "garbage_mqtt", "garbage_stdin", "mutated_files"]

GROWTH = 96 << 20
"""Bytes by which a watcher may grow while it is fed garbage: the queue holds 256 messages, a line at most 5 KB here, a
page's requests 8 times 6.5 MB of headers; NumPy and the C library keep some of what they had."""

LONG = 10 << 20
"""Bytes of a long line."""

Rng = np.random.Generator
Reading = Callable[[], None]


# -- garbage ----------------------------------------------------------------------------------------------------------


def garbage(rng: Rng) -> bytes:
    """A line that is of no use to a network of 6 values and 3 classes; never blank, never with a line feed."""
    x = [round(float(v), 3) for v in rng.normal(size=6)]
    good = json.dumps({"x": x, "label": int(rng.integers(3)), "id": f"g{rng.integers(1 << 30)}"})
    n = int(rng.integers(1, len(good)))
    kinds: list[Callable[[], bytes]] = [
        lambda: good.encode()[:n],
        lambda: good.replace(str(x[2]), "NaN").encode(),
        lambda: good.replace(str(x[2]), rng.choice(["Infinity", "-Infinity", "1e999", "1e300"])).encode(),
        lambda: json.dumps({"x": x[: int(rng.integers(6))]}).encode(),
        lambda: json.dumps({"x": x * int(rng.integers(2, 9))}).encode(),
        lambda: json.dumps({"x": [x, x]}).encode(),
        lambda: json.dumps({"x": [[x[:2]], [x]]}).encode(),
        lambda: json.dumps({"x": rng.choice(["", "AAAA", "no base64", "A" * 31, "é"])}).encode(),
        lambda: json.dumps({"x": {"0": 1}}).encode(),
        lambda: json.dumps({"x": [None] * 6}).encode(),
        lambda: json.dumps({"x": ["1"] * 5 + ["a"]}).encode(),
        lambda: json.dumps({"x": x, "label": rng.choice([3, -1, 1 << 40])}, default=int).encode(),
        lambda: json.dumps({"x": x, "label": [[], True, 1.5, "1", {}][int(rng.integers(5))]}).encode(),
        lambda: json.dumps({"x": x, "id": ["", "i" * 201, [], 1.5, False][int(rng.integers(5))]}).encode(),
        lambda: json.dumps({"x": x, "user": [[], "u" * 500, {}][int(rng.integers(3))]}).encode(),
        lambda: json.dumps({"x": x, "trusted": [1, "yes", None][int(rng.integers(3))]}).encode(),
        lambda: json.dumps({"id": f"unknown{n}", "label": 1}).encode(),
        lambda: json.dumps({"label": 1}).encode(),
        lambda: json.dumps({"command": ["explode", "", None, 7, "forget"][int(rng.integers(5))]}).encode(),
        lambda: json.dumps({"command": "forget", "all": "yes"}).encode(),
        lambda: json.dumps({"command": "rollback", "to": ["1", 1.5, True][int(rng.integers(3))]}).encode(),
        lambda: b'{"x": [' + b"9" * int(rng.integers(400, 4000)) + b", 0, 0, 0, 0, 0]}",
        lambda: b'{"x": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        lambda: b"[" * int(rng.integers(2, 4000)),
        lambda: b'{"a":' * 700,
        lambda: json.dumps([good]).encode(),
        lambda: rng.choice(["null", "1", '"x"', "true", "[]", "{}"]).encode(),
        lambda: b"\xff" + rng.bytes(int(rng.integers(1, 300))).replace(b"\n", b"\0"),
        lambda: b'{"x": "\xed\xa0\x80"}',
        lambda: b"\xef\xbb\xbf" + good.encode()[:n],
        lambda: b'{"x": [1, 2, 3, 4, 5, 6}' + b" " * 100,
        lambda: bytes(int(rng.integers(1, 100))),
    ]
    return kinds[int(rng.integers(len(kinds)))]()


def good_line(k: int) -> bytes:
    x, y = few()
    i = k % len(x)
    return json.dumps({"x": x[i].tolist(), "label": int(y[i])}).encode()


class Memory:
    """The largest memory a process ever had, in bytes, and by how much that grew."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self._before = self._peak()

    def _peak(self) -> int:
        text = self._path.read_text(encoding="ascii", errors="replace")
        return 1024 * int(text.split("VmHWM:")[1].split()[0])

    def grown(self) -> int:
        return self._peak() - self._before


class Program:
    """A watcher whose events are read as they come, so that it never waits."""

    def __init__(self, folder: Path, *more: object) -> None:
        self.process = subprocess.Popen(
            command("watch", base_file(), "--state", folder / "state", "--no-predictions", "--status", 0.5, *more),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        self.status: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "status":
                self.status = event

    def counted(self) -> int:
        return int(self.status.get("samples", 0)) + sum(self.status.get("skipped", {}).values())

    def until(self, messages: int, seconds: float = 600) -> None:
        """Wait until so many messages were counted."""
        end = time.monotonic() + seconds
        while self.counted() < messages and time.monotonic() < end:
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()[-300:]
            time.sleep(0.05)

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        self.process.stdin.close()
        err = self.process.stderr.read()
        assert self.process.wait(120) == 0, err[-300:]
        assert not unexpected(err), err[-300:]
        self._thread.join(30)


def _checked(program: Program, good: int, bad: int, grown: int, seen: Seen) -> Seen:
    status = program.status
    skipped = sum(status.get("skipped", {}).values())
    if (status.get("samples"), skipped) != (good, bad):
        seen.failures.append(f"{status.get('samples')} samples and {skipped} skipped, not {good} and {bad}")
    if grown > GROWTH:
        seen.failures.append(f"memory grew by {grown >> 20} MiB")
    seen.outcomes.update({"counted and skipped": skipped, "good ones between them": int(status.get("samples", 0))})
    seen.outcomes["MiB of growth"] = max(0, grown) >> 20
    return seen


def garbage_stdin(count: int) -> Seen:
    """Garbage, every hundredth line good, every thousandth of 10 MB."""
    seen, rng = Seen(count), np.random.default_rng(4)
    with tempfile.TemporaryDirectory() as scratch:
        program = Program(Path(scratch))
        stdin = program.process.stdin
        assert stdin is not None
        good = long = 0
        stdin.write(good_line(0) + b"\n")
        stdin.flush()
        program.until(1)
        memory = Memory(program.process.pid)
        for i in range(count):
            stdin.write((b"{" * LONG if i % 1000 == 7 else garbage(rng)) + b"\n")
            long += i % 1000 == 7
            if i % 100 == 0:
                good += 1
                stdin.write(good_line(good) + b"\n")
        stdin.flush()
        program.until(1 + good + count)
        grown = memory.grown()
        program.end()
        seen = _checked(program, 1 + good, count, grown, seen)
        seen.outcomes["of 10 MB"] = long
    return seen


def garbage_mqtt(count: int) -> Seen:
    """The same as payloads, through a real broker, which keeps those of 10 MB to itself."""
    try:
        from paho.mqtt import client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion
    except ImportError:
        return Seen(0, skipped="paho-mqtt is not installed")
    from ..test_mqtt import BROKER, Broker

    if BROKER is None:
        return Seen(0, skipped="mosquitto is not installed")
    seen, rng = Seen(count), np.random.default_rng(5)
    with tempfile.TemporaryDirectory() as scratch:
        broker = Broker(Path(scratch), "allow_anonymous true\nmax_queued_messages 0\nmax_inflight_messages 0\n")
        program = Program(Path(scratch), "--from", f"mqtt://127.0.0.1:{broker.port}/garbage")
        try:
            sender = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
            sender.max_inflight_messages_set(20)
            sender.connect("127.0.0.1", broker.port)
            sender.loop_start()
            end = time.monotonic() + 60
            first = 0
            while not program.counted() and time.monotonic() < end:  # it may not have subscribed yet
                sender.publish("garbage", good_line(0), qos=1).wait_for_publish(10)
                first += 1
                time.sleep(0.7)
            first = int(program.status["samples"])
            memory = Memory(program.process.pid)
            good = long = 0
            waiting = []
            for i in range(count):
                if i % 1000 == 7:
                    long += 1
                    waiting.append(sender.publish("garbage", b"{" * LONG, qos=1))
                else:
                    waiting.append(sender.publish("garbage", garbage(rng), qos=1))
                if i % 100 == 0:
                    good += 1
                    waiting.append(sender.publish("garbage", good_line(good), qos=1))
                if len(waiting) > 50:
                    for message in waiting:
                        message.wait_for_publish(60)
                    waiting = []
            for message in waiting:
                message.wait_for_publish(60)
            program.until(first + good + count - long, 120)
            sender.disconnect()
            sender.loop_stop()
            grown = memory.grown()
            program.process.terminate()
            program.end()
        finally:
            program.process.kill()
            broker.stop()
        seen = _checked(program, first + good, count - long, grown, seen)
        seen.outcomes["of 10 MB, kept by the broker"] = long
    return seen


def with_page(folder: Path) -> tuple[Program, int]:
    """The program with its page, after a good sample, and the page's port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    program = Program(folder, "--http", port)
    assert program.process.stdin is not None
    program.process.stdin.write(good_line(0) + b"\n")
    program.process.stdin.flush()
    program.until(1)
    return program, port


def garbage_http(count: int) -> Seen:
    """Requests that make no sense, or want what they may not have; nothing may change, and the page must go on."""
    seen, rng = Seen(count), np.random.default_rng(6)
    with tempfile.TemporaryDirectory() as scratch:
        program, port = with_page(Path(scratch))
        memory, before = Memory(program.process.pid), program.status["live"]
        for i in range(count):
            status = answered(port, huge(i % 1000) if i % 1000 < 3 else request(rng))
            seen.outcomes[status] += 1
            if status == "202":
                seen.failures.append("a request without the token was obeyed")
        assert program.process.stdin is not None
        program.process.stdin.write(good_line(1) + b"\n")
        program.process.stdin.flush()
        program.until(2)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/state.json")
        state = json.loads(connection.getresponse().read())
        connection.close()
        grown = memory.grown()
        if grown > GROWTH:
            seen.failures.append(f"memory grew by {grown >> 20} MiB")
        if state["live"] != before or state["rollbacks"] or state["adaptations"]:
            seen.failures.append("garbage changed something")
        program.end()
        if program.status["samples"] != 2:
            seen.failures.append("the loop did not go on")
        seen.outcomes["MiB of growth"] = max(0, grown) >> 20
    return seen


def request(rng: Rng) -> bytes:
    path = rng.choice(["/", "/rollback", "/adapt", "/state.json", "/../../../etc/passwd", "/%2e%2e/token", "/token",
                       "//etc/passwd", "/state/token", "http://x/", "*", "/\0", "é", "/" + "a" * 70000])  # fmt: skip
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PRI", "", "\xff"])
    version = "1.1" if rng.random() < 0.7 else rng.choice(["1.0", "0.9", "9.9", "x", "2"])
    head = [f"{method} {path} HTTP/{version}", "Host: 127.0.0.1"]
    body = garbage(rng)
    head += [
        [f"Content-Length: {len(body)}"], ["Content-Length: -1"], [f"Content-Length: {10**12}"], ["Content-Length: x"],
        ["Transfer-Encoding: chunked"], [f"X-{k}: y" for k in range(200)], ["Authorization: Bearer " + "x" * 32],
        ["Authorization: Bearer é"], ["no colon"], ["Host: evil.example"], ["X: " + "z" * 70000], [],
    ][int(rng.integers(12))]  # fmt: skip
    raw = "\r\n".join(head).encode("latin-1", "replace") + b"\r\n\r\n" + body
    return rng.bytes(int(rng.integers(1, 400))) if rng.random() < 0.1 else raw


def huge(kind: int) -> bytes:
    """10 MB in the first line, in a header, or as a body."""
    path, header, body = (b"x" * (LONG if kind == k else 1) for k in range(3))
    head = b"POST /%s HTTP/1.1\r\nHost: 127.0.0.1\r\nX: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (path, header, len(body)) + body


def answered(port: int, raw: bytes) -> str:
    """The status of the answer, or what else became of the request."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
            s.sendall(raw)
            s.shutdown(socket.SHUT_WR)
            held = b""
            while chunk := s.recv(65536):
                held += chunk
    except TimeoutError:
        raise AssertionError("a request got no answer within 20 s") from None
    except OSError:
        return "hung up"
    first = held.split(b"\r\n", 1)[0].split(b" ")
    return first[1].decode("ascii", "replace") if first[0].startswith(b"HTTP") and len(first) > 1 else "no status"


# -- mutated files ----------------------------------------------------------------------------------------------------

CODEC, CAPACITY = "nf4", 24

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "subprocess.Popen",
             "pickle.find_class", "socket.connect", "socket.bind", "ctypes.dlopen", "shutil.rmtree")  # fmt: skip
"""What reading a file must never lead to, by Python's audit events."""

WATCHED: list[str] = []


def _audit(event: str, _: Any) -> None:
    if WATCHED and event in FORBIDDEN:
        WATCHED.append(event)


@functools.cache
def originals() -> Path:
    """Good files: a base, an adapter, a cache file, an ONNX file where onnxruntime is there."""
    folder = scratch()
    trained().save(folder / "base.safetensors")
    base(IMAGES).save(folder / "images.safetensors")
    tuned().adapter.save(folder / "adapter")
    FineTuner(trained(), method="skip-ridge").fit_prepared(*few()).adapter.save(folder / "ridge")
    store = cache_of(folder / "cache")
    store.write(np.arange(CAPACITY), np.random.default_rng(0).normal(size=(CAPACITY, store.record.width)))
    store.flush()
    try:
        import onnxruntime  # noqa: F401

        from instantft.export.onnx import export_onnx

        export_onnx(trained(), None, folder / "net.onnx")
        export_onnx(base(IMAGES), None, folder / "images.onnx")
    except ImportError:
        pass
    return folder


def cache_of(path: Path) -> Any:
    return open_store(path, CODEC, trained().spec.record, CAPACITY, trained().hash, "data")


def mutated(raw: bytes, rng: Rng, other: bytes) -> bytes:
    """A few changes at random places."""
    data = bytearray(raw)
    for _ in range(int(rng.choice([1, 1, 2, 4, 16]))):
        at = int(rng.integers(max(1, len(data) if rng.random() < 0.5 else min(len(data), 600))))
        kind = int(rng.integers(7))
        if not data or kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
        elif kind == 3:
            size = int(rng.choice([4, 8]))
            data[at : at + size] = int(rng.choice([0, 1, (1 << 31) - 1, 1 << 31, 1 << 62, 10**12])).to_bytes(
                8, "little"
            )[:size]
        elif kind == 4:
            start = int(rng.integers(len(other)))
            piece = other[start : start + int(rng.integers(1, 200))]
            data[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 64))]
        else:
            data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(data)


VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 1 << 31, 1 << 63, 10**30, 1.5, "", "x", "../../etc/passwd", "999999", None, True,
    [], [0], [1 << 40, 1 << 40], {}, [[]], "F64", "I64", "BF16", "skip-ridge", "full",
)  # fmt: skip


def bent(value: Any, rng: Rng) -> Any:
    """JSON with one value replaced, a key renamed or an entry dropped, at random."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[int(rng.integers(len(value)))]
        out, chance = dict(value), rng.random()
        if chance < 0.1:
            del out[key]
        elif chance < 0.2:
            out[str(rng.choice(["x", "__metadata__", "lora.0-2.A", "../a"]))] = out.pop(key)
        else:
            out[key] = bent(value[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = int(rng.integers(len(value)))
        return [bent(v, rng) if i == at else v for i, v in enumerate(value)]
    if isinstance(value, str) and value[:1] in "{[" and value and rng.random() < 0.8:
        try:
            return json.dumps(bent(json.loads(value), rng))  # JSON within JSON: a network's shape
        except ValueError:
            pass
    return VALUES[int(rng.integers(len(VALUES)))]


def bent_tensors(raw: bytes, rng: Rng) -> bytes:
    """A safetensors file whose header was changed by somebody who knows the format."""
    n = int.from_bytes(raw[:8], "little")
    header = json.dumps(bent(json.loads(raw[8 : 8 + n]), rng)).encode()
    size = len(header) if rng.random() < 0.9 else int(rng.integers(1 << 62))
    return size.to_bytes(8, "little") + header + raw[8 + n :]


def mutate_file(i: int, folder: Path) -> str:
    """Read a changed file: an error of ours, or a network, adapter or cache that can be used."""
    rng, source = np.random.default_rng([i, 7]), originals()
    kinds = ["base", "adapter", "cache", "onnx"] if (source / "net.onnx").exists() else ["base", "adapter", "cache"]
    kind = kinds[i % len(kinds)]
    other = (source / "cache").read_bytes() + (source / "images.safetensors").read_bytes()
    knowing = rng.random() < 0.5
    read = READERS[kind](source, folder, rng, other, knowing)
    WATCHED[:] = ["watching"]
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("ignore")
        try:
            read()
            said = f"{kind}: usable"
            words = ""
        except InstantFTError as e:
            words, said = str(e), f"{kind}: refused"
    done, WATCHED[:] = WATCHED[1:], []
    assert not done, f"a file led to {done}"
    assert not printed.getvalue(), f"printed: {printed.getvalue()[:200]!r}"
    assert "\n" not in words, f"more than a line: {words[:200]!r}"
    assert len(words) < 1000, f"{len(words)} characters of an error"
    return said


def _base(source: Path, folder: Path, rng: Rng, other: bytes, knowing: bool) -> Reading:
    name = str(rng.choice(["base.safetensors", "images.safetensors"]))
    raw = (source / name).read_bytes()
    (folder / name).write_bytes(bent_tensors(raw, rng) if knowing else mutated(raw, rng, other))
    return lambda: _predicted(load(folder / name))


def _adapter(source: Path, folder: Path, rng: Rng, other: bytes, knowing: bool) -> Reading:
    name = str(rng.choice(["adapter", "ridge"]))
    shutil.rmtree(folder / "a", ignore_errors=True)
    shutil.copytree(source / name, folder / "a")
    tensors, config = folder / "a" / TENSOR_FILE, folder / "a" / CONFIG_FILE
    raw, text = tensors.read_bytes(), config.read_bytes()
    if knowing:  # and makes the checksum match
        raw = bent_tensors(raw, rng) if rng.random() < 0.6 else mutated(raw, rng, other)
        held = json.loads(text)
        if rng.random() < 0.5:
            held = bent(held, rng)
        if isinstance(held, dict):
            held["sha256"] = hashlib.sha256(raw).hexdigest()
        text = json.dumps(held).encode()
    elif rng.random() < 0.5:
        raw = mutated(raw, rng, other)
    else:
        text = mutated(text, rng, other)
    tensors.write_bytes(raw)
    config.write_bytes(text)
    return lambda: _used(Adapter.load(folder / "a", trained()))


def _used(found: Adapter) -> None:
    FineTuner(trained()).use(found).predict(world(0, 4)[0])


def _cache(source: Path, folder: Path, rng: Rng, other: bytes, knowing: bool) -> Reading:
    raw = (source / "cache").read_bytes()
    if knowing:
        n = struct.unpack("<I", raw[12:16])[0]
        header = json.dumps(bent(json.loads(raw[20 : 20 + n]), rng)).encode()
        raw = raw[:12] + struct.pack("<II", len(header), zlib.crc32(header)) + header + raw[20 + n :]
    else:
        raw = mutated(raw, rng, other)
    (folder / "cache").write_bytes(raw)
    return lambda: _same_records(cache_of(folder / "cache"), _good_cache())


def _same_records(store: Any, good: Any) -> None:
    held = np.flatnonzero(store.held(np.arange(CAPACITY)))
    assert (store.data[held] == good.data[held]).all(), "a record that was changed counts"


@functools.cache
def _good_cache() -> Any:
    return cache_of(originals() / "cache")


def _onnx(source: Path, folder: Path, rng: Rng, other: bytes, knowing: bool) -> Reading:
    name = str(rng.choice(["net.onnx", "images.onnx"]))
    raw = (source / name).read_bytes()
    (folder / name).write_bytes(mutated(raw, rng, raw[::-1] if knowing else raw))
    return lambda: _predicted(load(folder / name))


def _predicted(network: Any) -> None:
    if network.spec.geometry[0].N > 1 << 16:
        return
    x = np.random.default_rng(0).normal(size=(3, network.spec.geometry[0].N)).astype(np.float32)
    network.bind(get_engine()).forward(network.spec, network.tensors, x)


READERS: dict[str, Callable[[Path, Path, Rng, bytes, bool], Reading]] = {
    "base": _base, "adapter": _adapter, "cache": _cache, "onnx": _onnx,
}  # fmt: skip


def mutated_files(count: int) -> Seen:
    sys.addaudithook(_audit)
    originals()
    for name in ("base.safetensors", "net.onnx"):  # what is imported late is imported now
        if (originals() / name).exists():
            _predicted(load(originals() / name))
    seen = trials(mutate_file, count, limit=60.0)
    if not (originals() / "net.onnx").exists():
        seen.skipped = "ONNX files: onnxruntime is not installed"
    return seen

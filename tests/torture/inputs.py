"""Garbage where messages come in: standard input, MQTT, HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..test_watching import command, environment
from .crashes import base_file, few
from .work import Seen, unexpected

__all__ = ["garbage_http", "garbage_mqtt", "garbage_stdin"]

GROWTH = 96 << 20
"""Bytes by which a watcher may grow while it is fed garbage: the queue holds 256 messages, a line at most 5 KB here, a
page's requests 8 times 6.5 MB of headers; NumPy and the C library keep some of what they had."""

LONG = 10 << 20
"""Bytes of a long line."""

Rng = np.random.Generator


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

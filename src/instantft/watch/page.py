"""A page on what is going on, over HTTP, and the same for Prometheus. Everything it serves is in memory; nothing of a
request is ever part of a path. What changes anything needs the token.

    GET  /            the page, one file without anything from elsewhere
    GET  /state.json  what it shows (`Loop.summary`)
    GET  /metrics     the same as Prometheus text
    POST /rollback    {"to": 2}, or {} for the version before
    POST /adapt       {}
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import queue
import re
import secrets
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .. import files
from ..errors import FileError, UsageError
from .loop import Command

__all__ = ["Page", "address", "metrics", "token_in"]

LOOPBACK = "127.0.0.1"

SECONDS = 10.0
"""Within which a request must be complete."""

AT_ONCE = 8
"""Requests that are answered at a time; who comes when all are taken is turned away. The parser holds at most 6.5 MB
of headers a request."""

LONGEST_BODY = 1024

WAITING = 16
"""Commands that wait for the loop."""


def address(text: str) -> tuple[str, int]:
    """Host and port of ``[HOST:]PORT``; without a host only this machine can look.

    Raises:
        UsageError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16):
        raise UsageError(f"--http must be PORT or HOST:PORT, a port from 0 to 65535, not {text!r:.60}")
    return host.strip("[]") or LOOPBACK, int(port)


def token_in(path: Path) -> str:
    """The token in a file that only its owner can read; made if it is not there.

    Raises:
        FileError: it cannot be read or made.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if not path.exists() or not path.stat().st_size:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            files.sync_directory(path.parent)
    except OSError as e:
        raise FileError(f"the token must be in a writable place, but {path} is not: {files.reason(e)}") from None
    token = files.read_small(path, "the token").decode("ascii", "replace").strip()
    if len(token) < 16:
        raise FileError(f"the token must have at least 16 characters, but that in {path} has {len(token)}: delete it")
    return token


class Page:
    """The server; it runs in threads of its own until `close`.

    Args:
        host, port: where it listens; port 0: any that is free.
        token: what a request that changes something must bring along.

    Attributes:
        url: of the page.

    Raises:
        FileError: it cannot listen there.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        self._commands: queue.Queue[Command] = queue.Queue(WAITING)
        self._summary: dict[str, Any] = {}
        self._token = token.encode()
        try:
            self._server = _Server(self, host, port)
        except (OSError, OverflowError) as e:
            words = files.reason(e) if isinstance(e, OSError) else str(e)
            raise FileError(f"the page must listen on a free address, but {host}:{port} is not: {words}") from None
        name, bound = self._server.server_address[:2]
        self.host, self.port = str(name), int(bound)
        self.url = f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="page", daemon=True)
        self._thread.start()

    def publish(self, summary: dict[str, Any]) -> None:
        """What is shown from now on; it must not change afterwards."""
        self._summary = summary

    def commands(self) -> list[Command]:
        """What was asked for since the last time."""
        found: list[Command] = []
        while not self._commands.empty():
            found.append(self._commands.get_nowait())
        return found

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- what the handler asks -----------------------------------------------------------------------------------------

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, type and body for a GET."""
        if path == "/":
            return 200, "text/html; charset=utf-8", HTML
        if path == "/state.json":
            return 200, "application/json", json.dumps(self._summary, allow_nan=False).encode()
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", metrics(self._summary).encode()
        return 404, "text/plain", b"not here\n"

    def obey(self, path: str, authorization: str, body: bytes) -> tuple[int, str, bytes]:
        """Status, type and body for a POST."""
        plain = "text/plain; charset=utf-8"
        if path not in ("/rollback", "/adapt"):
            return 404, plain, b"not here\n"
        given = authorization.removeprefix("Bearer ").encode("utf-8", "surrogatepass")
        if not authorization.startswith("Bearer ") or not hmac.compare_digest(given, self._token):
            return 401, plain, b"this needs the token, which is in the state folder\n"
        try:
            held = json.loads(body or b"{}")
            to = held.get("to") if isinstance(held, dict) else "x"
        except (ValueError, RecursionError):
            to = "x"
        if to is not None and (type(to) is not int or not 0 <= to < 1 << 31):
            return 400, plain, b"the body must be an object with a version to go back to, or empty\n"
        try:
            self._commands.put_nowait(Command(path[1:], {} if to is None else {"to": to}))
        except queue.Full:
            return 503, plain, b"too much is waiting already\n"
        return 202, plain, b"asked for; what came of it is shown above\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, page: Page, host: str, port: int) -> None:
        self.page = page
        self.local = host in ("localhost", "::1") or host.startswith("127.")
        self._free = threading.BoundedSemaphore(AT_ONCE)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            return self.shutdown_request(request)
        return super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up, or is too slow, gets no answer and leaves no trace."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SECONDS
    server_version = "instantft"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        # One byte now and then would not be a timeout of the socket's.
        self._end = threading.Timer(SECONDS, lambda: self.connection.shutdown(socket.SHUT_RDWR))
        self._end.daemon = True
        self._end.start()

    def finish(self) -> None:
        self._end.cancel()
        super().finish()

    def do_GET(self) -> None:
        if self._known_host():
            self._send(*self.server.page.answer(self.path))

    def do_POST(self) -> None:
        if not self._known_host():
            return None
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 9 and int(length) <= LONGEST_BODY):
            return self._send(413, "text/plain", f"a body must have at most {LONGEST_BODY} bytes\n".encode())
        body = self.rfile.read(int(length))
        return self._send(*self.server.page.obey(self.path, self.headers.get("Authorization", ""), body))

    def log_message(self, *_: Any) -> None:
        """Events are told by the loop; requests are not."""

    def _known_host(self) -> bool:
        """Where only this machine may look, a page from elsewhere whose name leads here may not either."""
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if not self.server.local or name in ("localhost", "[::1]") or re.fullmatch(r"127(\.\d{1,3}){3}", name):
            return True
        self._send(403, "text/plain", b"ask for localhost\n")
        return False

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


COUNTERS = ("samples", "labels", "right", "drifts", "adaptations", "switches", "rollbacks", "errors")
GAUGES = ("live", "drift_score", "recent_accuracy", "pending", "kept", "capacity", "sample_bytes", "adapter_bytes")


def metrics(summary: Mapping[str, Any]) -> str:
    """The summary as Prometheus text; what is not known is left out."""
    found: list[str] = []

    def put(name: str, kind: str, values: Mapping[str, Any]) -> None:
        known = {label: value for label, value in values.items() if value is not None}
        if known:
            found.append(f"# TYPE instantft_{name} {kind}")
            found.extend(f"instantft_{name}{label} {float(value):.10g}" for label, value in known.items())

    for name in COUNTERS:
        put(f"{name}_total", "counter", {"": summary.get(name)})
    put("adaptation_seconds_total", "counter", {"": summary.get("adaptation_seconds")})
    put("adaptation_joules_total", "counter", {"": summary.get("joules")})
    kinds = {f'{{kind="{kind}"}}': n for kind, n in summary.get("skipped", {}).items()}
    put("skipped_total", "counter", kinds)
    for name in GAUGES:
        put({"live": "live_version"}.get(name, name), "gauge", {"": summary.get(name)})
    return "\n".join(found) + "\n"


HTML = Path(__file__).with_name("page.html").read_bytes()


def _allowed(tag: str) -> str:
    """The hash by which a browser knows the page's own script or style."""
    inside = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), HTML, re.DOTALL)
    assert inside is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside[1]).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_allowed('script')}; style-src {_allowed('style')}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

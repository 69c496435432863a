from __future__ import annotations

import http.client
import json
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.errors import FileError, UsageError
from instantft.watch.loop import Command
from instantft.watch.page import AT_ONCE, LONGEST_BODY, Page, address, metrics, token_in

from .browser import CHROMIUM, Browser
from .watched import journal_in, loop_on, run, samples

TOKEN = "sixteen-letters-at-least"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    found = Page("127.0.0.1", 0, TOKEN)
    found.publish({"samples": 3, "skipped": {"not JSON": 2}, "live": 1, "recent_accuracy": None})
    yield found
    found.close()


def ask(
    page: Page, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(page.host, page.port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_addresses() -> None:
    assert address("8080") == ("127.0.0.1", 8080)
    assert address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert address("[::1]:80") == ("::1", 80)
    for wrong in ("", "host", "host:", "1:99999", "x:-1", "80x", "٣"):
        with pytest.raises(UsageError, match="--http must be"):
            address(wrong)


def test_it_is_bound_to_loopback_and_a_taken_port_is_told(page: Page) -> None:
    assert page.url == f"http://127.0.0.1:{page.port}/"
    with pytest.raises(FileError, match="must listen on a free address"):
        Page("127.0.0.1", page.port, TOKEN)


def test_the_token_is_for_the_owner_and_stays(tmp_path: Path) -> None:
    token = token_in(tmp_path / "token")
    assert len(token) >= 32
    assert token_in(tmp_path / "token") == token
    assert token_in(tmp_path / "other") != token
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    (tmp_path / "empty").touch(0o600)  # of a crash while it was made
    assert len(token_in(tmp_path / "empty")) >= 32
    assert not [f for f in tmp_path.iterdir() if f.suffix == ".tmp"]
    (tmp_path / "short").write_text("abc")
    with pytest.raises(FileError, match="at least 16 characters"):
        token_in(tmp_path / "short")
    with pytest.raises(FileError, match="writable place"):
        token_in(tmp_path / "none" / "token")


def test_what_is_served(page: Page) -> None:
    status, body, headers = ask(page, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"instantft watch" in body
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")  # nothing from elsewhere
    assert b"https://" not in body
    status, body, _ = ask(page, "GET", "/state.json")
    assert json.loads(body)["samples"] == 3
    assert ask(page, "GET", "/metrics")[2]["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "Server" in ask(page, "GET", "/metrics")[2]
    assert "Python" not in ask(page, "GET", "/metrics")[2]["Server"]


@pytest.mark.parametrize(
    "path",
    ["/page.html", "/../token", "/token", "//etc/passwd", "/state.json/../token", "/%2e%2e/token", "/?x=/etc/passwd"],
)
def test_no_path_leads_to_a_file(page: Page, path: str) -> None:
    assert ask(page, "GET", path)[0] == 404
    assert ask(page, "POST", path, b"{}", Authorization=f"Bearer {TOKEN}")[0] == 404


def test_only_the_token_changes_anything(page: Page) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}):
        status, body, _ = ask(page, "POST", "/rollback", b"{}", **header)
        assert status == 401
        assert TOKEN.encode() not in body
    assert ask(page, "POST", f"/rollback?token={TOKEN}", b"{}")[0] == 404
    assert page.commands() == []
    assert ask(page, "POST", "/rollback", b'{"to": 2}', Authorization=f"Bearer {TOKEN}")[0] == 202
    assert ask(page, "POST", "/adapt", Authorization=f"Bearer {TOKEN}")[0] == 202
    assert page.commands() == [Command("rollback", {"to": 2}), Command("adapt", {})]
    assert page.commands() == []
    for body in (b"[", b"[1]", b'{"to": "1"}', b'{"to": -1}', b'{"to": true}', b'{"to": 1e9}', b"\xff", b"[" * 1000):
        assert ask(page, "POST", "/rollback", body, Authorization=f"Bearer {TOKEN}")[0] == 400
    assert ask(page, "POST", "/rollback", b" " * (LONGEST_BODY + 1), Authorization=f"Bearer {TOKEN}")[0] == 413
    assert ask(page, "DELETE", "/rollback")[0] == 501
    statuses = [ask(page, "POST", "/adapt", Authorization=f"Bearer {TOKEN}")[0] for _ in range(20)]
    assert statuses == [202] * 16 + [503] * 4
    assert len(page.commands()) == 16


def test_a_name_from_elsewhere_is_turned_away(page: Page) -> None:
    assert ask(page, "GET", "/state.json", Host="evil.example")[0] == 403
    assert ask(page, "GET", "/state.json", Host="127.0.0.1.evil.example:80")[0] == 403
    assert ask(page, "POST", "/adapt", Host="evil.example", Authorization=f"Bearer {TOKEN}")[0] == 403
    assert ask(page, "GET", "/state.json", Host="localhost")[0] == 200


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=300) | st.text(max_size=50).map(lambda t: f"GET {t} HTTP/1.1\r\n\r\n".encode()))
def test_garbage_does_no_harm(page: Page, raw: bytes) -> None:
    with socket.create_connection((page.host, page.port), timeout=20) as s:
        s.sendall(raw + b"\r\n\r\n")
        s.shutdown(socket.SHUT_WR)
        while s.recv(65536):
            pass
    assert ask(page, "GET", "/metrics")[0] == 200


def test_slow_and_many_requests_are_bounded(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    held = [socket.create_connection((page.host, page.port), timeout=20) for _ in range(AT_ONCE)]
    for s in held:
        s.sendall(b"GET / HTTP/1.1\r\n")
    end = time.monotonic() + 20
    while threading.active_count() < before + AT_ONCE:
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(page, "GET", "/metrics")
    for s in held:
        s.close()
    while True:
        try:
            assert ask(page, "GET", "/metrics")[0] == 200
            break
        except (ConnectionError, http.client.HTTPException):
            assert time.monotonic() < end
            time.sleep(0.05)


LINE = re.compile(r'instantft_[a-z_]+(\{kind="[^"\\\n]*"\})? -?[0-9][0-9.e+-]*')


def test_metrics_are_prometheus_text(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    loop = loop_on(journal, meter=lambda: lambda: 2.5)
    run(loop, samples(0, 200) + samples(1, 200, seed=1))
    loop.skip("too long", "")
    text = metrics(loop.summary())
    journal.close()
    lines = text.splitlines()
    assert text.endswith("\n")
    values = {}
    kinds = {}
    for line in lines:
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            kinds[name] = kind
        else:
            assert LINE.fullmatch(line), line
            name, value = line.rsplit(" ", 1)
            assert name.partition("{")[0] in kinds
            values[name] = float(value)
    assert values["instantft_samples_total"] == 400
    assert values["instantft_live_version"] >= 1
    assert values['instantft_skipped_total{kind="too long"}'] == 1
    assert values["instantft_adaptation_joules_total"] == 2.5 * values["instantft_adaptations_total"]
    assert kinds["instantft_drift_score"] == "gauge"
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())
    assert metrics({}) == "\n"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")
def test_in_a_real_browser(tmp_path: Path) -> None:
    """What one sees, and that its buttons do something with the token and only with it, by mouse and keyboard."""
    journal = journal_in(tmp_path / "state")
    loop = loop_on(journal, meter=lambda: lambda: 0.25)
    run(loop, samples(0, 300) + samples(1, 300, seed=1))
    live = journal.state.live
    assert live >= 1
    page = Page("127.0.0.1", 0, TOKEN)
    page.publish(loop.summary())
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=page.url)
        browser.wait("document.querySelectorAll('#versions tr').length > 1")
        text = browser.run("document.body.innerText")
        assert f"{live} (live)" in text
        assert "600" in text
        assert "standard errors" in text
        assert "0.250 J" in text
        points = browser.run("document.querySelector('#accuracy polyline').getAttribute('points')")
        assert len(points.split()) == len(loop.accuracy.points) >= 10
        assert "NaN" not in browser.run("document.documentElement.outerHTML")
        picture = Path(os.environ.get("INSTANTFT_PICTURES", tmp_path)) / "page.png"
        browser.picture(picture)
        assert picture.stat().st_size > 10_000

        def press(button: str) -> str:
            browser.run("document.getElementById('said').textContent = ''")
            browser.click(f"#{button}")
            browser.wait("document.getElementById('said').textContent.length > 1")
            said: Any = browser.run("document.getElementById('said').textContent")
            return str(said)

        def token(text: str) -> None:
            browser.click("#token", times=3)
            browser.type(text)
            assert browser.run("document.getElementById('token').value") == text

        for wrong in ("", "wrong", TOKEN[:-1], TOKEN.upper()):
            if wrong:
                token(wrong)
            for button in ("rollback", "adapt"):
                assert "needs the token" in press(button)
        assert page.commands() == []
        token("é☃")  # no header can say that
        assert "no answer" in press("rollback")
        token(TOKEN)
        assert "asked for" in press("rollback")
        asked = page.commands()
        assert asked == [Command("rollback", {"to": 0})]
        run(loop, asked)
        assert journal.state.live == 0
        page.publish(loop.summary())
        browser.wait("document.body.innerText.includes('0 (live)')")
        assert "asked for" in press("adapt")
        assert page.commands() == [Command("adapt", {})]
        complaints = [c for c in browser.complaints() if "401" not in c and "favicon" not in c]
        assert complaints == []
        page.close()
        assert "no answer" in press("rollback")
    finally:
        browser.close()
        page.close()
        journal.close()

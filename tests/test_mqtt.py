"""Against a real broker: mosquitto, on loopback."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instantft.errors import FileError, UsageError
from instantft.watch.loop import Label, Message, Sample, Skipped
from instantft.watch.mqtt import Mqtt
from instantft.watch.sources import JsonLines, longest_line

from .samples import SPEC
from .test_watching import Watcher, base_file, lines

__all__ = ["base_file"]

pytest.importorskip("paho.mqtt", reason="paho-mqtt is not installed (extra [mqtt])")

BROKER = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_broker = pytest.mark.skipif(
    BROKER is None, reason="there is no mosquitto here (Debian: apt-get install mosquitto)"
)

GO = Label("go", 1)

LONGEST = longest_line(SPEC)


class Broker:
    def __init__(self, folder: Path, more: str = "allow_anonymous true\n") -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"listener {self.port} 127.0.0.1\n{more}")
        self.start()

    def start(self) -> None:
        assert BROKER is not None
        self._process = subprocess.Popen([BROKER, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """In order: it writes what it is to remember."""
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    found = Broker(tmp_path)
    yield found
    found.stop()


class Sensor:
    """Somebody who publishes, and hears events."""

    def __init__(self, broker: Broker, topic: str = "fan") -> None:
        from paho.mqtt import client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.topic, self.events = topic, queue.Queue[dict[str, Any]]()
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self.client.on_message = lambda _, __, message: self.events.put(json.loads(message.payload))
        self.client.on_connect = lambda client, *_: client.subscribe(f"{topic}/events")
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()

    def send(self, data: bytes) -> None:
        for line in data.splitlines():
            self.client.publish(self.topic, line, qos=1).wait_for_publish(30)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def taken(found: queue.Queue[Message], n: int) -> list[Message]:
    """The next messages, but for those that were sent to see whether somebody listens."""
    kept: list[Message] = []
    while len(kept) < n:
        message = found.get(timeout=30)
        kept += [] if message == GO else [message]
    return kept


@needs_broker
def test_messages_good_and_bad(broker: Broker) -> None:
    found: queue.Queue[Message] = queue.Queue()
    parse = JsonLines(SPEC)
    client = Mqtt(f"mqtt://127.0.0.1:{broker.port}/fan", LONGEST, parse, found.put)
    client.start()
    sensor = Sensor(broker)
    while found.empty():  # until it listens
        sensor.client.publish("fan", b'{"id": "go", "label": 1}', qos=1)
        time.sleep(0.1)
    sensor.send(b'{"x": [1, 2, 3, 4, 5, 6], "id": "a"}\n{"id": "a", "label": 2}\nnonsense\n{"x": [NaN]}\n')
    a, b, c, d = taken(found, 4)
    assert isinstance(a, Sample)
    assert a.x.tolist() == [1, 2, 3, 4, 5, 6]
    assert b == Label("a", 2)
    assert isinstance(c, Skipped)
    assert isinstance(d, Skipped)
    sensor.send(b'{"x": "' + b"A" * (LONGEST - 9) + b'"}\n')  # as long as may be
    sensor.send(b"7" * (LONGEST + 100) + b"\n")  # longer: told
    assert [m.kind for m in taken(found, 2) if isinstance(m, Skipped)] == ["unusable", "too long"]
    sensor.send(b"7" * 10_000_000 + b"\n")  # the broker keeps it to itself
    sensor.send(b'{"id": "b", "label": 1}\n')
    assert taken(found, 1) == [Label("b", 1)]

    broker.stop()
    broker.start()
    end = time.monotonic() + 60
    while found.empty():  # it comes back by itself
        assert time.monotonic() < end
        sensor.client.publish("fan", b'{"id": "c", "label": 0}')
        time.sleep(0.2)
    assert taken(found, 1) == [Label("c", 0)]
    client.publish([{"event": "status"}])
    while sensor.events.get(timeout=30) != {"event": "status"}:
        pass
    client.close()
    sensor.close()


@needs_broker
def test_the_watcher_listens_and_tells(broker: Broker, base_file: Path, tmp_path: Path) -> None:
    watcher = Watcher(base_file, tmp_path / "state", "--from", f"mqtt://127.0.0.1:{broker.port}/fan", "--status", "0.2")
    sensor = Sensor(broker)
    watcher.until("status")
    while watcher.until("status")["samples"] == 0:
        sensor.send(lines(1, 1, seed=9))
    sensor.send(lines(1, 80) + b"garbage\n" + b'{"command": "adapt"}\n')
    told: list[dict[str, Any]] = []
    while not told or told[-1]["event"] != "adapted":
        told.append(sensor.events.get(timeout=60))
    assert {"prediction", "skipped", "adapting"} <= {e["event"] for e in told}
    watcher.process.send_signal(signal.SIGTERM)
    assert watcher.close() == 0
    sensor.close()


@needs_broker
def test_events_wait_for_a_broker_that_is_away(tmp_path: Path) -> None:
    """All but predictions, which somebody who is away has no use for."""
    from paho.mqtt import client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    broker = Broker(tmp_path, f"allow_anonymous true\nuser root\npersistence true\npersistence_location {tmp_path}/\n")
    heard: queue.Queue[str] = queue.Queue()
    ready = threading.Event()
    listener = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="listener", protocol=mqtt.MQTTv5)
    listener.on_message = lambda _, __, message: heard.put(json.loads(message.payload)["event"])
    listener.on_subscribe = lambda *_: ready.set()
    stays = Properties(PacketTypes.CONNECT)
    stays.SessionExpiryInterval = 1000
    listener.connect("127.0.0.1", broker.port, clean_start=False, properties=stays)
    listener.loop_start()
    listener.subscribe("fan/events", qos=1)
    assert ready.wait(30)
    client = Mqtt(f"mqtt://127.0.0.1:{broker.port}/fan", LONGEST, JsonLines(SPEC), lambda _: None)
    client.start()
    client.publish([{"event": "status"}, {"event": "prediction"}])
    assert [heard.get(timeout=30) for _ in range(2)] == ["status", "prediction"]
    broker.end()
    time.sleep(0.5)  # so that it has seen that the broker is away
    client.publish([{"event": name} for name in ("prediction", "adapted", "rolled back")])
    broker.start()
    assert [heard.get(timeout=60) for _ in range(2)] == ["adapted", "rolled back"]
    client.publish([{"event": "prediction"}] * 500 + [{"event": "skipped"}] * 500 + [{"event": "status"}])
    client.close()
    last = [heard.get(timeout=30) for _ in range(501)]
    while last[-1] != "status":
        last.append(heard.get(timeout=30))
    assert last.count("skipped") == 500
    listener.disconnect()
    listener.loop_stop()
    broker.stop()


@needs_broker
def test_a_password_is_asked_for(tmp_path: Path) -> None:
    broker = Broker(tmp_path, "allow_anonymous false\n")
    found: queue.Queue[Message] = queue.Queue()
    client = Mqtt(f"mqtt://anna:secret@127.0.0.1:{broker.port}/fan", LONGEST, JsonLines(SPEC), found.put)
    client.start()
    refused = found.get(timeout=30)
    assert isinstance(refused, Skipped)
    assert "turns us away" in refused.why
    assert "secret" not in refused.why
    client.close()
    broker.stop()


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://host",
        "mqtt:///topic",
        "mqtt://host/a/+/b",
        "mqtt://host/#",
        "mqtt://host:x/t",
        "http://h/t",
        "mqtt://",
        "mqtt://[::1/t",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="MQTT address must be"):
        Mqtt(url, LONGEST, JsonLines(SPEC), lambda _: None)


def test_a_broker_that_is_not_there() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        with pytest.raises(FileError, match="broker must be reachable"):
            Mqtt(f"mqtt://127.0.0.1:{s.getsockname()[1]}/t", LONGEST, JsonLines(SPEC), lambda _: None)

"""Messages over MQTT 5: a payload is what a line of JSON is elsewhere (`sources`). Events go to ``TOPIC/events``.

The broker is told how long a message may be, and keeps longer ones to itself, so that nobody can fill the memory. Who
is disconnected connects again; what was published meanwhile is not seen. Predictions are sent once (QoS 0), as fast as
they come; other events until the broker has them (QoS 1), if it was away meanwhile too. paho-mqtt is an extra, imported
here only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from .. import files
from ..errors import FileError, UsageError
from .loop import Event, Message, Skipped

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessageInfo

__all__ = ["SCHEMES", "Mqtt"]

SCHEMES = {"mqtt": 1883, "mqtts": 8883}
"""What addresses begin with, without and with TLS, and the usual ports."""

PASSWORD = "INSTANTFT_MQTT_PASSWORD"
"""Environment variable with the password of the user in the address."""

OVERHEAD = 1024
"""Bytes of an MQTT packet that are not payload: topic, numbers, properties."""

QUEUED = 1024
"""Events other than predictions that wait for the broker; more are dropped while it is away."""

GOODBYE = 2.0
"""Seconds that the last events may take."""


class Mqtt:
    """A connection to a broker; it runs in a thread of its own until `close`.

    Args:
        url: ``mqtt://[user[:password]@]host[:port]/topic``, or ``mqtts://…`` for TLS.
        longest: bytes of the longest payload.
        parse: a payload to a message.
        put: takes messages; it may wait.

    Raises:
        UsageError: it is no such address, or paho-mqtt is not installed.
        FileError: the broker cannot be reached.
    """

    def __init__(
        self, url: str, longest: int, parse: Callable[[bytes | None], Message | None], put: Callable[[Message], None]
    ) -> None:
        try:
            from paho.mqtt import client as mqtt
            from paho.mqtt.enums import CallbackAPIVersion
            from paho.mqtt.packettypes import PacketTypes
            from paho.mqtt.properties import Properties
        except ImportError:
            raise UsageError(
                "MQTT must have paho-mqtt, which is not installed: pip install 'instantft[mqtt]'"
            ) from None
        try:
            where = urlsplit(url)
            self._topic, host, port = unquote(where.path).strip("/"), where.hostname, where.port
        except ValueError:
            where, host = urlsplit(""), None
        if where.scheme not in SCHEMES or not host or not self._topic or any(c in self._topic for c in "+#\0"):
            raise UsageError("an MQTT address must be mqtt://[user@]host[:port]/topic, the topic without + and #")
        self._longest, self._parse, self._put = longest, parse, put
        client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        if where.username is not None:
            client.username_pw_set(unquote(where.username), unquote(where.password or os.environ.get(PASSWORD, "")))
        if where.scheme == "mqtts":
            client.tls_set()
        client.max_queued_messages_set(QUEUED)
        client.on_connect, client.on_message = self._connected, self._taken
        limits = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        limits.MaximumPacketSize = longest + OVERHEAD
        try:
            client.connect(host, port or SCHEMES[where.scheme], properties=limits)
        except (OSError, ValueError) as e:
            words = files.reason(e) if isinstance(e, OSError) else str(e)
            raise FileError(f"the broker must be reachable, but {host} is not: {words}") from None
        self._client: Client = client
        self._last: MQTTMessageInfo | None = None

    def start(self) -> None:
        """Take messages from now on."""
        self._client.loop_start()

    def publish(self, events: Iterable[Event]) -> None:
        """Send events."""
        for event in events:
            sure = event["event"] != "prediction"
            sent = self._client.publish(f"{self._topic}/events", json.dumps(event, allow_nan=False), qos=int(sure))
            self._last = sent if sure else self._last

    def close(self) -> None:
        """Disconnect, once the broker has the last event."""
        if self._last is not None and self._client.is_connected():
            with contextlib.suppress(ValueError, RuntimeError):  # it was dropped
                self._last.wait_for_publish(GOODBYE)
        self._client.disconnect()
        self._client.loop_stop()

    # -- called by paho, in its thread --------------------------------------------------------------------------------

    def _connected(self, client: Client, _: Any, __: Any, code: Any, ___: Any) -> None:
        if code.is_failure:
            return self._put(Skipped("source", f"the broker turns us away: {code}"))
        client.subscribe(self._topic, qos=1)
        return None

    def _taken(self, _: Client, __: Any, message: Any) -> None:
        payload: bytes = message.payload
        found = self._parse(None if len(payload) > self._longest else payload)
        if found is not None:
            self._put(found)

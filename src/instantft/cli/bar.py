"""Progress bars: on stderr, on a terminal, for what takes over a second."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import click

BAR_AFTER = 1.0
"""Seconds after which work shows a progress bar."""


class Bar:
    """A progress bar on stderr, if that is a terminal, and only once the work has taken a while.

    It shows itself after BAR_AFTER seconds even if nothing was reported until then, and then stands at the beginning.
    """

    _fine = 1000
    """Steps of the bar in one of `length`, which may be a long epoch."""

    def __init__(self, label: str, length: int) -> None:
        self._label = label
        self._length = length
        self._began = time.perf_counter()
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._timer = threading.Timer(BAR_AFTER, self._wake)
        self._timer.daemon = True
        self._over = False

    def __enter__(self) -> Bar:
        if self._terminal:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
            self._finish()

    def __call__(self, done: float) -> None:
        """The same as `update`."""
        self.update(done)

    def update(self, done: float) -> None:
        """`done` of `length` are done."""
        if not self._terminal:
            return
        with self._lock:
            if self._bar is None:
                if time.perf_counter() - self._began < BAR_AFTER or done >= self._length:
                    return
                self._show()
            self._bar.update(int(done * self._fine) - self._bar.pos)

    def stage(self, label: str, length: int) -> None:
        """From now on it is `label` that is going on; nothing happens if it is already."""
        with self._lock:
            if label != self._label:
                was_shown = self._bar is not None
                self._finish()
                self._label, self._length = label, length
                if was_shown:
                    self._show()

    def _show(self) -> None:
        self._bar = click.progressbar(length=self._length * self._fine, label=self._label, file=sys.stderr)
        self._bar.render_progress()

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None

    def _wake(self) -> None:
        with self._lock:
            if self._bar is None and not self._over:
                self._show()

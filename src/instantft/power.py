"""What the machine itself measures: power, energy, temperature, frequency.

    hwmon      /sys/class/hwmon/*/power*_input (µW), or in*_input (mV) · curr*_input (mA): INA219 and INA260 (ina2xx)
    RAPL       /sys/class/powercap/intel-rapl:*/energy_uj (µJ, wraps round at max_energy_range_uj)
    thermal    /sys/class/thermal/thermal_zone*/temp (m°C)
    cpufreq    /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq (kHz)

No number here is estimated: where there is no sensor there is none.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["PERIOD", "Sensor", "meter", "sensors"]

PERIOD = 0.05
"""Seconds between two readings, as InstantFT reads its INA260 (§5.4)."""

Sensor = Callable[[], float | None]
"""One reading, or None where it fails."""


def sensors(root: Path = Path("/")) -> dict[str, tuple[str, Sensor]]:
    """What this machine can measure: name to unit and sensor.

    Args:
        root: of the file system that /sys is in.
    """
    found: dict[str, tuple[str, Sensor]] = {}
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        label = _text(chip / "name") or chip.name
        powers = sorted(chip.glob("power*_input"))
        for path in powers:
            found[f"{label} {path.name.removesuffix('_input')}"] = ("W", _scaled(path, 1e-6))
        if not powers:
            for current in sorted(chip.glob("curr*_input")):
                # ina2xx: in1 is the bus voltage of curr1
                volts = chip / current.name.replace("curr", "in")
                if volts.is_file():
                    found[f"{label} {current.name.removesuffix('_input')}"] = ("W", _product(volts, current))
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:?")):
        energy = _text(zone / "energy_uj")
        if energy is not None:
            found[f"RAPL {_text(zone / 'name') or zone.name}"] = ("W", _Energy(zone))
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        if _number(zone / "temp") is not None:
            found[f"{_text(zone / 'type') or zone.name}"] = ("°C", _scaled(zone / "temp", 1e-3))
    for path in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")):
        if _number(path) is not None:
            found[f"{path.parts[-3]} frequency"] = ("MHz", _scaled(path, 1e-3))
    return found


class _Energy:
    """Mean power since the last reading, from a counter of energy."""

    def __init__(self, zone: Path) -> None:
        self._zone = zone
        self._range = _number(zone / "max_energy_range_uj") or 0.0
        self._last: tuple[float, float] | None = None

    def __call__(self) -> float | None:
        found = self.since()
        return None if found is None or found[0] <= 0 else found[1] / found[0]

    def since(self) -> tuple[float, float] | None:
        """Seconds and joules since the last reading."""
        now, energy = time.perf_counter(), _number(self._zone / "energy_uj")
        last, self._last = self._last, None if energy is None else (now, energy)
        if energy is None or last is None:
            return None
        used = energy - last[1]
        if used < 0:
            used += self._range
        return now - last[0], used * 1e-6


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _scaled(path: Path, factor: float) -> Sensor:
    def read() -> float | None:
        value = _number(path)
        return None if value is None else value * factor

    return read


def _product(volts: Path, current: Path) -> Sensor:
    def read() -> float | None:
        v, i = _number(volts), _number(current)
        return None if v is None or i is None else v * i * 1e-6

    return read


def meter(root: Path = Path("/")) -> Callable[[], float | None]:
    """Starts to measure what the whole machine uses; calling the result ends that.

    RAPL counts energy, of all packages. Where there is none, power is read every 50 ms and summed up; of several
    channels the one that shows most counts, since boards measure their whole input, and parts of it besides.

    Args:
        root: of the file system that /sys is in.

    Returns:
        What returns the joules used since; None where there is no sensor, or it failed.
    """
    found = [sensor for unit, sensor in sensors(root).values() if unit == "W"]
    counters = [sensor for sensor in found if isinstance(sensor, _Energy)]
    if counters:
        for counter in counters:
            counter.since()

        def used() -> float | None:
            seen = [counter.since() for counter in counters]
            known = [joules for _, joules in filter(None, seen)]
            return sum(known) if len(known) == len(seen) else None

        return used
    if not found:
        return lambda: None
    readings: list[list[tuple[float, float]]] = [[] for _ in found]
    over = threading.Event()

    def read() -> None:
        for sensor, seen in zip(found, readings, strict=True):
            value = sensor()
            if value is not None:
                seen.append((time.perf_counter(), value))

    def go_on() -> None:
        while not over.wait(PERIOD):
            read()

    read()
    thread = threading.Thread(target=go_on, name="power", daemon=True)
    thread.start()

    def summed() -> float | None:
        over.set()
        thread.join()
        read()
        sums = [
            sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(seen))
            for seen in readings
            if len(seen) > 1
        ]
        return max(sums, default=None)

    return summed

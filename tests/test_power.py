from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from instantft import power


def board(root: Path) -> None:
    """A board with an INA219, RAPL, a thermal zone and cpufreq."""
    for name, text in {
        "sys/class/hwmon/hwmon0/name": "ina219",
        "sys/class/hwmon/hwmon0/power1_input": "1455000",
        "sys/class/hwmon/hwmon1/name": "ina3221",
        "sys/class/hwmon/hwmon1/in1_input": "5000",
        "sys/class/hwmon/hwmon1/curr1_input": "300",
        "sys/class/hwmon/hwmon2/name": "broken",
        "sys/class/powercap/intel-rapl:0/name": "package-0",
        "sys/class/powercap/intel-rapl:0/energy_uj": "999000000",
        "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "1000000000",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "44500",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1000000",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_a_board_s_sensors_are_read(tmp_path: Path) -> None:
    board(tmp_path)
    found = power.sensors(tmp_path)
    values = {name: (unit, sensor()) for name, (unit, sensor) in found.items()}
    assert values == {
        "ina219 power1": ("W", pytest.approx(1.455)),
        "ina3221 curr1": ("W", pytest.approx(1.5)),
        "RAPL package-0": ("W", None),
        "cpu-thermal": ("°C", pytest.approx(44.5)),
        "cpu0 frequency": ("MHz", pytest.approx(1000)),
    }


def test_an_energy_counter_may_wrap_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board(tmp_path)
    now = iter((10.0, 12.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    sensor = power.sensors(tmp_path)["RAPL package-0"][1]
    assert sensor() is None
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("3000000")
    assert sensor() == pytest.approx(4e6 * 1e-6 / 2)


def test_a_sensor_that_goes_away_gives_nothing(tmp_path: Path) -> None:
    board(tmp_path)
    found = power.sensors(tmp_path)
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").unlink()
    assert found["cpu-thermal"][1]() is None


def test_energy_of_counters_is_their_difference(tmp_path: Path) -> None:
    board(tmp_path)
    used = power.meter(tmp_path)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("3000000")  # it has wrapped round
    assert used() == pytest.approx(4.0)
    used = power.meter(tmp_path)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert used() is None


def test_energy_of_power_is_its_integral(tmp_path: Path) -> None:
    board(tmp_path)
    shutil.rmtree(tmp_path / "sys/class/powercap")
    for seconds in (0.0, 0.2):
        began = time.perf_counter()
        used = power.meter(tmp_path)
        time.sleep(seconds)
        joules = used()
        assert joules is not None
        # Of the channel that shows most, 1.5 W. The readings are of rounded numbers: 1e-9.
        assert 1.5 * seconds * (1 - 1e-9) <= joules <= 1.5 * (time.perf_counter() - began) * (1 + 1e-9)


def test_without_sensors_there_is_no_energy(tmp_path: Path) -> None:
    assert power.meter(tmp_path)() is None

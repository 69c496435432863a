"""Skip2-LoRA, Tables 3 and 4 and Fig. 3: accuracy on the cooling fan and on human activity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..cache.store import memory_store
from ..data.protocols import BATCH, RANK, TASKS, Task, drifted
from ..methods import SGD_METHODS
from ..solvers import sgd
from . import plots
from .accuracy import (
    accuracy,
    base_network,
    base_params,
    column,
    engine,
    small,
    task_of,
    trial,
    trials,
    with_base,
)
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
    mean,
    spread,
)

__all__ = ["FIG_3", "SETS", "TABLE_3", "TABLE_4", "differences"]

SETS = {"Damage1": "damage1", "Damage2": "damage2", "HAR": "har"}
"""Name in the papers to task."""

LONG = {"damage1": 400, "damage2": 400, "har": 900}
"""Epochs of Table 3 (§5.2)."""

PAPER_3 = {
    "Damage1": {"before": (60.61, 13.73), "after": (98.99, 2.81)},
    "Damage2": {"before": (51.86, 8.04), "after": (90.88, 5.65)},
    "HAR": {"before": (79.97, 5.62), "after": (86.09, 4.40)},
}

PAPER_4 = {
    "Damage1": {
        "ft-all": (98.73, 2.11), "ft-last": (94.19, 2.24), "ft-bias": (79.42, 7.50), "ft-all-lora": (98.63, 2.14),
        "lora-all": (98.26, 1.32), "lora-last": (94.67, 2.92), "skip-lora": (96.07, 2.14), "skip2-lora": (96.19, 2.29),
    },
    "Damage2": {
        "ft-all": (88.12, 6.13), "ft-last": (92.43, 3.67), "ft-bias": (79.56, 6.47), "ft-all-lora": (88.88, 5.73),
        "lora-all": (86.45, 4.90), "lora-last": (93.55, 3.50), "skip-lora": (93.24, 3.86), "skip2-lora": (93.46, 3.21),
    },
    "HAR": {
        "ft-all": (90.99, 1.86), "ft-last": (89.31, 1.06), "ft-bias": (82.21, 1.27), "ft-all-lora": (90.40, 2.49),
        "lora-all": (91.09, 1.26), "lora-last": (89.79, 1.46), "skip-lora": (92.10, 1.05), "skip2-lora": (91.99, 1.00),
    },
}  # fmt: skip

EPOCHS_NEEDED = {"Damage1": 100, "Damage2": 60, "HAR": 200}
"""Required epochs of Fig. 3 (§5.3)."""

CURVE_TRIALS = 10

WHY = (
    "The paper states neither which recordings of the fan and which cut of the HAR subjects it used (ours are"
    " inferred, see the README of the data) nor the learning rate (ours: pre-training 0.05, fine-tuning 0.02)."
)

BEFORE = (
    "Before the drift was seen, much hangs on the recording that is pre-trained on: in a comparison of the four silent"
    " ones (learning rate 0.01) Damage1 went from 45 to 57 % and Damage2 from 53 to 62 %."
)
"""From the README of the data."""

BIASES = (
    "FT-Bias here trains biases and beta of batch normalisation, by the frozen mean and variance; the paper does not"
    " say what its FT-Bias does there. Beta does not explain the difference: without it, 5 trials reached 99.3 % on"
    " Damage1 and 88.7 % on Damage2. By the batch's mean, biases of hidden layers would have no effect; the last"
    " layer's alone reached 89.0 and 68.2 %."
)
"""Measured with the tasks' own epochs and learning rate, seeds 0 to 4."""

Means = dict[str, dict[str, dict[str, float] | None]]


def differences(paper: Mapping[str, Mapping[str, Any]], ours: Means) -> str:
    """The sentence on the largest difference of two means."""
    found: list[tuple[float, str]] = []
    count = within = 0
    for row, cells in paper.items():
        for name, value in cells.items():
            mine = ours[row][name]
            if mine is None or isinstance(value, str):
                continue
            count += 1
            delta = mine["mean"] - value["mean"]
            within += abs(delta) <= value.get("sd", 0.0)
            title = SGD_METHODS[name].title if name in SGD_METHODS else name
            found.append((abs(delta), f"{title} on {row}, {mine['mean']:.1f} beside {value['mean']:.1f}"))
    if not found:
        return ""
    return (
        f"{within} of {count} means lie within the paper's standard deviation; the largest difference is"
        f" {max(found)[1]}."
    )


def _means(paper: Mapping[str, Mapping[str, tuple[float, float]]]) -> Means:
    return {row: {k: {"mean": m, "sd": sd} for k, (m, sd) in cells.items()} for row, cells in paper.items()}


def _task(name: str, settings: Settings) -> Task:
    return small(TASKS[SETS[name]]) if settings.quick else TASKS[SETS[name]]


def _cut(settings: Settings) -> str:
    return (
        " Quick run: fewer trials and epochs, so the accuracies are not the paper's experiment."
        if settings.quick
        else ""
    )


# -- Table 3


def _task_3(name: str, settings: Settings) -> Task:
    task = _task(name, settings)
    return replace(task, pretrain_epochs=20 if settings.quick else LONG[SETS[name]])


def _trials_3(settings: Settings) -> list[Trial]:
    both: list[tuple[str, str | None]] = [("none", None), ("after", None)]
    return [t for name in SETS for t in trials(_task_3(name, settings), both, settings.seeds(20))]


def _section_3(settings: Settings, found: Results) -> Section:
    seeds, paper = settings.seeds(20), _means(PAPER_3)
    ours: Means = {
        name: {
            label: mean(column(found, _task_3(name, settings), method, seeds))
            for label, method in (("before", "none"), ("after", "after"))
        }
        for name in SETS
    }
    rows = [
        [name, *(spread(side[name][label]) for label in ("before", "after") for side in (paper, ours))] for name in SETS
    ]
    epochs = ", ".join(f"{name} {_task_3(name, settings).pretrain_epochs}" for name in SETS)
    note = f"Epochs: {epochs}. {differences(paper, ours)} {WHY} {BEFORE}{_cut(settings)}"
    table = Table(["", "before, paper", "before, ours", "after, paper", "after, ours"], rows)
    return Section(paper, ours, "% correct", len(seeds), note, [table])


TABLE_3 = Target(
    "Accuracy before and after data drift",
    "Skip2-LoRA, Table 3: 20 trials, mean ± standard deviation",
    _trials_3,
    _section_3,
)

# -- Table 4


def _trials_4(settings: Settings) -> list[Trial]:
    every: list[tuple[str, str | None]] = [(m, None) for m in SGD_METHODS]
    return [t for name in SETS for t in trials(_task(name, settings), every, settings.seeds(20))]


def _section_4(settings: Settings, found: Results) -> Section:
    seeds, paper = settings.seeds(20), _means(PAPER_4)
    ours: Means = {
        name: {m: mean(column(found, _task(name, settings), m, seeds)) for m in SGD_METHODS} for name in SETS
    }
    head = ["", *(f"{name}, {side}" for name in SETS for side in ("paper", "ours"))]
    rows = [
        [m.title, *(spread(side[name][m.name]) for name in SETS for side in (paper, ours))]
        for m in SGD_METHODS.values()
    ]
    same = all(
        column(found, _task(n, settings), "skip-lora", seeds) == column(found, _task(n, settings), "skip2-lora", seeds)
        for n in SETS
    )
    equal = (
        "Skip2-LoRA equals Skip-LoRA in every trial here" if same else "Skip2-LoRA differs from Skip-LoRA by rounding"
    )
    note = f"{differences(paper, ours)} {WHY} {BIASES} {equal}, since an fp32 cache only saves work.{_cut(settings)}"
    return Section(paper, ours, "% correct", len(seeds), note, [Table(head, rows)])


TABLE_4 = Target(
    "Accuracy of every method after fine-tuning",
    "Skip2-LoRA, Table 4: 20 trials, mean ± standard deviation",
    _trials_4,
    _section_4,
)

# -- Fig. 3


def curve(params: Params, where: Where) -> Numbers:
    """Test accuracy of Skip2-LoRA after every epoch: {"accuracy": [percent, …]}."""
    task, seed, eng = task_of(params), params["seed"], engine(where.engine)
    tune, test = drifted(task, where.data, seed)
    net = base_network(params, where)
    store = memory_store("fp32", net.spec.record, len(tune[0]))
    adapter, reached = None, []
    for epoch in range(task.epochs):
        fitted = sgd.fit(
            eng, net, "skip2-lora", *tune, rank=RANK, epochs=1, batch_size=BATCH, lr=task.lr, seed=seed, store=store,
            start=adapter, epochs_before=epoch, space="primal",
        )  # fmt: skip
        adapter = fitted.adapter
        reached.append(accuracy(eng, net, adapter.tensors, test))
    return {"accuracy": reached}


def _curve_trial(task: Task, seed: int) -> Trial:
    return with_base(curve, base_params(task, seed), task.epochs / 300)


def _trials_f3(settings: Settings) -> list[Trial]:
    tasks = [_task(name, settings) for name in SETS]
    curves = [_curve_trial(task, seed) for task in tasks for seed in settings.seeds(CURVE_TRIALS)]
    return curves + [trial(task, "skip2-lora", seed) for task in tasks for seed in settings.seeds(20)]


def _first(values: list[float], goal: float) -> int | None:
    """The first epoch at which the mean is no more than a point below the goal."""
    return next((epoch for epoch, value in enumerate(values, 1) if value >= goal - 1.0), None)


def _section_f3(settings: Settings, found: Results) -> Section:
    seeds = settings.seeds(CURVE_TRIALS)
    ours: dict[str, Any] = {}
    series: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    lines: dict[str, dict[str, float]] = {}
    rows = []
    for name in SETS:
        task = _task(name, settings)
        runs = [found(_curve_trial(task, seed))["accuracy"] for seed in seeds]
        average = [m["mean"] for m in (mean(at) for at in zip(*runs, strict=True)) if m is not None]
        final = mean(column(found, task, "skip2-lora", settings.seeds(20)))
        own = _first(average, final["mean"]) if final else None
        papers = _first(average, PAPER_4[name]["skip2-lora"][0])
        ours[name] = {"required epochs": own, "required epochs, paper's accuracy": papers, "curve": average}
        series[name] = {"Skip2-LoRA, ours": (list(range(1, len(average) + 1)), average)}
        lines[name] = {"paper's accuracy (Table 4)": PAPER_4[name]["skip2-lora"][0]}
        rows.append([name, str(EPOCHS_NEEDED[name]), *("not reached" if e is None else str(e) for e in (own, papers))])
    head = [
        "",
        "required epochs, paper",
        "ours: within a point of our accuracy",
        "ours: within a point of the paper's",
    ]
    picture = Picture(
        "skip2-fig3",
        plots.curves(series, x="epochs of fine-tuning", y="test accuracy, %", lines=lines, markers=False),
        "Test accuracy of Skip2-LoRA by epoch on three data sets, mean of all trials",
    )
    note = (
        "Required epochs: the first at which the mean test accuracy is within a point of the accuracy after all"
        " epochs. The paper's curves are a picture, so only its required epochs stand beside ours; they depend on the"
        " learning rate, which it does not state. Where a point below the paper's accuracy is not reached, our accuracy"
        " after all epochs is lower than that (skip2-table4). " + WHY + _cut(settings)
    )
    paper = {name: {"required epochs": EPOCHS_NEEDED[name], "curve": NOT_HERE} for name in SETS}
    return Section(paper, ours, "epochs; curve: % correct", len(seeds), note, [Table(head, rows)], [picture])


FIG_3 = Target(
    "Training curves of Skip2-LoRA and the required epochs", "Skip2-LoRA, Fig. 3: 10 trials", _trials_f3, _section_f3
)

"""`pretrain` and `finetune`."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileError, UsageError
from .bar import Bar
from .inspecting import lift_cost_of
from .options import (
    batch_option,
    check_file_target,
    core_options,
    engine_of,
    engine_option,
    engine_or_core,
    history_option,
    input_shape_option,
    json_option,
    memory_option,
    preprocessing,
    preprocessing_options,
    seed_option,
    sizes,
    source_options,
    taps_option,
    task_option,
    threads_option,
    values,
)
from .running import class_names, read_samples, score_of
from .show import core_text, history_of, percent, print_history, print_json, time_text

if TYPE_CHECKING:
    from ..adapters import Adapter
    from ..backbones.builtin import Network
    from ..hw.engine import FixedEngine
    from ..tasks import Task

FEW = 30
"""Samples left out below which a gate that says no is said to have seen few."""


@click.command()
@click.argument("net", metavar="dnn|lenet5")
@click.option("--data", required=True, metavar="NPZ|CSV|FOLDER", help="Samples and labels to train on.")
@click.option("--eval", "eval_path", metavar="NPZ|CSV|FOLDER", help="Samples and labels to measure accuracy on.")
@source_options
@click.option("--out", required=True, metavar="FILE", help="Base file to write (.safetensors).")
@click.option("--hidden", default=96, show_default=True, help="Width of the dnn's hidden layers.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--lr", default=0.1, show_default=True, help="Learning rate.")
@batch_option
@click.option("--momentum", default=0.0, show_default=True, help="Of SGD, 0 to below 1.")
@seed_option
@preprocessing_options("not done")
@history_option
@engine_option
@json_option
def pretrain(
    net: str,
    data: str,
    eval_path: str | None,
    size: int | None,
    label: str | None,
    out: str,
    hidden: int,
    epochs: int,
    lr: float,
    batch_size: int,
    momentum: float,
    seed: int,
    mean: str | None,
    std: str | None,
    history: bool,
    engine: str | None,
    as_json: bool,
) -> None:
    """Train a network from scratch and write it as a base file."""
    from .. import spec as specs
    from ..backbones.builtin import check_preprocessing
    from ..cost import network_parameters
    from ..data import as_samples, warn_if_poor
    from ..solvers import sgd
    from ..watch.detectors import Seen

    if net not in ("dnn", "lenet5"):
        raise UsageError(f"NET must be dnn or lenet5, not {net!r:.60}")
    if not 1 <= hidden <= specs.MAX_WIDTH:
        raise UsageError(f"--hidden must be 1 to {specs.MAX_WIDTH}, not {hidden}")
    sgd.check_arguments(epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum, seed=seed)
    check_file_target(out, {"--data": data, "--eval": eval_path})
    samples = read_samples(data, size=size, label=label, beside=eval_path)
    y = samples.labels
    C = max(int(y.max()) + 1, len(samples.classes))
    spec = specs.dnn(samples.x.shape[1], C, hidden) if net == "dnn" else specs.lenet5(samples.shape, C)
    means, stds = check_preprocessing(values("--mean", mean), values("--std", std), spec.input_shape)
    test = None
    if eval_path:
        test = read_samples(eval_path, spec, means, stds, size=size, label=label, beside=data, classes=samples.classes)
    warn_if_poor(y, batch_size)
    x, _ = as_samples(samples.x, spec, means, stds, name=f"{data}: x")
    chosen = engine_of(engine)
    began = time.perf_counter()
    with Bar("pre-training", epochs) as bar:
        network, stats = sgd.pretrain(
            chosen,
            spec,
            x,
            y,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            seed=seed,
            mean=means,
            std=stds,
            progress=bar.update,
        )
    seconds = time.perf_counter() - began
    accuracy = score_of(chosen, network, None, test) if test else None
    shown = (test.x, test.labels) if test else (x, None)
    network = replace(network, seen=Seen.by(chosen, network, x, *shown).text())
    network.save(out)
    result = {
        "network": net,
        "base": out,
        "hash": network.hash,
        "parameters": network_parameters(spec),
        "classes": C,
        "samples": len(x),
        "epochs": epochs,
        "steps": epochs * math.ceil(len(x) / batch_size),
        "loss": float(stats.loss[-1]),
        "accuracy_train": int(stats.correct[-1]) / len(x),
        "accuracy": accuracy,
        "seconds": seconds,
        "engine": chosen.name,
    }
    if history:
        result["history"] = history_of(stats, len(x))
    if as_json:
        return print_json(result)
    if history:
        print_history(result["history"])
    click.echo(f"{net}: {network_parameters(spec):,} parameters, {epochs} epochs in {time_text(seconds)}")
    click.echo(f"accuracy in the last epoch {result['accuracy_train']:.1%}, on --eval {percent(accuracy)}")
    click.echo(f"base     {out}")


@click.command()
@click.argument("base")
@click.option("--data", required=True, metavar="NPZ|CSV|FOLDER", help="Samples and labels to adapt to.")
@click.option("--eval", "eval_path", metavar="NPZ|CSV|FOLDER", help="Samples and labels to measure accuracy on.")
@source_options
@click.option("--out", required=True, metavar="DIR", help="Adapter to write; one that is there is replaced.")
@click.option(
    "--method",
    default="auto",
    show_default=True,
    help="auto, skip-ridge, skip2-lora, skip-lora, lora-last, ft-last, lora-all, ft-bias, ft-all or ft-all-lora.",
)
@click.option(
    "--cache",
    metavar="CODEC",
    help="fp32, fp16, int8, nf4, nf4-block64, nf4-hw, relu4, relu2 or none. "
    "[default: fp32 for skip2-lora and skip-ridge, else none]",
)
@click.option("--cache-capacity", type=int, metavar="N", help="Samples the cache has room for. [default: all]")
@click.option("--cache-file", metavar="FILE", help="Keep the cache in a file. [default: in memory]")
@click.option("--epochs", type=int, help="Of SGD. [default: 10; under auto what a held-out block asks for]")
@batch_option
@click.option(
    "--lr", type=float, help="Learning rate of SGD. [default: from the frozen layers' outputs; where those change, 0.1]"
)
@click.option(
    "--momentum", type=float, help="Of SGD, 0 to below 1. [default: 0; 0.8 for skip-lora and skip2-lora without --lr]"
)
@click.option("--space", default="auto", show_default=True, help="Where SGD makes its steps: auto, primal or dual.")
@click.option("--rank", type=int, help="Of the adapters. [default: 4; full for skip-ridge]")
@click.option("--lift", metavar="KIND", help="arccos or nystrom: a kernel of the taps, where that helps skip-ridge.")
@taps_option
@input_shape_option
@click.option("--groups", metavar="KEY", help="Integers in --data: samples of a group are left out together.")
@task_option
@click.option("--outputs", type=int, metavar="C", help="Give BASE a new head of C outputs. [default: it keeps its own]")
@click.option("--class-weights", metavar="balanced|V,V,…", help="How much samples of each class count. [default: 1]")
@click.option("--sample-weights", metavar="KEY", help="Numbers in --data: how much each sample counts. [default: 1]")
@click.option("--label-smoothing", default=0.0, show_default=True, help="Share of every target that is spread evenly.")
@seed_option
@threads_option
@preprocessing_options("that of BASE")
@core_options
@memory_option
@history_option
@click.option("--force", is_flag=True, help="Keep the new adapter even where the gate would not.")
@json_option
def finetune(
    base: str,
    data: str,
    eval_path: str | None,
    size: int | None,
    label: str | None,
    out: str,
    method: str,
    cache: str | None,
    cache_capacity: int | None,
    cache_file: str | None,
    epochs: int | None,
    batch_size: int,
    lr: float | None,
    momentum: float | None,
    space: str,
    rank: int | None,
    lift: str | None,
    taps: str | None,
    input_shape: str | None,
    groups: str | None,
    task: str | None,
    outputs: int | None,
    class_weights: str | None,
    sample_weights: str | None,
    label_smoothing: float,
    seed: int,
    threads: int,
    mean: str | None,
    std: str | None,
    engine: str | None,
    hw_config: str | None,
    memory_limit: str | None,
    history: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Adapt the network in the file BASE to new samples, and write the adapter to a directory.

    The new adapter is kept if samples that it was not fitted to say that it is better than the one in the directory
    or, without one, than the frozen network.
    """
    from ..acceptance import decide, untrained
    from ..adapters import CONFIG_FILE, check_target
    from ..data import announced
    from ..memory import peak_memory, size_of, size_text
    from ..methods import LORA_RANK
    from ..solvers.sgd import FitResult
    from ..tasks import METRICS, TASKS, check_task, targets
    from ..tuner import FineTuner
    from ..tuner import load as load_base

    network = load_base(base, taps, input_shape=sizes("--input-shape", input_shape))
    if outputs is not None:
        network = network.with_outputs(outputs)
    wanted = check_task(task or TASKS[0])
    weights = class_weights if class_weights in (None, "balanced") else values("--class-weights", class_weights)
    who, core = engine_or_core(engine, hw_config, trains=True)
    if core is not None:
        method, cache = _on_core(core, network, method, cache, memory_limit)
    chosen = network.bind(who)
    tuner = FineTuner(
        network,
        method=method,
        rank=rank,
        cache=cache,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        threads=threads,
        engine=chosen,
        momentum=momentum,
        space=space,
        cache_capacity=cache_capacity,
        cache_file=cache_file,
        lift=lift,
        task=wanted,
        class_weight=weights,
        label_smoothing=label_smoothing,
        memory_limit=memory_limit,
    )
    check_target(out)
    means, stds = preprocessing(network, mean, std)
    # Before anything is read, if the file says how much there is in it.
    here, there = announced(data), announced(eval_path) if eval_path else None
    plan, P = None, network.spec.positions
    if here is not None:
        plan = tuner.planned(P * here[0], others=P * there[0] if there else 0, itemsize=here[1])
    old = _adapter_in_use(out, network, means, stds, wanted)
    read = partial(
        read_samples, spec=network.spec, mean=means, std=stds, task=wanted, size=size, label=label, form=network
    )
    samples = read(data, groups=groups, weights=sample_weights, beside=eval_path, classes=class_names(old))
    test = read(eval_path, beside=data, classes=samples.classes) if eval_path else None
    before = score_of(chosen, network, None, test, threads, wanted) if test else None
    T = len(samples.x)
    if plan is None:
        plan = tuner.planned(T, others=len(test.x) if test else 0)
    doing = f"fine-tuning ({tuner.row(T).name})"
    length = tuner.planned_epochs
    if core is not None:
        goal = targets(
            samples.labels, network.spec.C, wanted,
            sample_weight=samples.weights, class_weight=weights, smoothing=label_smoothing,
        )  # fmt: skip
        core.check(network.spec, network.tensors, rank or LORA_RANK, batch_size, lr, momentum, goal, T)
        core.clear()
    with Bar(doing, length) as bar:

        def filling(done: float) -> None:
            if done < T:
                bar.stage("filling the cache", T)
                bar.update(done)
            else:
                bar.stage(doing, length)

        def simulating(done: int, steps: int) -> None:
            bar.stage("simulating the core", steps)
            bar.update(done)

        if core is not None:
            core.progress = simulating
        tuner.fit_prepared(
            samples.x, samples.labels, samples.weights,
            groups=samples.groups, progress=bar.update, filling=filling, plan=plan,
        )  # fmt: skip
    fitted, store, row = tuner.result_, tuner.store_, tuner.method_.name
    hardware = core.report() if core is not None else None
    if core is not None:
        tuner.set_params(engine=core.golden())  # the gate trains again
    after = score_of(chosen, network, tuner.adapter, test, threads, wanted) if test else None
    classes = wanted == TASKS[0]
    result: dict[str, Any] = {
        "method": row,
        "task": wanted,
        "metric": METRICS[wanted],
        "accuracy_before": before if classes else None,
        "accuracy_after": after if classes else None,
        "score_before": before,
        "score_after": after,
        "accepted": True,
        "estimate": None,
        "seconds": {"fill": fitted.seconds.fill, "train": fitted.seconds.train, "total": fitted.seconds.total},
        "steps": fitted.steps if isinstance(fitted, FitResult) else 0,
        "epochs": tuner.epochs_,
        "trainable_parameters": tuner.adapter.parameters,
        "cache": {
            "codec": store.codec.name if store else None,
            "bytes": store.nbytes if store else 0,
            "bytes_per_sample": store.codec.bytes_per_sample(store.record) if store else 0,
            "hits": store.hits if store else 0,
            "misses": store.misses if store else 0,
        },
        "memory": {
            "peak": sum(peak_memory(plan).values()) if core is None and (network.spec.own or memory_limit) else None,
            "limit": size_of(memory_limit) if memory_limit else None,
        },
        "adapter": out,
        "samples": T,
        "loss": float(fitted.stats.loss[-1]) if isinstance(fitted, FitResult) else fitted.loss,
        "engine": chosen.name,
    }
    adapter = tuner.adapter
    if isinstance(fitted, FitResult):
        result |= {"lr": adapter.config["lr"], "momentum": adapter.config["momentum"]}
    else:
        result |= {
            "lambda": fitted.lam,
            "taps": list(fitted.weights),
            "gain": fitted.gain,
            "temperature": float(fitted.temperature),
            "space": fitted.space,
            "lift": None if fitted.lift is None else lift_cost_of(network.spec, adapter.lift_cost),
            "calibration_error": fitted.calibration_error,
        }
    began = time.perf_counter()
    with Bar("asking the gate", 1):
        decision = decide(tuner, samples.x, old)
    result["seconds"]["gate"] = time.perf_counter() - began
    result["estimate"] = {"before": decision.before, "after": decision.after, "interval": list(decision.interval)}
    result["accepted"] = decision.accepted
    # Whoever uses the adapter must preprocess as it was done here.
    other: dict[str, Any] = (
        {"mean": list(means), "std": list(stds)} if (means, stds) != (network.mean, network.std) else {}
    )
    if samples.classes:
        other["classes"] = list(samples.classes)
    said = {METRICS[wanted]: decision.after, "samples": decision.n}
    adapter = replace(tuner.adapter, config={**tuner.adapter.config, **other, "estimate": said})
    kept, was_there = decision.accepted or force, Path(out, CONFIG_FILE).exists()
    if kept:
        adapter.save(out)
    elif not was_there:
        untrained(adapter, network.tensors).save(out)

    if hardware is not None:
        result["hardware"] = hardware
    if store and store.damaged:
        result["cache"]["damaged"] = store.damaged
    if history:
        result["history"] = history_of(fitted.stats, T, wanted != "regression") if isinstance(fitted, FitResult) else []
    if as_json:
        return print_json(result)
    if result.get("history"):
        print_history(result["history"])
    s = fitted.seconds
    steps = f", {tuner.epochs_} epochs, {result['steps']:,} steps" if result["steps"] else ", in closed form"
    click.echo(f"{row}: {adapter.parameters:,} trainable parameters, {T:,} samples{steps}")
    if isinstance(fitted, FitResult):
        click.echo(f"loss     {result['loss']:.4f} over the last epoch, lr {result['lr']:.3g}")
    else:
        click.echo(
            f"chosen   λ {fitted.lam:.3g}, taps {' '.join(f'{w:g}' for w in fitted.weights)}"
            + (f"; calibration error {fitted.calibration_error:.1%}" if fitted.calibration_error is not None else "")
        )
        if lift is not None:
            cost, many = result["lift"], ""
            if cost:
                macs = cost["network_macs"]
                many = f"{1 + cost['macs'] / macs:.2f}× the network's" if macs else f"{cost['macs']:,} more"
            click.echo(
                f"lift     {lift}: a prediction takes {many} multiply-adds, {cost['bytes'] / 1000:,.1f} kB more"
                if cost
                else f"lift     {lift} does not help here, so there is none"
            )
    name, show = {
        "classification": ("accuracy", percent),
        "regression": ("R²      ", lambda v: f"{v:.3f}"),
        "multi-label": ("labels  ", percent),
    }[wanted]
    if test:
        click.echo(f"{name} {show(before)} → {show(after)} on {eval_path}, of the new one")
    low, high = (f"{end:+.3f}" if wanted == "regression" else f"{100 * end:+.1f} points" for end in decision.interval)
    click.echo(
        f"estimate {show(decision.before)} → {show(decision.after)} on {decision.n:,} samples left out; "
        f"the difference is {low.removesuffix(' points')} to {high} (95 %)"
    )
    parts = f" ({time_text(s.fill)} filling the cache, {time_text(s.train)} training)" if store else ""
    click.echo(f"time     {time_text(s.total)}{parts}")
    if store:
        held = result["cache"]
        click.echo(
            f"cache    {held['codec']}, {held['bytes_per_sample']:,} B a sample, "
            f"{held['hits']:,} hits, {held['misses']:,} misses"
        )
    if hardware is not None:
        click.echo(core_text(hardware))
    peak = result["memory"]["peak"]
    if peak:
        click.echo(f"memory   at most {size_text(peak)}, as stated ahead")
    rival = "the frozen network" if old is None else f"the adapter in {out}"
    verdict = "better than" if decision.accepted else "not surely better than"
    few = f"; {decision.n} samples tell little" if not decision.accepted and decision.n < FEW else ""
    click.echo(f"gate     {verdict} {rival}{few}" + (", kept by --force" if force and not decision.accepted else ""))
    if not kept:
        stays = f"{out} stays as it was" if was_there else f"{out} holds an adapter that changes nothing"
        return click.echo(f"adapter  {stays}; --force keeps the new one")
    click.echo(f"adapter  {out}")


def _on_core(
    core: FixedEngine, network: Network, method: str, cache: str | None, memory_limit: str | None
) -> tuple[str, str]:
    """Method and cache of a fine-tuning on the hardware core."""
    from ..hw.engine import METHOD
    from ..hw.fixed import CODEC

    core.build(network.spec)
    if method not in ("auto", METHOD):
        raise UsageError(f"--method must be {METHOD} for the core, not {method!r:.60}")
    if cache not in (None, CODEC):
        raise UsageError(f"--cache must be {CODEC} for the core, not {cache!r:.60}")
    if memory_limit is not None:
        raise UsageError("--memory-limit must go with --engine native or reference, not with the core")
    return METHOD, CODEC


def _adapter_in_use(
    out: str, network: Network, means: tuple[float, ...], stds: tuple[float, ...], task: Task
) -> Adapter | None:
    """The adapter in a directory, if it can be compared with a new one."""
    from ..adapters import CONFIG_FILE, Adapter
    from ..claims import claims
    from ..errors import MismatchError

    if not Path(out, CONFIG_FILE).exists():
        return None
    try:
        adapter = Adapter.load(out, network)
        claims(adapter)
        if adapter.task != task:
            why = f"it was made for {adapter.task}"
        elif preprocessing(network, None, None, adapter) == (means, stds):
            return adapter
        else:
            why = "it was made for samples with another --mean and --std"
    except MismatchError:
        why = "it was made on another network"
    except FileError as e:
        why = f"it cannot be read ({e})"
    click.echo(f"warning: the adapter in {out} is not compared with the new one, because {why}", err=True)
    return None

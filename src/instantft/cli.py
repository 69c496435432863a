"""What a person types. Every command prints its result on stdout and everything else on stderr.

Exit status: 0 done; 2 wrong usage or unusable input, with one line that says what is wrong; 1 anything else.

Imports that take time stay inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .errors import EngineError, FileError, InstantFTError, UsageError

if TYPE_CHECKING:
    from .adapters import Adapter
    from .backbones.builtin import Network
    from .data import Samples
    from .engine import Engine, EpochStats, Floats
    from .lift import LiftCost
    from .spec import NetSpec

__all__ = ["main", "run"]

BAR_AFTER = 1.0
"""Seconds after which work shows a progress bar."""

FEW = 30
"""Samples left out below which a gate that says no is said to have seen few."""

Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> None:
    """The console script."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        Exit status.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
        try:
            commands.main(None if arguments is None else list(arguments), prog_name="instantft", standalone_mode=False)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as e:
            click.echo(e.ctx.get_help() if e.ctx else str(e), err=True)
            return 2
        except click.ClickException as e:
            context = getattr(e, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            return _fail(e.format_message() + hint)
        except click.exceptions.Exit as e:
            return e.exit_code
        except (click.Abort, KeyboardInterrupt) as e:
            click.echo(str(e.__cause__ or e) or "interrupted; nothing was replaced", err=True)
            return 130
        except InstantFTError as e:
            return _fail(str(e))
        except MemoryError as e:
            return _fail(f"the work must fit in memory, but it does not: {e or 'use fewer or smaller samples'}")
        except BrokenPipeError:
            _drop_stdout()
            return 1
        except OSError as e:
            _drop_stdout()
            return _fail(
                f"files must be readable and writable, but {e.filename or 'the output'} is not: {e.strerror or e}"
            )
    return 0


def _fail(message: str) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return 2


def _drop_stdout() -> None:
    """What could not be written will not be tried again when Python closes."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- options that several commands share -----------------------------------------------------------------------------

_engine_option = click.option("--engine", metavar="native|reference", help="Who computes. [default: native]")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_threads_option = click.option("--threads", default=1, show_default=True, help="For running the frozen network.")
_seed_option = click.option("--seed", default=0, show_default=True, help="Decides the whole result.")
_batch_option = click.option("--batch-size", default=20, show_default=True)
_adapter_option = click.option("--adapter", metavar="DIR", help="Adapter to use with it. [default: none]")
_taps_option = click.option(
    "--taps", metavar="T[,T…]", help="Of an ONNX model: names, patterns, NAME@GRID, or auto[:BYTES]. [default: auto]"
)
_history_option = click.option("--history", is_flag=True, help="Loss and accuracy of every epoch.")


def _preprocessing_options(instead: str) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for name, what in (("--std", "Divide by this, per channel"), ("--mean", "Subtract this, per channel")):
            command = click.option(name, metavar="V[,V…]", help=f"{what}. [default: {instead}]")(command)
        return command

    return add


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the story, not of the alphabet


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import instantft

        click.echo(f"instantft {instantft.__version__}")
        ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def commands() -> None:
    """Adapt a trained network on the device, in milliseconds, from about a thousand labelled samples."""


# -- the commands ----------------------------------------------------------------------------------------------------


@commands.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="Where picture and files go.")
@_seed_option
@_engine_option
@_json_option
def demo(out: str, seed: int, engine: str | None, as_json: bool) -> None:
    """The whole story on scikit-learn's digits, in under a minute: pre-train, drift, adapt, compare."""
    from .demo import run_demo

    def say(text: str) -> None:
        click.echo(text, err=as_json)

    result = run_demo(Path(out), seed, _engine(engine), say, _Bar)
    if as_json:
        _print_json(result)


@commands.command()
@click.argument("net", metavar="dnn|lenet5")
@click.option("--data", required=True, metavar="NPZ", help="Samples x and labels y to train on.")
@click.option("--eval", "eval_path", metavar="NPZ", help="Samples and labels to measure accuracy on.")
@click.option("--out", required=True, metavar="FILE", help="Base file to write (.safetensors).")
@click.option("--hidden", default=96, show_default=True, help="Width of the dnn's hidden layers.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--lr", default=0.1, show_default=True, help="Learning rate.")
@_batch_option
@click.option("--momentum", default=0.0, show_default=True, help="Of SGD, 0 to below 1.")
@_seed_option
@_preprocessing_options("not done")
@_history_option
@_engine_option
@_json_option
def pretrain(
    net: str,
    data: str,
    eval_path: str | None,
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
    from . import spec as specs
    from .backbones.builtin import check_preprocessing
    from .cost import network_parameters
    from .data import as_samples, load_samples, warn_if_poor
    from .solvers import sgd

    if net not in ("dnn", "lenet5"):
        raise UsageError(f"NET must be dnn or lenet5, not {net!r:.60}")
    if not 1 <= hidden <= specs.MAX_WIDTH:
        raise UsageError(f"--hidden must be 1 to {specs.MAX_WIDTH}, not {hidden}")
    sgd.check_arguments(epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum, seed=seed)
    _check_file_target(out, {"--data": data, "--eval": eval_path})
    samples = load_samples(data)
    y = samples.labels
    C = int(y.max()) + 1
    spec = specs.dnn(samples.x.shape[1], C, hidden) if net == "dnn" else specs.lenet5(samples.shape, C)
    means, stds = check_preprocessing(_values("--mean", mean), _values("--std", std), spec.input_shape)
    test = load_samples(eval_path, spec, means, stds) if eval_path else None
    warn_if_poor(y, batch_size)
    x, _ = as_samples(samples.x, spec, means, stds, name=f"{data}: x")
    chosen = _engine(engine)
    began = time.perf_counter()
    with _Bar("pre-training", epochs) as bar:
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
    accuracy = _accuracy(chosen, network, None, test) if test else None
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
        result["history"] = _history(stats, len(x))
    if as_json:
        return _print_json(result)
    if history:
        _print_history(result["history"])
    click.echo(f"{net}: {network_parameters(spec):,} parameters, {epochs} epochs in {_time(seconds)}")
    click.echo(f"accuracy in the last epoch {result['accuracy_train']:.1%}, on --eval {_percent(accuracy)}")
    click.echo(f"base     {out}")


@commands.command()
@click.argument("base")
@click.option("--data", required=True, metavar="NPZ", help="Samples x and labels y to adapt to.")
@click.option("--eval", "eval_path", metavar="NPZ", help="Samples and labels to measure accuracy on, before and after.")
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
    help="fp32, fp16, int8, nf4, nf4-block64, relu4, relu2 or none. "
    "[default: fp32 for skip2-lora and skip-ridge, else none]",
)
@click.option("--cache-capacity", type=int, metavar="N", help="Samples the cache has room for. [default: all]")
@click.option("--cache-file", metavar="FILE", help="Keep the cache in a file. [default: in memory]")
@click.option("--epochs", type=int, help="Of SGD. [default: 10; under auto what a held-out block asks for]")
@_batch_option
@click.option(
    "--lr", type=float, help="Learning rate of SGD. [default: from the frozen layers' outputs; where those change, 0.1]"
)
@click.option(
    "--momentum", type=float, help="Of SGD, 0 to below 1. [default: 0; 0.8 for skip-lora and skip2-lora without --lr]"
)
@click.option("--space", default="auto", show_default=True, help="Where SGD makes its steps: auto, primal or dual.")
@click.option("--rank", type=int, help="Of the adapters. [default: 4; full for skip-ridge]")
@click.option("--lift", metavar="KIND", help="arccos or nystrom: a kernel of the taps, where that helps skip-ridge.")
@_taps_option
@click.option("--groups", metavar="KEY", help="Integers in --data: samples of a group are left out together.")
@_seed_option
@_threads_option
@_preprocessing_options("that of BASE")
@_engine_option
@_history_option
@click.option("--force", is_flag=True, help="Keep the new adapter even where the gate would not.")
@_json_option
def finetune(
    base: str,
    data: str,
    eval_path: str | None,
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
    groups: str | None,
    seed: int,
    threads: int,
    mean: str | None,
    std: str | None,
    engine: str | None,
    history: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Adapt the network in the file BASE to new samples, and write the adapter to a directory.

    The new adapter is kept if samples that it was not fitted to say that it is better than the one in the directory
    or, without one, than the frozen network.
    """
    from .acceptance import decide, untrained
    from .adapters import CONFIG_FILE, check_target
    from .data import load_samples
    from .solvers.sgd import FitResult
    from .tuner import FineTuner
    from .tuner import load as load_base

    network = load_base(base, taps)
    chosen = network.bind(_engine(engine))
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
    )
    check_target(out)
    means, stds = _preprocessing(network, mean, std)
    samples = load_samples(data, network.spec, means, stds, groups=groups)
    test = load_samples(eval_path, network.spec, means, stds) if eval_path else None
    old = _adapter_in_use(out, network, means, stds)
    before = _accuracy(chosen, network, None, test, threads) if test else None
    T = len(samples.x)
    label = f"fine-tuning ({tuner.row(T).name})"
    length = tuner.planned_epochs
    with _Bar(label, length) as bar:

        def filling(done: float) -> None:
            if done < T:
                bar.stage("filling the cache", T)
                bar.update(done)
            else:
                bar.stage(label, length)

        tuner.fit_prepared(samples.x, samples.labels, groups=samples.groups, progress=bar.update, filling=filling)
    fitted, store, row = tuner.result_, tuner.store_, tuner.method_.name
    result: dict[str, Any] = {
        "method": row,
        "accuracy_before": before,
        "accuracy_after": _accuracy(chosen, network, tuner.adapter, test, threads) if test else None,
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
            "lift": None if fitted.lift is None else _lift_cost(network.spec, adapter.lift_cost),
            "calibration_error": fitted.calibration_error,
        }
    began = time.perf_counter()
    with _Bar("asking the gate", 1):
        decision = decide(tuner, samples.x, old)
    result["seconds"]["gate"] = time.perf_counter() - began
    result["estimate"] = {"before": decision.before, "after": decision.after, "interval": list(decision.interval)}
    result["accepted"] = decision.accepted
    # Whoever uses the adapter must preprocess as it was done here.
    other = {"mean": list(means), "std": list(stds)} if (means, stds) != (network.mean, network.std) else {}
    said = {"accuracy": decision.after, "samples": decision.n}
    adapter = replace(tuner.adapter, config={**tuner.adapter.config, **other, "estimate": said})
    kept, was_there = decision.accepted or force, Path(out, CONFIG_FILE).exists()
    if kept:
        adapter.save(out)
    elif not was_there:
        untrained(adapter, network.tensors).save(out)

    if store and store.damaged:
        result["cache"]["damaged"] = store.damaged
    if history:
        result["history"] = _history(fitted.stats, T) if isinstance(fitted, FitResult) else []
    if as_json:
        return _print_json(result)
    if result.get("history"):
        _print_history(result["history"])
    s = fitted.seconds
    steps = f", {tuner.epochs_} epochs, {result['steps']:,} steps" if result["steps"] else ", in closed form"
    click.echo(f"{row}: {adapter.parameters:,} trainable parameters, {T:,} samples{steps}")
    if isinstance(fitted, FitResult):
        click.echo(f"loss     {result['loss']:.4f} over the last epoch, lr {result['lr']:.3g}")
    else:
        click.echo(
            f"chosen   λ {fitted.lam:.3g}, taps {' '.join(f'{w:g}' for w in fitted.weights)}; "
            f"calibration error {fitted.calibration_error:.1%}"
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
    if test:
        click.echo(f"accuracy {_percent(before)} → {_percent(result['accuracy_after'])} on {eval_path}, of the new one")
    low, high = (f"{100 * end:+.1f}" for end in decision.interval)
    click.echo(
        f"estimate {_percent(decision.before)} → {_percent(decision.after)} on {decision.n:,} samples left out; "
        f"the difference is {low} to {high} points (95 %)"
    )
    parts = f" ({_time(s.fill)} filling the cache, {_time(s.train)} training)" if store else ""
    click.echo(f"time     {_time(s.total)}{parts}")
    if store:
        held = result["cache"]
        click.echo(
            f"cache    {held['codec']}, {held['bytes_per_sample']:,} B a sample, "
            f"{held['hits']:,} hits, {held['misses']:,} misses"
        )
    rival = "the frozen network" if old is None else f"the adapter in {out}"
    verdict = "better than" if decision.accepted else "not surely better than"
    few = f"; {decision.n} samples tell little" if not decision.accepted and decision.n < FEW else ""
    click.echo(f"gate     {verdict} {rival}{few}" + (", kept by --force" if force and not decision.accepted else ""))
    if not kept:
        stays = f"{out} stays as it was" if was_there else f"{out} holds an adapter that changes nothing"
        return click.echo(f"adapter  {stays}; --force keeps the new one")
    click.echo(f"adapter  {out}")


@commands.command()
@click.argument("base")
@_adapter_option
@click.option("--data", required=True, metavar="NPZ", help="Samples x and labels y.")
@_preprocessing_options("that of BASE")
@_threads_option
@_engine_option
@_json_option
def evaluate(
    base: str,
    adapter: str | None,
    data: str,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Accuracy and loss on labelled samples, per class, and the confusion matrix."""
    import numpy as np

    from .solvers.calibration import expected_calibration_error, log_loss, softmax
    from .table import format_table

    network, chosen, samples, logits = _forward(base, adapter, data, mean, std, threads, engine, labels=True)
    y, C = samples.labels, network.spec.C
    predicted = logits.argmax(axis=1)
    confusion = np.zeros((C, C), np.int64)
    np.add.at(confusion, (y, predicted), 1)
    counts, right = confusion.sum(axis=1), confusion.diagonal()
    result: dict[str, Any] = {
        "accuracy": float(right.sum() / len(y)),
        "loss": float(log_loss(logits.astype(np.float64), y).mean()),
        "calibration_error": expected_calibration_error(softmax(logits), y),
        "n": len(y),
        "per_class": [
            {"class": c, "n": int(counts[c]), "accuracy": float(right[c] / counts[c]) if counts[c] else None}
            for c in range(C)
        ],
        "confusion_matrix": confusion.tolist(),
        "engine": chosen.name,
    }
    if as_json:
        return _print_json(result)
    click.echo(
        f"accuracy {result['accuracy']:.2%}   loss {result['loss']:.4f}   "
        f"calibration error {result['calibration_error']:.1%}   n {len(y):,}\n"
    )
    if C > 30:
        click.echo(
            format_table(
                ("class", "n", "accuracy"), [(p["class"], p["n"], _percent(p["accuracy"])) for p in result["per_class"]]
            )
        )
        return click.echo(f"\nThe confusion matrix ({C}x{C}) is in --json.")
    rows = [
        (c, *(n or "·" for n in confusion[c].tolist()), int(counts[c]), _percent(result["per_class"][c]["accuracy"]))
        for c in range(C)
    ]
    click.echo("Rows are the true class, columns the predicted one.")
    click.echo(format_table(("true", *map(str, range(C)), "n", "accuracy"), rows))


@commands.command()
@click.argument("base")
@_adapter_option
@click.option("--data", required=True, metavar="NPZ", help="Samples x.")
@click.option("--out", required=True, metavar="NPZ", help="Where logits, probabilities and label go.")
@_preprocessing_options("that of BASE")
@_threads_option
@_engine_option
@_json_option
def predict(
    base: str,
    adapter: str | None,
    data: str,
    out: str,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Predict samples; write logits, probabilities and label to an .npz."""
    import io

    import numpy as np

    from . import files
    from .adapters import CONFIG_FILE, TENSOR_FILE
    from .solvers.calibration import softmax

    inputs = {"--data": data, "BASE": base}
    if adapter:
        inputs |= {
            "the adapter": str(Path(adapter, TENSOR_FILE)),
            "the adapter's config": str(Path(adapter, CONFIG_FILE)),
        }
    _check_file_target(out, inputs)
    _, chosen, _, logits = _forward(base, adapter, data, mean, std, threads, engine, labels=False)
    label = logits.argmax(axis=1)
    buffer = io.BytesIO()
    np.savez(buffer, logits=logits, probabilities=softmax(logits), label=label)
    files.write_whole(Path(out), buffer.getvalue(), "predictions")
    if as_json:
        return _print_json({"n": len(label), "out": out, "engine": chosen.name})
    click.echo(f"{len(label):,} predictions in {out}")


@commands.command()
@click.argument("path", metavar="BASE|DIR")
@click.option("--rank", type=int, help="Of the adapters whose cost is shown. [default: 4; full for skip-ridge]")
@click.option("--samples", default=1024, show_default=True, help="For the cost of skip-ridge, which has no steps.")
@_taps_option
@_json_option
def inspect(path: str, rank: int | None, samples: int, taps: str | None, as_json: bool) -> None:
    """Layers, taps, shapes, parameters, FLOPs, and bytes a sample in the cache."""
    from . import lift
    from .adapters import Adapter
    from .solvers import lifting, sgd
    from .tuner import load as load_base

    sgd.check_arguments(rank=1 if rank is None else rank)
    if not 1 <= samples <= 1 << 40:
        raise UsageError(f"--samples must be 1 to {1 << 40}, not {samples}")
    result: dict[str, Any]
    if Path(path).is_dir():
        adapter = Adapter.load(path)
        spec = adapter.spec
        result = {
            "kind": "adapter",
            "method": adapter.method,
            "rank": adapter.rank,
            "base_hash": adapter.base_hash,
            "trainable_parameters": adapter.parameters,
            "tensors": {name: list(t.shape) for name, t in adapter.tensors.items()},
            "training": {name: value for name, value in adapter.config.items() if name != "left_out"},
            "lift": _lift_cost(spec, adapter.lift_cost),
        }
        rank = adapter.rank
    else:
        network = load_base(path, taps)
        spec = network.spec
        result = {"kind": "base", "hash": network.hash, "mean": list(network.mean), "std": list(network.std)}
        if not spec.own:
            result["candidates"] = _candidates(network)
        result["lifts"] = {
            kind: _lift_cost(spec, lift.cost(spec, *lifting.size(kind, samples)))
            for kind in lifting.LIFTS
            if kind != "arccos" or samples <= lift.MAX_LANDMARKS
        }
    result |= (_described if spec.own else _described_foreign)(spec, rank, samples)
    if as_json:
        return _print_json(result)
    (_print_inspection if spec.own else _print_foreign)(path, result)


@commands.group()
def export() -> None:
    """An adapted network for other programs."""


@export.command("onnx")
@click.argument("base")
@_adapter_option
@click.option("--out", required=True, metavar="FILE", help="Where the ONNX model goes.")
@_json_option
def export_onnx(base: str, adapter: str | None, out: str, as_json: bool) -> None:
    """One ONNX file of the network BASE with its adapter as ordinary nodes.

    Any runtime can run it; it needs nothing of instantft.
    """
    from .export.onnx import export_onnx

    _check_file_target(out, {"BASE": base})
    network, loaded = _adapted(base, adapter)
    export_onnx(network, loaded, out)
    size = Path(out).stat().st_size
    if as_json:
        return _print_json({"out": out, "bytes": size, "method": loaded.method if loaded else None})
    click.echo(f"{out}: {size:,} bytes")


@commands.command()
@click.argument("base", required=False)
@click.option("--data", metavar="NPZ", help="Samples and labels. [default: random ones]")
@click.option("--samples", default=1024, show_default=True, help="How many random samples.")
@click.option("--epochs", default=10, show_default=True)
@_batch_option
@click.option("--lr", default=0.05, show_default=True, help="Learning rate.")
@click.option("--rank", default=4, show_default=True)
@click.option("--repeat", default=3, show_default=True, help="Interleaved rounds; medians are shown.")
@_threads_option
@_seed_option
@_engine_option
@_json_option
def bench(
    base: str | None,
    data: str | None,
    samples: int,
    epochs: int,
    batch_size: int,
    lr: float,
    rank: int,
    repeat: int,
    threads: int,
    seed: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Time every method side by side, with what one would use instead: PyTorch eager, logistic regression.

    Without BASE, the network is an untrained lenet5 on 28x28.
    """
    import numpy as np

    from .backbones.builtin import Network
    from .bench import run_bench
    from .data import load_samples
    from .solvers import sgd
    from .spec import lenet5
    from .table import format_table
    from .tuner import load as load_base

    sgd.check_arguments(rank=rank, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, threads=threads)
    for name, value, high in (("--samples", samples, 1 << 20), ("--repeat", repeat, 1000)):
        if not 1 <= value <= high:
            raise UsageError(f"{name} must be 1 to {high}, not {value}")
    network = load_base(base) if base else Network.init(lenet5((1, 28, 28)), seed)
    if not network.spec.own:
        raise UsageError(f"bench must have a network of our own, which PyTorch can run beside it, not {base}")
    if data:
        loaded = load_samples(data, network.spec, network.mean, network.std)
        x, y = loaded.x, loaded.labels
    else:
        rng = np.random.default_rng([seed, 3])
        if samples * network.spec.tap_widths[0] > 1 << 28:
            raise UsageError(f"--samples must leave at most {1 << 28} values, not {samples} samples")
        x = rng.random((samples, network.spec.tap_widths[0]), np.float32)
        y = rng.integers(0, network.spec.C, samples).astype(np.int32)
    chosen = _engine(engine)
    with _Bar("benchmark", repeat) as bar:
        rows = run_bench(
            chosen,
            network,
            x,
            y,
            rank=rank,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            threads=threads,
            repeat=repeat,
            progress=bar.update,
        )
    if as_json:
        return _print_json({"engine": chosen.name, "samples": len(x), "epochs": epochs, "rows": rows})
    click.echo(f"{len(x):,} samples, {epochs} epochs, batches of {batch_size}, median of {repeat} rounds\n")
    click.echo(
        format_table(
            ("", "time", "fill", "skip2-lora is", "B a sample", "accuracy"),
            [
                (
                    r["name"],
                    _time(r["seconds"]),
                    _time(r["fill"]) if r["fill"] else "–",
                    f"{r['ratio']:.2f}×",
                    r["bytes_per_sample"] or "–",
                    _percent(r["accuracy"]),
                )
                for r in rows
            ],
        )
    )
    click.echo(
        "\n“skip2-lora is” says how many times as fast Skip2-LoRA with its fp32 cache is. "
        "Accuracy is on the samples adapted to."
    )


@commands.command()
@click.argument("targets", nargs=-1, metavar="[TARGET …]")
@click.option("--quick", is_flag=True, help="Next to nothing of everything, in under three minutes.")
@click.option("--out", default="reproduction", show_default=True, metavar="DIR", help="Report, pictures and results.")
@click.option("--data-dir", metavar="DIR", help="Data sets. [default: $INSTANTFT_DATA or ../shared/data]")
@click.option("--trials", type=int, metavar="N", help="Seeds behind every mean. [default: as many as the papers]")
@click.option("--jobs", type=int, metavar="N", help="Trials at a time. [default: one a processor]")
@_engine_option
@_json_option
def reproduce(
    targets: tuple[str, ...],
    quick: bool,
    out: str,
    data_dir: str | None,
    trials: int | None,
    jobs: int | None,
    engine: str | None,
    as_json: bool,
) -> None:
    """Make the papers' tables and figures again, and a report of them beside ours: report.md, .html and .json.

    Finished trials are kept in DIR: a run that was stopped goes on where it stopped. Without TARGET: all of them.
    """
    from .experiments.catalogue import RESULTS, chosen
    from .experiments.catalogue import reproduce as run_all
    from .experiments.core import extra

    chosen(targets)
    if jobs is not None and not 1 <= jobs <= 1024:
        raise UsageError(f"--jobs must be 1 to 1024, not {jobs}")
    _engine(engine)
    joblib = extra("joblib", "joblib")

    @contextlib.contextmanager
    def stage(label: str) -> Iterator[Callable[[float], None]]:
        with _Bar(label, 100) as bar:
            yield lambda share: bar.update(100 * share)

    try:
        with joblib.parallel_config(n_jobs=jobs or os.cpu_count() or 1):
            made = run_all(targets, Path(out), quick=quick, trials=trials, data=data_dir, engine=engine, stage=stage)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished trials are in {Path(out) / RESULTS}, and the same command goes on"
        ) from None
    report = [str(path) for path in made.files]
    if as_json:
        return _print_json({"targets": list(made.sections), "ran": made.ran, "kept": made.kept, "files": report})
    for name, section in made.sections.items():
        click.echo(f"{name}: {' '.join(section.note.split())}\n")
    click.echo(f"{made.ran} trials run, {made.kept} kept from before; the report is {Path(out) / 'report.html'}")


# -- what the commands share -----------------------------------------------------------------------------------------


def _engine(name: str | None) -> Engine:
    from .engine import get_engine

    if name is not None:
        return get_engine(name)
    try:
        return get_engine("native")
    except EngineError as e:
        if os.environ.get("INSTANTFT_ISA"):
            raise  # who asks for one instruction set does not want another engine
        click.echo(f"warning: {' '.join(str(e).split())}; the slow NumPy engine computes", err=True)
        return get_engine("reference")


def _values(option: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} must be numbers with commas between them, not {text!r:.60}") from None


def _preprocessing(
    network: Network, mean: str | None, std: str | None, adapter: Adapter | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What to take off samples and divide them by: the options, else what the adapter was made with, else the base."""
    from .backbones.builtin import check_preprocessing

    kept = adapter.config if adapter is not None else {}
    try:
        made = [
            tuple(float(v) for v in kept.get(name, of)) for name, of in (("mean", network.mean), ("std", network.std))
        ]
    except (TypeError, ValueError):
        raise FileError(
            f"an adapter's mean and std must be lists of numbers, not {str(kept.get('mean'))[:40]!r} "
            f"and {str(kept.get('std'))[:40]!r}"
        ) from None
    means = made[0] if mean is None else _values("--mean", mean)
    stds = made[1] if std is None else _values("--std", std)
    return check_preprocessing(means, stds, network.spec.input_shape)


def _adapter_in_use(out: str, network: Network, means: tuple[float, ...], stds: tuple[float, ...]) -> Adapter | None:
    """The adapter in a directory, if it can be compared with a new one."""
    from .adapters import CONFIG_FILE, Adapter
    from .claims import claims
    from .errors import MismatchError

    if not Path(out, CONFIG_FILE).exists():
        return None
    try:
        adapter = Adapter.load(out, network)
        claims(adapter)
        if _preprocessing(network, None, None, adapter) == (means, stds):
            return adapter
        why = "it was made for samples with another --mean and --std"
    except MismatchError:
        why = "it was made on another network"
    except FileError as e:
        why = f"it cannot be read ({e})"
    click.echo(f"warning: the adapter in {out} is not compared with the new one, because {why}", err=True)
    return None


def _adapted(base: str, adapter_path: str | None) -> tuple[Network, Adapter | None]:
    """The network in a file, with the taps of an adapter, and that adapter."""
    from .adapters import Adapter
    from .tuner import load as load_base

    if adapter_path is None:
        return load_base(base), None
    network = load_base(base, adapter=Adapter.load(adapter_path))
    return network, Adapter.load(adapter_path, network)


def _check_file_target(out: str, inputs: Mapping[str, str | None]) -> None:
    """Refuse, before any work is done, a place where no file can come to be, and a file that is read as well."""
    from . import files

    files.check_file(Path(out), "--out")
    for name, path in inputs.items():
        if path and os.path.realpath(out) == os.path.realpath(path):
            raise UsageError(f"--out must be another file than {name}, not {out}")


def _forward(
    base: str,
    adapter_path: str | None,
    data: str,
    mean: str | None,
    std: str | None,
    threads: int,
    engine: str | None,
    labels: bool,
) -> tuple[Network, Engine, Samples, Floats]:
    from .data import load_samples
    from .solvers import sgd

    sgd.check_arguments(threads=threads)
    network, adapter = _adapted(base, adapter_path)
    means, stds = _preprocessing(network, mean, std, adapter)
    samples = load_samples(data, network.spec, means, stds, labels=labels)
    chosen = network.bind(_engine(engine))
    return network, chosen, samples, _logits(chosen, network, adapter, samples, threads)


def _accuracy(engine: Engine, network: Network, adapter: Adapter | None, test: Samples, threads: int = 1) -> float:
    return float((_logits(engine, network, adapter, test, threads).argmax(axis=1) == test.labels).mean())


def _logits(engine: Engine, network: Network, adapter: Adapter | None, samples: Samples, threads: int) -> Floats:
    from .engine import forward

    tensors = {**network.tensors, **(adapter.tensors if adapter else {})}
    with _Bar("predicting", len(samples.x)) as bar:
        return forward(engine, network.spec, tensors, samples.x, threads, bar.update)


def _history(stats: EpochStats, T: int) -> list[dict[str, float]]:
    pairs = zip(stats.loss.tolist(), stats.correct.tolist(), strict=True)
    return [{"epoch": e + 1, "loss": loss, "accuracy": correct / T} for e, (loss, correct) in enumerate(pairs)]


def _print_history(history: Any) -> None:
    from .table import format_table

    rows = [(h["epoch"], f"{h['loss']:.4f}", f"{h['accuracy']:.2%}") for h in history]
    click.echo(format_table(("epoch", "loss", "accuracy"), rows) + "\n")


def _described(spec: NetSpec, rank: int | None, T: int) -> dict[str, Any]:
    from .cache.codecs import CODECS
    from .cost import closed_form, cost, linear_macs, network_parameters
    from .methods import METHODS, own_rank

    layers = [
        {
            "layer": k,
            "kind": y.kind,
            "in": list(g.in_shape),
            "out": list(g.out_shape),
            "kernel": list(y.kernel) if y.kind == "conv" else None,
            "padding": list(y.padding) if y.kind == "conv" else None,
            "batch_norm": y.batch_norm,
            "relu": y.relu,
            "pool": y.pool,
            "macs": macs,
        }
        for k, (y, g, macs) in enumerate(zip(spec.layers, spec.geometry, linear_macs(spec), strict=True))
    ]
    methods = []
    for m in METHODS.values():
        R = own_rank(m, spec) if rank is None else rank
        c = cost(spec, m, R)
        methods.append(
            {
                "method": m.name,
                "rank": R if m.adapters != "none" else None,
                "trainable_parameters": c.parameters,
                "forward_flops": c.forward,
                "forward_flops_cached": c.forward_cached,
                "backward_flops": c.backward,
                "memory_bytes": c.memory,
            }
        )
    return {
        "input_shape": list(spec.input_shape),
        "classes": spec.C,
        "parameters": network_parameters(spec),
        "layers": layers,
        "taps": [{"name": f"x{k}", "size": n} for k, n in enumerate(spec.tap_widths)],
        "record_floats": spec.record.size,
        "cache_bytes_per_sample": {name: c.bytes_per_sample(spec.record) for name, c in CODECS.items()},
        "methods": methods,
        "closed_form": {"samples": T, **asdict(closed_form(spec, T))},
    }


def _candidates(network: Network) -> list[dict[str, Any]]:
    """Every value of an ONNX model that could be a tap."""
    from .backbones.onnx import OnnxNetwork

    assert isinstance(network, OnnxNetwork)
    entry, chosen = network.model.inputs[0].name, {tap.value: tap for tap in network.taps}
    return [
        {
            "name": tap.value,
            "shape": list(tap.shape),
            "bytes": 4 * tap.width,
            "chosen": chosen[tap.value].name
            if tap.value in chosen
            else (entry if tap.value == entry and network.spec.input_tap else None),
        }
        for tap in network.candidates
    ]


def _described_foreign(spec: NetSpec, rank: int | None, T: int) -> dict[str, Any]:
    """What is known of a network that somebody else runs."""
    from .cache.codecs import CODECS
    from .cost import closed_form
    from .methods import METHODS, own_rank, parameters

    methods = []
    for m in METHODS.values():
        if m.rows_only:
            R = own_rank(m, spec) if rank is None else rank
            methods.append({"method": m.name, "rank": R, "trainable_parameters": parameters(m, spec, R)})
    return {
        "input_shape": list(spec.input_shape),
        "classes": spec.C,
        "taps": [
            {"name": f"x{k}", "size": n, "value": spec.layers[k - 1].name if k else "the input"}
            for k, n in enumerate(spec.tap_widths)
            if k >= spec.first_tap
        ],
        "logits": spec.layers[-1].name,
        "record_floats": spec.record.size,
        "cache_bytes_per_sample": {name: c.bytes_per_sample(spec.record) for name, c in CODECS.items()},
        "methods": methods,
        "closed_form": {"samples": T, **asdict(closed_form(spec, T))},
    }


def _print_foreign(path: str, r: dict[str, Any]) -> None:
    from .table import format_table

    what = "adapter" if r["kind"] == "adapter" else "ONNX model"
    click.echo(f"{what} {path}: input {_shape(r['input_shape'])}, {r['classes']} classes in {r['logits']}")
    click.echo(f"of base {r['base_hash']}" if r["kind"] == "adapter" else f"hash {r['hash']} (with these taps)")
    if "candidates" in r:
        rows = [(c["name"], _shape(c["shape"]), f"{c['bytes']:,}", c["chosen"] or "–") for c in r["candidates"]]
        click.echo("\nCandidates for --taps:")
        click.echo(format_table(("value", "shape", "bytes a sample", "chosen"), rows))
    click.echo("\nTaps:")
    click.echo(format_table(("tap", "value", "width"), [(t["name"], t["value"], f"{t['size']:,}") for t in r["taps"]]))
    click.echo()
    methods = [(m["method"], m["rank"], f"{m['trainable_parameters']:,}") for m in r["methods"]]
    click.echo(format_table(("method", "rank", "parameters"), methods))
    solve = r["closed_form"]
    click.echo(
        f"\nskip-ridge solves one system ({solve['space']}): {_flops(solve['flops'])} and "
        f"{solve['memory'] / 1e6:,.1f} MB for {solve['samples']:,} samples."
    )
    click.echo(f"\nCache, {r['record_floats']:,} values a sample:")
    click.echo(format_table(("codec", "bytes"), [(k, f"{v:,}") for k, v in r["cache_bytes_per_sample"].items()]))


def _lift_cost(spec: NetSpec, c: LiftCost | None) -> dict[str, Any] | None:
    """What a lift adds to the prediction of one sample, beside the network's own."""
    from .cost import linear_macs, network_parameters

    if c is None:
        return None
    return {
        "directions": c.directions,
        "landmarks": c.landmarks,
        "macs": c.macs,
        "bytes": c.bytes,
        "network_macs": sum(linear_macs(spec)) if spec.own else None,
        "network_bytes": 4 * network_parameters(spec) if spec.own else None,
    }


def _print_lifts(lifts: Mapping[str, dict[str, Any]]) -> None:
    from .table import format_table

    rows = [
        (
            name,
            f"{c['directions']:,}",
            f"{c['landmarks']:,}",
            f"{c['macs']:,}",
            f"{c['macs'] / c['network_macs']:.2f}×",
            f"{c['bytes'] / 1000:,.1f} kB",
            f"{c['bytes'] / c['network_bytes']:.2f}×",
        )
        for name, c in lifts.items()
    ]
    head = ("lift", "directions", "landmarks", "multiply-adds", "the network's", "tensors", "the network's")
    click.echo(format_table(head, rows))


def _print_inspection(path: str, r: dict[str, Any]) -> None:
    from .table import format_table

    if r["kind"] == "adapter":
        idle = "" if r["training"].get("trained", True) else "; it changes nothing: the gate said no"
        click.echo(f"adapter {path}: {r['method']}, rank {r['rank']}, {r['trainable_parameters']:,} parameters{idle}")
        click.echo(f"of base {r['base_hash']}")
        for name, shape in r["tensors"].items():
            click.echo(f"  {name:<28} {_shape(shape)}")
    else:
        click.echo(f"base {path}: {r['parameters']:,} parameters, {r['classes']} classes\nhash {r['hash']}")
        for name in ("mean", "std"):
            if r[name]:
                click.echo(f"{name} {', '.join(f'{v:g}' for v in r[name])}")
    click.echo(
        "\n"
        + format_table(
            ("layer", "tap", "in", "out", "then", "multiply-adds"),
            [
                (
                    f"{y['layer']} {y['kind']}" + (f" {_shape(y['kernel'])}" if y["kernel"] else ""),
                    f"x{y['layer']}: {r['taps'][y['layer']]['size']:,}",
                    _shape(y["in"]),
                    _shape(y["out"]),
                    " ".join(
                        [
                            *(["norm"] if y["batch_norm"] else []),
                            *(["relu"] if y["relu"] else []),
                            *([f"pool {y['pool']}"] if y["pool"] > 1 else []),
                        ]
                    )
                    or "–",
                    f"{y['macs']:,}",
                )
                for y in r["layers"]
            ],
        )
    )
    click.echo("\nCost a sample (FLOPs; memory of training with batches of one):")
    click.echo(
        format_table(
            ("method", "rank", "parameters", "forward", "cached", "backward", "memory"),
            [
                (
                    m["method"],
                    m["rank"] or "–",
                    f"{m['trainable_parameters']:,}",
                    _flops(m["forward_flops"]),
                    _flops(m["forward_flops_cached"]),
                    _flops(m["backward_flops"]) if m["backward_flops"] else "–",
                    f"{m['memory_bytes'] / 1000:,.1f} kB",
                )
                for m in r["methods"]
            ],
        )
    )
    solve = r["closed_form"]
    click.echo(
        f"\nskip-ridge solves one system ({solve['space']}) instead: {_flops(solve['flops'])} and "
        f"{solve['memory'] / 1e6:,.1f} MB for {solve['samples']:,} samples."
    )
    if r.get("lift"):
        click.echo("\nThe lift adds to every prediction, beside the network:")
        _print_lifts({"": r["lift"]})
    elif "lifts" in r:
        click.echo(
            f"\nA lift by {r['closed_form']['samples']:,} samples would add to every prediction, beside the network:"
        )
        _print_lifts(r["lifts"])
    click.echo(f"\nCache, {r['record_floats']:,} values a sample:")
    click.echo(format_table(("codec", "bytes"), [(k, f"{v:,}") for k, v in r["cache_bytes_per_sample"].items()]))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _flops(n: int | None) -> str:
    if n is None:
        return "–"
    if n >= 1e9:
        return f"{n / 1e9:.2f} G"
    return f"{n / 1e6:.3f} M" if n >= 1e6 else f"{n / 1e3:.1f} k"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.1%}"


def _print_json(result: dict[str, Any]) -> None:
    click.echo(json.dumps(_plain(result), allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has no NaN or Inf; they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


class _Bar:
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

    def __enter__(self) -> _Bar:
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

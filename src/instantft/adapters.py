"""What fine-tuning yields: a few tensors, bound by hash to the network they were trained on (docs/formats.md).

Every solver has this one result type: y = gain·c + Σ x^k·A_k·B_k + bias, and for the FT methods changed weights in the
place of the network's own. An adapter never changes; going back to the old one means keeping it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files, lift
from .backbones.builtin import Network, check_values, read_spec
from .errors import FileError, MismatchError, UsageError
from .methods import METHODS, Method, connections, method, parameters, trainable
from .spec import NetSpec
from .tasks import TASKS, Task, check_task

__all__ = ["CONFIG_FILE", "FORMAT", "MAX_RANK", "TENSOR_FILE", "VERSION", "Adapter", "check_target", "initial"]

Floats = NDArray[np.float32]

FORMAT = "instantft-adapter"
VERSION = "1"
TENSOR_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

MAX_RANK = 4096
"""Largest rank; far above it an adapter is larger than the layer it stands beside."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter.

    Args:
        method: the row of `methods.METHODS` that made it.
        rank: R.
        spec: shape of the network it belongs to.
        base_hash: `Network.hash` of that network.
        tensors: what was trained (``lora.I-J.A`` (N, R), ``lora.I-J.B`` (R, M), or changed weights), the running
            statistics where batch norm was trained, and optionally ``output.gain`` (1,), ``output.bias`` (C,), and the
            four of `lift` where all adapters lead to the output.
        config: how it was trained (epochs, lr, seed, …), plain JSON values, for information.

    Raises:
        UsageError: the tensors are not those of the method, or a value is not finite.
    """

    method: str
    rank: int
    spec: NetSpec
    base_hash: str
    tensors: Mapping[str, Floats]
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = expected(method(self.method), self.spec, self.rank)
        optional = _output_shapes(self.spec)
        if any(name.startswith("lift.") for name in self.tensors):
            shapes |= _lift_shapes(method(self.method), self.spec, *_lift_size(self.tensors))
        for name in sorted(set(shapes) - set(self.tensors)):
            raise UsageError(f"an adapter of {self.method} must hold {name}, but it is missing")
        kept: dict[str, Floats] = {}
        for name, value in self.tensors.items():
            shape = shapes.get(name, optional.get(name))
            if shape is None:
                raise UsageError(f"an adapter of {self.method} must hold no {name!r}")
            if value.shape != shape or value.dtype != np.float32:
                raise UsageError(f"{name} must be float32 {list(shape)}, not {value.dtype} {list(value.shape)}")
            check_values(name, value)
            kept[name] = files.frozen(value)
        object.__setattr__(self, "tensors", kept)

    def __repr__(self) -> str:
        return f"Adapter({self.method}, rank {self.rank}, {self.parameters:,} parameters, of {self.base_hash[:8]}…)"

    def __deepcopy__(self, memo: object) -> Adapter:
        return self  # nothing in it changes

    @property
    def parameters(self) -> int:
        """Number of trainable parameters (InstantFT Table 1); of a lift, its coefficients."""
        lifted = self.tensors["lift.coefficients"].size if lift.BASIS in self.tensors else 0
        return parameters(method(self.method), self.spec, self.rank) + lifted

    @property
    def task(self) -> Task:
        """What its outputs are for.

        Raises:
            FileError: its config names a task that there is not.
        """
        try:
            return check_task(self.config.get("task", TASKS[0]))
        except UsageError as e:
            raise FileError(f"an adapter's config must name its task, but {e}") from None

    @property
    def lift_cost(self) -> lift.LiftCost | None:
        """What the lift adds to predicting one sample; None without one."""
        return lift.cost(self.spec, *_lift_size(self.tensors)) if lift.BASIS in self.tensors else None

    def check_base(self, base: Network) -> None:
        """See that the adapter was made on `base`.

        Raises:
            MismatchError: it was not; both hashes are named.
        """
        if base.hash != self.base_hash:
            raise MismatchError(
                f"an adapter must be used on the network it was made on, which is {self.base_hash}, not {base.hash}"
            )

    def widened(self, base: Network) -> Adapter:
        """The adapter for `base`, which is its own network with one class more (`Network.widened`) that it ignores."""
        tensors: dict[str, Floats] = {}
        # At the full rank of a closed form B is the identity, and stays one.
        full = method(self.method).solver == "ridge" and self.rank == self.spec.C
        for name, value in self.tensors.items():
            if name.endswith(".A"):
                tensors[name] = np.pad(value, ((0, 0), (0, int(full))))
            elif name.endswith(".B"):
                tensors[name] = np.pad(value, ((0, int(full)), (0, 1)))
                tensors[name][-1, -1] = float(full)
            elif name == "lift.coefficients":
                tensors[name] = np.pad(value, ((0, 0), (0, 1)))
            else:
                tensors[name] = np.pad(value, (0, 1)) if name == "output.bias" else value
        return Adapter(self.method, self.rank + int(full), base.spec, base.hash, tensors, self.config)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the adapter to a directory of its own; an adapter already there is replaced whole or not at all.

        Raises:
            FileError: the place cannot be written, or the directory holds other files.
        """
        target = Path(os.path.realpath(directory))
        check_target(target)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "rank": str(self.rank),
            "base_hash": self.base_hash,
            "spec": json.dumps(self.spec.to_json()),
            "outputs": " ".join(k for k in self.tensors if k in _output_shapes(self.spec)),
        }
        if lift.BASIS in self.tensors:
            metadata["lift"] = " ".join(map(str, _lift_size(self.tensors)))
        data = files.encode_tensors(self.tensors, metadata)
        config = {
            "format": FORMAT,
            "format_version": VERSION,
            "peft_type": _peft_type(self.method),
            "method": self.method,
            "r": self.rank,
            "base_model_hash": self.base_hash,
            "trainable_parameters": self.parameters,
            "sha256": hashlib.sha256(data).hexdigest(),
            "training": dict(self.config),
        }
        try:
            text = json.dumps(config, indent=2, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as e:
            raise UsageError(f"an adapter's config must be plain finite JSON values: {e}") from None
        files.replace_directory(target, {TENSOR_FILE: data, CONFIG_FILE: text}, "an adapter")

    @classmethod
    def load(cls, directory: str | PathLike[str], base: Network | None = None) -> Adapter:
        """Read an adapter and check all of it.

        Args:
            directory: as given to `save`.
            base: the network it is meant for; None: not checked.

        Raises:
            FileError: missing, truncated, damaged, or of another version.
            MismatchError: it was made on another network.
        """
        directory = Path(directory)
        try:
            is_directory = directory.is_dir()
        except (OSError, ValueError):
            is_directory = False
        if not is_directory:
            raise FileError(f"an adapter must be a directory, but {str(directory)!r} is none")
        config_path, tensor_path = directory / CONFIG_FILE, directory / TENSOR_FILE
        what = "an adapter"
        config = files.decode_json(files.read_small(config_path, what), what, config_path)
        for key, value in (("format", FORMAT), ("format_version", VERSION)):
            if config.get(key) != value:
                raise FileError(
                    f"{what} must have {key} {value!r}, but {config_path} has {str(config.get(key))[:60]!r}"
                )
        described: list[tuple[str, int, NetSpec, str]] = []

        def expect(metadata: dict[str, str]) -> dict[str, tuple[int, ...]]:
            for key, value in (("format", FORMAT), ("version", VERSION)):
                if metadata.get(key) != value:
                    raise FileError(
                        f"{what} must have {key} {value!r}, but {tensor_path} has {str(metadata.get(key))[:60]!r}"
                    )
            name, base_hash = metadata.get("method", ""), metadata.get("base_hash", "")
            text = metadata.get("rank", "")
            rank = int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0
            if name not in METHODS or not 1 <= rank <= MAX_RANK:
                raise FileError(
                    f"{what} must name a method and a rank of 1 to {MAX_RANK}, but {tensor_path} has "
                    f"{name[:40]!r} and {text[:20]!r}"
                )
            pairs: tuple[tuple[str, object], ...] = (("method", name), ("r", rank), ("base_model_hash", base_hash))
            for key, wanted in pairs:
                if config.get(key) != wanted:
                    raise FileError(
                        f"{what} must agree with its config, but in {config_path} {key} is "
                        f"{str(config.get(key))[:80]!r} and in {TENSOR_FILE} {str(wanted)[:80]!r}"
                    )
            spec = read_spec(metadata.get("spec", ""), what, tensor_path)
            if base is not None and base_hash != base.hash:
                raise MismatchError(
                    f"an adapter must be used on the network it was made on, but {directory} was made on "
                    f"{base_hash[:64]}, not on {base.hash}"
                )
            described.append((name, rank, spec, base_hash))
            shapes = expected(METHODS[name], spec, rank)
            if "lift" in metadata:
                sizes = metadata["lift"].split(" ")
                if len(sizes) != 2 or not all(n.isascii() and n.isdigit() and len(n) <= 6 for n in sizes):
                    raise FileError(
                        f"{what} must give directions and landmarks of its lift, but {tensor_path} has "
                        f"{metadata['lift'][:40]!r}"
                    )
                try:
                    shapes |= _lift_shapes(METHODS[name], spec, int(sizes[0]), int(sizes[1]))
                except UsageError as e:
                    raise FileError(f"{what} must hold usable tensors, but {tensor_path} does not: {e}") from None
            outputs = metadata.get("outputs", "")
            return shapes | {k: v for k, v in _output_shapes(spec).items() if k in outputs.split()}

        tensors, _ = files.read_tensors(tensor_path, what, expect)
        try:
            found = hashlib.sha256(tensor_path.read_bytes()).hexdigest()
        except OSError as e:
            raise FileError(f"{what} must be readable, but {tensor_path} is not: {files.reason(e)}") from None
        if found != config.get("sha256"):
            raise FileError(
                f"{what} must match its sha256 {str(config.get('sha256'))[:64]}, but {tensor_path} has {found}: "
                "it was changed or damaged"
            )
        name, rank, spec, base_hash = described[0]
        training = config.get("training")
        try:
            return cls(name, rank, spec, base_hash, tensors, training if isinstance(training, dict) else {})
        except UsageError as e:
            raise FileError(f"{what} must hold usable values, but {tensor_path} does not: {e}") from None


def expected(m: Method, spec: NetSpec, rank: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor an adapter of this method holds: what it trains, and running statistics."""
    shapes = trainable(m, spec, rank)
    if m.norms == "train":
        shapes |= {k: s for k, s in spec.parameters.items() if k.endswith((".bn.running_mean", ".bn.running_var"))}
    return shapes


def initial(m: Method, spec: NetSpec, rank: int, seed: int) -> dict[str, Floats]:
    """Start values of a method's adapters, the same whatever the engine: A Gaussian, B zero.

    The standard deviation of A is 1/√N, so that h = x·A starts about as large as x. Each adapter draws from a stream
    of its own, so that the last adapter of Skip-LoRA starts exactly as that of LoRA-Last does.

    Args:
        m: the method.
        spec: the network's shape.
        rank: R.
        seed: 0 or more.

    Returns:
        ``lora.I-J.A`` (N, R) and ``lora.I-J.B`` (R, M); nothing for methods without adapters.
    """
    tensors: dict[str, Floats] = {}
    for i, j in connections(m, spec.L, spec.first_tap):
        N, M = spec.geometry[i].N, spec.geometry[j - 1].M
        rng = np.random.default_rng([seed, 2, i])
        tensors[f"lora.{i}-{j}.A"] = (rng.standard_normal((N, rank)) / math.sqrt(N)).astype(np.float32)
        tensors[f"lora.{i}-{j}.B"] = np.zeros((rank, M), np.float32)
    return tensors


def check_target(directory: str | PathLike[str]) -> None:
    """See that an adapter may be written to `directory`: it is not there, or empty, or holds an adapter and no more.

    Raises:
        FileError: it is a file, or holds anything else.
    """
    target = Path(os.path.realpath(directory))
    try:
        # realpath has followed the links, so the nearest existing parent decides whether a directory can come to be.
        parent = next(p for p in (target, *target.parents) if p.exists())
        if not parent.is_dir():
            raise FileError(f"an adapter must be written to a directory, but {parent} is a file")
        others = sorted(p.name for p in target.iterdir()) if target.exists() else []
    except (OSError, ValueError) as e:
        if isinstance(e, FileError):
            raise
        words = files.reason(e) if isinstance(e, OSError) else str(e)
        raise FileError(f"an adapter must be written to a usable directory, not {str(directory)!r}: {words}") from None
    if others and CONFIG_FILE not in others:
        raise FileError(f"an adapter must have a directory of its own, but {directory} holds {others[0]!r}")
    foreign = [name for name in others if name not in (CONFIG_FILE, TENSOR_FILE)]
    if foreign:
        raise FileError(f"an adapter must have a directory of its own, but {directory} also holds {foreign[0]!r}")


def _output_shapes(spec: NetSpec) -> dict[str, tuple[int, ...]]:
    return {"output.gain": (1,), "output.bias": (spec.C,)}


def _lift_size(tensors: Mapping[str, Floats]) -> tuple[int, int]:
    """Directions and landmarks."""
    for name in (lift.BASIS, "lift.landmarks"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UsageError(f"an adapter with a lift must hold {name}, a matrix, but it is missing or none")
    return tensors[lift.BASIS].shape[1], tensors["lift.landmarks"].shape[0]


def _lift_shapes(m: Method, spec: NetSpec, directions: int, landmarks: int) -> dict[str, tuple[int, ...]]:
    if m.adapters != "skip":
        raise UsageError(f"a lift must go with adapters that all lead to the output, not with {m.name}")
    return lift.shapes(spec, directions, landmarks)


def _peft_type(name: str) -> str:
    adapters = METHODS[name].adapters
    return {"none": "NONE", "last": "LORA", "layers": "LORA", "skip": "SKIP_LORA"}[adapters]

"""Our own base networks: a `NetSpec` with its numbers, and the file they live in (docs/formats.md).

A network never changes: its arrays are read-only, and its hash is what adapters and cache files are bound to.
It does not run itself; engines do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import files
from ..engine import Engine
from ..errors import FileError, UsageError
from ..methods import Method
from ..spec import LayerSpec, NetSpec

__all__ = ["FORMAT", "VERSION", "Given", "Labelled", "Network", "embeddings"]

Floats = NDArray[np.float32]

Given = ArrayLike | Mapping[str, Any]
"""Samples as a caller has them: an array, or arrays by the names of a network's inputs."""

Labelled = tuple[Floats, NDArray[Any], Any, Any]
"""Rows, and labels, groups and weights of each."""

FORMAT = "instantft-base"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class Network:
    """A network with its numbers.

    Args:
        spec: its shape.
        tensors: float32 arrays, names and shapes of ``spec.parameters``. They are copied if not read-only.
        mean, std: what every channel of a sample is centred on and divided by before the network sees it; one value,
            or one a channel (one a feature for vectors). Empty: neither.
        seen: what its training samples looked like to it, for whoever watches for drift (`watch.detectors`); no part of
            what the network is. Empty: not known.

    Raises:
        UsageError: the tensors do not fit the shape, a value is not finite, or a variance is negative.
    """

    spec: NetSpec
    tensors: Mapping[str, Floats]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    seen: str = ""

    def __post_init__(self) -> None:
        if type(self) is Network and not self.spec.own:
            raise UsageError("a network of our own must have fc and conv layers, not foreign ones")
        shapes = self.spec.parameters
        if set(self.tensors) != set(shapes):
            names = sorted(set(self.tensors) ^ set(shapes))
            raise UsageError(f"a network's tensors must be those of its shape, but {names[0]!r} is missing or too much")
        kept: dict[str, Floats] = {}
        for name, shape in shapes.items():
            value = np.asarray(self.tensors[name])
            if value.shape != shape or value.dtype != np.float32:
                raise UsageError(f"{name} must be float32 {list(shape)}, not {value.dtype} {list(value.shape)}")
            check_values(name, value)
            kept[name] = files.frozen(value)
        object.__setattr__(self, "tensors", kept)
        mean, std = check_preprocessing(self.mean, self.std, self.spec.input_shape)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.spec.input_shape))
        return f"{type(self).__name__}({shape} → {self.spec.C}, {len(self.spec.layers)} layers, {self.hash[:8]}…)"

    def __deepcopy__(self, memo: object) -> Network:
        return self  # nothing in it changes

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the shape, the preprocessing, and name, shape and bytes of every tensor."""
        h = hashlib.sha256()
        h.update(_canonical([FORMAT, VERSION, self.spec.to_json(), list(self.mean), list(self.std)]))
        for name, value in self.tensors.items():
            h.update(_canonical([name, list(value.shape)]))
            h.update(value.astype("<f4", copy=False).tobytes())
        return h.hexdigest()

    @classmethod
    def init(cls, spec: NetSpec, seed: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Network:
        """A network to start pre-training from: W and b uniform in ±1/√fan_in, gamma 1, beta 0, mean 0, variance 1.

        Args:
            spec: its shape.
            seed: 0 or more; the same seed gives the same network.
            mean, std: preprocessing, as in the class.
        """
        tensors: dict[str, Floats] = {}
        for name, shape in spec.parameters.items():
            k = int(name.split(".")[1])
            if ".bn." in name:
                one = name.endswith((".weight", ".running_var"))
                tensors[name] = np.full(shape, 1.0 if one else 0.0, np.float32)
                continue
            g, layer = spec.geometry[k], spec.layers[k]
            fan_in = g.N if layer.kind == "fc" else g.in_shape[0] * math.prod(layer.kernel)
            rng = np.random.default_rng([seed, 0, k, int(name.endswith("bias"))])
            tensors[name] = ((2.0 * rng.random(shape, np.float32) - 1.0) / math.sqrt(fan_in)).astype(np.float32)
        return cls(spec, tensors, mean, std)

    def bind(self, engine: Engine) -> Engine:
        """The engine that runs this network: `engine` itself, for networks of our own."""
        return engine

    @property
    def keys(self) -> tuple[str, ...]:
        """Under which names a sample file has what the network takes."""
        return ("x",)

    def pack(self, x: Given) -> ArrayLike:
        """Samples as one array; networks of our own take nothing else."""
        return x  # type: ignore[return-value]

    def flat(self, rows: Floats, y: NDArray[Any], groups: Any = None, weights: Any = None) -> Labelled:
        """What there is to learn from, a row a record: of networks that score whole samples, all that is given.

        Args:
            rows: as `pack` and `data.as_samples` yield them.
            y, groups, weights: of each sample; groups and weights may be None.
        """
        return rows, y, groups, weights

    def shaped(self, values: NDArray[Any]) -> NDArray[Any]:
        """What is said of records, as the caller knows samples."""
        return values

    def check_method(self, m: Method) -> None:
        """See that this network can be adapted by a method; those of our own can be by all.

        Raises:
            UsageError: it cannot.
        """

    def with_outputs(self, C: int) -> Network:
        """The network with a new last layer of C outputs, all of them 0: for targets that it was not trained for.

        Raises:
            UsageError: there cannot be so many.
        """
        k, spec = self.spec.L - 1, self.spec
        if not spec.own:
            raise UsageError("a new last layer can be given to networks of our own, not to one that somebody else runs")
        layers = (*spec.layers[:-1], LayerSpec("fc", C))
        shape = NetSpec(spec.input_shape, layers)
        fresh = {name: np.zeros(shape.parameters[name], np.float32) for name in _head(k)}
        kept = {name: value for name, value in self.tensors.items() if name in shape.parameters}
        return Network(shape, {**kept, **fresh}, self.mean, self.std)

    def runtime_cost(self, threads: int = 1) -> tuple[float, int]:
        """Seconds a sample, and bytes, that the runtime of a foreign network takes, as measured; 0 for our own."""
        return 0.0, 0

    def widened(self) -> Network:
        """The network with one more class, whose logit is the mean of the others, so that it is never the largest.

        Raises:
            UsageError: the last layer is not a plain fc layer.
        """
        *front, last = self.spec.layers
        if last.kind != "fc" or last.batch_norm or last.relu:
            raise UsageError("a class can be added where the last layer is fc without batch norm and ReLU")
        k = len(front)
        tensors = dict(self.tensors)
        for name in _head(k):
            value = tensors[name]
            tensors[name] = np.concatenate([value, value.mean(axis=-1, keepdims=True)], axis=-1, dtype=np.float32)
        layers = (*front, replace(last, out=last.out + 1))
        return Network(NetSpec(self.spec.input_shape, layers), tensors, self.mean, self.std)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a base file; an existing one is replaced whole or not at all.

        Raises:
            FileError: it cannot be written there.
        """
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "spec": json.dumps(self.spec.to_json()),
            "mean": json.dumps(list(self.mean)),
            "std": json.dumps(list(self.std)),
            "hash": self.hash,
            **({"seen": self.seen} if self.seen else {}),
        }
        files.write_whole(Path(path), files.encode_tensors(self.tensors, metadata), "a base file")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Network:
        """Read a base file and check all of it: sizes, names, shapes, types, values, version, hash.

        Raises:
            FileError: missing, truncated, damaged, of another version, or with a wrong hash.
        """
        path = Path(path)
        found: list[NetSpec] = []

        def expect(metadata: dict[str, str]) -> dict[str, tuple[int, ...]]:
            if metadata.get("format") != FORMAT:
                raise FileError(f"a base file must have format {FORMAT!r}, but {path} has {metadata.get('format')!r}")
            if metadata.get("version") != VERSION:
                raise FileError(
                    f"a base file must have version {VERSION!r}, but {path} has {str(metadata.get('version'))[:40]!r}"
                )
            found.append(read_spec(metadata.get("spec", ""), "a base file", path))
            return found[0].parameters

        tensors, metadata = files.read_tensors(path, "a base file", expect)
        try:
            mean, std = (_numbers(metadata.get(key, "[]")) for key in ("mean", "std"))
            network = cls(found[0], tensors, mean, std, metadata.get("seen", ""))
        except (ValueError, RecursionError) as e:
            what = "a base file must hold usable values and preprocessing"
            raise FileError(f"{what}, but {path} does not: {e}") from None
        if network.hash != metadata.get("hash"):
            raise FileError(
                f"a base file must match its hash {str(metadata.get('hash'))[:64]}, but {path} hashes to "
                f"{network.hash}: it was changed or damaged"
            )
        return network


def embeddings(N: int, C: int) -> Network:
    """A base for samples that are embeddings already: no network at all, but C outputs that are 0 before adapting.

    What is adapted reads the embeddings themselves.

    Args:
        N: values of an embedding.
        C: outputs: classes, labels or numbers.

    Raises:
        UsageError: too few or too many of either.
    """
    spec = NetSpec((N,), (LayerSpec("fc", C),))
    return Network(spec, {name: np.zeros(shape, np.float32) for name, shape in spec.parameters.items()})


def _head(k: int) -> tuple[str, str]:
    """The tensors of a last layer k."""
    return f"layers.{k}.weight", f"layers.{k}.bias"


def check_preprocessing(
    mean: tuple[float, ...], std: tuple[float, ...], shape: tuple[int, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`mean` and `std` as float32 values, checked against the channels of a sample of this shape.

    Raises:
        UsageError: too many or too few values, one is not finite, or a std is not positive.
    """
    checked: list[tuple[float, ...]] = []
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, shape[0]):
            raise UsageError(f"{name} must have one value or one a channel ({shape[0]}), not {len(values)}")
        with np.errstate(over="ignore"):
            rounded = tuple(float(np.float32(v)) for v in values)
        for before, v in zip(values, rounded, strict=True):
            if not math.isfinite(v) or (name == "std" and v <= 0):
                rule = "finite" if name == "mean" else "finite and above 0"
                raise UsageError(f"{name} must be {rule}, not {before:g}")
        checked.append(rounded)
    return checked[0], checked[1]


def check_values(name: str, value: Floats) -> None:
    """See that the tensor called `name` can be computed with.

    Raises:
        UsageError: a value is not finite, or a running variance is negative.
    """
    if not np.isfinite(value).all():
        raise UsageError(f"{name} must hold finite values only, not NaN or Inf")
    if name.endswith(".running_var") and value.size and value.min() < 0:
        raise UsageError(f"{name} must hold variances of at least 0, not {value.min():g}")


def read_spec(text: str, what: str, path: Path) -> NetSpec:
    """The network's shape out of a file's metadata.

    Raises:
        FileError: it is none.
    """
    try:
        return NetSpec.from_json(json.loads(text))
    except (ValueError, TypeError, RecursionError) as e:
        raise FileError(f"{what} must describe its network, but {path} does not: {str(e)[:200]}") from None


def _numbers(text: str) -> tuple[float, ...]:
    values = json.loads(text)
    if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
        raise ValueError("mean and std must be lists of numbers")
    try:
        return tuple(float(v) for v in values)
    except OverflowError:
        raise ValueError("mean and std must be finite") from None


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

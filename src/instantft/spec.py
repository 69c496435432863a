"""What a network *is*, without any of its numbers: shapes, taps and records.

A network is a row of L layers. Each layer is a linear map (``fc`` or ``conv``, stride 1, with bias), then, where
asked for and in this order, batch norm, ReLU, and max pooling with a square window as wide as its stride. Where an
``fc`` follows a ``conv`` the feature map is flattened (channel, row, column). The last layer is a bare ``fc``.

A network that somebody else runs (backbones/foreign.py) is a row of ``foreign`` layers, each of which stands for
whatever lies between two of its taps. They have no tensors here.

Letters, as in the papers: L layers, N and M input and output width of a layer, C outputs, x^k the input of layer k
(counted from 0), x^L the output before softmax.

The *record* of a sample is the narrow waist of the whole package: the taps x^1 … x^{L-1} and the frozen output
c = x^L. x^0 is the sample itself, which the data set holds already. In memory a record is a float32 row in which
every segment starts at a multiple of PAD floats and the gaps are zero.

This file uses the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from .errors import UsageError

__all__ = ["PAD", "Geometry", "LayerSpec", "NetSpec", "RecordSpec", "Segment", "dnn", "lenet5", "pad"]

PAD = 16
"""Floats to which every row and every segment is padded: one vector of the widest instruction set."""

MAX_LAYERS = 32
MAX_WIDTH = 1 << 22
"""Largest number of values in one activation of one sample; keeps a damaged file from asking for all memory."""

MAX_PARAMETERS = 1 << 28


def pad(n: int) -> int:
    """n rounded up to a multiple of PAD."""
    return -(-n // PAD) * PAD


@dataclass(frozen=True)
class LayerSpec:
    """One layer: linear map, then batch norm, ReLU and max pooling where asked for, in this order."""

    kind: Literal["fc", "conv", "foreign"]
    out: int
    """Outputs (fc, foreign) or output channels (conv)."""
    kernel: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    batch_norm: bool = False
    relu: bool = False
    pool: int = 1
    name: str = ""
    """Of a foreign layer: how its backbone calls what comes out of it."""


@dataclass(frozen=True)
class Geometry:
    """The shapes of one layer inside a network."""

    in_shape: tuple[int, ...]
    """(N,) or (channels, height, width)."""
    linear_shape: tuple[int, ...]
    """What the linear map yields, before pooling."""
    out_shape: tuple[int, ...]

    @property
    def N(self) -> int:
        """Width of the input, flattened."""
        return math.prod(self.in_shape)

    @property
    def M(self) -> int:
        """Width of the linear map's output, flattened, before pooling."""
        return math.prod(self.linear_shape)

    @property
    def n_out(self) -> int:
        """Width of the layer's output, flattened, after pooling."""
        return math.prod(self.out_shape)


@dataclass(frozen=True)
class Segment:
    """One activation inside a record."""

    name: str
    size: int
    """Values."""
    groups: int
    """Channels, each with a scale of its own in the quantised codecs; 1 for a vector."""
    nonnegative: bool
    """True after a ReLU."""
    offset: int
    """Where it starts in a record row, in floats; a multiple of PAD."""


@dataclass(frozen=True)
class RecordSpec:
    """Layout of the record of a sample: taps x^1 … x^{L-1}, then the frozen output c."""

    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Values in a record, without padding (1,790 for LeNet-5)."""
        return sum(s.size for s in self.segments)

    @property
    def width(self) -> int:
        """Floats in a record row, with padding."""
        last = self.segments[-1]
        return last.offset + pad(last.size)


@dataclass(frozen=True)
class NetSpec:
    """A network's shape.

    Args:
        input_shape: (N,) or (channels, height, width).
        layers: the L layers, first to last.
        input_tap: whether x^0 is a tap; False only for foreign networks, whose input may be far wider than any tap.
        positions: P, how many places of a sample a foreign network scores one by one, each with a record of its own; a
            row of the input then ends in the number of the place.

    Raises:
        UsageError: the layers do not fit together.
    """

    input_shape: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    input_tap: bool = True
    positions: int = 1

    def __post_init__(self) -> None:
        _ = self.geometry  # resolves every shape once, and so refuses what does not fit
        if self.own and not self.input_tap:
            raise UsageError("x^0 must be a tap of networks of our own")
        if self.positions != 1 and (self.own or self.input_tap or not 1 < self.positions <= MAX_WIDTH):
            raise UsageError(f"a network must score samples, or positions without x^0, not {self.positions} of them")

    @property
    def L(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def C(self) -> int:
        """Number of outputs (classes)."""
        return self.layers[-1].out

    @property
    def own(self) -> bool:
        """Whether the engines of this package can run it; False: it is foreign."""
        return self.layers[0].kind != "foreign"

    def check_own(self) -> None:
        """See that an engine of this package can run it.

        Raises:
            UsageError: it is foreign.
        """
        if not self.own:
            raise UsageError("a foreign network must be run by an engine of its own: its bind(engine) makes one")

    @property
    def first_tap(self) -> int:
        """Number of the first tap: 0, or 1 where the sample itself is none."""
        return 0 if self.input_tap else 1

    @cached_property
    def geometry(self) -> tuple[Geometry, ...]:
        """Input, linear and output shape of every layer."""
        return _resolve(self.input_shape, self.layers)

    @cached_property
    def record(self) -> RecordSpec:
        """Layout of this network's records."""
        segments: list[Segment] = []
        offset = 0
        for k in range(1, self.L + 1):
            shape = self.geometry[k - 1].out_shape
            size = math.prod(shape)
            groups = shape[0] if len(shape) == 3 else 1
            name = f"x{k}" if k < self.L else "c"
            segments.append(Segment(name, size, groups, self.layers[k - 1].relu, offset))
            offset += pad(size)
        return RecordSpec(tuple(segments))

    @cached_property
    def tap_widths(self) -> tuple[int, ...]:
        """N of x^0 … x^{L-1}; 0 for an x^0 that is no tap."""
        return tuple(g.N if k >= self.first_tap else 0 for k, g in enumerate(self.geometry))

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the network, in order.

        ``layers.K.weight`` is (N, M) for fc and (out, in, kh, kw) for conv.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.own:
            return shapes
        for k, (layer, g) in enumerate(zip(self.layers, self.geometry, strict=True)):
            if layer.kind == "fc":
                shapes[f"layers.{k}.weight"] = (g.N, layer.out)
            else:
                shapes[f"layers.{k}.weight"] = (layer.out, g.in_shape[0], *layer.kernel)
            shapes[f"layers.{k}.bias"] = (layer.out,)
            if layer.batch_norm:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"layers.{k}.bn.{name}"] = (layer.out,)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values; `from_json` undoes it."""
        if not self.own:
            return {
                "input_shape": list(self.input_shape),
                "input_tap": self.input_tap,
                **({"positions": self.positions} if self.positions > 1 else {}),
                "layers": [{"kind": y.kind, "out": y.out, "relu": y.relu, "name": y.name} for y in self.layers],
            }
        return {
            "input_shape": list(self.input_shape),
            "layers": [
                {
                    "kind": y.kind,
                    "out": y.out,
                    "kernel": list(y.kernel),
                    "padding": list(y.padding),
                    "batch_norm": y.batch_norm,
                    "relu": y.relu,
                    "pool": y.pool,
                }
                for y in self.layers
            ],
        }

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> NetSpec:
        """The network described by `d`, checked as if it came from a stranger.

        Raises:
            UsageError: `d` is no description of a network.
        """
        try:
            layers = tuple(
                LayerSpec("foreign", _integer(y["out"]), relu=bool(y["relu"]), name=str(y["name"]))
                if y["kind"] == "foreign"
                else LayerSpec(
                    kind=y["kind"],
                    out=_integer(y["out"]),
                    kernel=(_integer(y["kernel"][0]), _integer(y["kernel"][1])),
                    padding=(_integer(y["padding"][0]), _integer(y["padding"][1])),
                    batch_norm=bool(y["batch_norm"]),
                    relu=bool(y["relu"]),
                    pool=_integer(y["pool"]),
                )
                for y in d["layers"]
            )
            shape = tuple(_integer(n) for n in d["input_shape"])
            positions = _integer(d.get("positions", 1))
        except (KeyError, TypeError, IndexError, ValueError) as e:
            raise UsageError(
                f"a network description must list input_shape and layers with all their fields, "
                f"but reading it failed at {e!r}"
            ) from None
        return cls(shape, layers, bool(d.get("input_tap", True)), positions)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"not an integer: {value!r}")
    return value


def _resolve(shape: tuple[int, ...], layers: tuple[LayerSpec, ...]) -> tuple[Geometry, ...]:
    """Walk the layers once and give each its shapes."""
    if len(shape) not in (1, 3) or any(n < 1 for n in shape) or math.prod(shape) > MAX_WIDTH:
        raise UsageError(
            "a network's input must be (N,) or (channels, height, width) "
            f"of at most {MAX_WIDTH} values, not {list(shape)}"
        )
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise UsageError(f"a network must have 1 to {MAX_LAYERS} layers, not {len(layers)}")
    resolved: list[Geometry] = []
    parameters = 0
    foreign = layers[0].kind == "foreign"
    for k, layer in enumerate(layers):
        if layer.out < 1 or layer.out > MAX_WIDTH:
            raise UsageError(f"layer {k}: outputs must be 1 to {MAX_WIDTH}, not {layer.out}")
        if (layer.kind == "foreign") != foreign:
            raise UsageError(f"layer {k}: layers must be all foreign or all of our own kinds, not both")
        if foreign:
            linear: tuple[int, ...] = (layer.out,)
        elif layer.kind == "fc":
            if layer.pool != 1:
                raise UsageError(f"layer {k}: pooling needs a feature map, but an fc layer yields a vector")
            linear = (layer.out,)
            parameters += layer.out * math.prod(shape)
        elif layer.kind == "conv":
            if len(shape) != 3:
                raise UsageError(
                    f"layer {k}: conv layers must come before the first fc, but its input is {list(shape)}"
                )
            linear = _conv_shape(k, layer, (shape[0], shape[1], shape[2]))
            parameters += layer.out * shape[0] * layer.kernel[0] * layer.kernel[1]
        else:
            raise UsageError(f"layer {k}: kind must be 'fc' or 'conv', not {layer.kind!r}")
        out = linear if layer.pool == 1 else (linear[0], linear[1] // layer.pool, linear[2] // layer.pool)
        if any(n < 1 for n in out):
            raise UsageError(f"layer {k}: pooling by {layer.pool} must leave a pixel, but its map is {list(linear)}")
        if math.prod(linear) > MAX_WIDTH or parameters > MAX_PARAMETERS:
            raise UsageError(
                f"layer {k}: a network must stay under {MAX_WIDTH} values a layer and "
                f"{MAX_PARAMETERS} parameters, not {math.prod(linear)} and {parameters}"
            )
        resolved.append(Geometry(shape, linear, out))
        shape = out
    last = layers[-1]
    if last.kind == "conv" or last.batch_norm or last.relu:
        raise UsageError("the last layer must be a bare fc, whose outputs are the logits")
    return tuple(resolved)


def _conv_shape(k: int, layer: LayerSpec, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if layer.pool < 1:
        raise UsageError(f"layer {k}: pool must be at least 1, not {layer.pool}")
    sides = []
    for n, kernel, padding in zip(shape[1:], layer.kernel, layer.padding, strict=True):
        if kernel < 1 or not 0 <= padding < kernel:
            raise UsageError(
                f"layer {k}: kernel must be at least 1 and padding 0 to kernel-1, not {kernel} and {padding}"
            )
        side = n + 2 * padding - kernel + 1
        if side < 1:
            raise UsageError(f"layer {k}: a kernel of {kernel} must fit its input, which is {n} + 2*{padding} wide")
        sides.append(side)
    return layer.out, sides[0], sides[1]


def dnn(n_inputs: int, classes: int, hidden: int = 96) -> NetSpec:
    """The DNN of Skip2-LoRA §5.1: FC-BN-ReLU twice, then FC."""
    body = LayerSpec("fc", hidden, batch_norm=True, relu=True)
    return NetSpec((n_inputs,), (body, body, LayerSpec("fc", classes)))


def lenet5(input_shape: tuple[int, ...], classes: int = 10) -> NetSpec:
    """The LeNet-5-like CNN of InstantFT Fig. 4.

    One-channel images are padded by 2 at the first convolution (28x28), colour images are not (32x32).
    """
    if len(input_shape) != 3:
        raise UsageError(f"lenet5 needs images (channels, height, width), not {list(input_shape)}: use dnn for vectors")
    first = (2, 2) if input_shape[0] == 1 else (0, 0)
    return NetSpec(
        input_shape,
        (
            LayerSpec("conv", 6, (5, 5), first, relu=True, pool=2),
            LayerSpec("conv", 16, (5, 5), relu=True, pool=2),
            LayerSpec("fc", 120, relu=True),
            LayerSpec("fc", 84, relu=True),
            LayerSpec("fc", classes),
        ),
    )

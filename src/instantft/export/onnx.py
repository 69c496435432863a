"""An adapted network as one ONNX file: the adapter as ordinary nodes, and nothing of this package needed to run it.

    y = gain·c + Σ x^k·A_k·B_k + bias

A model that came from an ONNX file stays what it was: y takes the name and the shape of its logits, so that whatever
came after them (softmax, outputs) goes on from the adapted ones. Networks of our own are written node by node; samples
go in as `predict` takes them, scaled to 0 … 1 but before mean and standard deviation.

TOLERANCE is how far onnxruntime may be from `decision_function`, relative to the largest logit: both compute in
float32, and sums of up to some thousand products in another order differ by less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from .. import files, lift
from ..adapters import Adapter
from ..backbones.builtin import Network
from ..backbones.onnx import OnnxNetwork, tap_nodes
from ..backbones.onnx_file import constant, fresh, given, node, output, rewritten
from ..engine import Floats, Tensors
from ..engine.reference import BN_EPS
from ..errors import UsageError
from ..spec import NetSpec

__all__ = ["TOLERANCE", "export_onnx"]

TOLERANCE = 1e-4
"""Of logits, relative to the largest of the sample set."""

OWN = "instantft"
"""In front of the names of an adapter's values in networks of our own."""

NUMPY_TYPES = {"float32": 1, "float16": 10, "float64": 11}


def export_onnx(base: Network, adapter: Adapter | None, path: str | PathLike[str]) -> None:
    """Write an adapted network as an ONNX file; one that is there is replaced whole or not at all.

    Args:
        base: the network; of an ONNX model with external data, the file must go into the same folder.
        adapter: made on it; None: the network alone, which must be one of our own.
        path: where to.

    Raises:
        MismatchError: the adapter was made on another network.
        UsageError: the adapter has a lift, or there is nothing to export.
        FileError: the file cannot be written.
    """
    if adapter is not None:
        adapter.check_base(base)
        lift.check_none(adapter.tensors)
    path = Path(path)
    if isinstance(base, OnnxNetwork):
        if adapter is None:
            raise UsageError("an ONNX model must be exported with an adapter: without one it is a file already")
        if base.model.external and path.resolve().parent != base.model.path.resolve().parent:
            raise UsageError(
                f"a model with external data must be written beside them, to {base.model.path.resolve().parent}, "
                f"not to {path}"
            )
        data = _foreign(base, adapter)
    else:
        data = _own(base, adapter)
    files.write_whole(path, data, "an ONNX model")


def _foreign(base: OnnxNetwork, adapter: Adapter) -> bytes:
    """The model with taps and adapter."""
    p, frozen = base.prefix, f"{base.prefix}/frozen"
    nodes = [tap_nodes(base, frozen)]
    if base.spec.input_tap:
        entry = base.model.inputs[0].name
        if base.channels_last:
            nodes.append(node("Transpose", [entry], [f"{p}/image"], perm=[0, 3, 1, 2]))
            entry = f"{p}/image"
        nodes.append(node("Flatten", [entry], [f"{p}/x0"], axis=1))
    taps = [f"{p}/x{k}" for k in range(base.spec.L)]
    nodes += _sum(base.spec, adapter.tensors, taps, f"{p}/c", f"{p}/y", p)
    nodes.append(constant(f"{p}/shape", np.array([-1, *base.logits_shape], np.int64)))
    same = base.logits_type == "float32"
    nodes.append(node("Reshape", [f"{p}/y", f"{p}/shape"], [base.logits if same else f"{p}/z"]))
    if not same:
        nodes.append(node("Cast", [f"{p}/z"], [base.logits], to=NUMPY_TYPES[base.logits_type]))
    return rewritten(base.model, base.logits, frozen, b"".join(nodes))


def _sum(spec: NetSpec, tensors: Tensors, taps: Sequence[str], c: str, y: str, p: str) -> Iterator[bytes]:
    """y = gain·c + Σ x^k·A_k·B_k + bias; what is zero is left out."""
    parts: list[str] = []
    gain = float(tensors["output.gain"][0]) if "output.gain" in tensors else 1.0
    if gain not in (0.0, 1.0):
        yield constant(f"{p}/gain", np.array(gain, np.float32))
        yield node("Mul", [c, f"{p}/gain"], [f"{p}/scaled"])
    if gain != 0:
        parts.append(c if gain == 1 else f"{p}/scaled")
    for k, tap in enumerate(taps):
        name = f"lora.{k}-{spec.L}"
        if f"{name}.A" in tensors and tensors[f"{name}.A"].any() and tensors[f"{name}.B"].any():
            yield from _low_rank(tensors, name, tap, p)
            parts.append(f"{p}/{name}")
    # the bias is there even where it is zero, so that there is something to add it to
    yield constant(f"{p}/bias", tensors.get("output.bias", np.zeros(spec.C, np.float32)))
    if not parts:  # nothing but the bias: of zero times c it takes the number of samples
        yield constant(f"{p}/zero", np.array(0, np.float32))
        yield node("Mul", [c, f"{p}/zero"], [f"{p}/nothing"])
        parts.append(f"{p}/nothing")
    total = parts[0]
    for i, part in enumerate([*parts[1:], f"{p}/bias"], start=1):
        result = y if i == len(parts) else f"{p}/sum{i}"
        yield node("Add", [total, part], [result])
        total = result


def _low_rank(tensors: Tensors, name: str, tap: str, p: str) -> Iterator[bytes]:
    """x·A·B as P/NAME; at full rank B is the identity, and stays away."""
    A, B = tensors[f"{name}.A"], tensors[f"{name}.B"]
    whole = A.shape[1] == B.shape[1] and bool((np.eye(len(B), dtype=np.float32) == B).all())
    yield constant(f"{p}/{name}.A", A)
    yield node("MatMul", [tap, f"{p}/{name}.A"], [f"{p}/{name}" + ("" if whole else ".h")])
    if not whole:
        yield constant(f"{p}/{name}.B", B)
        yield node("MatMul", [f"{p}/{name}.h", f"{p}/{name}.B"], [f"{p}/{name}"])


def _own(base: Network, adapter: Adapter | None) -> bytes:
    """A network of our own, with an adapter of any method."""
    spec = base.spec
    tensors: Mapping[str, Floats] = {**base.tensors, **(adapter.tensors if adapter is not None else {})}
    config = adapter.config if adapter is not None else {}
    mean, std = (config.get(name, of) for name, of in (("mean", base.mean), ("std", base.std)))
    nodes: list[bytes] = [given("x", ["batch", *spec.input_shape]), output("logits", ["batch", spec.C])]
    value, taps = "x", []
    for op, name, numbers in (("Sub", "mean", mean), ("Div", "std", std)):
        if len(numbers):
            by_channel = np.array(numbers, np.float32).reshape(-1, *[1] * (len(spec.input_shape) - 1))
            nodes += [constant(name, by_channel), node(op, [value, name], [f"x-{name}"])]
            value = f"x-{name}"
    for k, layer in enumerate(spec.layers):
        nodes.append(node("Flatten", [value], [f"tap{k}"], axis=1))
        taps.append(f"tap{k}")
        nodes += _linear(spec, tensors, k, value)
        value = f"layer{k}"
        if layer.batch_norm:
            nodes += _batch_norm(spec, tensors, k, value)
            value += ".bn"
        if layer.relu:
            nodes.append(node("Relu", [value], [f"{value}.relu"]))
            value += ".relu"
        if layer.pool > 1:
            p = [layer.pool] * 2
            nodes.append(node("MaxPool", [value], [f"{value}.pool"], kernel_shape=p, strides=p))
            value += ".pool"
    nodes += _sum(spec, tensors, taps, value, "logits", OWN)
    return fresh(b"".join(nodes))


def _linear(spec: NetSpec, tensors: Tensors, k: int, value: str) -> Iterator[bytes]:
    """The linear map of layer k, with the adapter from its input to its output, which of the last is left to `_sum`."""
    layer, g, W = spec.layers[k], spec.geometry[k], f"layers.{k}.weight"
    inner = k < spec.L - 1 and f"lora.{k}-{k + 1}.A" in tensors
    made = f"layer{k}" + (".own" if inner else "")
    yield constant(W, tensors[W])
    yield constant(f"layers.{k}.bias", tensors[f"layers.{k}.bias"])
    if layer.kind == "conv":
        pads = [*layer.padding, *layer.padding]
        yield node("Conv", [value, W, f"layers.{k}.bias"], [made], kernel_shape=layer.kernel, pads=pads)
    else:
        yield node("Gemm", [f"tap{k}", W, f"layers.{k}.bias"], [made])
    if inner:
        name = f"lora.{k}-{k + 1}"
        yield from _low_rank(tensors, name, f"tap{k}", OWN)
        yield constant(f"{made}.shape", np.array([-1, *g.linear_shape], np.int64))
        yield node("Reshape", [f"{OWN}/{name}", f"{made}.shape"], [f"{made}.added"])
        yield node("Add", [made, f"{made}.added"], [f"layer{k}"])


def _batch_norm(spec: NetSpec, tensors: Tensors, k: int, value: str) -> Iterator[bytes]:
    """γ·(z − μ)/√(σ² + ε) + β with running statistics, as one factor and one sum a channel."""
    gamma, beta, mean, var = (
        tensors[f"layers.{k}.bn.{n}"].astype(np.float64) for n in ("weight", "bias", "running_mean", "running_var")
    )
    factor = gamma / np.sqrt(var + BN_EPS)
    shape = -1, *[1] * (len(spec.geometry[k].linear_shape) - 1)
    yield constant(f"{value}.factor", factor.reshape(shape).astype(np.float32))
    yield constant(f"{value}.shift", (beta - factor * mean).reshape(shape).astype(np.float32))
    yield node("Mul", [value, f"{value}.factor"], [f"{value}.scaled"])
    yield node("Add", [f"{value}.scaled", f"{value}.shift"], [f"{value}.bn"])

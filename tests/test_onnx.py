"""Networks in ONNX files: the logits and taps that are found, adaptation, export, and files that must be refused."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from instantft import FileError, FineTuner, MismatchError, UsageError, from_onnx
from instantft.adapters import Adapter
from instantft.backbones import onnx as onnx_backbone
from instantft.backbones.builtin import Network
from instantft.backbones.onnx import OnnxNetwork
from instantft.cli import run as command_line
from instantft.engine import get_engine
from instantft.export.onnx import TOLERANCE, export_onnx
from instantft.methods import METHODS
from instantft.spec import LayerSpec, NetSpec, dnn

from .nets import NETS, ODD, samples_for, tensors_for
from .samples import adapter as made_up
from .samples import blobs

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

Array = NDArray[Any]

NETWORKS = {**NETS, "logistic": NetSpec((7,), (LayerSpec("fc", 5, relu=True), LayerSpec("fc", 3)))}
METHOD_TAPS = ("skip-ridge", "skip2-lora", "skip-lora", "lora-last")


def run(path: Path, x: Array) -> Array:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def close(a: Array, b: Array) -> None:
    assert a.shape == b.shape
    assert float(np.abs(a - b).max()) <= TOLERANCE * float(np.abs(b).max())


def own(name: str) -> Network:
    spec = NETWORKS[name]
    return Network(spec, tensors_for(spec))


def logits_of(network: Network, adapter: Adapter | None, x: Array) -> Array:
    tensors = {**network.tensors, **(adapter.tensors if adapter else {})}
    return get_engine("reference").forward(network.spec, tensors, x.reshape(len(x), -1))


# -- networks of our own, exported -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_own_networks_are_the_same_in_onnxruntime(name: str, tmp_path: Path) -> None:
    network = own(name)
    x, _ = samples_for(network.spec, 7)
    export_onnx(network, None, tmp_path / "net.onnx")
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    close(run(tmp_path / "net.onnx", x.reshape(7, *network.spec.input_shape)), logits_of(network, None, x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["odd", "dnn"])
def test_adapters_of_every_method_are_the_same(name: str, method: str, tmp_path: Path) -> None:
    network = own(name)
    x, _ = samples_for(network.spec, 7)
    adapter = made_up(network, method)
    export_onnx(network, adapter, tmp_path / "net.onnx")
    y = run(tmp_path / "net.onnx", x.reshape(7, *network.spec.input_shape))
    close(y, logits_of(network, adapter, x))
    changed = np.abs(y - logits_of(network, None, x)).max()
    assert changed > 10 * TOLERANCE * np.abs(y).max()


def test_preprocessing_is_in_the_file(tmp_path: Path) -> None:
    network = Network(NETS["odd"], tensors_for(NETS["odd"]), (0.1, 0.2, 0.3), (2.0, 3.0, 4.0))
    x = samples_for(network.spec, 5)[0].reshape(5, *network.spec.input_shape)
    export_onnx(network, None, tmp_path / "net.onnx")
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (network.mean, network.std))
    close(run(tmp_path / "net.onnx", x), logits_of(network, None, (x - mean) / std))


# -- adapting --------------------------------------------------------------------------------------------------------


def twin(name: str, folder: Path, taps: str | list[str] | None = "auto:1000000") -> tuple[Network, OnnxNetwork]:
    """A network of our own, and the same as a foreign one with the same taps."""
    network = own(name)
    export_onnx(network, None, folder / "net.onnx")
    return network, from_onnx(folder / "net.onnx", taps)


@pytest.mark.parametrize("name", NETWORKS)
def test_records_are_those_of_our_own_engines(name: str, tmp_path: Path) -> None:
    network, foreign = twin(name, tmp_path)
    assert foreign.spec.tap_widths == network.spec.tap_widths
    assert foreign.spec.C == network.spec.C
    assert [s.nonnegative for s in foreign.spec.record.segments] == [
        s.nonnegative for s in network.spec.record.segments
    ]
    x, _ = samples_for(network.spec, 40)
    wanted = get_engine("reference").records(network.spec, network.tensors, x)
    close(foreign.records(x), wanted)


@pytest.mark.parametrize("engine", ["reference", "native"])
@pytest.mark.parametrize("cache", ["none", "fp32", "nf4-block64"])
@pytest.mark.parametrize("method", METHOD_TAPS)
def test_adapters_are_those_of_our_own_networks(method: str, cache: str, engine: str, tmp_path: Path) -> None:
    network, foreign = twin("odd", tmp_path)
    x, y = samples_for(network.spec, 90)
    settings: dict[str, Any] = {"method": method, "cache": cache, "engine": engine}
    if METHODS[method].solver == "sgd":
        settings |= {"epochs": 3, "lr": 0.003}
    a, b = (FineTuner(n, **settings).fit(x, y) for n in (network, foreign))
    z, _ = samples_for(network.spec, 50, seed=1)
    # codes of values next to a boundary may differ, so with a 4-bit cache the two are only alike
    difference = np.abs(a.decision_function(z) - b.decision_function(z)).max()
    assert difference <= (0.02 if cache == "nf4-block64" else TOLERANCE) * np.abs(a.decision_function(z)).max()
    assert b.judge().n == a.judge().n
    assert set(b.adapter.tensors) == set(a.adapter.tensors)


@pytest.mark.parametrize("method", METHOD_TAPS)
def test_input_that_is_no_tap(method: str, tmp_path: Path) -> None:
    _, foreign = twin("odd", tmp_path, ["layer0*", "tap*"])
    assert foreign.spec.tap_widths[0] == 0
    assert not foreign.spec.input_tap
    x, y = samples_for(foreign.spec, 60)
    steps: dict[str, Any] = {} if method == "skip-ridge" else {"lr": 0.003, "epochs": 2}
    tuner = FineTuner(foreign, method=method, **steps).fit(x, y)
    assert not any(name.startswith("lora.0-") for name in tuner.adapter.tensors)
    tuner.adapter.save(tmp_path / "adapter")
    again = Adapter.load(tmp_path / "adapter", foreign)
    export_onnx(foreign, again, tmp_path / "adapted.onnx")
    close(run(tmp_path / "adapted.onnx", x.reshape(60, 3, 13, 11)), tuner.decision_function(x))


def test_streams_and_lifts(tmp_path: Path) -> None:
    export_onnx(Network.init(dnn(6, 3, hidden=5), 0), None, tmp_path / "net.onnx")
    foreign = from_onnx(tmp_path / "net.onnx", "tap*")
    x, y = blobs(200)
    whole = FineTuner(foreign).fit(x, y)
    parts = FineTuner(foreign)
    for i in range(0, 200, 20):
        parts.partial_fit(x[i : i + 20], y[i : i + 20])
    assert parts.score(x, y) > 0.9 < whole.score(x, y)
    lifted = FineTuner(foreign, lift="arccos").fit(x, y)
    assert lifted.score(x, y) > 0.9
    if "lift.basis" in lifted.adapter.tensors:
        with pytest.raises(UsageError, match="lift"):
            export_onnx(foreign, lifted.adapter, tmp_path / "adapted.onnx")


# -- models of other people ------------------------------------------------------------------------------------------

FLOAT = onnx.TensorProto.FLOAT


def weights(*shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, *shape])
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def model(
    folder: Path,
    nodes: list[Any],
    constants: dict[str, Array],
    shape: tuple[int | str, ...] = ("n", 3, 8, 8),
    outputs: tuple[str, ...] = ("y",),
    type_: int = FLOAT,
    opset: int = 13,
) -> Path:
    """A model with input x in a file."""
    free = [5] if outputs == ("y",) and nodes[-1].op_type in ("Gemm", "Softmax", "Flatten") else [None] * 3
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", type_, shape)],
        [onnx.helper.make_tensor_value_info(name, FLOAT, ["n", *free]) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(made, str(folder / "model.onnx"))
    return folder / "model.onnx"


N = onnx.helper.make_node
BODY = [
    N("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
    N("Relu", ["a"], ["b"]),
    N("Conv", ["b", "w2"], ["d"], pads=[1, 1, 1, 1]),
    N("Add", ["d", "b"], ["e"]),
    N("Relu", ["e"], ["f"]),
]
CONSTANTS = {"w1": weights(4, 3, 3, 3), "w2": weights(4, 4, 3, 3)}

HEADS: dict[str, tuple[list[Any], dict[str, Array], str]] = {
    "gemm": (
        [N("GlobalAveragePool", ["f"], ["g"]), N("Flatten", ["g"], ["h"]), N("Gemm", ["h", "w3", "b3"], ["y"])],
        {"w3": weights(4, 5), "b3": weights(5, 1)[:, 0]},
        "y",
    ),
    "matmul, add, softmax": (
        [
            N("ReduceMean", ["f"], ["h"], axes=[2, 3], keepdims=0),
            N("MatMul", ["h", "w3"], ["i"]),
            N("Add", ["i", "b3"], ["j"]),
            N("Softmax", ["j"], ["y"], axis=1),
        ],
        {"w3": weights(4, 5), "b3": weights(5, 1)[:, 0]},
        "j",
    ),
    "1x1 convolution, means, sigmoid": (
        [
            N("Conv", ["f", "w3"], ["g"]),
            N("GlobalAveragePool", ["g"], ["h"]),
            N("Sigmoid", ["h"], ["i"]),
            N("Flatten", ["i"], ["y"]),
        ],
        {"w3": weights(5, 4, 1, 1)},
        "h",
    ),
}


@pytest.mark.parametrize("taps", [None, "auto:400", "b@2,f@3", "*"])
@pytest.mark.parametrize("head", HEADS)
def test_last_layers_and_taps_are_found(head: str, taps: str | None, tmp_path: Path) -> None:
    nodes, constants, logits = HEADS[head]
    path = model(tmp_path, [*BODY, *nodes], {**CONSTANTS, **constants})
    if taps == "b@2,f@3" and head != "1x1 convolution, means, sigmoid":
        taps = "b@2,h"
    base = from_onnx(path, taps)
    assert base.logits == logits
    values = [tap.value for tap in base.candidates]
    assert values[:2] == ["x", "b"]
    assert values[2:] == (["f"] if head.startswith("1x1") else ["h"])
    assert all(tap.nonnegative for tap in base.candidates[1:])
    rng = np.random.default_rng(0)
    x = rng.random((60, 3, 8, 8), np.float32)
    y = rng.integers(0, 5, 60)
    tuner = FineTuner(base).fit(x, y)
    tuner.adapter.save(tmp_path / "adapter")
    again = from_onnx(path, like=Adapter.load(tmp_path / "adapter").spec)
    assert again.hash == base.hash
    # what is not a logit goes on from the adapted ones
    export_onnx(again, Adapter.load(tmp_path / "adapter", again), tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    wanted: Array = tuner.decision_function(x)
    if "softmax" in head:
        wanted = tuner.predict_proba(x)
    elif "sigmoid" in head:
        wanted = 1 / (1 + np.exp(-wanted))
    close(run(tmp_path / "out.onnx", x), wanted)
    assert np.abs(run(path, x) - wanted).max() > 0.01


def test_taps_are_means_of_a_grid(tmp_path: Path) -> None:
    nodes, constants, _ = HEADS["gemm"]
    path = model(tmp_path, [*BODY, *nodes], {**CONSTANTS, **constants})
    whole, means = (from_onnx(path, ["b" + grid, "h"]) for grid in ("", "@3"))
    assert means.spec.tap_widths == (0, 4 * 9, 4)
    x = np.random.default_rng(0).random((5, 192), np.float32)
    b = whole.records(x)[:, :256].reshape(5, 4, 8, 8)
    cuts = [(0, 3), (2, 6), (5, 8)]  # thirds of 8, rounded outwards
    wanted: Array = np.array([[b[:, :, i:j, k:m].mean(axis=(2, 3)) for k, m in cuts] for i, j in cuts])
    close(means.records(x)[:, :36], wanted.transpose(2, 3, 0, 1).reshape(5, 36))


def test_an_adapted_model_can_be_adapted_again(tmp_path: Path) -> None:
    nodes, constants, _ = HEADS["gemm"]
    path = model(tmp_path, [*BODY, *nodes], {**CONSTANTS, **constants})
    x = np.random.default_rng(0).random((60, 3, 8, 8), np.float32)
    y = np.arange(60) % 5
    once = FineTuner(from_onnx(path)).fit(x, y)
    export_onnx(once.base, once.adapter, tmp_path / "once.onnx")
    twice = FineTuner(from_onnx(tmp_path / "once.onnx")).fit(x, y)
    export_onnx(twice.base, twice.adapter, tmp_path / "twice.onnx")
    close(run(tmp_path / "twice.onnx", x), twice.decision_function(x))


def test_adapters_are_switched_without_reloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = from_onnx(gemm(tmp_path))
    x = np.random.default_rng(0).random((60, 3, 8, 8), np.float32)
    x[:, 0] += (np.arange(60) % 5)[:, None, None]
    a, b = (FineTuner(base).fit(x, (np.arange(60) + i) % 5) for i in (0, 1))
    said = [t.decision_function(x) for t in (a, b)]
    assert np.abs(said[0] - said[1]).max() > 0.1
    monkeypatch.setattr(onnx_backbone, "_open", None)  # no session is made any more
    one = FineTuner(base)
    for i in (1, 0, 1):
        np.testing.assert_array_equal(one.use((a, b)[i].adapter_).decision_function(x), said[i])


def test_places_of_features_last_are_averaged(tmp_path: Path) -> None:
    """As in ConvNeXt, whose linear maps work on (height, width, channels)."""
    nodes, constants, _ = HEADS["gemm"]
    last = [
        N("Transpose", ["b"], ["l"], perm=[0, 2, 3, 1]),
        N("MatMul", ["l", "w5"], ["m"]),
        N("Transpose", ["m"], ["f"], perm=[0, 3, 1, 2]),
    ]
    path = model(tmp_path, [*BODY[:2], *last, *nodes], {**CONSTANTS, **constants, "w5": weights(4, 4)})
    x = np.random.default_rng(0).random((40, 3, 8, 8), np.float32)
    base = from_onnx(path, "l@3,h")
    whole = from_onnx(path, "l,h").records(x.reshape(40, -1))[:, :256].reshape(40, 8, 8, 4)
    cuts = [(0, 3), (2, 6), (5, 8)]
    wanted: Array = np.array([[whole[:, i:j, k:m].mean(axis=(1, 2)) for k, m in cuts] for i, j in cuts])
    close(base.records(x.reshape(40, -1))[:, :36], wanted.transpose(2, 0, 1, 3).reshape(40, 36))
    tuner = FineTuner(base).fit(x, np.arange(40) % 5)
    export_onnx(base, tuner.adapter, tmp_path / "out.onnx")
    close(run(tmp_path / "out.onnx", x), tuner.decision_function(x))


def test_channels_last(tmp_path: Path) -> None:
    nodes, constants, _ = HEADS["gemm"]
    first = [N("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), N("Conv", ["t", "w1"], ["a"], pads=[1, 1, 1, 1])]
    path = model(tmp_path, [*first, *BODY[1:], *nodes], {**CONSTANTS, **constants}, ("n", 8, 6, 3))
    base = from_onnx(path)
    assert base.channels_last
    assert base.spec.input_shape == (3, 8, 6)
    assert base.spec.input_tap
    x = np.random.default_rng(0).random((60, 3, 8, 6), np.float32)
    tuner = FineTuner(base).fit(x, np.arange(60) % 5)
    export_onnx(base, tuner.adapter, tmp_path / "out.onnx")
    close(run(tmp_path / "out.onnx", x.transpose(0, 2, 3, 1)), tuner.decision_function(x))


def test_quantised_model(tmp_path: Path) -> None:
    nodes, constants, _ = HEADS["matmul, add, softmax"]
    path = model(tmp_path, [*BODY, *nodes], {**CONSTANTS, **constants})
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    x = np.random.default_rng(0).random((64, 3, 8, 8), np.float32)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(x[:32])

        def get_next(self) -> dict[str, Array] | None:
            row = next(self.rows, None)
            return None if row is None else {"x": row[None]}

    quantize_static(str(path), str(tmp_path / "int8.onnx"), Reader(), quant_format=QuantFormat.QDQ)
    base = from_onnx(tmp_path / "int8.onnx")
    assert base.spec.L >= 3
    tuner = FineTuner(base).fit(x, np.arange(64) % 5)
    export_onnx(base, tuner.adapter, tmp_path / "out.onnx")
    # after the adapted logits the model quantises what comes: one step of 1/255 of its softmax
    assert np.abs(run(tmp_path / "out.onnx", x) - tuner.predict_proba(x)).max() < 0.02


def test_external_data(tmp_path: Path) -> None:
    nodes, constants, _ = HEADS["gemm"]
    path = model(tmp_path, [*BODY, *nodes], {**CONSTANTS, **constants})
    x = np.random.default_rng(0).random((40, 3, 8, 8), np.float32)
    inside = from_onnx(path, "b,h")
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="data.bin", size_threshold=0)
    base = from_onnx(path, "b,h")
    assert base.model.external == (tmp_path / "data.bin",)
    close(base.records(x.reshape(40, -1)), inside.records(x.reshape(40, -1)))
    tuner = FineTuner(base).fit(x, np.arange(40) % 5)
    with pytest.raises(UsageError, match="beside"):
        export_onnx(base, tuner.adapter, tmp_path / "other" / "out.onnx")
    export_onnx(base, tuner.adapter, tmp_path / "out.onnx")
    close(run(tmp_path / "out.onnx", x), tuner.decision_function(x))
    tuner.adapter.save(tmp_path / "adapter")
    data = bytearray((tmp_path / "data.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "data.bin").write_bytes(data)
    with pytest.raises(MismatchError, match="made on"):
        Adapter.load(tmp_path / "adapter", from_onnx(path, "b,h"))


# -- several inputs, integers, and a score for every position --------------------------------------------------------

TYPES = {"input_ids": onnx.TensorProto.INT64, "attention_mask": onnx.TensorProto.INT64, "ids": onnx.TensorProto.INT32}


def encoder(folder: Path, tokens: bool, length: int | str = 12, names: tuple[str, ...] = tuple(TYPES)[:2]) -> Path:
    """Words, weighed by a mask if there is one, and a score for each or for all of them."""
    nodes = [N("Gather", ["E", names[0]], ["e"])]
    if len(names) > 1:
        nodes += [
            N("Cast", [names[1]], ["m"], to=FLOAT),
            N("Unsqueeze", ["m", "two"], ["m2"]),
            N("Mul", ["e", "m2"], ["e2"]),
        ]
    nodes += [N("MatMul", [nodes[-1].output[0], "w1"], ["a"]), N("Relu", ["a"], ["b"])]
    nodes += [N("MatMul", ["b", "w2"], ["c"]), N("Tanh", ["c"], ["d"])]
    if not tokens:
        nodes.append(N("ReduceMean", ["d"], ["p"], axes=[1], keepdims=0))
    nodes += [N("MatMul", [nodes[-1].output[0], "w3"], ["z"]), N("Add", ["z", "b3"], ["y"])]
    constants = {
        "E": weights(40, 8) * 8, "two": np.array([2]), "w1": weights(8, 12), "w2": weights(12, 10),
        "w3": weights(10, 5), "b3": weights(5, 1)[:, 0],
    }  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(name, TYPES[name], ["n", length]) for name in names],
        [onnx.helper.make_tensor_value_info("y", FLOAT, ["n", length, 5] if tokens else ["n", 5])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(made, str(folder / "encoder.onnx"))
    return folder / "encoder.onnx"


def sentences(T: int) -> tuple[Any, Array]:
    """Words and a mask; each word's class."""
    rng = np.random.default_rng(T)
    mask = (np.arange(12) < rng.integers(4, 13, (T, 1))).astype(np.int64)
    ids = rng.integers(1, 40, (T, 12)) * mask
    return {"input_ids": ids, "attention_mask": mask}, np.where(rng.random(ids.shape) < 0.1, -100, ids * 7 % 5)


def run_all(path: Path, feeds: dict[str, Array]) -> Array:
    return np.asarray(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0])


@pytest.mark.parametrize("length", [12, "s"])
@pytest.mark.parametrize("tokens", [False, True])
def test_encoders_of_text(tokens: bool, length: int | str, tmp_path: Path) -> None:
    path = encoder(tmp_path, tokens, length)
    shapes = {"input_ids": (12,), "attention_mask": (12,)} if length == "s" else None
    base = from_onnx(path, input_shape=shapes)
    assert [tap.shape for tap in base.candidates] == ([(8,), (12,), (10,)] if tokens else [(12, 8), (12, 12), (10,)])
    assert base.spec.positions == (12 if tokens else 1)
    x, y = sentences(60)
    if not tokens:
        y = y[:, 0] % 5
    tuner = FineTuner(base).fit(x, y)
    tuner.adapter.save(tmp_path / "adapter")
    again = from_onnx(path, like=Adapter.load(tmp_path / "adapter").spec)
    assert again.hash == base.hash
    export_onnx(again, Adapter.load(tmp_path / "adapter", again), tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    close(run_all(tmp_path / "out.onnx", x), tuner.decision_function(x))
    assert np.abs(run_all(path, x) - tuner.decision_function(x)).max() > 0.1
    if tokens:
        assert tuner.score(*sentences(50)) > 0.5
        assert tuner.predict(x).shape == (60, 12)
    if length == "s":
        with pytest.raises(FileError, match=r"leaves \[None\] of 'input_ids' open: give input_shape"):
            from_onnx(path)


@pytest.mark.parametrize("tokens", [False, True])
def test_one_input_of_integers(tokens: bool, tmp_path: Path) -> None:
    path = encoder(tmp_path, tokens, "s", ("ids",))
    base = from_onnx(path, input_shape=(12,))
    assert not base.spec.input_tap
    assert base.spec.input_shape == (13 if tokens else 12,)
    x = np.random.default_rng(0).integers(0, 40, (60, 12))
    tuner = FineTuner(base).fit(x, x * 7 % 5 if tokens else x[:, 0] % 5)
    assert from_onnx(path, like=tuner.adapter.spec).hash == base.hash
    export_onnx(base, tuner.adapter, tmp_path / "out.onnx")
    close(run_all(tmp_path / "out.onnx", {"ids": x.astype(np.int32)}), tuner.decision_function(x))
    with pytest.raises(FileError, match="must run in onnxruntime"):
        tuner.predict(x + 40)


def test_model_as_converted_from_tflite(tmp_path: Path) -> None:
    """Images with channels last, turned for every convolution and back, Reshape before the last layer, Softmax."""
    nodes = [
        N("Transpose", ["x"], ["t1"], perm=[0, 3, 1, 2]),
        N("Conv", ["t1", "w1", "b1"], ["c1"], auto_pad="SAME_UPPER", strides=[2, 2]),
        N("Transpose", ["c1"], ["t2"], perm=[0, 2, 3, 1]),
        N("Clip", ["t2", "zero", "six"], ["r1"]),
        N("Transpose", ["r1"], ["t3"], perm=[0, 3, 1, 2]),
        N("Conv", ["t3", "w2"], ["c2"], auto_pad="SAME_UPPER", group=4),
        N("Transpose", ["c2"], ["t4"], perm=[0, 2, 3, 1]),
        N("Clip", ["t4", "zero", "six"], ["r2"]),
        N("ReduceMean", ["r2"], ["m"], axes=[1, 2], keepdims=1),
        N("Reshape", ["m", "flat"], ["h"]),
        N("MatMul", ["h", "w3"], ["i"]),
        N("Add", ["i", "b3"], ["j"]),
        N("Softmax", ["j"], ["y"], axis=1),
    ]
    constants = {
        "w1": weights(4, 3, 3, 3), "b1": weights(4, 1)[:, 0], "w2": weights(4, 1, 3, 3), "w3": weights(4, 5),
        "b3": weights(5, 1)[:, 0], "zero": np.array(0, np.float32), "six": np.array(6, np.float32),
        "flat": np.array([-1, 4], np.int64),
    }  # fmt: skip
    path = model(tmp_path, nodes, constants, ("n", 9, 7, 3))
    base = from_onnx(path)
    assert (base.channels_last, base.spec.input_shape, base.logits) == (True, (3, 9, 7), "j")
    assert [tap.value for tap in base.candidates] == ["x", "t3", "h"]
    assert base.candidates[1].shape == (4, 5, 4)
    rng = np.random.default_rng(0)
    x = rng.random((60, 3, 9, 7), np.float32)
    tuner = FineTuner(base).fit(x, rng.integers(0, 5, 60))
    export_onnx(base, tuner.adapter, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    adapted = run(tmp_path / "out.onnx", x.transpose(0, 2, 3, 1))
    close(adapted, tuner.predict_proba(x))
    assert np.abs(run(path, x.transpose(0, 2, 3, 1)) - adapted).max() > 0.01


def test_commands_on_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inputs by their names in the .npz, a length that the file leaves open, and labels of words."""

    def ask(*arguments: str) -> dict[str, Any]:
        assert command_line([*arguments, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    path, data, adapter = str(encoder(tmp_path, True, "s")), str(tmp_path / "x.npz"), str(tmp_path / "adapter")
    x, y = sentences(60)
    np.savez(data, **x, y=y, person=np.arange(60) // 6)
    length = ("--input-shape", "12")
    assert len(ask("inspect", path, *length)["candidates"]) == 3
    made = ask("finetune", path, *length, "--data", data, "--eval", data, "--out", adapter)
    counted = (y != -100) & (x["attention_mask"] == 1)
    assert made["samples"] == counted.sum()
    assert made["accepted"]
    tuner = FineTuner(from_onnx(path, input_shape=(12,))).fit(x, y)
    assert made["accuracy_after"] == pytest.approx(tuner.score(x, y))
    assert ask("evaluate", path, "--adapter", adapter, "--data", data)["n"] == counted.sum()
    ask("predict", path, "--adapter", adapter, "--data", data, "--out", str(tmp_path / "p.npz"))
    np.testing.assert_array_equal(np.load(tmp_path / "p.npz")["label"], tuner.predict(x).reshape(-1))
    ask("export", "onnx", path, "--adapter", adapter, "--out", str(tmp_path / "out.onnx"))
    close(run_all(tmp_path / "out.onnx", x), tuner.decision_function(x))
    ask("finetune", path, *length, "--data", data, "--out", str(tmp_path / "by-person"), "--groups", "person")
    np.savez(data, input_ids=x["input_ids"], y=y)
    for arguments, message in (
        (length, "must hold input_ids and attention_mask and y"),
        ((), "give input_shape"),
        (("--input-shape", "many"), "--input-shape must be whole numbers"),
    ):
        assert command_line(["finetune", path, *arguments, "--data", data, "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err


# -- bad input -------------------------------------------------------------------------------------------------------


def gemm(folder: Path, **changes: Any) -> Path:
    nodes, constants, _ = HEADS["gemm"]
    return model(folder, [*BODY, *nodes], {**CONSTANTS, **constants}, **changes)


def test_models_that_cannot_be_adapted(tmp_path: Path) -> None:
    nodes, constants, _ = HEADS["gemm"]
    parts = {**CONSTANTS, **constants}
    with pytest.raises(FileError, match="batches of any size"):
        from_onnx(gemm(tmp_path, shape=(1, 3, 8, 8)))
    with pytest.raises(FileError, match=r"leaves .* open"):
        from_onnx(gemm(tmp_path, shape=("n", 3, "h", "w")))
    assert from_onnx(gemm(tmp_path, shape=("n", 3, "h", "w")), input_shape=(3, 6, 6)).spec.input_shape == (3, 6, 6)
    with pytest.raises(FileError, match="end in a linear layer"):
        from_onnx(model(tmp_path, [*BODY, N("Relu", ["f"], ["y"])], CONSTANTS))
    with pytest.raises(FileError, match="one score a class"):
        from_onnx(model(tmp_path, [*BODY, N("Conv", ["f", "w2"], ["y"])], CONSTANTS))
    with pytest.raises(FileError, match="is one number a sample and has no axis of scores"):
        from_onnx(
            model(
                tmp_path,
                [
                    *BODY,
                    *nodes[:-1],
                    N(nodes[-1].op_type, nodes[-1].input, ["z"]),
                    N("Gather", ["z", "i"], ["y"], axis=1),
                ],
                {**parts, "i": np.array(0)},
            )
        )
    with pytest.raises(FileError, match="one output"):
        from_onnx(model(tmp_path, [*BODY, *nodes], parts, outputs=("y", "f")))
    with pytest.raises(FileError, match="operators that onnxruntime"):
        from_onnx(model(tmp_path, [*BODY, *nodes[:-1], N("Odd", ["h"], ["y"], domain="mine")], parts))
    frozen = [*nodes[:-1], N("Reshape", ["h", "s"], ["r"]), N("Gemm", ["r", "w3", "b3"], ["y"])]
    with pytest.raises(FileError, match=r"must (run|keep the batch)"):
        from_onnx(model(tmp_path, [*BODY, *frozen], {**parts, "s": np.array([1, 4])}))
    inner = onnx.helper.make_graph([N("Identity", ["f"], ["k"])], "b", [], [onnx.ValueInfoProto(name="k")])
    flow = N("If", ["yes"], ["m"], then_branch=inner, else_branch=inner)
    with pytest.raises(FileError, match="control flow"):
        from_onnx(model(tmp_path, [*BODY, flow, *nodes], {**parts, "yes": np.array(True)}))
    path = gemm(tmp_path)
    with pytest.raises(UsageError, match=r"names or patterns of candidates \(x, b, h\)"):
        from_onnx(path, "c")
    with pytest.raises(UsageError, match="budget"):
        from_onnx(path, "auto:many")
    with pytest.raises(UsageError, match="room for the last tap, which takes 16 bytes"):
        from_onnx(path, "auto:15")
    with pytest.raises(UsageError, match="besides the input"):
        from_onnx(path, "x")
    with pytest.raises(UsageError, match="only its taps"):
        FineTuner(from_onnx(path), method="ft-all")
    with pytest.raises(UsageError, match="all 50 samples"):
        FineTuner(from_onnx(path), method="skip2-lora", cache_capacity=20).fit(
            np.zeros((50, 3, 8, 8), np.float32), np.arange(50) % 5
        )


def test_damaged_files(tmp_path: Path) -> None:
    path = gemm(tmp_path)
    whole = path.read_bytes()
    for n in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(FileError):
            from_onnx(path)
    rng = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        with contextlib.suppress(FileError):  # many a change is to a weight or a name, and harmless
            from_onnx(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link", "", "a/../../secret", "x\0"])
def test_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    path = gemm(tmp_path / "in")
    loaded = onnx.load(str(path))
    tensor = loaded.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(loaded.SerializeToString())
    with pytest.raises(FileError, match="in its own folder"):
        from_onnx(path)


def test_sizes_that_are_only_announced(tmp_path: Path) -> None:
    path = gemm(tmp_path)
    loaded = onnx.load(str(path))
    loaded.graph.initializer[0].dims[0] = 1 << 40
    path.write_bytes(loaded.SerializeToString())
    with pytest.raises(FileError, match="announces"):
        from_onnx(path)
    with pytest.raises(FileError, match="at most"):
        from_onnx(gemm(tmp_path, shape=("n", 3, 1 << 20, 1 << 20)))


# -- the command line ------------------------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*arguments: str) -> dict[str, Any]:
        assert command_line([*arguments, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    path, data, adapter = str(gemm(tmp_path)), str(tmp_path / "x.npz"), str(tmp_path / "adapter")
    rng = np.random.default_rng(0)
    x, y = rng.random((80, 3, 8, 8), np.float32), np.arange(80) % 2
    x[y == 1, 0] += 2
    np.savez(data, x=x, y=y)
    shown = ask("inspect", path, "--taps", "b@2,h")
    assert [(c["name"], c["bytes"], c["chosen"]) for c in shown["candidates"]] == [
        ("x", 768, None),
        ("b", 1024, "b@2"),
        ("h", 16, "h"),
    ]
    assert shown["cache_bytes_per_sample"]["fp32"] == 4 * (16 + 4 + 5)
    made = ask("finetune", path, "--data", data, "--eval", data, "--out", adapter, "--taps", "b@2,h")
    assert made["accepted"]
    assert made["accuracy_after"] > 0.95 > made["accuracy_before"]
    assert ask("evaluate", path, "--adapter", adapter, "--data", data)["accuracy"] == made["accuracy_after"]
    assert [t["value"] for t in ask("inspect", adapter)["taps"]] == ["b@2", "h"]
    ask("predict", path, "--adapter", adapter, "--data", data, "--out", str(tmp_path / "p.npz"))
    ask("export", "onnx", path, "--adapter", adapter, "--out", str(tmp_path / "out.onnx"))
    close(run(tmp_path / "out.onnx", x), np.load(tmp_path / "p.npz")["logits"])
    for arguments in (("inspect", path), ("inspect", adapter)):
        assert command_line(arguments) == 0
        assert "skip-ridge" in capsys.readouterr().out
    other = str(tmp_path / "other")
    assert command_line(["finetune", path, "--data", data, "--out", other, "--method", "lora-all"]) == 2
    assert "only its taps" in capsys.readouterr().err
    assert command_line(["export", "onnx", path, "--out", str(tmp_path / "no.onnx")]) == 2
    assert "with an adapter" in capsys.readouterr().err


def test_the_package_needs_no_onnxruntime_to_start() -> None:
    code = "import sys, instantft.tuner, instantft.cli; sys.exit('onnxruntime' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("engine", ["reference", "native"])
def test_our_engines_do_not_run_what_they_do_not_know(engine: str, tmp_path: Path) -> None:
    foreign, ours = from_onnx(gemm(tmp_path), "b@2,h"), get_engine(engine)
    x = np.zeros((3, 192), np.float32)
    for run_it in (ours.forward, ours.records):
        with pytest.raises(UsageError, match="engine of its own"):
            run_it(foreign.spec, foreign.tensors, x)
    assert command_line(["bench", str(tmp_path / "model.onnx"), "--samples", "8"]) == 2


def test_no_base_file_of_ours_is_foreign(tmp_path: Path) -> None:
    foreign = from_onnx(gemm(tmp_path), "b@2,h")
    with pytest.raises(UsageError, match="not foreign"):
        Network(foreign.spec, {})
    with pytest.raises(UsageError, match="saved by who made it"):
        foreign.save(tmp_path / "base.safetensors")
    with pytest.raises(UsageError, match="networks of our own"):
        foreign.widened()
    assert NetSpec.from_json(json.loads(json.dumps(foreign.spec.to_json()))) == foreign.spec
    with pytest.raises(UsageError, match="must be a tap"):
        NetSpec((4,), (LayerSpec("fc", 2),), input_tap=False)
    with pytest.raises(UsageError, match="not both"):
        NetSpec((4,), (LayerSpec("foreign", 2), LayerSpec("fc", 2)))


@pytest.mark.parametrize("fixed", [True, False])
def test_memory_that_a_graph_asks_for(fixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes that make a gigabyte, when the model is opened or when it runs, where a quarter is allowed."""
    nodes, constants, _ = HEADS["gemm"]
    sizes = [N("Shape", ["x"], ["sizes"]), N("ReduceProd", ["sizes"], ["many"]), N("Mul", ["many", "big"], ["huge"])]
    if fixed:
        sizes = [N("Mul", ["big", "big"], ["huge"])]
    attack = [*sizes, N("ConstantOfShape", ["huge"], ["k"]), N("ReduceSum", ["k"], ["l"]), N("Add", ["h", "l"], ["m"])]
    parts = {**CONSTANTS, **constants, "big": np.array([1 << (14 if fixed else 20)])}
    path = model(tmp_path, [*BODY, *nodes[:-1], *attack, N("Gemm", ["m", "w3", "b3"], ["y"])], parts)
    monkeypatch.setattr(onnx_backbone, "MAX_MEMORY", 1 << 28)
    with pytest.raises(FileError, match=r"must (load|run)"):
        from_onnx(path)


@pytest.mark.parametrize("fixed", [True, False])
def test_time_that_a_graph_asks_for(fixed: bool, tmp_path: Path) -> None:
    """A product of two large matrices that nobody needs, when the model is opened or when it runs: 10^13 operations."""
    nodes, constants, _ = HEADS["gemm"]
    size = [N("Shape", ["x"], ["sizes"]), N("ReduceProd", ["sizes"], ["many"]), N("Mul", ["many", "none"], ["nil"])]
    if fixed:
        size = [N("Mul", ["none", "none"], ["nil"])]
    attack = [*size, N("Add", ["nil", "big"], ["huge"]), N("ConstantOfShape", ["huge"], ["k"])]
    attack += [N("MatMul", ["k", "k"], ["kk"]), N("ReduceSum", ["kk"], ["l"]), N("Add", ["h", "l"], ["m"])]
    parts = {**CONSTANTS, **constants, "none": np.array([0, 0]), "big": np.array([16_000, 16_000])}
    path = model(tmp_path, [*BODY, *nodes[:-1], *attack, N("Gemm", ["m", "w3", "b3"], ["y"])], parts)
    code = (
        "import sys; from instantft.backbones import onnx; from instantft.cli import run; onnx.MAX_SECONDS = 1.0; "
        f"sys.exit(run(['inspect', {str(path)!r}]))"
    )
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    what = "load" if fixed else "run"
    assert f"must {what} in onnxruntime, but {path} does not: it takes more than 1 seconds" in ended.stderr
    assert time.perf_counter() - began < 30


def test_automatic_taps_are_no_weights_of_channels(tmp_path: Path) -> None:
    nodes, constants, _ = HEADS["gemm"]
    squeezed = [
        *BODY[:2],
        N("GlobalAveragePool", ["b"], ["p"]),
        N("Conv", ["p", "w4"], ["q"]),
        N("Sigmoid", ["q"], ["r"]),
        N("Mul", ["b", "r"], ["b2"]),
        N("Conv", ["b2", "w2"], ["f"], pads=[1, 1, 1, 1]),
    ]
    path = model(tmp_path, [*squeezed, *nodes], {**CONSTANTS, **constants, "w4": weights(4, 4, 1, 1)})
    assert [tap.value for tap in from_onnx(path).candidates] == ["x", "p", "b2", "h"]
    assert [tap.value for tap in from_onnx(path).taps] == ["b2", "h"]
    assert [tap.value for tap in from_onnx(path, "p,h").taps] == ["p", "h"]


def test_automatic_taps_share_the_budget(tmp_path: Path) -> None:
    """The input takes none of it; what a narrow tap leaves of its share, a wider one gets."""
    nodes, constants, _ = HEADS["gemm"]
    path = model(tmp_path, [*BODY, *nodes], {**CONSTANTS, **constants})
    names = {}
    for budget in (16, 4 * 191, 4 * 192, 4 * 260, 16_384):
        base = from_onnx(path, f"auto:{budget}")
        assert 4 * sum(tap.width for tap in base.taps) <= budget
        names[budget] = base.spec.input_tap, [tap.name for tap in base.taps]
    assert names == {
        16: (False, ["h"]),
        4 * 191: (False, ["b@4", "h"]),
        4 * 192: (True, ["b@4", "h"]),
        4 * 260: (True, ["b", "h"]),
        16_384: (True, ["b", "h"]),
    }
    with pytest.raises(UsageError, match="room for the last tap, which takes 16 bytes a sample, not 15"):
        from_onnx(path, "auto:15")


def test_values_that_mix_samples_are_no_taps(tmp_path: Path) -> None:
    """As where windows of an image become samples of their own, and images again."""
    nodes, constants, _ = HEADS["gemm"]
    windows = [
        N("Reshape", ["f", "apart"], ["w"]),
        N("MatMul", ["w", "w4"], ["v"]),
        N("Reshape", ["v", "back"], ["f2"]),
    ]
    head = [N("GlobalAveragePool", ["f2"], ["g"]), *nodes[1:]]
    shapes = {"apart": np.array([-1, 64]), "back": np.array([-1, 4, 8, 8]), "w4": weights(64, 64)}
    path = model(tmp_path, [*BODY, *windows, *head], {**CONSTANTS, **constants, **shapes})
    base = from_onnx(path)
    assert [tap.value for tap in base.candidates] == ["x", "b", "h"]
    x = np.random.default_rng(0).random((40, 3, 8, 8), np.float32)
    tuner = FineTuner(base).fit(x, np.arange(40) % 5)
    export_onnx(base, tuner.adapter, tmp_path / "out.onnx")
    close(run(tmp_path / "out.onnx", x), tuner.decision_function(x))


def test_nothing_is_printed_of_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime would, where its own message is no UTF-8."""
    export_onnx(Network.init(ODD, 0), None, tmp_path / "net.onnx")
    raw = (tmp_path / "net.onnx").read_bytes()
    assert b"pads" in raw
    (tmp_path / "net.onnx").write_bytes(raw.replace(b"pads", b"pa\xe8s"))
    with pytest.raises(FileError):
        from_onnx(tmp_path / "net.onnx")
    assert capsys.readouterr().out == ""

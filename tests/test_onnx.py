"""Networks in ONNX files: the logits and taps that are found, adaptation, export, and files that must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from instantft import FineTuner, UsageError, from_onnx
from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.backbones.onnx import OnnxNetwork
from instantft.engine import get_engine
from instantft.export.onnx import TOLERANCE, export_onnx
from instantft.methods import METHODS
from instantft.spec import LayerSpec, NetSpec, dnn

from .nets import NETS, samples_for, tensors_for
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

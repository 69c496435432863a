"""What only the reference engine promises; what every engine must do is in test_engines and test_gradients."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

from instantft.cache.codecs import codec
from instantft.cache.store import memory_store
from instantft.engine import reference
from instantft.engine.reference import ReferenceEngine, gradients
from instantft.errors import UsageError
from instantft.methods import METHODS, connections, trainable
from instantft.spec import LayerSpec, NetSpec
from instantft.tasks import as_targets

from .nets import METHOD_NAMES, NETS, generator, samples_for, tensors_for

ENGINE = ReferenceEngine()

DIFFERENCE = 1e-5
"""Of a directional derivative: central differences in float64 at step 1e-5 are off by about 1e-9, kinks aside."""


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("net", ["dnn", "odd"])
def test_gradients_against_differences(net: str, method: str) -> None:
    """Needs no torch: the loss along a random direction, a little forward and a little back."""
    spec, m = NETS[net], METHODS[method]
    tensors = {name: v.astype(np.float64) for name, v in tensors_for(spec, m).items()}
    x32, y = samples_for(spec, 5)
    x = x32.astype(np.float64)
    grads = gradients(spec, tensors, m, x, y)
    assert list(grads) == list(trainable(m, spec, 4))
    rng = generator("direction", net, method)
    for name, g in grads.items():
        direction = rng.normal(size=g.shape)
        losses = []
        for h in (1e-5, -1e-5):
            moved = {**tensors, name: tensors[name] + h * direction}
            logits = reference._forward(spec, moved, connections(m, spec.L), x, m.norms == "train").y
            losses.append(reference._loss(logits, as_targets(y, logits.shape[1]))[0])
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs(slope - (g * direction).sum()) <= DIFFERENCE * max(abs(slope), 1e-2), name


def test_max_pooling_gives_the_gradient_to_the_first_of_equals() -> None:
    z = np.zeros((1, 1, 5, 4))
    z[0, 0, 0, 1] = z[0, 0, 1, 0] = 2  # equal largest values of the first window
    g = np.array([[[[1.0, 10.0], [100.0, 1000.0]]]])
    got = reference._unpooled(g, z, 2)[0, 0]
    expected = np.zeros((5, 4))
    expected[0, 1], expected[0, 2], expected[2, 0], expected[2, 2] = 1, 10, 100, 1000
    np.testing.assert_array_equal(got, expected)


def test_convolution_by_hand() -> None:
    """A 1x1 image of ones under a padded 3x2 kernel sees only the kernel's middle row."""
    spec = NetSpec((1, 1, 2), (LayerSpec("conv", 1, (3, 2), (1, 1)), LayerSpec("fc", 3)))
    W = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 3, 2)
    tensors = {"layers.0.weight": W, "layers.0.bias": np.array([100], np.float32)}
    z = reference._linear(spec, tensors, 0, np.array([[10, 20]], np.float32))
    np.testing.assert_array_equal(z, [[100 + 4 * 10, 100 + 3 * 10 + 4 * 20, 100 + 3 * 20]])


def test_cross_entropy() -> None:
    y = np.array([[1000.0, 0, 0], [0, 0, 0]])
    loss, g = reference._loss(y, as_targets(np.array([0, 2]), y.shape[1]))
    assert loss == pytest.approx(np.log(3) / 2)
    np.testing.assert_allclose(g, np.array([[0, 0, 0], [1 / 6, 1 / 6, -1 / 3]]))


@pytest.mark.parametrize("net", NETS)
def test_a_record_does_not_depend_on_its_batch(net: str) -> None:
    spec = NETS[net]
    tensors = tensors_for(spec)
    x, _ = samples_for(spec, 7)
    together = ENGINE.records(spec, tensors, x)
    np.testing.assert_array_equal(ENGINE.records(spec, tensors, x[3:5]), together[3:5])


def test_records_are_those_of_the_start() -> None:
    """FT-Last moves the last layer; a record computed late still holds the frozen network's output."""
    spec, T = NETS["dnn"], 6
    tensors = tensors_for(spec)
    x, y = samples_for(spec, T)
    store = memory_store("fp32", spec.record, T)
    trainer = ENGINE.trainer(
        spec, tensors, METHODS["ft-last"], 4, x, y, numbers=np.arange(T), store=store, batch_size=2, lr=0.5
    )
    trainer.epochs(np.arange(T, dtype=np.int32)[None])
    np.testing.assert_array_equal(store.read(np.arange(T)), ENGINE.records(spec, tensors, x))


def test_samples_that_are_not_kept_pass_through_the_codec_too() -> None:
    spec = NETS["dnn"]
    tensors = tensors_for(spec)
    x, y = samples_for(spec, 4)
    store = memory_store("nf4", spec.record, 1)
    trainer = ENGINE.trainer(
        spec, tensors, METHODS["ft-last"], 4, x, y, numbers=np.arange(4), store=store, batch_size=4, lr=0.1
    )
    got = trainer._cached(np.arange(4, dtype=np.int32), store)
    c = codec("nf4")
    plain = ENGINE.records(spec, tensors, x)
    np.testing.assert_array_equal(got, c.decode(c.encode(plain, spec.record), spec.record))


def test_divergence_leaves_nan_for_the_epochs_not_finished() -> None:
    spec, T = NETS["dnn"], 4
    tensors = tensors_for(spec, METHODS["skip-lora"])
    x, y = samples_for(spec, T)
    trainer = ENGINE.trainer(
        spec, tensors, METHODS["skip-lora"], 4, x, y, numbers=np.arange(T), store=None, batch_size=2, lr=1e30
    )
    stats = trainer.epochs(np.tile(np.arange(T, dtype=np.int32), (3, 1)))
    assert stats.diverged_at == 2
    assert np.isnan(stats.loss).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora.1-3.B": None}, r"tensor lora.1-3.B must have the shape \[4, 3\], not missing"),
        ({"lora.0-3.A": np.zeros((61, 5), np.float32)}, r"lora.0-3.A must have the shape \[61, 4\], not \[61, 5\]"),
        ({"layers.1.bias": np.zeros(25, np.float32)}, r"layers.1.bias must have the shape \[24\], not \[25\]"),
    ],
)
def test_tensors_are_checked(change: dict, message: str) -> None:
    spec, m = NETS["dnn"], METHODS["skip-lora"]
    tensors = {k: v for k, v in {**tensors_for(spec, m), **change}.items() if v is not None}
    x, y = samples_for(spec, 2)
    with pytest.raises(UsageError, match=message):
        ENGINE.trainer(spec, tensors, m, 4, x, y, numbers=np.arange(2), store=None, batch_size=2, lr=0.1)


def test_only_numpy() -> None:
    """The oracle must run anywhere: NumPy and the package, nothing else."""
    tree = ast.parse(Path(inspect.getfile(reference)).read_text())
    tops = {
        n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level
    }
    tops |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert tops == {"__future__", "collections", "dataclasses", "typing", "numpy"}

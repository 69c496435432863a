"""Gradients of every method and every trained tensor, against torch autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest

from instantft.engine import Engine
from instantft.engine.reference import gradients
from instantft.methods import METHODS, trainable

from .nets import METHOD_NAMES, NETS, samples_for, tensors_for

torch_nets = pytest.importorskip("tests.torch_nets", reason="needs torch: pip install 'instantft[torch]'")

FLOAT64 = 1e-10
"""Of a tensor's largest gradient. Both sides sum at most 10^5 products in float64, whose rounding is 1e-16 each."""

FLOAT32 = 2e-5
"""Of a tensor's largest gradient. A gradient passes five layers of sums of up to 10^3 float32 products, each rounding
6e-8, which add up like a random walk: 2e-6 a layer (the reference is within 2e-6 everywhere). A wrong term is wrong by
far more: one kernel share of 25 left out changes a gradient by 1e-2."""

RANK = 4


def case(net: str, method: str, B: int) -> tuple:
    """Everything a gradient depends on, with gain and bias of the output set too."""
    spec, m = NETS[net], METHODS[method]
    tensors = tensors_for(spec, m, RANK)
    tensors["output.gain"] = np.array([0.75], np.float32)
    tensors["output.bias"] = np.linspace(-0.5, 0.5, spec.C, dtype=np.float32)
    x, y = samples_for(spec, B)
    return spec, m, tensors, x, y


def assert_close(
    got: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    tolerance: float,
    before: dict[str, np.ndarray] | None = None,
) -> None:
    """Compare gradients; with `before`, those read off one step, in which the tensor itself was rounded."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        scale = np.abs(value).max()
        beta = name.replace("bias", "bn.bias")
        if beta in expected and beta != name and name.replace("bias", "bn.weight") in expected:
            # batch norm on batch statistics takes every constant out again: this gradient is zero but for rounding
            assert scale < 1e-12
            scale = np.abs(expected[beta]).max()
        assert scale > 0, f"{name}: a gradient of zero shows nothing"
        rounding = 2.0**-23 * np.abs(before[name]).max() if before else 0.0
        assert np.abs(got[name] - value).max() <= tolerance * scale + rounding, name


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("net", NETS)
def test_reference_in_float64(net: str, method: str) -> None:
    spec, m, tensors, x, y = case(net, method, 6)
    wide = {name: value.astype(np.float64) for name, value in tensors.items()}
    got = gradients(spec, wide, m, x.astype(np.float64), y)
    assert_close(got, torch_nets.gradients(spec, tensors, m, RANK, x, y), FLOAT64)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("net", NETS)
def test_engine(engine: Engine, net: str, method: str) -> None:
    """One step at lr 1 over all samples moves every tensor by its gradient, and only those the method trains."""
    B = 7
    spec, m, tensors, x, y = case(net, method, B)
    trainer = engine.trainer(
        spec, tensors, m, RANK, x, y, numbers=np.arange(B), store=None, batch_size=B, lr=1.0, momentum=0.0
    )
    trainer.epochs(np.arange(B, dtype=np.int32)[None])
    after = trainer.tensors()
    names = trainable(m, spec, RANK)
    statistics = [name for name in spec.parameters if ".bn.running_" in name] if m.norms == "train" else []
    assert set(after) == {*names, *statistics}
    got = {name: tensors[name].astype(np.float64) - after[name] for name in names}
    assert_close(got, torch_nets.gradients(spec, tensors, m, RANK, x, y), FLOAT32, tensors)


@pytest.mark.parametrize("method", ["ft-last", "lora-all", "skip-lora"])
@pytest.mark.parametrize("net", NETS)
def test_forward(engine: Engine, net: str, method: str) -> None:
    """Logits, with batch norm by its running statistics, adapters, gain and bias."""
    spec, m, tensors, x, _ = case(net, method, 5)
    t = torch_nets.to_torch(tensors, torch_nets.torch.float64)
    wide = torch_nets.torch.tensor(x, dtype=torch_nets.torch.float64)
    expected = torch_nets.forward(spec, t, m, wide, training=False).numpy()
    assert np.abs(engine.forward(spec, tensors, x) - expected).max() <= FLOAT32 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["ft-all", "ft-bias", "ft-all-lora"])
@pytest.mark.parametrize("B", [1, 6])
def test_running_statistics(engine: Engine, method: str, B: int) -> None:
    """Batch norm keeps statistics as torch does, with the unbiased variance; FT-Bias leaves them alone."""
    spec, m, tensors, x, y = case("odd", method, B)
    trainer = engine.trainer(
        spec, tensors, m, RANK, x, y, numbers=np.arange(B), store=None, batch_size=B, lr=0.1, momentum=0.0
    )
    trainer.epochs(np.arange(B, dtype=np.int32)[None])
    after = trainer.tensors()
    t = torch_nets.to_torch(tensors)
    torch_nets.forward(spec, t, m, torch_nets.torch.tensor(x))
    statistics = [name for name in spec.parameters if ".bn.running_" in name]
    if m.norms != "train":
        assert not set(statistics) & set(after)
        return
    for name in statistics:
        np.testing.assert_allclose(after[name], t[name].numpy(), rtol=1e-5, atol=1e-6, err_msg=name)

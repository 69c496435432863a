"""The same networks in PyTorch, so that autograd can be asked: from a `NetSpec` and a dictionary of tensors.

Functional: `forward` takes the tensors by name, as the engines do, and every one that requires a gradient gets it.
Linear maps and convolutions are torch's own. It is for correctness alone: what times are compared with is
benchmarks/rivals.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest

from instantft.methods import Method, connections, trainable
from instantft.spec import NetSpec

torch = pytest.importorskip("torch")

BN_EPS = 1e-5
BN_MOMENTUM = 0.1

Tensor = Any
"""torch.Tensor; torch is optional, so it has no type here."""


def to_torch(tensors: Mapping[str, np.ndarray], dtype: Any = None, trained: Collection[str] = ()) -> dict[str, Tensor]:
    """Copies of `tensors` for torch; those named in `trained` require a gradient."""
    out = {}
    for name, value in tensors.items():
        t = torch.tensor(np.ascontiguousarray(value), dtype=dtype or torch.float32)
        out[name] = t.requires_grad_(name in trained)
    return out


def forward(spec: NetSpec, tensors: Mapping[str, Tensor], method: Method, x: Tensor, training: bool = True) -> Tensor:
    """Logits (B, C) of samples x (B, N) with the method's adapters.

    Args:
        spec: the network.
        tensors: by name; in training mode the running statistics in it are replaced by new ones where the method's
            batch norm uses batch statistics.
        method: its adapters are added, and it says how batch norm behaves.
        x: (B, N), flat.
        training: False: batch norm by its running statistics whatever the method.
    """
    taps = []
    z = x
    pairs = connections(method, spec.L)
    for k in range(spec.L - 1):
        taps.append(x)
        z = linear(spec, tensors, k, x)
        if (k, k + 1) in pairs:
            z = z + adapter(tensors, k, k + 1, x).reshape(z.shape)
        layer = spec.layers[k]
        if layer.batch_norm:
            z = batch_norm(tensors, k, z, training and method.norms == "train")
        if layer.relu:
            z = torch.relu(z)
        if layer.pool > 1:
            z = torch.nn.functional.max_pool2d(z, layer.pool)
        x = z.flatten(1)
    taps.append(x)
    return output(spec, tensors, method, taps, linear(spec, tensors, spec.L - 1, x))


def output(spec: NetSpec, tensors: Mapping[str, Tensor], method: Method, taps: list[Tensor], c: Tensor) -> Tensor:
    """y = gain·c + Σ x^k·A_k·B_k + bias, from taps x^0 … x^{L-1} and the output c of the last layer."""
    y = c * tensors["output.gain"] if "output.gain" in tensors else c
    for i, j in connections(method, spec.L):
        if j == spec.L:
            y = y + adapter(tensors, i, j, taps[i])
    return y + tensors["output.bias"] if "output.bias" in tensors else y


def linear(spec: NetSpec, tensors: Mapping[str, Tensor], k: int, x: Tensor) -> Tensor:
    """Linear map of layer k of flat x: (B, M), or (B, out, h, w)."""
    W, b = tensors[f"layers.{k}.weight"], tensors[f"layers.{k}.bias"]
    if spec.layers[k].kind == "fc":
        return torch.nn.functional.linear(x, W.T, b)
    image = x.reshape(-1, *spec.geometry[k].in_shape)
    return torch.nn.functional.conv2d(image, W, b, padding=spec.layers[k].padding)


def adapter(tensors: Mapping[str, Tensor], i: int, j: int, x: Tensor) -> Tensor:
    """x·A·B of adapter i→j."""
    return x @ tensors[f"lora.{i}-{j}.A"] @ tensors[f"lora.{i}-{j}.B"]


def batch_norm(tensors: Mapping[str, Tensor], k: int, z: Tensor, batch_stats: bool) -> Tensor:
    """Batch norm of layer k, written out, because torch's refuses a batch of one sample."""
    gamma, beta, mean, var = (tensors[f"layers.{k}.bn.{n}"] for n in ("weight", "bias", "running_mean", "running_var"))
    shape = (1, -1, *[1] * (z.ndim - 2))
    if batch_stats:
        axes = [0, *range(2, z.ndim)]
        old_mean, old_var = mean, var
        mean, var = z.mean(axes), z.var(axes, unbiased=False)
        n = z.numel() // z.shape[1]
        with torch.no_grad():
            old_mean.mul_(1 - BN_MOMENTUM).add_(BN_MOMENTUM * mean)
            old_var.mul_(1 - BN_MOMENTUM).add_(BN_MOMENTUM * var * (n / max(n - 1, 1)))
    normed = (z - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + BN_EPS)
    return normed * gamma.reshape(shape) + beta.reshape(shape)


def gradients(
    spec: NetSpec, tensors: Mapping[str, np.ndarray], method: Method, rank: int, x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """What autograd says: gradients of the mean cross-entropy in float64 of everything the method trains."""
    names = trainable(method, spec, rank)
    t = to_torch(tensors, torch.float64, names)
    logits = forward(spec, t, method, torch.tensor(x, dtype=torch.float64))
    torch.nn.functional.cross_entropy(logits, torch.tensor(y, dtype=torch.int64)).backward()
    return {name: t[name].grad.numpy() for name in names}

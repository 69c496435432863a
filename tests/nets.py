"""The networks that tests use, with tensors and samples for them."""

from __future__ import annotations

import zlib

import numpy as np

from instantft.methods import SGD_METHODS, Method, trainable
from instantft.spec import LayerSpec, NetSpec, dnn, lenet5

ODD = NetSpec(
    (3, 13, 11),
    (
        LayerSpec("conv", 5, (3, 2), (1, 0), batch_norm=True, relu=True, pool=3),
        LayerSpec("conv", 7, (2, 3), (0, 1), relu=True),
        LayerSpec("fc", 19, batch_norm=True, relu=True),
        LayerSpec("fc", 11),
        LayerSpec("fc", 5),
    ),
)
"""Nothing in it is a multiple of a vector, and every feature occurs where LeNet-5 does not have it."""

NETS: dict[str, NetSpec] = {
    "dnn": dnn(61, 3, 24),
    "lenet5": lenet5((1, 28, 28)),
    "lenet5-colour": lenet5((3, 32, 32)),
    "odd": ODD,
}


def generator(*key: object) -> np.random.Generator:
    """A generator that depends on `key` alone."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def tensors_for(spec: NetSpec, method: Method | None = None, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors of a network that passes signals on well; with `method`, its adapters too, B not zero."""
    rng = generator("tensors", seed)
    out: dict[str, np.ndarray] = {}
    for name, shape in spec.parameters.items():
        if name.endswith("running_var") or name.endswith("bn.weight"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("weight"):
            fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
            value = rng.normal(0, np.sqrt(2 / fan_in), shape)
        else:
            value = rng.normal(0, 0.1, shape)
        out[name] = value.astype(np.float32)
    if method is not None:
        for name, shape in trainable(method, spec, rank).items():
            if name.startswith("lora."):
                deviation = shape[0] ** -0.5 if name.endswith("A") else 0.1
                out[name] = rng.normal(0, deviation, shape).astype(np.float32)
    return out


def samples_for(spec: NetSpec, T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x (T, N) float32 and y (T,) int32."""
    rng = generator("samples", seed)
    x = rng.normal(size=(T, spec.geometry[0].N)).astype(np.float32)
    return x, rng.integers(0, spec.C, T).astype(np.int32)


METHOD_NAMES = tuple(SGD_METHODS)

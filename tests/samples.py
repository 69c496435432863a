"""Small networks and samples that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instantft.adapters import Adapter, expected, initial
from instantft.backbones.builtin import Network
from instantft.methods import METHODS
from instantft.spec import LayerSpec, NetSpec, dnn

SPEC = dnn(6, 3, hidden=5)
IMAGES = NetSpec((2, 6, 5), (LayerSpec("conv", 3, (3, 2), (1, 0), relu=True, pool=2), LayerSpec("fc", 4)))


def blobs(T: int = 60, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Three easy classes in six dimensions."""
    rng = np.random.default_rng(seed)
    y = (np.arange(T) % 3).astype(np.int32)
    x = rng.normal(size=(T, 6)).astype(np.float32) * 0.5
    x[np.arange(T), y] += 2
    return x, y


def shells(T: int = 400, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Two classes in six dimensions that differ in length only, which no linear map can tell."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(T, 6)), rng.integers(0, 2, T).astype(np.int32)
    x *= ((1 + 2 * y) / np.linalg.norm(x, axis=1))[:, None]
    return x.astype(np.float32), y


def base(spec: NetSpec = SPEC, seed: int = 0) -> Network:
    return Network.init(spec, seed)


def adapter(of: Network, method: str = "skip2-lora", rank: int = 2, seed: int = 0) -> Adapter:
    """An adapter with random values, as if it had been trained."""
    m, rng = METHODS[method], np.random.default_rng(seed)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32) ** 2 for name, shape in expected(m, of.spec, rank).items()
    }
    assert set(initial(m, of.spec, rank, seed)) <= set(tensors)
    return Adapter(method, rank, of.spec, of.hash, tensors, {"epochs": 1})


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path

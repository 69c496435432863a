"""What a user would write in PyTorch instead: every fine-tuning method, eager, from the same numbers.

A `Rival` is built from a `NetSpec` and the same dictionary of tensors that an engine takes, so both sides start from
identical weights and adapters, and given the same order of samples they make the same steps (tests/test_benchmarks.py).

It is meant to be a rival, not a victim:

- what a method does not train has ``requires_grad=False``, and what lies below the lowest trained tensor runs under
  ``torch.no_grad``, so autograd computes the gradients of Skip2-LoRA's Table 1 and no others;
- batches are rows taken with ``index_select`` from tensors that are already there: no DataLoader, no copies from NumPy;
- adapters are one ``mm`` and one fused ``addmm``; ReLU works in place; gradients are set to None, not zeroed;
- the forward cache is one preallocated tensor a tap, filled in large batches and indexed by sample number, and a method
  caches only the taps it reads;
- neither loss nor accuracy is read back during training (the engines do report both).

It refuses to do anything PyTorch would not do eagerly: no torch.compile, no hand-written kernels.

Letters as in `instantft.spec`. T samples, B batch, N inputs, C outputs, R rank, E epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from instantft.methods import Method, connections, trainable
from instantft.spec import LayerSpec, NetSpec

__all__ = ["FILL_BATCH", "Backbone", "Layer", "Rival", "single_thread"]

FILL_BATCH = 128
"""Samples per forward pass while filling the cache and predicting; 64 to 512 are equally fast, 20 and 1024 slower."""


def single_thread() -> None:
    """Make PyTorch use one thread, as all comparisons here do."""
    torch.set_num_threads(1)


class Layer(nn.Module):
    """One layer of a `NetSpec`: linear map, then batch norm, ReLU and max pooling where asked for."""

    def __init__(self, spec: LayerSpec, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.is_fc = spec.kind == "fc"
        self.linear: nn.Module
        if self.is_fc:
            self.linear = nn.Linear(int(np.prod(in_shape)), spec.out)
        else:
            self.linear = nn.Conv2d(in_shape[0], spec.out, spec.kernel, padding=spec.padding)
        self.bn: nn.Module | None = None
        if spec.batch_norm:
            self.bn = nn.BatchNorm1d(spec.out) if self.is_fc else nn.BatchNorm2d(spec.out)
        self.relu = spec.relu
        self.pool = spec.pool

    def forward(self, x: Tensor, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        """x (B, N) or (B, channels, h, w) to the input of the next layer; A, B: an adapter beside the linear map."""
        if self.is_fc:
            x = x.flatten(1)
        y = self.linear(x)
        if A is not None:
            y = torch.addmm(y.flatten(1), x.flatten(1) @ A, B).view_as(y)
        if self.bn is not None:
            y = self.bn(y)
        if self.relu:
            y = F.relu_(y)
        return F.max_pool2d(y, self.pool) if self.pool > 1 else y


class Backbone(nn.Module):
    """The network of a `NetSpec`, holding the weights in `tensors`."""

    def __init__(self, spec: NetSpec, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(s, g.in_shape) for s, g in zip(spec.layers, spec.geometry, strict=True))
        self.eval().requires_grad_(False)
        with torch.no_grad():
            for name in spec.parameters:
                self.tensor(name).copy_(_as_torch(tensors[name], self._transposed(name)))

    def tensor(self, name: str) -> Any:
        """The parameter or buffer that `NetSpec.parameters` calls `name`."""
        _, k, *rest = name.split(".")
        layer = self.layers[int(k)]
        return getattr(layer.bn if rest[0] == "bn" else layer.linear, rest[-1])

    def array(self, name: str) -> NDArray[np.float32]:
        """A copy of that tensor, laid out as the package has it."""
        t = self.tensor(name).detach()
        return np.ascontiguousarray((t.T if self._transposed(name) else t).numpy(), dtype=np.float32).copy()

    def _transposed(self, name: str) -> bool:
        """Weights of fc layers are (N, M) in the package and (M, N) in PyTorch."""
        _, k, *rest = name.split(".")
        return rest == ["weight"] and self.layers[int(k)].is_fc


def _as_torch(array: NDArray[Any], transposed: bool = False) -> Tensor:
    return torch.from_numpy(np.array(array.T if transposed else array, order="C"))


class Rival:
    """One fine-tuning method in PyTorch.

    Args:
        spec: the network.
        tensors: its weights, and the start values of the method's adapters (``lora.I-J.A``, ``lora.I-J.B``).
        method: the row of the table.
        x: (T, N) samples.  y: (T,) labels.
        lr, momentum, batch_size: SGD.
        cached: keep the taps and the frozen output of every sample; by default as the row says.
        fused: use PyTorch's fused SGD instead of its default; here the two take the same time.
    """

    def __init__(
        self,
        spec: NetSpec,
        tensors: Mapping[str, NDArray[np.float32]],
        method: Method,
        x: NDArray[np.float32],
        y: NDArray[np.int32],
        *,
        lr: float,
        batch_size: int = 20,
        momentum: float = 0.0,
        cached: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self.spec, self.method, self.batch_size = spec, method, batch_size
        self.cached = method.cached if cached is None else cached
        if self.cached and not method.cacheable:
            raise ValueError(f"cached must be False for {method.name}: its taps change as it trains")
        self.backbone = Backbone(spec, tensors)
        self.x = torch.from_numpy(x).view(-1, *spec.input_shape)
        self.y = torch.from_numpy(y.astype(np.int64))
        self.connections = connections(method, spec.L)
        self.A: dict[int, Tensor] = {}
        self.B: dict[int, Tensor] = {}
        for i, j in self.connections:
            self.A[i] = _as_torch(tensors[f"lora.{i}-{j}.A"]).requires_grad_()
            self.B[i] = _as_torch(tensors[f"lora.{i}-{j}.B"]).requires_grad_()
        rank = next(iter(self.A.values())).shape[1] if self.A else 1
        self.trained = list(trainable(method, spec, rank))
        for name in self.trained:
            if name.startswith("layers."):
                self.backbone.tensor(name).requires_grad_()
        self.backbone.train(method.norms == "train")
        parameters = [self._parameter(name) for name in self.trained]
        self.optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, fused=fused)
        self.cache: dict[int, Tensor] = {}
        """Tap number (L: the frozen output c) to (T, N)."""

    def _parameter(self, name: str) -> Any:
        if name.startswith("layers."):
            return self.backbone.tensor(name)
        _, connection, letter = name.split(".")
        return (self.A if letter == "A" else self.B)[int(connection.split("-")[0])]

    # The frozen network

    @property
    def _reads(self) -> list[int]:
        """Taps (L: the frozen output) that the trained part reads."""
        L = self.spec.L
        return [L - 1] if self.method.weights == "last" else [*(i for i, _ in self.connections), L]

    def _taps(self, x: Tensor) -> dict[int, Tensor]:
        """What the trained part reads of a batch, computed by the frozen network, every tap flattened."""
        reads = self._reads
        taps: dict[int, Tensor] = {}
        with torch.no_grad():
            for k, layer in enumerate(self.backbone.layers):
                if k in reads:
                    taps[k] = x.flatten(1)
                if k == reads[-1]:
                    return taps
                x = layer(x)
        taps[self.spec.L] = x
        return taps

    def fill(self, batch: int = FILL_BATCH) -> None:
        """Run the frozen network once for every sample and keep what the trained part reads (x^0 is the sample)."""
        T = len(self.x)
        widths = [*self.spec.tap_widths, self.spec.C]
        self.cache = {k: torch.empty(T, widths[k]) for k in self._reads}
        if 0 in self.cache:
            self.cache[0] = self.x.flatten(1)
        for start in range(0, T, batch):
            for k, tap in self._taps(self.x[start : start + batch]).items():
                if k > 0:
                    self.cache[k][start : start + batch] = tap

    # Training

    def _logits(self, index: Tensor) -> Tensor:
        """Logits of the samples `index`, with a graph that reaches what the method trains and no further."""
        L = self.spec.L
        if not self.method.cacheable:
            return self._through(self.x.index_select(0, index))
        if self.cached:
            taps = {k: rows.index_select(0, index) for k, rows in self.cache.items()}
        else:
            taps = self._taps(self.x.index_select(0, index))
        if self.method.weights == "last":
            return self.backbone.layers[L - 1](taps[L - 1])
        return self._adapted(taps)

    def _adapted(self, taps: Mapping[int, Tensor]) -> Tensor:
        """y = c + Σ x^k·A_k·B_k, Equation 17 of Skip2-LoRA."""
        y = taps[self.spec.L]
        for k, A in self.A.items():
            y = torch.addmm(y, taps[k] @ A, self.B[k])
        return y

    def _through(self, x: Tensor) -> Tensor:
        """Logits of samples x through the whole network, an adapter beside each layer where the method has them."""
        for k, layer in enumerate(self.backbone.layers):
            x = layer(x, self.A.get(k), self.B.get(k))
        return x

    def epochs(self, order: NDArray[np.integer]) -> None:
        """Run E epochs; `order` is (E, T), the rows in the order they are visited."""
        if self.cached and not self.cache:
            self.fill()
        optimizer, y = self.optimizer, self.y
        for epoch in torch.from_numpy(order.astype(np.int64)):
            for index in epoch.split(self.batch_size):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(self._logits(index), y.index_select(0, index)).backward()
                optimizer.step()

    # Results

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The trained tensors, and the running statistics where batch norm is trained, by the package's names."""
        names = [*self.trained]
        if self.method.norms == "train":
            names += [name for name in self.spec.parameters if ".running_" in name]
        return {
            name: (
                self.backbone.array(name)
                if name.startswith("layers.")
                else self._parameter(name).detach().numpy().copy()
            )
            for name in names
        }

    def forward(self, x: NDArray[np.float32], batch: int = FILL_BATCH) -> NDArray[np.float32]:
        """Logits (T, C) of samples x (T, N) as the method would predict them now, by running statistics."""
        was_training = self.backbone.training
        self.backbone.eval()
        skips = self.method.cacheable and self.connections
        with torch.no_grad():
            rows = [
                self._adapted(self._taps(b)) if skips else self._through(b)
                for b in torch.from_numpy(x).view(-1, *self.spec.input_shape).split(batch)
            ]
        self.backbone.train(was_training)
        return torch.cat(rows).numpy()

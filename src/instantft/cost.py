"""What a method costs, counted from the network's shape and the compute types of Skip2-LoRA's Table 1.

The counting rules are those behind InstantFT's Table 1, all of whose cells they reproduce (tests/test_cost.py):

    forward    2 a multiply-add · 1 a bias · 1 a ReLU · p²-1 a pixel after pooling by p · 2 a value through batch norm
    backward   gW as many as the layer's multiply-adds, twice · gb 1 a linear output · gx as gW
               1 a ReLU and 1 a batch norm value that a gradient passes (5 where it is trained on batch statistics)
    adapter    forward 2NR + 2RM; backward 4RM (gW_B, gx_B) + 2NR (gW_A), and 2NR more where gx flows on

Per sample throughout. This file counts; it measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .methods import Method, adapter_types, connections, layer_types, parameters, trainable
from .spec import NetSpec

__all__ = [
    "Cost",
    "Part",
    "Solve",
    "Work",
    "closed_form",
    "cost",
    "dual_work",
    "linear_macs",
    "network_parameters",
    "parts",
    "primal_work",
    "spaces",
]

FLOPS_PER_BYTE = 3
"""Operations that take as long as a byte from memory: 61 GFLOP/s of a Gram product, 15 to 20 GB/s of SGD on wide taps.
This and the next two were measured by benchmarks/dual_space.py; docs/decisions/0007-dual-sgd.md has the figures."""

STEP_FLOPS, TAP_FLOPS = 3_000_000, 1_000_000
"""Operations that take as long as the calls of NumPy in a step of `solvers.dual`: 50 µs, and 18 µs for each tap."""

MAX_GRAM_BYTES = 1 << 28
"""Most bytes of Gram matrices, all taps together: one tap of 8,192 samples."""

MAX_DECODED_BYTES = 1 << 30
"""Most bytes of decoded records that are held for a run in sample space which was not asked for."""


@dataclass(frozen=True)
class Cost:
    """What fine-tuning costs, per sample.

    Attributes:
        parameters: trainable parameters.
        forward: FLOPs of the network and its adapters.
        forward_cached: the same where the record comes from the cache; None where the method cannot use one.
        backward: FLOPs of the gradients the compute types call for; a closed form has none (see `closed_form`).
        backward_printed: as InstantFT prints them: for skip adapters it also counts gx, though nothing needs it.
        memory: bytes at batch size 1: weights, gradients, activations, adapters.
    """

    parameters: int
    forward: int
    forward_cached: int | None
    backward: int
    backward_printed: int
    memory: int


def linear_macs(spec: NetSpec) -> tuple[int, ...]:
    """Multiply-adds of every layer's linear map, for one sample."""
    return tuple(
        g.N * g.M if y.kind == "fc" else g.M * g.in_shape[0] * math.prod(y.kernel)
        for y, g in zip(spec.layers, spec.geometry, strict=True)
    )


def network_parameters(spec: NetSpec) -> int:
    """Weights, biases, gamma and beta of the network (61,706 for LeNet-5); running statistics are not counted."""
    return sum(math.prod(s) for name, s in spec.parameters.items() if ".bn.running_" not in name)


def cost(spec: NetSpec, m: Method, rank: int) -> Cost:
    """Cost of fine-tuning a network of this shape by method `m` at rank R, per sample."""
    trained = parameters(m, spec, rank)
    pairs = [(spec.geometry[i].N, spec.geometry[j - 1].M) for i, j in connections(m, spec.L)]
    adapters = sum(2 * rank * (N + M) for N, M in pairs)
    last = 2 * linear_macs(spec)[-1] + spec.C
    cached = adapters + (last if m.weights == "last" or m.biases == "last" else 0)
    steps = m.solver == "sgd"
    unneeded = 2 * rank * sum(spec.tap_widths[1:]) if m.adapters == "skip" and steps else 0
    each = parts(spec, m, rank)
    backward = sum(part.backward for part in each)
    return Cost(
        parameters=trained,
        forward=sum(part.forward for part in each),
        forward_cached=cached if m.cacheable else None,
        backward=backward,
        backward_printed=backward + unneeded,
        memory=_memory(spec, m, rank, trained),
    )


@dataclass(frozen=True)
class Solve:
    """What one closed-form fit of T samples costs, beside the frozen network's pass over them.

    Attributes:
        space: "dual", a system of T samples, or "primal", one of D+1 features: the smaller.
        flops: products of features, Cholesky factor and its inverse, solution; choosing λ is not counted.
    """

    space: str
    flops: int


def closed_form(spec: NetSpec, T: int) -> Solve:
    """Cost of ridge regression on all taps (docs/decisions/0005-ridge.md), for T samples."""
    D, C = sum(spec.tap_widths), spec.C
    dual = T <= D
    n = T if dual else D + 1
    products = T * (T + 1) * D if dual else T * (D + 1) * (D + 2)
    flops = products + 2 * n**3 // 3 + 2 * n * n * C + 2 * T * D * C
    return Solve("dual" if dual else "primal", flops)


@dataclass(frozen=True)
class Part:
    """A layer or an adapter, per sample; its update, per step.

    Attributes:
        name: number and kind of the layer, or i→j of the adapter.
        type: compute type, as in Skip2-LoRA's Table 1; "ridge" of an adapter that is solved for.
        forward, backward, update: FLOPs.
        forward_bytes, backward_bytes, update_bytes: float32 values that are read and written once each.
    """

    name: str
    type: str
    forward: int
    backward: int
    update: int
    forward_bytes: int
    backward_bytes: int
    update_bytes: int


def parts(spec: NetSpec, m: Method, rank: int) -> list[Part]:
    """What each layer and each adapter costs under method `m`; of a foreign network, the adapters.

    An update is one multiply-add a trained value, which reads it and its gradient, and writes it.
    """
    found = []
    sizes = {name: math.prod(s) for name, s in trainable(m, spec, rank).items()}
    types = layer_types(m, spec.L)
    crossed = _crossed(types)  # the layer above hands a gradient down through these activations
    for k, (y, g) in enumerate(zip(spec.layers, spec.geometry, strict=True) if spec.own else ()):
        macs, wanted = linear_macs(spec)[k], types[k].removeprefix("FC_y")
        values = sum(math.prod(s) for name, s in spec.parameters.items() if name.startswith(f"layers.{k}."))
        forward = 2 * macs + g.M + (g.M if y.relu else 0) + (2 * g.M if y.batch_norm else 0)
        forward += (y.pool**2 - 1) * g.n_out if y.pool > 1 else 0
        weights = math.prod(spec.parameters[f"layers.{k}.weight"])
        backward = moved = 0
        if "w" in wanted:
            backward, moved = backward + 2 * macs, moved + g.N + g.M + weights
        if "b" in wanted:
            backward, moved = backward + g.M, moved + g.M + y.out
        if "x" in wanted:
            backward, moved = backward + 2 * macs, moved + g.N + g.M + weights
        if k in crossed:
            each = int(y.relu) + ({"frozen": 1, "beta": 2, "train": 5}[m.norms] if y.batch_norm else 0)
            backward, moved = backward + each * g.M, moved + (2 * g.M if each else 0)
        if m.solver != "sgd":
            backward = moved = 0
        trained = sum(n for name, n in sizes.items() if name.startswith(f"layers.{k}."))
        read = 4 * (values + g.N + g.n_out)
        found.append(Part(f"{k} {y.kind}", types[k], forward, backward, 2 * trained, read, 4 * moved, 12 * trained))
    kinds = adapter_types(m, spec.L)[-len(connections(m, spec.L, spec.first_tap)) :]
    for (i, j), kind in zip(connections(m, spec.L, spec.first_tap), kinds, strict=True):
        N, M = spec.geometry[i].N, spec.geometry[j - 1].M
        table, flows = rank * (N + M), kind.endswith("x")
        if m.solver != "sgd":
            found.append(Part(f"x{i}→{j}", "ridge", 2 * table, 0, 0, 4 * (table + N + M + rank), 0, 0))
            continue
        backward = 4 * rank * M + 2 * rank * N + (2 * rank * N if flows else 0)
        moved = 2 * rank * M + rank * N + N + M + 2 * rank + (rank * N + N if flows else 0)
        read = table + N + M + rank
        found.append(Part(f"x{i}→{j}", kind, 2 * table, backward, 2 * table, 4 * read, 4 * moved, 12 * table))
    return found


def _crossed(types: list[str]) -> list[int]:
    """Layers whose output gets a gradient from the layer above."""
    return [k for k in range(len(types) - 1) if "x" in types[k + 1].removeprefix("FC_y")]


def _memory(spec: NetSpec, m: Method, rank: int, trained: int) -> int:
    """Bytes at batch size 1, all values 4 bytes: InstantFT's Table 1, last column of each half."""
    sizes = trainable(m, spec, rank)
    adapters = sum(math.prod(s) for name, s in sizes.items() if name.startswith("lora."))
    weights = sum(math.prod(s) for s in spec.parameters.values())
    # Activations: the sample, and every linear output, and once more where pooling makes another.
    pooled = sum(g.n_out for y, g in zip(spec.layers, spec.geometry, strict=True) if y.pool > 1)
    outputs = sum(g.M for g in spec.geometry) + pooled
    propagates = bool(_crossed(layer_types(m, spec.L)))
    floats = weights + max(trained - adapters, 0) + spec.tap_widths[0] + outputs
    floats += outputs + pooled if propagates else spec.C  # gradients, and where each maximum came from
    floats += 2 * adapters + 2 * rank * len(connections(m, spec.L))
    return 4 * floats


@dataclass(frozen=True)
class Work:
    """What training the adapter of one tap takes, over all its epochs.

    Attributes:
        flops: operations.
        bytes: read and written beyond the near caches.
    """

    flops: int
    bytes: int

    @property
    def price(self) -> int:
        """Operations that would take as long, where the slower of the two decides."""
        return max(self.flops, FLOPS_PER_BYTE * self.bytes)


def primal_work(N: int, T: int, rank: int, epochs: int, batch_size: int) -> Work:
    """SGD on A (N, R) itself: x·A forward, xᵀ·dh backward, so x passes twice, and A three times a step."""
    steps = epochs * math.ceil(T / batch_size)
    return Work(flops=4 * epochs * T * N * rank, bytes=8 * epochs * T * N + 12 * steps * N * rank)


def dual_work(N: int, T: int, rank: int, epochs: int) -> Work:
    """The same steps on K = X·Xᵀ (T, T), by `solvers.dual`.

    Once: half of K, X·A(0), and Xᵀ·C at the end, so x passes three times; then a row of K a sample, forward only.
    """
    once = T * T * N + 4 * T * N * rank
    return Work(flops=once + 2 * epochs * T * T * rank, bytes=12 * T * N + 4 * (epochs + 1) * T * T)


def spaces(
    widths: Sequence[int], T: int, rank: int, epochs: int, batch_size: int, *, always: bool = False
) -> tuple[bool, ...]:
    """Which of the taps train in the dual.

    Each tap goes where its price is lower, those that gain most first, as long as the Gram matrices stay within
    MAX_GRAM_BYTES. All stay in the primal where the calls of NumPy cost more than is gained (the dual is written in it,
    and a step that has one tap there is made there as a whole), and where decoded records take over MAX_DECODED_BYTES.

    Args:
        widths: N_k of the taps that have an adapter.
        T, rank, epochs, batch_size: of the run.
        always: in the dual even where it does not pay, all taps whose Gram matrices fit.
    """
    gains = [primal_work(N, T, rank, epochs, batch_size).price - dual_work(N, T, rank, epochs).price for N in widths]
    chosen = [False] * len(widths)
    room = MAX_GRAM_BYTES // (4 * T * T)
    for k in sorted(range(len(widths)), key=lambda k: -gains[k])[:room]:
        chosen[k] = always or gains[k] > 0
    overhead = (STEP_FLOPS + TAP_FLOPS * len(widths)) * epochs * math.ceil(T / batch_size)
    gained = sum(g for g, dual in zip(gains, chosen, strict=True) if dual)
    pays = gained > overhead and 4 * T * sum(widths) <= MAX_DECODED_BYTES
    return tuple(chosen) if always or pays else (False,) * len(widths)

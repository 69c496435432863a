"""The table of fine-tuning methods. A method is a row, not a class.

A row says which layers train W and b, what happens to batch norm, and which adapters exist. Everything else (what
can be cached, which compute types of Skip2-LoRA's Table 1 each layer needs, what is trained) follows from the row and
is read by the trainer, the cost model and the hardware alike.

This file uses the standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .errors import UsageError, nearest
from .spec import NetSpec

__all__ = [
    "METHODS",
    "SGD_METHODS",
    "Method",
    "adapter_types",
    "connections",
    "layer_types",
    "method",
    "own_rank",
    "parameters",
    "trainable",
]

Scope = Literal["none", "last", "all"]

LORA_RANK = 4
"""R of the papers."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    title: str
    weights: Scope = "none"
    """Which layers train W."""
    biases: Scope = "none"
    """Which layers train b."""
    norms: Literal["frozen", "beta", "train"] = "frozen"
    """Batch norm: frozen; only beta trained (running statistics); or gamma, beta trained on batch statistics."""
    adapters: Literal["none", "last", "layers", "skip"] = "none"
    """Which adapters i→j exist: none, L-1→L, k→k+1 for every layer, or k→L for every layer."""
    cached: bool = False
    """Whether the forward cache is used unless the caller says otherwise."""
    solver: Literal["sgd", "ridge"] = "sgd"
    """Who finds the values: steps of gradient descent, or ridge regression in closed form."""

    @property
    def cacheable(self) -> bool:
        """True where everything but the last layer's output stays as the frozen network computed it."""
        return self.weights != "all" and self.biases != "all" and self.norms == "frozen" and self.adapters != "layers"

    @property
    def rows_only(self) -> bool:
        """True where training needs only records: adapters straight to the output and no weights."""
        return self.weights == "none" and self.biases == "none" and self.adapters in ("last", "skip")

    @property
    def without(self) -> dict[str, str]:
        """Arguments of `FineTuner` that mean nothing to this row, and why."""
        unused = (
            dict.fromkeys(("epochs", "lr", "momentum", "batch_size", "space"), "makes no steps")
            if self.solver == "ridge"
            else dict.fromkeys(("forgetting", "support"), "is not in closed form")
        )
        return unused | ({"rank": "has no adapters"} if self.adapters == "none" else {})


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("ft-all", "FT-All", weights="all", biases="all", norms="train"),
        Method("ft-last", "FT-Last", weights="last", biases="last"),
        Method("ft-bias", "FT-Bias", biases="all", norms="beta"),
        Method("ft-all-lora", "FT-All-LoRA", weights="all", biases="all", norms="train", adapters="layers"),
        Method("lora-all", "LoRA-All", adapters="layers"),
        Method("lora-last", "LoRA-Last", adapters="last"),
        Method("skip-lora", "Skip-LoRA", adapters="skip"),
        Method("skip2-lora", "Skip2-LoRA", adapters="skip", cached=True),
        Method("skip-ridge", "Skip-Ridge", adapters="skip", cached=True, solver="ridge"),
    )
}

SGD_METHODS: dict[str, Method] = {name: m for name, m in METHODS.items() if m.solver == "sgd"}
"""The rows that make steps."""


def method(name: str) -> Method:
    """The row called `name`.

    Raises:
        UsageError: there is no such row.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, not {name!r}{nearest(name, METHODS)}") from None


def own_rank(m: Method, spec: NetSpec) -> int:
    """R where nobody asks for one: the papers' 4; for closed forms full rank, which is the number of outputs."""
    return spec.C if m.solver == "ridge" else LORA_RANK


def parameters(m: Method, spec: NetSpec, rank: int) -> int:
    """Number of trainable parameters (InstantFT Table 1).

    A closed form also finds the bias and the gain of the output; at full rank its B is the identity, which is none.
    """
    shapes = trainable(m, spec, rank)
    if m.solver == "ridge":
        shapes = {k: s for k, s in shapes.items() if rank < spec.C or k.endswith(".A")}
        return sum(math.prod(s) for s in shapes.values()) + spec.C + 1
    return sum(math.prod(s) for s in shapes.values())


def _reaches(scope: Scope, k: int, L: int) -> bool:
    return scope == "all" or (scope == "last" and k == L - 1)


def connections(m: Method, L: int, first: int = 0) -> list[tuple[int, int]]:
    """The adapters i→j of the row: from tap x^i to layer output x^j (before batch norm), in order of i.

    Args:
        m: the row.
        L: number of layers.
        first: number of the first tap, `NetSpec.first_tap`.
    """
    match m.adapters:
        case "none":
            return []
        case "last":
            return [(L - 1, L)]
        case "layers":
            return [(k, k + 1) for k in range(first, L)]
        case "skip":
            return [(k, L) for k in range(first, L)]


def trainable(m: Method, spec: NetSpec, rank: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the method trains, in order.

    Adapters are ``lora.I-J.A`` (N, R) and ``lora.I-J.B`` (R, M).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in spec.parameters.items():
        k = int(name.split(".")[1])
        is_weight = name == f"layers.{k}.weight"
        is_bias = name == f"layers.{k}.bias"
        if (
            (is_weight and _reaches(m.weights, k, spec.L))
            or (is_bias and _reaches(m.biases, k, spec.L))
            or (name.endswith(".bn.weight") and m.norms == "train")
            or (name.endswith(".bn.bias") and m.norms != "frozen")
        ):
            shapes[name] = shape
    for i, j in connections(m, spec.L, spec.first_tap):
        shapes[f"lora.{i}-{j}.A"] = (spec.geometry[i].N, rank)
        shapes[f"lora.{i}-{j}.B"] = (rank, spec.geometry[j - 1].M)
    return shapes


def _needs_gx(m: Method, k: int, L: int) -> bool:
    """Whether some layer below k trains anything a gradient must reach through layer k."""
    if k == 0:
        return False
    return m.weights == "all" or m.biases == "all" or m.norms != "frozen" or m.adapters == "layers"


def layer_types(m: Method, L: int) -> list[str]:
    """Compute type of each layer, as in Skip2-LoRA's Table 1: FC_y followed by those of w, b, x that are computed."""
    return [
        "FC_y"
        + ("w" if _reaches(m.weights, k, L) else "")
        + ("b" if _reaches(m.biases, k, L) else "")
        + ("x" if _needs_gx(m, k, L) else "")
        for k in range(L)
    ]


def adapter_types(m: Method, L: int) -> list[str]:
    """Compute type of each adapter, in the order of `connections`: LoRA_yw, or LoRA_ywx where gx flows on."""
    return ["LoRA_yw" + ("x" if j == i + 1 and _needs_gx(m, i, L) else "") for i, j in connections(m, L)]

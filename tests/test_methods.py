"""The table of methods against the papers: what each trains, and what it must compute for that."""

from __future__ import annotations

import math

import pytest

from instantft.errors import UsageError
from instantft.methods import (
    METHODS,
    Method,
    adapter_types,
    connections,
    layer_types,
    method,
    own_rank,
    parameters,
    trainable,
)
from instantft.spec import dnn, lenet5

from .nets import METHOD_NAMES


def trained(name: str, shape: tuple[int, ...], rank: int = 4) -> int:
    return sum(math.prod(s) for s in trainable(method(name), lenet5(shape), rank).values())


@pytest.mark.parametrize(
    ("name", "mnist", "svhn"),
    [
        ("ft-all", 61_706, 62_006),
        ("ft-last", 850, 850),
        ("ft-bias", 236, 236),
        ("lora-all", 36_328, 45_480),
        ("lora-last", 376, 376),
        ("skip-lora", 10_456, 19_608),
        ("skip2-lora", 10_456, 19_608),
    ],
)
def test_trainable_parameters(name: str, mnist: int, svhn: int) -> None:
    """InstantFT's Table 1, column by column (InstantFT itself is skip2-lora)."""
    assert trained(name, (1, 28, 28)) == mnist
    assert trained(name, (3, 32, 32)) == svhn


def test_ft_all_lora_is_both() -> None:
    """Skip2-LoRA §3.1: FT-All and LoRA-All together."""
    shape = (1, 28, 28)
    assert trained("ft-all-lora", shape) == trained("ft-all", shape) + trained("lora-all", shape)


@pytest.mark.parametrize(
    ("name", "layers", "adapters"),
    [
        ("ft-all", ["FC_ywb", "FC_ywbx", "FC_ywbx"], []),
        ("ft-last", ["FC_y", "FC_y", "FC_ywb"], []),
        ("ft-bias", ["FC_yb", "FC_ybx", "FC_ybx"], []),
        ("lora-all", ["FC_y", "FC_yx", "FC_yx"], ["LoRA_yw", "LoRA_ywx", "LoRA_ywx"]),
        ("ft-all-lora", ["FC_ywb", "FC_ywbx", "FC_ywbx"], ["LoRA_yw", "LoRA_ywx", "LoRA_ywx"]),
        ("lora-last", ["FC_y", "FC_y", "FC_y"], ["LoRA_yw"]),
        ("skip-lora", ["FC_y", "FC_y", "FC_y"], ["LoRA_yw", "LoRA_yw", "LoRA_yw"]),
        ("skip2-lora", ["FC_y", "FC_y", "FC_y"], ["LoRA_yw", "LoRA_yw", "LoRA_yw"]),
    ],
)
def test_compute_types(name: str, layers: list[str], adapters: list[str]) -> None:
    """Skip2-LoRA §3 and §4.1, for three layers, as the text lists them."""
    assert layer_types(method(name), 3) == layers
    assert adapter_types(method(name), 3) == adapters


def test_connections() -> None:
    assert connections(method("ft-all"), 3) == []
    assert connections(method("lora-last"), 3) == [(2, 3)]
    assert connections(method("lora-all"), 3) == [(0, 1), (1, 2), (2, 3)]
    assert connections(method("skip-lora"), 3) == [(0, 3), (1, 3), (2, 3)]


def test_cacheable() -> None:
    """Skip2-LoRA §4.2: the cache works well for FT-Last, LoRA-Last and Skip-LoRA."""
    assert [m for m in METHOD_NAMES if METHODS[m].cacheable] == ["ft-last", "lora-last", "skip-lora", "skip2-lora"]
    assert [m for m in METHOD_NAMES if METHODS[m].cached] == ["skip2-lora"]
    assert [m for m in METHOD_NAMES if METHODS[m].rows_only] == ["lora-last", "skip-lora", "skip2-lora"]


@pytest.mark.parametrize(
    "row",
    [
        Method("m", "M", weights="all"),
        Method("m", "M", biases="all"),
        Method("m", "M", norms="beta"),
        Method("m", "M", norms="train", adapters="skip"),
        Method("m", "M", adapters="layers"),
    ],
)
def test_not_cacheable(row: Method) -> None:
    """Each of these alone obsoletes what lies below the last layer's output."""
    assert not row.cacheable


def test_batch_norm() -> None:
    """Gamma and beta are trained with all weights, beta alone with the biases, and neither elsewhere."""
    spec = dnn(8, 3, 5)
    trained = {name: [n for n in trainable(m, spec, 2) if ".bn." in n] for name, m in METHODS.items()}
    both = [f"layers.{k}.bn.{n}" for k in (0, 1) for n in ("weight", "bias")]
    assert trained.pop("ft-all") == trained.pop("ft-all-lora") == both
    assert trained.pop("ft-bias") == ["layers.0.bn.bias", "layers.1.bn.bias"]
    assert not any(trained.values())


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_gradients_flow_where_they_are_needed(name: str) -> None:
    """Below a layer without gx nothing is trained except straight to the output; gx stops at the first layer."""
    m = METHODS[name]
    spec = lenet5((1, 28, 28))
    types = layer_types(m, spec.L)
    assert "x" not in types[0]
    lowest = next(k for k in reversed(range(spec.L)) if "x" not in types[k].removeprefix("FC_y"))
    for tensor in trainable(m, spec, 2):
        kind, place = tensor.split(".")[:2]
        if kind == "layers":
            assert int(place) >= lowest, tensor
        else:
            i, j = map(int, place.split("-"))
            assert j == spec.L or i >= lowest, tensor


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"^method must be one of ft-all, .*, skip-ridge, not 'ft'$"):
        method("ft")


def test_ranks_and_parameters_of_a_closed_form() -> None:
    spec, ridge = dnn(561, 6), method("skip-ridge")
    assert [own_rank(m, spec) for m in (ridge, method("skip2-lora"))] == [6, 4]
    D = 561 + 96 + 96
    assert parameters(ridge, spec, 6) == 6 * D + 6 + 1
    assert parameters(ridge, spec, 2) == 2 * D + 3 * 2 * 6 + 6 + 1

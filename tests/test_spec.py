"""Networks and records: the papers' shapes, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantft.errors import UsageError
from instantft.spec import MAX_LAYERS, MAX_WIDTH, PAD, LayerSpec, NetSpec, dnn, lenet5, pad

from .nets import NETS, ODD


def count(spec: NetSpec) -> int:
    return sum(math.prod(s) for name, s in spec.parameters.items() if ".bn." not in name)


@pytest.mark.parametrize(("shape", "n0", "parameters"), [((1, 28, 28), 784, 61_706), ((3, 32, 32), 3072, 62_006)])
def test_lenet5(shape: tuple[int, ...], n0: int, parameters: int) -> None:
    """InstantFT Fig. 4 and Table 1; taps as counted by hand."""
    spec = lenet5(shape)
    assert spec.tap_widths == (n0, 1176, 400, 120, 84)
    assert [g.M for g in spec.geometry] == [4704, 1600, 120, 84, 10]
    assert (spec.L, spec.C) == (5, 10)
    assert count(spec) == parameters
    assert spec.record.size == 1176 + 400 + 120 + 84 + 10 == 1790
    assert [(s.name, s.size, s.groups, s.nonnegative) for s in spec.record.segments] == [
        ("x1", 1176, 6, True),
        ("x2", 400, 16, True),
        ("x3", 120, 1, True),
        ("x4", 84, 1, True),
        ("c", 10, 1, False),
    ]


def test_dnn() -> None:
    """Skip2-LoRA §5.1: its cache is 96 + 96 + 3 floats, 358 KiB for 470 samples."""
    spec = dnn(256, 3)
    assert spec.tap_widths == (256, 96, 96)
    assert spec.record.size * 4 * 470 // 1024 == 358
    assert count(spec) == 256 * 96 + 96 + 96 * 96 + 96 + 96 * 3 + 3
    assert set(spec.parameters) - {n for n in spec.parameters if ".bn." in n} == {
        f"layers.{k}.{n}" for k in range(3) for n in ("weight", "bias")
    }
    assert spec.parameters["layers.1.bn.running_var"] == (96,)


@pytest.mark.parametrize("net", NETS)
def test_record_layout(net: str) -> None:
    """Segments follow each other, begin at multiples of PAD, and divide into their groups."""
    record = NETS[net].record
    offset = 0
    for k, s in enumerate(record.segments, 1):
        assert s.name == (f"x{k}" if k < len(record.segments) else "c")
        assert s.offset == offset
        assert s.offset % PAD == 0
        assert s.size % s.groups == 0
        offset += pad(s.size)
    assert record.width == offset
    assert record.size == sum(s.size for s in record.segments)


def test_odd_shapes() -> None:
    """Kernels, padding and pooling that do not fit evenly."""
    assert [g.linear_shape for g in ODD.geometry] == [(5, 13, 10), (7, 3, 3), (19,), (11,), (5,)]
    assert [g.out_shape for g in ODD.geometry] == [(5, 4, 3), (7, 3, 3), (19,), (11,), (5,)]
    assert ODD.parameters["layers.0.weight"] == (5, 3, 3, 2)
    assert ODD.parameters["layers.2.weight"] == (63, 19)


@given(st.integers(0, 10_000))
def test_pad(n: int) -> None:
    assert pad(n) % PAD == 0
    assert 0 <= pad(n) - n < PAD


@pytest.mark.parametrize("net", NETS)
def test_json_round_trip(net: str) -> None:
    spec = NETS[net]
    assert NetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


LAST = LayerSpec("fc", 3)
GOOD = dnn(4, 2, 8).to_json()


@pytest.mark.parametrize(
    ("shape", "layers", "message"),
    [
        ((4, 4), (LAST,), r"input must be \(N,\) or .*, not \[4, 4\]"),
        ((0,), (LAST,), r"not \[0\]"),
        ((MAX_WIDTH + 1,), (LAST,), "of at most"),
        ((4,), (), f"must have 1 to {MAX_LAYERS} layers, not 0"),
        ((4,), (LAST,) * (MAX_LAYERS + 1), f"not {MAX_LAYERS + 1}"),
        ((4,), (LayerSpec("fc", 0),), "layer 0: outputs must be 1 to .*, not 0"),
        ((4,), (LayerSpec("fc", 4, pool=2), LAST), "layer 0: pooling needs a feature map"),
        ((4,), (LayerSpec("conv", 4), LAST), r"layer 0: conv layers must come before the first fc"),
        ((1, 4, 4), (LayerSpec("conv", 4, (5, 5)), LAST), "kernel of 5 must fit"),
        ((1, 4, 4), (LayerSpec("conv", 4, (3, 3), (3, 0)), LAST), "padding 0 to kernel-1, not 3 and 3"),
        ((1, 4, 4), (LayerSpec("conv", 4, (3, 3), pool=3), LAST), "pooling by 3 must leave a pixel"),
        ((1, 4, 4), (LayerSpec("conv", 4, (3, 3), pool=0), LAST), "pool must be at least 1, not 0"),
        ((4,), (LayerSpec("fc", 3, relu=True),), "last layer must be a bare fc"),
        ((1, 4, 4), (LayerSpec("conv", 3),), "last layer must be a bare fc"),
        ((1 << 15,), (LayerSpec("fc", 1 << 15), LAST), "parameters, not"),
        ((4,), (LayerSpec("lstm", 3),), "kind must be 'fc' or 'conv', not 'lstm'"),  # type: ignore[arg-type]
    ],
)
def test_networks_that_do_not_fit(shape: tuple[int, ...], layers: tuple[LayerSpec, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as e:
        NetSpec(shape, layers)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": None},
        {"layers": [{"kind": "fc"}]},
        {"layers": [[]]},
        {"input_shape": [4.0]},
        {"input_shape": [True]},
        {"input_shape": 4},
        {"layers": [{**GOOD["layers"][0], "kernel": [1]}]},
        {"layers": [{**GOOD["layers"][0], "out": "8"}]},
    ],
)
def test_descriptions_from_a_stranger(damage: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="network description must list") as e:
        NetSpec.from_json({**GOOD, **damage})
    assert "\n" not in str(e.value)


def test_lenet5_needs_images() -> None:
    with pytest.raises(UsageError, match=r"lenet5 needs images .*, not \[256\]"):
        lenet5((256,))

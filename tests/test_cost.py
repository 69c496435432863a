"""InstantFT's Table 1, cell by cell, and the shapes the counting rules must survive."""

from __future__ import annotations

import pytest

from instantft.cost import (
    MAX_GRAM_BYTES,
    closed_form,
    cost,
    dual_work,
    linear_macs,
    network_parameters,
    parts,
    primal_work,
    spaces,
)
from instantft.methods import METHODS, connections, method
from instantft.spec import LayerSpec, NetSpec, dnn, lenet5

MNIST, SVHN = lenet5((1, 28, 28)), lenet5((3, 32, 32))

# parameters, forward MFLOPs, backward MFLOPs, memory kB, as printed
TABLE_1 = [
    (MNIST, "ft-all", 61_706, "0.851", "1.444", "567.8"),
    (SVHN, "ft-all", 62_006, "1.321", "1.914", "579.4"),
    (MNIST, "ft-last", 850, "0.851", "0.002", "285.8"),
    (MNIST, "ft-bias", 236, "0.851", "0.611", "322.0"),
    (MNIST, "lora-all", 36_328, "0.923", "0.743", "611.8"),
    (MNIST, "lora-last", 376, "0.852", "0.001", "285.4"),
    (MNIST, "skip2-lora", 10_456, "0.872", "0.036", "366.2"),
    (SVHN, "ft-last", 850, "1.321", "0.002", "296.1"),
    (SVHN, "ft-bias", 236, "1.321", "0.611", "332.3"),
    (SVHN, "lora-all", 45_480, "1.412", "0.762", "695.4"),
    (SVHN, "lora-last", 376, "1.322", "0.001", "295.8"),
    (SVHN, "skip2-lora", 19_608, "1.360", "0.054", "449.8"),
]


@pytest.mark.parametrize(("spec", "name", "parameters", "forward", "backward", "memory"), TABLE_1)
def test_table_1(spec: NetSpec, name: str, parameters: int, forward: str, backward: str, memory: str) -> None:
    c = cost(spec, method(name), 4)
    assert c.parameters == parameters
    assert f"{c.forward / 1e6:.3f}" == forward
    assert f"{c.backward_printed / 1e6:.3f}" == backward
    assert f"{c.memory / 1e3:.1f}" == memory


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("ft-all", 850_794, 1_443_906),
        ("ft-last", 850_794, 1_690),
        ("ft-bias", 850_794, 610_866),
        ("lora-all", 923_450, 743_388),
        ("lora-last", 851_546, 832),
        ("skip2-lora", 871_706, 35_552 - 14_240),
        ("skip-lora", 871_706, 35_552 - 14_240),
    ],
)
def test_exact_counts(name: str, forward: int, backward: int) -> None:
    c = cost(MNIST, method(name), 4)
    assert (c.forward, c.backward) == (forward, backward)


def test_cached_step_computes_adapters_only() -> None:
    assert cost(MNIST, method("skip2-lora"), 4).forward_cached == 871_706 - 850_794
    assert cost(MNIST, method("ft-last"), 4).forward_cached == 2 * 84 * 10 + 10
    assert cost(MNIST, method("lora-all"), 4).forward_cached is None


def test_network_totals() -> None:
    assert network_parameters(MNIST) == 61_706
    assert network_parameters(SVHN) == 62_006
    assert sum(linear_macs(MNIST)) == 416_520


def test_batch_norm_is_counted() -> None:
    spec = dnn(256, 3)
    plain = 2 * (256 * 96 + 96 * 96 + 96 * 3) + 195 + 192
    assert cost(spec, method("skip-lora"), 4).forward == plain + 2 * 192 + 8 * (256 + 96 + 96) + 3 * 8 * 3


@pytest.mark.parametrize("name", METHODS)
def test_cost_grows_with_rank(name: str) -> None:
    one, two = (cost(MNIST, method(name), r) for r in (1, 2))
    assert (two.parameters > one.parameters) == (METHODS[name].adapters != "none")


def test_work_of_a_tap_in_both_spaces() -> None:
    """By hand: N = 1,000, T = 50 in 3 batches, R = 4, 10 epochs."""
    primal, dual = primal_work(1000, 50, 4, 10, 20), dual_work(1000, 50, 4, 10)
    assert primal.flops == 10 * 50 * (2 * 4000 + 2 * 4000)
    assert primal.bytes == 10 * (50 * 2 * 4000 + 3 * 3 * 16_000)
    assert dual.flops == 50 * 50 * 1000 + 50 * (8000 + 8000) + 10 * 50 * (2 * 50 * 4)
    assert dual.bytes == 50 * 3 * 4000 + 11 * 50 * 50 * 4


def test_spaces_prefer_what_gains_most() -> None:
    assert spaces((100_352, 96), 256, 4, 100, 20) == (True, False)
    assert spaces((96, 100_352), 256, 4, 100, 20) == (False, True)
    assert spaces((96, 100_352), 256, 4, 1, 20) == (False, False)
    assert spaces((96, 100_352), 256, 4, 1, 20, always=True) == (True, True)


def test_spaces_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    widths, T = (1 << 20, 1 << 22, 1 << 21), int((MAX_GRAM_BYTES // 8) ** 0.5)  # two matrices have room
    assert spaces(widths, T, 4, 100_000, 20) == (False, False, False)  # 164 GB of records
    assert spaces(widths, T, 4, 100_000, 20, always=True) == (False, True, True)
    monkeypatch.setattr("instantft.cost.MAX_DECODED_BYTES", 4 * T * sum(widths))
    assert spaces(widths, T, 4, 100_000, 20) == (False, True, True)
    assert spaces(widths, 2 * T, 4, 100_000, 20) == (False, False, False)


@pytest.mark.parametrize(("T", "space", "n"), [(100, "dual", 100), (2564, "dual", 2564), (2565, "primal", 2565)])
def test_closed_form(T: int, space: str, n: int) -> None:
    """The smaller system is solved, and its cube is in the count."""
    solve = closed_form(MNIST, T)
    assert solve.space == space
    assert solve.flops > 2 * n**3 // 3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spec", [MNIST, dnn(256, 3)], ids=["lenet5", "dnn"])
def test_parts_add_up(name: str, spec: NetSpec) -> None:
    m = METHODS[name]
    each, c = parts(spec, m, 4), cost(spec, m, 4)
    assert len(each) == spec.L + len(connections(m, spec.L))
    assert sum(part.forward for part in each) == c.forward
    assert sum(part.backward for part in each) == c.backward
    if m.solver == "sgd":
        assert sum(part.update for part in each) == 2 * c.parameters
        assert sum(part.update_bytes for part in each) == 12 * c.parameters
    else:
        assert not any(part.backward or part.update for part in each)
    assert all(part.forward_bytes > 0 for part in each)


def test_parts_by_hand() -> None:
    """A layer of 3 to 2 that trains everything below another of 2 to 2, which has batch norm's ReLU between them."""
    spec = NetSpec((3,), (LayerSpec("fc", 2, relu=True), LayerSpec("fc", 2)))
    first, last = parts(spec, method("ft-all"), 1)
    assert (first.type, first.forward, first.backward, first.update) == ("FC_ywb", 12 + 2 + 2, 12 + 2 + 2, 16)
    assert (last.type, last.forward, last.backward, last.update) == ("FC_ywbx", 8 + 2, 8 + 2 + 8, 12)
    assert first.forward_bytes == 4 * (8 + 3 + 2)
    assert last.backward_bytes == 4 * ((2 + 2 + 4) + (2 + 2) + (2 + 2 + 4))
    adapters = parts(spec, method("skip2-lora"), 1)[2:]
    assert [part.name for part in adapters] == ["x0→2", "x1→2"]
    assert adapters[0].forward == 2 * 3 + 2 * 2
    assert adapters[0].backward == 4 * 2 + 2 * 3


def test_dual_and_primal_meet() -> None:
    a, b = closed_form(MNIST, 2564), closed_form(MNIST, 2565)
    assert a.flops == pytest.approx(b.flops, rel=0.02)

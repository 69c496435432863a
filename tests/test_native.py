"""What only the native engine promises: bytes equal to the shared vectors, and results that depend on nothing but the
sample: not on its neighbours, the threads, or where a batch was cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instantft.cache.codecs import CODECS
from instantft.cache.store import Store, memory_store
from instantft.engine import get_engine
from instantft.engine.native import CODEC_IDS, NativeEngine, _Buffers, fma_peak, isas
from instantft.errors import UsageError
from instantft.methods import METHODS
from instantft.spec import LayerSpec, NetSpec, lenet5

from .conftest import ISAS
from .nets import NETS, samples_for, tensors_for

if ISAS == ["not built"]:
    pytest.skip("the native core was not built", allow_module_level=True)

VECTORS = Path(__file__).parent.parent / "vectors"


def _fc(out: int, relu: bool = False) -> LayerSpec:
    return LayerSpec("fc", out, relu=relu)


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeEngine:
    monkeypatch.setenv("INSTANTFT_ISA", request.param)
    return NativeEngine()


def test_every_codec_is_known() -> None:
    assert set(CODEC_IDS) == set(CODECS)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("layout", ["small", "points", "dnn", "lenet5"])
def test_vectors(native: NativeEngine, layout: str, name: str) -> None:
    """Byte for byte what vectors/ holds, both ways, on every instruction set."""
    described = json.loads((VECTORS / "codecs.json").read_text())["layouts"][layout]
    spec = NetSpec.from_json(described["net"])
    with np.load(VECTORS / "codecs.npz") as z:
        rows, expected = z[f"{layout}.rows"], z[f"{layout}.{name}.bytes"]
        decoded = z[f"{layout}.{name}.decoded"] if name != "fp32" else rows
    core, plan = native._core, _Buffers(native._core, spec, {}, [0] * spec.L, 0, 1, name).plan
    assert plan.codec_bytes == described["codecs"][name]["nbytes"] == expected.shape[1]
    assert plan.stride == described["codecs"][name]["stride"]
    width = spec.record.width
    for row, code, back in zip(rows, expected, decoded, strict=True):
        out = np.full(plan.stride + 64, 0xA5, np.uint8)
        core.encode(plan, np.ascontiguousarray(row), out, np.zeros(2 * width + 64, np.uint8))
        np.testing.assert_array_equal(out[: len(code)], code)
        assert (out[plan.stride :] == 0xA5).all(), "nothing is written behind the record"
        got = np.full(width + 16, np.nan, np.float32)
        core.decode(plan, out, got)
        assert np.isnan(got[width:]).all(), "nothing is written behind the row"
        np.testing.assert_array_equal(got[:width].view(np.uint32) << 1, back.view(np.uint32) << 1)  # −0 is 0


WIDTHS = {
    "relu, then none, without a gap": NetSpec((9,), (_fc(96, True), _fc(32), _fc(64, True), _fc(5))),
    "none, then relu": NetSpec((9,), (_fc(16), _fc(48, True), _fc(16), _fc(20))),
    "many classes, off a block": NetSpec((9,), (_fc(49, True), _fc(64))),
    "small groups": NetSpec((2, 5, 5), (LayerSpec("conv", 7, (3, 3), relu=True), _fc(33), _fc(49))),
    "a scale a value": NetSpec((3, 1, 1), (LayerSpec("conv", 300, relu=True), LayerSpec("conv", 40), _fc(3))),
    "odd": NetSpec((9,), (_fc(97, True), _fc(13), _fc(17))),
}
"""Layouts in which a segment, a group or a block ends where a vector does not."""


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("layout", WIDTHS)
def test_codecs_on_every_layout(native: NativeEngine, layout: str, name: str) -> None:
    """Bytes and rows as cache/codecs.py has them, and nothing touched behind either."""
    spec = WIDTHS[layout]
    record, numpy_codec = spec.record, CODECS[name]
    rows = np.zeros((4, record.width), np.float32)
    rng = np.random.default_rng(3)
    for s in record.segments:
        value = rng.normal(size=(4, s.size)) * rng.lognormal(size=(4, s.size))
        rows[:, s.offset : s.offset + s.size] = np.abs(value) if s.nonnegative else value
    core, plan = native._core, _Buffers(native._core, spec, {}, [0] * spec.L, 0, 1, name).plan
    expected = numpy_codec.encode(rows, record)
    decoded = numpy_codec.decode(expected, record)
    assert plan.stride == expected.shape[1]
    for row, code, back in zip(rows, expected, decoded, strict=True):
        out = np.full(plan.stride + 64, 0xA5, np.uint8)
        core.encode(plan, row, out, np.zeros(2 * record.width + 64, np.uint8))
        np.testing.assert_array_equal(out[: plan.codec_bytes], code[: plan.codec_bytes])
        assert (out[plan.stride :] == 0xA5).all()
        got = np.full(record.width + 16, np.nan, np.float32)
        core.decode(plan, out, got)
        np.testing.assert_array_equal(got[: record.width], back)
        assert np.isnan(got[record.width :]).all()


@pytest.mark.parametrize("layout", WIDTHS)
def test_nf4_hw_takes_any_values_and_any_bytes(native: NativeEngine, layout: str) -> None:
    """Values on both sides of the limits and between two integers, entries that are noise: as cache/codecs.py does."""
    spec, c = WIDTHS[layout], CODECS["nf4-hw"]
    record, rng = spec.record, np.random.default_rng(7)
    core, plan = native._core, _Buffers(native._core, spec, {}, [0] * spec.L, 0, 1, "nf4-hw").plan
    scale = 2.0 ** rng.integers(-40, 40, (60, record.width))
    rows = (rng.normal(size=scale.shape) * np.where(rng.random((60, 1)) < 0.3, 2.0**-16, scale)).astype(np.float32)
    rows[:10] = np.round(rows[:10] * 2.0**17) * np.float32(2.0**-17)  # ties
    rows[10], rows[11] = np.inf, -np.inf
    expected = c.encode(rows, record)
    scratch, got = np.zeros(2 * record.width + 64, np.uint8), np.zeros(record.width + 16, np.float32)
    for row, code in zip(rows, expected, strict=True):
        out = np.full(plan.stride + 64, 0xA5, np.uint8)
        core.encode(plan, row, out, scratch)
        np.testing.assert_array_equal(out[: plan.stride], code)
    noise = rng.integers(0, 256, (60, plan.stride), np.uint8)
    for data, back in zip(noise, c.decode(noise, record), strict=True):
        core.decode(plan, np.pad(data, (0, 16), constant_values=0xA5), got)
        np.testing.assert_array_equal(got[: record.width], back)


def test_fp16_keeps_nan(native: NativeEngine) -> None:
    """A record that is not a number must still be seen after the cache."""
    spec = WIDTHS["odd"]
    core, plan = native._core, _Buffers(native._core, spec, {}, [0] * spec.L, 0, 1, "fp16").plan
    row = np.zeros(spec.record.width, np.float32)
    row[3] = np.nan
    out, got = np.zeros(plan.stride + 64, np.uint8), np.zeros(spec.record.width + 16, np.float32)
    core.encode(plan, row, out, np.zeros(2 * spec.record.width + 64, np.uint8))
    core.decode(plan, out, got)
    assert np.isnan(got[3])
    assert np.isfinite(np.delete(got, 3)).all()


@pytest.mark.parametrize("capacity", [60, 59, 7])
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("layout", WIDTHS)
def test_capacity_changes_nothing(native: NativeEngine, layout: str, name: str, capacity: int) -> None:
    """More samples than a chunk holds, so that computed, kept and decoded records lie side by side."""
    spec, m, T = WIDTHS[layout], METHODS["skip-lora"], 60
    tensors = tensors_for(spec, m)
    x, y = samples_for(spec, T)
    order = np.stack([np.random.default_rng(e).permutation(T) for e in range(3)]).astype(np.int32)

    def trained(store: Store) -> dict[str, np.ndarray]:
        trainer = native.trainer(spec, tensors, m, 4, x, y, numbers=np.arange(T), store=store, batch_size=7, lr=0.01)
        trainer.epochs(order)
        return trainer.tensors()

    full = memory_store(name, spec.record, T)
    native.fill(spec, tensors, x, np.arange(T), full)
    expected = trained(full)
    for key, value in trained(memory_store(name, spec.record, capacity)).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


@pytest.mark.parametrize("net", NETS)
def test_a_sample_does_not_know_its_neighbours(native: NativeEngine, net: str) -> None:
    """Records are the same to the bit whichever samples are computed beside them, and however many."""
    spec = NETS[net]
    tensors = tensors_for(spec)
    x, _ = samples_for(spec, 41)
    whole = native.records(spec, tensors, x)
    for n in (1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 20, 33):
        np.testing.assert_array_equal(native.records(spec, tensors, x[:n]), whole[:n])
        np.testing.assert_array_equal(native.records(spec, tensors, x[-n:]), whole[-n:])


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_nothing(native: NativeEngine, threads: int) -> None:
    spec, T = NETS["lenet5"], 101
    tensors = tensors_for(spec, METHODS["skip-lora"])
    x, _ = samples_for(spec, T)
    np.testing.assert_array_equal(native.forward(spec, tensors, x), native.forward(spec, tensors, x, threads))
    np.testing.assert_array_equal(native.records(spec, tensors, x), native.records(spec, tensors, x, threads))
    for name in CODECS:
        stores = [memory_store(name, spec.record, T) for _ in range(2)]
        for store, n in zip(stores, (1, threads), strict=True):
            native.fill(spec, tensors, x, np.arange(T), store, n)
        np.testing.assert_array_equal(stores[0].data, stores[1].data)


def test_instruction_sets_agree(native: NativeEngine) -> None:
    """Fused and unfused multiply-adds round differently: 1e-5 of the largest logit after five layers."""
    spec = lenet5((1, 28, 28))
    tensors = tensors_for(spec, METHODS["skip-lora"])
    x, _ = samples_for(spec, 40)
    first = get_engine("reference").forward(spec, tensors, x)
    assert np.abs(native.forward(spec, tensors, x) - first).max() <= 1e-5 * np.abs(first).max()


def test_two_kinds_of_adapters_are_refused() -> None:
    spec = NETS["lenet5"]
    tensors = tensors_for(spec, METHODS["lora-all"]) | tensors_for(spec, METHODS["skip-lora"])
    with pytest.raises(UsageError, match="adapters must lead either"):
        NativeEngine().forward(spec, tensors, samples_for(spec, 2)[0])


def test_order_must_stay_inside_the_data() -> None:
    spec, m = NETS["dnn"], METHODS["skip-lora"]
    tensors = tensors_for(spec, m)
    x, y = samples_for(spec, 5)
    trainer = NativeEngine().trainer(spec, tensors, m, 4, x, y, numbers=np.arange(5), store=None, batch_size=2, lr=0.1)
    for bad in (5, -1):
        with pytest.raises(UsageError, match="order must hold rows 0 to 4, not"):
            trainer.epochs(np.array([[0, 1, bad]], np.int32))


def test_numbers_must_not_be_negative() -> None:
    spec, m = NETS["dnn"], METHODS["skip-lora"]
    x, y = samples_for(spec, 3)
    with pytest.raises(UsageError, match="sample numbers must be at least 0, not -4"):
        NativeEngine().trainer(
            spec,
            tensors_for(spec, m),
            m,
            4,
            x,
            y,
            numbers=np.array([1, -4, 2]),
            store=memory_store("fp32", spec.record, 3),
            batch_size=2,
            lr=0.1,
        )


REFUSED: dict[str, tuple[list[list[int]], tuple[int, int, int], int, int]] = {
    "an input too wide": ([[0, 3, 1, 1, 0, 0, 0, 0, 1, 0]], (65536, 65536, 1), 0, 1),
    "no input": ([[0, 3, 1, 1, 0, 0, 0, 0, 1, 0]], (0, 1, 1), 0, 1),
    "an absurd rank": ([[0, 3, 1, 1, 0, 0, 0, 0, 1, 128]], (4, 1, 1), 2**31 - 1, 1),
    "no batch": ([[0, 3, 1, 1, 0, 0, 0, 0, 1, 0]], (4, 1, 1), 0, 0),
    "gx at the first layer": ([[0, 3, 1, 1, 0, 0, 0, 0, 1, 5]], (4, 1, 1), 0, 1),
    "a kernel wider than its input": (
        [[1, 3, 5, 5, 0, 0, 0, 0, 1, 0], [0, 3, 1, 1, 0, 0, 0, 0, 1, 0]],
        (1, 4, 4),
        0,
        1,
    ),
    "training from a later conv": (
        [[1, 3, 3, 3, 0, 0, 0, 0, 1, 0], [1, 3, 3, 3, 0, 0, 0, 0, 1, 1], [0, 3, 1, 1, 0, 0, 0, 0, 1, 0]],
        (1, 9, 9),
        0,
        1,
    ),
    "a ReLU on the logits": ([[0, 3, 1, 1, 0, 0, 0, 1, 1, 0]], (4, 1, 1), 0, 1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_make_no_sense_are_refused(case: str) -> None:
    """The C interface checks for itself; the Python side refuses most of these before."""
    from instantft._core import Plan

    layers, shape, rank, batch = REFUSED[case]
    with pytest.raises(ValueError, match="the core refused"):
        Plan(np.array(layers, np.int32), shape, rank, batch, 0)


def test_isa_is_forced_by_the_environment() -> None:
    code = "from instantft.engine import get_engine; print(get_engine('native').isa)"
    for isa in isas():
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            env={**os.environ, "INSTANTFT_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == isa, done.stderr


def test_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTANTFT_ISA", "mmx")
    with pytest.raises(UsageError, match=r"INSTANTFT_ISA must be one of .*scalar.*, not 'mmx'"):
        get_engine()


def test_peak_is_a_rate() -> None:
    assert 1e7 < fma_peak() < 1e13

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
from instantft.cache.store import memory_store
from instantft.engine import get_engine
from instantft.engine.native import _CODEC_IDS, NativeEngine, _Buffers, fma_peak, isas
from instantft.errors import UsageError
from instantft.methods import METHODS
from instantft.spec import NetSpec, lenet5

from .conftest import ISAS
from .nets import NETS, samples_for, tensors_for

if ISAS == ["not built"]:
    pytest.skip("the native core was not built", allow_module_level=True)

VECTORS = Path(__file__).parent.parent / "vectors"


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeEngine:
    monkeypatch.setenv("INSTANTFT_ISA", request.param)
    return NativeEngine()


def test_every_codec_is_known() -> None:
    assert set(_CODEC_IDS) == set(CODECS)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("layout", ["small", "dnn", "lenet5"])
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
        np.testing.assert_array_equal(got[:width].view(np.uint32) << 1, back.view(np.uint32) << 1)  # −0 is 0


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

"""The detectors in C that microcontrollers get: alarms at the same samples as those of watch/detectors.py, whose scores
they match to the bit."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.data import Samples
from instantft.export.c import export_c
from instantft.solvers.calibration import softmax
from instantft.watch.detectors import PER_ROW, ROWS, Adwin, Cusum, Scale, TapStatistics

from .device import WARNINGS
from .watched import trained, world

ROOT = Path(__file__).parent.parent
DRIFT = ROOT / "native" / "embedded" / "src" / "instantft_drift.c"
PROGRAM = ROOT / "native" / "embedded" / "tests" / "test_drift.c"
VECTORS = json.loads((ROOT / "vectors" / "drift.json").read_text())

EXP = 1e-15
"""NumPy's exp and libm's may differ in the last bit of a number up to 1."""

FLOAT = 1e-5
"""A distance is a mean of float32 squares in NumPy, and of doubles in C."""

TARGETS = {
    "gcc": "gcc",
    "gcc, fused where it may": "gcc -O3 -march=native -ffp-contract=fast",
    "clang": "clang -O2 -march=native -ffp-contract=fast",
    "sanitizers": "gcc -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    "a53": "aarch64-linux-gnu-gcc -O2 -mcpu=cortex-a53 -ffp-contract=fast -static",
    "m4": "arm-none-eabi-gcc -O2 -mcpu=cortex-m4 -mfpu=fpv4-sp-d16",
    "m7": "arm-none-eabi-gcc -O2 -mcpu=cortex-m7 -mfpu=fpv5-d16 -ffp-contract=fast",
}
"""Compilers. The Cortex-M7 has multiply-adds of doubles, which would change sums."""

RUNNERS = {
    "a53": "qemu-aarch64",
    "m4": "qemu-system-arm -M mps2-an386 -nographic -monitor none -serial none -semihosting-config "
    "enable=on,target=native -kernel",
    "m7": "qemu-system-arm -M mps2-an500 -nographic -monitor none -serial none -semihosting-config "
    "enable=on,target=native -kernel",
}


class CErrors(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_uint32), ("wrong", ctypes.c_uint32), ("score", ctypes.c_double),
        ("bucket", ctypes.c_uint16 * (PER_ROW + 1) * ROWS), ("buckets", ctypes.c_uint8 * ROWS),
        ("since", ctypes.c_uint8),
    )  # fmt: skip


class CCusum(ctypes.Structure):
    _fields_ = (
        ("mean", ctypes.c_double), ("deviation", ctypes.c_double), ("sum", ctypes.c_double * 2),
        ("run", ctypes.c_uint32 * 2), ("sums", ctypes.c_uint8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler here")
    path = tmp_path_factory.mktemp("drift") / "drift.so"
    command = ["cc", "-std=c11", "-O2", *WARNINGS, "-fPIC", "-shared", str(DRIFT), "-lm", "-o", str(path)]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(path))
    for name in ("cusum_score", "doubt", "distance"):
        getattr(found, f"instantft_{name}").restype = ctypes.c_double
    return found


def number(value: float) -> Any:
    return ctypes.c_double(value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_errors_to_the_bit(lib: Any, data: st.DataObject) -> None:
    adwin, held = Adwin(), CErrors()
    lib.instantft_errors_init(ctypes.byref(held))
    known, n = data.draw(st.floats(0, 1)), data.draw(st.sampled_from([0, 3, 256]))
    adwin.expect(known, n)
    lib.instantft_errors_expect(ctypes.byref(held), number(known), ctypes.c_uint32(n))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    for rate, length in data.draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 300)), max_size=4)):
        for wrong in (rng.random(length) < rate).tolist():
            assert bool(lib.instantft_errors_add(ctypes.byref(held), int(wrong))) == adwin.add(float(wrong))
            assert (held.score, held.n) == (adwin.score, len(adwin))
        assert held.wrong == round(adwin.mean * len(adwin))


def test_the_window_is_bounded_in_both(lib: Any) -> None:
    adwin, held = Adwin(), CErrors()
    lib.instantft_errors_init(ctypes.byref(held))
    adwin.expect(0.25, 400_000)
    lib.instantft_errors_expect(ctypes.byref(held), number(0.25), ctypes.c_uint32(400_000))
    assert len(adwin) == held.n <= PER_ROW * (2**ROWS - 1)
    assert len(adwin) > 200_000
    assert sum(map(len, adwin._rows)) == sum(held.buckets)
    assert [row[:n] for row, n in zip(map(list, held.bucket), held.buckets, strict=True)] == adwin._rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e300, 1e300) | st.floats(-20, 20) | st.just(float("nan")), max_size=200),
    st.floats(-5, 5), st.floats(1e-6, 10), st.booleans(),
)  # fmt: skip
def test_moves_to_the_bit(lib: Any, values: list[float], mean: float, deviation: float, both: bool) -> None:
    cusum, held = Cusum(Scale(mean, deviation), both), CCusum()
    lib.instantft_cusum_init(ctypes.byref(held), number(mean), number(deviation), int(both))
    for value in values:
        assert bool(lib.instantft_cusum_add(ctypes.byref(held), number(value))) == cusum.add(value)
        assert lib.instantft_cusum_score(ctypes.byref(held)) == cusum.score
        assert lib.instantft_cusum_begun(ctypes.byref(held)) == cusum.begun


def test_doubt_and_distance(lib: Any) -> None:
    rng = np.random.default_rng(0)

    def pointer(a: Any) -> Any:
        return a.ctypes.data_as(ctypes.c_void_p)

    for n in (1, 2, 10, 784):
        logits = (30 * rng.normal(size=n)).astype(np.float32)
        assert abs(lib.instantft_doubt(pointer(logits), n) - (1 - softmax(logits[None].astype(float)).max())) <= EXP
        taps = TapStatistics.of([rng.normal(2, 3, (50, n)).astype(np.float32)])
        x = rng.normal(5, 9, n).astype(np.float32)
        found = lib.instantft_distance(pointer(x), pointer(taps.means[0]), pointer(taps.deviations[0]), n)
        assert found == pytest.approx(float(taps.distance([x[None]])[0]), rel=FLOAT)


def test_the_vectors_are_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make", ROOT / "vectors" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.drift() == VECTORS


@pytest.mark.parametrize("target", TARGETS)
def test_alarms_come_at_the_same_samples_everywhere(tmp_path: Path, target: str) -> None:
    compiler, runner = TARGETS[target].split(), RUNNERS.get(target, "").split()
    missing = [tool for tool in (compiler[0], *runner[:1]) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    sources, warnings = [DRIFT, PROGRAM], list(WARNINGS)
    if target in ("m4", "m7"):
        compiler += ["-mthumb", "-mfloat-abi=hard", "--specs=rdimon.specs", "-nostartfiles"]
        warnings = []  # of the board's start
        board = ROOT / "tools" / "embedded"
        start = subprocess.run(
            [*compiler, "-print-file-name=rdimon-crt0.o"], capture_output=True, text=True, check=True
        )
        sources += [board / "mps2.c", Path(start.stdout.strip())]
        compiler += ["-T", str(board / "mps2.ld"), "-Wl,--defsym=DEVICE_RAM=65536"]
    command = [*compiler, "-std=c11", *warnings, *map(str, sources), "-lm", "-o", str(tmp_path / "t")]
    subprocess.run(command, check=True)
    done = subprocess.run([*runner, str(tmp_path / "t")], capture_output=True, text=True, check=True, timeout=100)

    def told(alarms: list[list[int]]) -> str:
        return "".join(f" {at}({n})" for at, n in alarms)

    wanted = [f"errors {k}:{told(s['alarms'])}, {s['wrong']} of {s['window']}" for k, s in enumerate(VECTORS["errors"])]
    wanted += [f"moves {k}:{told(s['alarms'])}" for k, s in enumerate(VECTORS["moves"])]
    assert done.stdout.splitlines() == [*wanted, "doubt and distance as they should be"]


def test_the_export_brings_them_with_an_example(tmp_path: Path) -> None:
    """40 samples that the network knows, then 200 of another world."""
    old, new = world(0, 40), world(1, 200)
    data = Samples(np.concatenate([old[0], new[0]]), np.concatenate([old[1], new[1]]), trained().spec.input_shape)
    export_c(trained(), None, tmp_path / "c", samples=64, data=data, lr=0.1)
    for name in ("include/instantft_drift.h", "src/instantft_drift.c", "tests/test_drift.c"):
        assert (tmp_path / "c" / name).read_bytes() == (ROOT / "native" / "embedded" / name).read_bytes()
    if not shutil.which("make") or not shutil.which("cc"):
        pytest.skip("there is no compiler here")
    command = ["make", "-s", "-C", str(tmp_path / "c"), "CFLAGS=-O1 -Werror"]
    done = subprocess.run([*command, "drift"], capture_output=True, text=True, check=True)
    first, second, *_, last = done.stdout.splitlines()
    assert 40 <= int(first.split()[1][:-1]) < 70, first
    assert second.endswith("adapted to 32 samples")
    assert int(last.split()[0]) > 160  # 40 and 195 of them; the frozen network has 40 and 20
    done = subprocess.run([*command, "test"], capture_output=True, text=True, check=True)
    assert "doubt and distance as they should be" in done.stdout
    assert done.stdout.splitlines()[-1] == "all passed"

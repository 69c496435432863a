"""What importing costs: no extras, and next to no time. And that these checks can fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = ("torch", "onnx", "onnxruntime", "matplotlib", "scipy", "sklearn")


def loaded(code: str) -> list[str]:
    """Which extras are in memory after running `code` in a fresh Python."""
    report = f"import sys; print(*[m for m in {EXTRAS!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], text=True, capture_output=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import instantft",
        "import instantft; [getattr(instantft, n) for n in instantft.__all__]",
        "import instantft.cli, instantft.demo, instantft.bench, instantft.engine.reference",
    ],
)
def test_no_extra_is_imported(code: str) -> None:
    assert loaded(code) == []


def test_the_check_can_fail() -> None:
    pytest.importorskip("scipy")
    assert "scipy" in loaded("import instantft, scipy")


def seconds(code: str) -> float:
    """Shortest of five runs of `code`, in a fresh Python each, without the start of Python."""
    timed = f"import time; t = time.perf_counter()\n{code}\nprint(time.perf_counter() - t)"
    return min(
        float(subprocess.run([sys.executable, "-c", timed], text=True, capture_output=True, check=True).stdout)
        for _ in range(5)
    )


def test_importing_takes_no_time() -> None:
    assert seconds("import instantft") <= 0.2


def test_the_stopwatch_can_fail() -> None:
    assert seconds("import instantft; time.sleep(0.21)") > 0.2

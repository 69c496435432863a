"""`inspect --cost` and `bench --calibrate`: what is said, to people and to scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft import calibrating
from instantft.cli import run
from instantft.cost import cost
from instantft.methods import METHODS, method
from instantft.spec import dnn
from instantft.speed import calibration_file

from . import samples


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(calibrating, "DENSE", (dnn(16, 3, 8), dnn(24, 3, 8)))
    monkeypatch.setattr(calibrating, "CONV", ())


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.safetensors"
    samples.base().save(path)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert run(arguments) == status
    captured = capsys.readouterr()
    assert not (captured.out if status else captured.err)
    return captured.err if status else captured.out


def test_every_method_and_its_parts(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--samples", "100", "--epochs", "3", "--batch-size", "10", "--json")
    found: dict[str, Any] = json.loads(said(capsys, "inspect", base, "--cost", *arguments))["cost"]
    assert [r["method"] for r in found["runs"]] == list(METHODS)
    assert found["calibration"] == {
        "file": str(calibration_file()),
        "missing": f"there is no calibration in {calibration_file()}",
    }
    for r in found["runs"]:
        assert r["peak"] == sum(r["memory"].values())
        assert r["seconds"] is None
        assert r["fits"] is None
    by_name = {r["method"]: r for r in found["runs"]}
    c = cost(samples.SPEC, method("ft-all"), 4)
    assert by_name["ft-all"]["flops"] == 3 * 100 * (c.forward + c.backward) + 30 * 2 * c.parameters
    frozen = cost(samples.SPEC, method("ft-last"), 4).forward
    skip = cost(samples.SPEC, method("skip2-lora"), 4)
    assert skip.forward_cached is not None
    expected = 100 * frozen + 3 * 100 * (skip.forward_cached + skip.backward) + 30 * 2 * skip.parameters
    assert by_name["skip2-lora"]["flops"] == expected
    assert by_name["skip2-lora"]["cache_bytes"] == 100 * 4 * samples.SPEC.record.size


def test_times_after_calibration(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No times, because there is no calibration" in said(capsys, "inspect", base, "--cost")
    made = json.loads(said(capsys, "bench", "--calibrate", "--json"))
    assert made["calibration"] == str(calibration_file())
    found = json.loads(said(capsys, "inspect", base, "--cost", "--json"))["cost"]
    assert found["calibration"]["missing"] is None
    assert all(0 < r["seconds"] < 10 for r in found["runs"])
    text = said(capsys, "inspect", base, "--cost", "--method", "lora-all")
    assert "x0→1" in text
    assert "LoRA_yw" in text
    assert "No times" not in text
    calibration_file().write_text("{")
    assert "is damaged" in said(capsys, "inspect", base, "--cost")
    assert "calibrated in" in said(capsys, "bench", "--calibrate")  # which mends it
    assert "No times" not in said(capsys, "inspect", base, "--cost")


def test_limit(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("inspect", base, "--cost", "--samples", "20000", "--memory-limit", "12M")
    found = json.loads(said(capsys, *arguments, "--json"))["cost"]
    assert {r["fits"] for r in found["runs"]} == {True, False}
    assert "too much" in said(capsys, *arguments)
    error = said(capsys, *arguments, "--method", "skip2-lora", status=2)
    assert error.startswith(
        "error: the run must fit in 12.0 MiB of memory, but skip2-lora with a cache in fp32 of 20,000"
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--method", "ft-all"), "--method, --cache and --memory-limit must go with --cost"),
        (("--cost", "--method", "best"), "method must be one of"),
        (("--cost", "--cache", "zip"), "codec"),
        (("--cost", "--epochs", "0"), "epochs must be"),
        (("--cost", "--memory-limit", "lots"), "a memory limit must be a size"),
    ],
)
def test_refused(base: str, arguments: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error in said(capsys, "inspect", base, *arguments, status=2)


def test_of_an_onnx_model(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What onnxruntime does is timed and weighed, not counted."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is an extra: pip install 'instantft[onnx]'")
    model = str(tmp_path / "net.onnx")
    said(capsys, "export", "onnx", base, "--out", model)
    said(capsys, "bench", "--calibrate")
    text = said(capsys, "inspect", model, "--cost")
    assert "are not counted: onnxruntime runs it, in" in text
    found = json.loads(said(capsys, "inspect", model, "--cost", "--json"))["cost"]
    assert [r["method"] for r in found["runs"]] == [m.name for m in METHODS.values() if m.rows_only]
    assert all(r["seconds"] > 100 * found["seconds_a_sample_of_the_network"] for r in found["runs"])
    x, y = samples.blobs(40)
    np.savez(tmp_path / "ft.npz", x=x, y=y)
    arguments = ("finetune", model, "--data", str(tmp_path / "ft.npz"), "--out", str(tmp_path / "out"), "--json")
    assert json.loads(said(capsys, *arguments))["memory"] == {"peak": None, "limit": None}
    assert json.loads(said(capsys, *arguments, "--memory-limit", "1G"))["memory"]["peak"] > 8 << 20

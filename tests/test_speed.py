"""Predicted times: what is counted, where a calibration is kept, and that every kind of work is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.cache.codecs import CODECS
from instantft.methods import METHODS, Method, method, own_rank
from instantft.spec import dnn, lenet5
from instantft.speed import (
    Calibration,
    calibration_file,
    fill_work,
    load_calibration,
    save_calibration,
    this_machine,
    train_work,
)

DNN, LENET = dnn(256, 3), lenet5((1, 28, 28))


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def train(name: str, T: int = 400, E: int = 10, B: int = 20, codec: str | None = None, **more: Any) -> dict[str, float]:
    m = method(name)
    codec = codec or ("fp32" if m.cached else None)
    return dict(train_work(LENET, m, T, rank=4, epochs=E, batch_size=B, codec=codec, **more))


def test_work_by_hand() -> None:
    """Skip2-LoRA on the fan's DNN: taps of 256, 96, 96, four ranks, 400 samples in 20 steps an epoch."""
    work = train_work(DNN, method("skip2-lora"), 400, rank=4, epochs=10, batch_size=20, codec="fp32")
    assert work["steps"] == 200
    assert work["samples"] == 4000
    assert work["skip"] == 2 * 4000 * 4 * (256 + 96 + 96)
    assert work["products"] == 400 * 4 * (256 + 96 + 96)
    assert not any(kind.startswith(("frozen", "step ")) for kind in work)
    filled = fill_work(DNN, 400, "nf4")
    assert filled["frozen fc"] == 400 * (256 * 96 + 96 * 96 + 96 * 16)
    assert filled["write nf4"] == 400 * (96 + 96 + 16)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.solver == "sgd"])
def test_more_epochs_are_more_of_all_that_steps_take(name: str) -> None:
    one, ten = train(name, E=1, own_step=False), train(name, E=10, own_step=False)
    for kind, n in one.items():
        assert ten[kind] == pytest.approx(n if kind == "runs" else 10 * n)


def test_the_cache_spares_the_frozen_network() -> None:
    assert any(kind.startswith("frozen") for kind in train("skip-lora"))
    assert not any(kind.startswith("frozen") for kind in train("skip2-lora"))
    assert "read nf4" in train("skip2-lora", codec="nf4")


def test_own_step_is_counted_where_it_is_made() -> None:
    assert "own steps" in train("ft-last")
    assert "own steps" not in train("ft-last", own_step=False)
    assert "own steps" not in train("ft-all")


@pytest.mark.parametrize("T", [100, 1000, 6000])
def test_closed_form_solves_the_smaller_system(T: int) -> None:
    work = train_work(LENET, method("skip-ridge"), T, rank=10, epochs=1, batch_size=20, codec="fp32")
    dual = sum(LENET.tap_widths) >= T
    assert ("factor" in work) == dual
    assert ("wide factor" in work) == (not dual)


def made(engine: str = "native") -> Calibration:
    return Calibration({"steps": 2e-6, "samples": 1e-7}, this_machine(engine), 0.1)


def test_seconds() -> None:
    assert made().seconds({"steps": 1000, "samples": 20_000}) == pytest.approx(4e-3)
    assert made().seconds({"steps": 1000, "gram": 1}) is None


def test_kept_and_found_again(tmp_path: Path) -> None:
    found, why = load_calibration("native")
    assert found is None
    assert why == f"there is no calibration in {tmp_path / 'instantft' / 'calibration.json'}"
    assert save_calibration(made()) == calibration_file()
    assert load_calibration("native") == (made(), "")
    assert [p.name for p in calibration_file().parent.iterdir()] == ["calibration.json"]


def test_of_another_engine_machine_or_version(monkeypatch: pytest.MonkeyPatch) -> None:
    save_calibration(made())
    found, why = load_calibration("reference")
    assert found is None
    assert why.endswith("is of another engine")
    monkeypatch.setattr("instantft.__version__", "99", raising=False)
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert load_calibration("native")[1].endswith("is of another node and instantft")


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.integers(0, 300)))
def test_damaged(content: bytes | int) -> None:
    """Any bytes, and any cut of a good file but the whole."""
    path = save_calibration(made())
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: content % len(whole)])
    found, why = load_calibration("native")
    assert found is None
    assert "is damaged" in why


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": 2},
        {"rates": {}},
        {"rates": {"steps": -1.0}},
        {"rates": {"steps": math.nan}},
        {"rates": {"steps": "x"}},
        {"rates": [1]},
        {"error": None},
        {"machine": 3},
    ],
)
def test_wrong_content(wrong: dict[str, Any]) -> None:
    path = save_calibration(made())
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    assert "is damaged or of another version" in load_calibration("native")[1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("m", METHODS.values(), ids=list(METHODS))
def test_every_kind_of_work_is_timed(m: Method, codec: str, timed_kinds: set[str]) -> None:
    """Without which `inspect --cost` could not say a time."""
    name = codec if m.cacheable else None
    for spec in (DNN, LENET):
        for T in (50, 3000, 6000):
            for space in ("auto", "dual") if m.rows_only and T == 50 and m.solver == "sgd" else ("auto",):
                R = own_rank(m, spec)
                work = train_work(spec, m, T, rank=R, epochs=3, batch_size=20, codec=name, space=space)
                assert work.keys() <= timed_kinds
    if name is not None:
        assert fill_work(LENET, 10, name).keys() <= timed_kinds


@pytest.fixture(scope="module")
def timed_kinds() -> set[str]:
    from instantft.calibrating import _cases
    from instantft.engine import get_engine

    return {kind for case in _cases(get_engine()) for work in case.work() for kind in work}

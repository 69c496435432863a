"""The demo: its digits, its picture, and that it runs to the end and leaves what it promises."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft import cli, demo
from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.data import load_samples
from instantft.engine import Engine, get_engine
from instantft.errors import UsageError
from instantft.watch.detectors import Seen

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_digits_are_upsampled_in_place() -> None:
    images, labels = demo.make_digits(0)
    assert images.shape == (1797, 28, 28)
    assert images.dtype == np.uint8
    assert images.max() == 255
    assert sorted(set(labels)) == list(range(10))
    weights = demo._bilinear(8, 28)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights @ np.arange(8), np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7), rtol=1e-5)
    assert (demo.make_digits(1)[1] != labels).any()


def test_upsampling_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    small = np.random.default_rng(0).random((1, 1, 8, 8)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(small), size=(28, 28), mode="bilinear").numpy()
    weights = demo._bilinear(8, 28)
    np.testing.assert_allclose(weights @ small @ weights.T, wanted, atol=1e-6)


def test_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Engine = get_engine()
    for name, value in (("PRETRAIN", 60), ("FINETUNE", 40), ("EPOCHS", 2)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "PRETRAIN_EPOCHS", {"native": 1, "reference": 1})
    monkeypatch.setattr(demo, "CONTESTANTS", (("ft-last", None), ("skip2-lora", "relu4"), ("skip-ridge", "fp32")))
    said: list[str] = []
    told: list[tuple[str, int, float]] = []

    @contextmanager
    def stage(label: str, length: int) -> Iterator[Callable[[float], None]]:
        yield lambda done: told.append((label, length, done))

    got: dict[str, Any] = demo.run_demo(tmp_path / "demo", 0, engine, said.append, stage)
    turns = 9 if engine.name == "native" else 3
    assert told == [("pre-training", 1, 1), *(("adapting", turns, i + 1) for i in range(turns))]
    assert [r["method"] for r in got["rows"]] == ["ft-last", "skip2-lora", "skip-ridge"]
    text = "\n".join(said)
    assert "Skip2-LoRA relu4" in text
    commands = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("instantft ")]
    assert [c[0] for c in commands] == ["evaluate", "finetune", "inspect"]
    assert [cli.run(c) for c in commands] == [0, 0, 0]
    base = Network.load(got["base"])
    assert Seen.read(base.seen, base.spec.tap_widths) is not None  # so that a watcher sees the drift from the start
    Adapter.load(got["adapter"], base)
    for name, T in (("pretrain", 60), ("finetune", 40), ("test", 1697)):
        assert len(load_samples(tmp_path / "demo" / f"{name}.npz", base.spec).x) == T
    assert Path(got["picture"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_demo_as_a_reader_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The closed form wins back what the drift took, Skip2-LoRA most of it, with every cache."""
    pytest.importorskip("instantft._core")
    assert cli.run(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["accuracy_upright"] > 0.9
    assert got["accuracy_before"] < 0.6
    rows = {(r["method"], r["codec"]): r for r in got["rows"]}
    for codec in ("fp32", "nf4", "relu4"):
        assert rows["skip2-lora", codec]["accuracy"] > got["accuracy_before"] + 0.2
        assert rows["skip2-lora", codec]["seconds"] < rows["lora-all", None]["seconds"]
    best = max(r["accuracy"] for r in got["rows"] if r["method"] != "skip-ridge")
    for codec in ("fp32", "relu4"):
        assert rows["skip-ridge", codec]["accuracy"] > best
    assert Path(got["picture"]).is_file()


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, package in (("matplotlib", "matplotlib"), ("sklearn.datasets", "scikit-learn")):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(UsageError, match=rf"needs {package}, .* pip install 'instantft\[demo\]'"):
                demo.run_demo(tmp_path / "demo", 0, get_engine("reference"), lambda _: None)
    assert not (tmp_path / "demo").exists()

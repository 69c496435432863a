"""What docs/guide.md and docs/formats.md say is so."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import instantft as ift
from instantft.cache.codecs import CODECS
from instantft.cli import commands
from instantft.methods import METHODS

from . import samples
from .test_readme import all_commands

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documents are not part of the installed package")


def guide() -> str:
    return (DOCS / "guide.md").read_text(encoding="utf-8")


def test_python_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = samples.blobs(40)
    rng = np.random.default_rng(0)
    first, *others = re.findall(r"```python\n(.*?)```", guide(), re.DOTALL)
    exec(first, {"x": rng.random((40, 3 * 24 * 24), np.float32), "y": (np.arange(40) % 5).astype(np.int32)})
    assert ift.load("base.safetensors").spec.C == 5
    (embedded,) = (block for block in others if "embeddings" in block)
    others.remove(embedded)
    e, of = rng.random((40, 768), np.float32), (np.arange(40) % 10).astype(np.int32)
    exec(embedded, {"x": e, "y": of, "x_test": e, "y_test": of})
    samples.base().save("base.safetensors")
    names: dict[str, Any] = {"x": x, "y": y, "x_test": x, "y_test": y, "x_new": x, "y_new": y}
    names |= {"x_old": x[[0, 5, 9]], "y_old": y[[0, 5, 9]]}
    assert len(others) == 4
    for block in others:
        exec(block, names)
    assert ift.Adapter.load("adapter", names["base"]).method == "skip-ridge"
    assert ift.load("wider.safetensors").spec.C == 4
    assert not names["tuner"].store_.held([5]).any()


def test_options_in_the_guide_exist() -> None:
    known = {"--help", "--version"}
    for command in all_commands(commands):
        known |= {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
    mentioned = set(re.findall(r"--[a-z][a-z-]+", guide()))
    assert mentioned
    assert mentioned <= known
    for name in (*METHODS, *CODECS):
        assert f"`{name}`" in guide()


def test_bytes_in_the_guide_are_right() -> None:
    record = ift.lenet5((1, 28, 28)).record
    for name, codec in CODECS.items():
        assert f"| `{name}` | {codec.bytes_per_sample(record):,} |" in guide()


def test_hash_as_written_down(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    network = ift.Network.init(samples.IMAGES, 0, (0.1,), (0.5, 0.25))
    network.save(path)
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    metadata = header.pop("__metadata__")

    def text(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    fields = [json.loads(metadata[key]) for key in ("spec", "mean", "std")]
    h = hashlib.sha256(text(["instantft-base", "1", *fields]))
    for k in range(2):
        for part in ("weight", "bias"):
            entry = header[f"layers.{k}.{part}"]
            start, end = entry["data_offsets"]
            h.update(text([f"layers.{k}.{part}", entry["shape"]]) + raw[8 + n + start : 8 + n + end])
    assert h.hexdigest() == metadata["hash"] == network.hash


def test_adapter_as_written_down(tmp_path: Path) -> None:
    samples.adapter(samples.base()).save(tmp_path / "a")
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    for key in json.loads((tmp_path / "a" / "adapter_config.json").read_text()):
        assert f"`{key}`" in text

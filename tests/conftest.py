"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from instantft.engine import Engine, get_engine
from instantft.engine.native import isas
from instantft.errors import EngineError

try:
    ISAS = isas()
except EngineError:
    ISAS = ["not built"]

ENGINES = ["reference", *(f"native:{isa}" for isa in ISAS)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The reference engine and the native one on every instruction set this machine has."""
    name, _, isa = str(request.param).partition(":")
    if isa:
        monkeypatch.setenv("INSTANTFT_ISA", isa)
    try:
        return get_engine(name)
    except EngineError as e:
        pytest.skip(f"engine {request.param} is not here: {e}")

"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from instantft.engine import ENGINES, Engine
from instantft.errors import EngineError


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn; the native one only where the core was built."""
    try:
        made: Engine = ENGINES[request.param]()
    except (EngineError, ImportError) as e:
        pytest.skip(f"engine {request.param} is not here: {e}")
    return made

"""Class names and the numbers they stand for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

__all__ = ["Classes", "numbered"]

Classes = tuple[str, ...]
"""Name of class 0, 1, …; empty where classes are numbers and have no names."""


def numbered(names: Sequence[str], present: Collection[str], known: Classes, what: str) -> tuple[NDArray[Any], Classes]:
    """Labels from names.

    Names that are all whole numbers are the labels. Otherwise the order of `known` numbers them and, where nothing is
    known, their own, sorted.

    Args:
        names: (T,) of every sample.
        present: the classes there are; those without samples count too.
        known: names that a network's outputs are known by.
        what: the file or folder, for messages.

    Returns:
        (T,) int64; the names, empty where there are none.

    Raises:
        DataError: a name is not among those known.
    """
    found = sorted({*names, *present})
    if not known and all(re.fullmatch(r"0|[1-9]\d{0,8}", name) for name in found):
        return np.array([int(name) for name in names], np.int64), ()
    order = known or tuple(found)
    if strange := [name for name in found if name not in order]:
        raise DataError(f"{what}: classes must be those known already, {_some(order)}, but there is {strange[0]!r:.60}")
    number = {name: k for k, name in enumerate(order)}
    return np.array([number[name] for name in names], np.int64), order


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:12]) + (", …" if len(names) > 12 else "")

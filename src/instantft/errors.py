"""Every error that instantft raises on purpose.

    InstantFTError                 the root: catch this one to catch them all
    ├── UsageError                 an argument is outside its range, or a combination has no meaning
    ├── DataError                  samples or labels that cannot be used
    ├── FileError                  a file that is missing, damaged, or cannot be written
    │   └── MismatchError          a good file that belongs to another network or data set
    ├── EngineError                the compute engine asked for is not there
    └── DivergedError              training produced a loss that is not finite

Messages are one line: the rule first, then the offending value, then what to do.
The command line prints them as they are and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "DataError",
    "DivergedError",
    "EngineError",
    "FileError",
    "InstantFTError",
    "MismatchError",
    "UsageError",
]


def nearest(name: object, known: Iterable[str]) -> str:
    """What to add to a message about a name that nobody knows: the known one that it resembles, or nothing."""
    from difflib import get_close_matches

    found = get_close_matches(str(name).lower()[:60], known, 1)
    return f" (did you mean {found[0]}?)" if found else ""


class InstantFTError(Exception):
    """Root of all errors raised on purpose."""


class UsageError(InstantFTError, ValueError):
    """An argument is outside its range, or a combination of arguments has no meaning."""


class DataError(InstantFTError, ValueError):
    """Samples or labels that cannot be used."""


class FileError(InstantFTError, OSError):
    """A file that is missing, damaged, or cannot be written."""


class MismatchError(FileError):
    """A good file that belongs to another network or data set."""


class EngineError(InstantFTError, RuntimeError):
    """The compute engine asked for is not there."""


class DivergedError(InstantFTError, ArithmeticError):
    """Training produced a loss that is not finite; nothing was replaced.

    Attributes:
        step: 1-based number of the step whose loss was not finite.
    """

    def __init__(self, step: int, lr: float) -> None:
        self.step = step
        super().__init__(
            f"the loss must stay finite, but step {step} made it NaN or Inf at lr {lr:g}: "
            f"use a smaller --lr, say {lr / 5:g}; nothing was replaced"
        )

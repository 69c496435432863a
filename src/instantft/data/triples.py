"""Drift protocols: from a data set, what a network is trained on, adapted to and tested on.

No sample is in two parts. Images stay bytes (T, channels, height, width) or (T, height, width); features stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, UsageError
from .drift import rotate

__all__ = ["Part", "Triple", "rotation", "shuffled", "silent_to_noisy", "subject_cut", "subjects"]

Set = Mapping[str, NDArray[Any]]

Part = dict[str, NDArray[Any]]
"""x and y as in a sample file, and further keys by which samples belong together."""

Triple = dict[str, Part]
"""`pretrain`, `finetune`, `test`."""


def shuffled(T: int, seed: int) -> NDArray[np.int64]:
    """The order in which drifted images are dealt out: the first ones to fine-tuning, the others to the test."""
    return np.random.default_rng([seed, 75]).permutation(T)


def rotation(data: Set, degrees: float, samples: int = 1024, seed: int = 0) -> Triple:
    """InstantFT's: trained on upright images; adapted to some of the turned test images, tested on the others.

    Args:
        data: train_x, test_x uint8 (T, h, w) or (T, h, w, channels); train_y, test_y (T,).
        degrees: counter-clockwise.
        samples: test images to adapt to.
        seed: decides which.

    Raises:
        DataError: the set is none of images.
        UsageError: `samples` leaves nothing to test on, or the angle is not finite.
    """
    _need(data, "train_x", "train_y", "test_x", "test_y")
    train, test = (_channels_first(data[f"{part}_x"]) for part in ("train", "test"))
    if not 1 <= samples < len(test):
        raise UsageError(f"--samples must be 1 to {len(test) - 1}, which leaves one to test on, not {samples}")
    turned, order = rotate(test, degrees), shuffled(len(test), seed)
    tune, rest = order[:samples], order[samples:]
    return {
        "pretrain": {"x": train, "y": data["train_y"]},
        "finetune": {"x": turned[tune], "y": data["test_y"][tune]},
        "test": {"x": turned[rest], "y": data["test_y"][rest]},
    }


def subjects(data: Set, drifted: Collection[int], windows: int = 210) -> Triple:
    """Skip2-LoRA's for HAR: trained without some persons; adapted to their first windows, tested on their later ones.

    Args:
        data: x (T, N), y, subject, split (T,): split 0 is the training part.
        drifted: the persons.
        windows: of each person, to adapt to.

    Returns:
        Parts with the key `subject`, for ``--groups subject``.

    Raises:
        DataError: the set has no subjects.
        UsageError: a person is not in the set, has too few windows, or nobody else is left.
    """
    parts = subject_cut(data, drifted, windows)
    return {name: {key: data[key][rows] for key in ("x", "y", "subject")} for name, rows in parts.items()}


def subject_cut(data: Set, drifted: Collection[int], windows: int) -> dict[str, NDArray[np.int64]]:
    """The rows of the three parts of `subjects`."""
    _need(data, "x", "y", "subject", "split")
    who = data["subject"]
    present = sorted(set(who.tolist()))
    if not drifted or (strange := sorted(set(drifted) - set(present))):
        raise UsageError(f"--subjects must be among {present}, not {strange if drifted else 'none'}")
    chosen = np.isin(who, sorted(set(drifted)))
    base = np.flatnonzero((data["split"] == 0) & ~chosen)
    rows = [np.flatnonzero(who == s) for s in sorted(set(drifted))]
    shortest = min(len(r) for r in rows)
    if not 1 <= windows < shortest:
        raise UsageError(f"--windows must be 1 to {shortest - 1}, which leaves some of each to test on, not {windows}")
    if not len(base):
        raise UsageError(f"--subjects must leave some of the training part, but {sorted(set(drifted))} leave none")
    return {
        "pretrain": base,
        "finetune": np.sort(np.concatenate([r[:windows] for r in rows])),
        "test": np.sort(np.concatenate([r[windows:] for r in rows])),
    }


def silent_to_noisy(data: Set, recording: str = "silentA_1") -> Triple:
    """Skip2-LoRA's for the cooling fan: trained in a silent room, adapted to one noisy recording, tested on another.

    Args:
        data: pretrain_x, finetune_x, test_x (470, 256), their y, and the same of other rooms, pretrain_ROOM_x.
        recording: the silent one: silentA_1, silentA_2, silentB_1 or silentB_2.

    Raises:
        DataError: the set is none of the fan.
        UsageError: it has no such recording.
    """
    _need(data, *(f"{part}_{key}" for part in ("pretrain", "finetune", "test") for key in "xy"))
    rooms = {"silentA_1": "pretrain"}
    rooms |= {key[9:-2]: key[:-2] for key in data if key.startswith("pretrain_silent") and key.endswith("_x")}
    if recording not in rooms:
        raise UsageError(f"--recording must be {', '.join(sorted(rooms))}, not {recording!r:.60}")
    parts = {"pretrain": rooms[recording], "finetune": "finetune", "test": "test"}
    return {part: {key: data[f"{prefix}_{key}"] for key in "xy"} for part, prefix in parts.items()}


def _need(data: Set, *keys: str) -> None:
    if missing := [key for key in keys if key not in data]:
        raise DataError(
            f"the set must hold {', '.join(keys)}, but lacks {missing[0]}: this protocol is for another set"
        )


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    if images.ndim not in (3, 4) or images.dtype != np.uint8:
        raise DataError(f"images must be uint8 of 3 or 4 dimensions, not {images.dtype} {list(images.shape)}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if images.ndim == 4 else images

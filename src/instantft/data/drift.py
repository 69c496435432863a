"""Drift made to order: what the world does to samples after a network was trained.

This file changes inputs only; it never touches labels or networks.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["rotate"]

Pixel = TypeVar("Pixel", np.uint8, np.float32)


def rotate(images: NDArray[Pixel], degrees: float) -> NDArray[Pixel]:
    """Images turned about their centre, bilinear, zero where the source has nothing.

    Args:
        images: (T, height, width) or (T, channels, height, width), uint8 or float32.
        degrees: counter-clockwise, as seen with row 0 on top.

    Returns:
        The same shape and type; uint8 is rounded to the nearest.

    Raises:
        UsageError: wrong type or shape, or an angle that is not finite.
    """
    if images.ndim not in (3, 4) or images.dtype not in (np.uint8, np.float32):
        raise UsageError(
            "images must be (T, height, width) or (T, channels, height, width) of uint8 or float32, "
            f"not {list(images.shape)} of {images.dtype}"
        )
    if not math.isfinite(degrees):
        raise UsageError(f"the angle must be finite, not {degrees}")
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    row, column = np.mgrid[:height, :width].astype(np.float64)
    right, up = column - (width - 1) / 2, (height - 1) / 2 - row
    # Where each target pixel comes from: the inverse turn. Rounding takes off the dust of cos 90°, which is not 0.
    from_column = np.round(cos * right + sin * up + (width - 1) / 2, 9)
    from_row = np.round((height - 1) / 2 - (cos * up - sin * right), 9)
    left, top = np.floor(from_column).astype(np.int64), np.floor(from_row).astype(np.int64)
    fx, fy = from_column - left, from_row - top

    flat = images.reshape(-1, height * width)
    out = np.zeros(flat.shape, np.float32)
    for d_row, d_column, weight in (
        (0, 0, (1 - fy) * (1 - fx)),
        (0, 1, (1 - fy) * fx),
        (1, 0, fy * (1 - fx)),
        (1, 1, fy * fx),
    ):
        r, c = top + d_row, left + d_column
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        source = np.where(inside, r * width + c, 0).ravel()
        out += flat[:, source] * np.where(inside, weight, 0).astype(np.float32).ravel()
    if images.dtype == np.uint8:
        np.clip(np.rint(out, out=out), 0, 255, out=out)
    return out.astype(images.dtype).reshape(images.shape)

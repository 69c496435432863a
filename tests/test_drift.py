"""Rotation, against what quarter turns and an independent interpolation say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.data.drift import rotate
from instantft.errors import UsageError

IMAGES = np.random.default_rng(0).random((3, 7, 7)).astype(np.float32)


@pytest.mark.parametrize("quarter", [0, 1, 2, 3, 4, -1])
def test_quarter_turns_are_exact_and_counter_clockwise(quarter: int) -> None:
    np.testing.assert_array_equal(rotate(IMAGES, 90 * quarter), np.rot90(IMAGES, quarter, axes=(1, 2)))


def test_channels_turn_alike() -> None:
    both = np.stack([IMAGES, IMAGES], axis=1)
    out = rotate(both, 33)
    np.testing.assert_array_equal(out[:, 0], rotate(IMAGES, 33))
    np.testing.assert_array_equal(out[:, 1], out[:, 0])


def test_against_torch() -> None:
    torch = pytest.importorskip("torch")
    angle = np.radians(30)
    turn: Any = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])
    grid = torch.nn.functional.affine_grid(turn.float()[None].repeat(3, 1, 1), (3, 1, 7, 7), align_corners=False)
    wanted = torch.nn.functional.grid_sample(
        torch.from_numpy(IMAGES)[:, None], grid, padding_mode="zeros", align_corners=False
    )
    np.testing.assert_allclose(rotate(IMAGES, 30), wanted[:, 0].numpy(), atol=2e-6)  # a few float32 roundings


def test_uint8_stays_uint8() -> None:
    images = (IMAGES * 255).astype(np.uint8)
    out = rotate(images, 10)
    assert out.dtype == np.uint8
    assert np.abs(out - rotate(images.astype(np.float32), 10)).max() <= 0.5


def test_corners_are_zero_filled() -> None:
    assert rotate(np.ones((1, 8, 8), np.float32), 45)[0, 0, 0] == 0


@pytest.mark.parametrize("bad", [np.zeros((7, 7), np.float32), np.zeros((1, 7, 7)), np.zeros((1, 7, 7), int)])
def test_bad_images(bad: Any) -> None:
    with pytest.raises(UsageError, match="images must be"):
        rotate(bad, 10)


def test_bad_angle() -> None:
    with pytest.raises(UsageError, match="angle must be finite, not nan"):
        rotate(IMAGES, float("nan"))

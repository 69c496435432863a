"""Folders of images: one subfolder a class. Pillow (extra ``[images]``) reads them.

Every image is turned as its EXIF says, scaled, cut to the network's input and made to its channels, one at a time, into
the float32 rows that the engines take: the memory is that of the rows, 4 bytes a value, and one image. Both are bounded
before anything is decoded.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, FileError, UsageError
from .classes import Classes, numbered

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "MAX_PIXELS", "SUFFIXES", "Folder", "read_folder"]

Floats = NDArray[np.float32]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

MAX_PIXELS = 1 << 26
"""Largest image that is decoded, 67 megapixels: at most 256 MiB while it is scaled."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Folder:
    """The images of a folder.

    Attributes:
        x: (T, channels·height·width) float32, 0 to 1.
        y: (T,) labels; None where there were no subfolders, or labels were not asked for.
        shape: (channels, height, width).
        classes: names of the classes.
        names: (T,) the images' files, as paths from the folder.
    """

    x: Floats
    y: NDArray[Any] | None
    shape: tuple[int, int, int]
    classes: Classes
    names: tuple[str, ...]


def read_folder(
    path: Path,
    wanted: tuple[int, ...] | None,
    size: int | None,
    labels: bool,
    known: Classes,
    most_bytes: int,
    progress: Callable[[float], None] | None = None,
) -> Folder:
    """Read the images of a folder, in the order of their names.

    Args:
        path: the folder. Its subfolders are the classes (an empty one holds a class's place); where labels are not
            asked for, images may lie in it directly.
        wanted: (channels, height, width) of the network's input, or (N,); None: square images of `size`, of one channel
            if all are grey, else of three.
        size: the shorter side is scaled to this many pixels, then the middle, as large as the network's input, is cut
            out; None: as large as the input, so that as little as possible is cut off.
        labels: whether labels are needed.
        known: names the classes are known by.
        most_bytes: that the rows may take.
        progress: is told the share of the images that is read.

    Raises:
        UsageError: Pillow is not installed, or size is missing or does not fit.
        DataError: there are no images or no classes, too many images, or one that cannot be read or is too large.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UsageError("a folder of images needs Pillow: pip install 'instantft[images]'") from None
    if size is not None and not 1 <= size <= 1 << 13:
        raise UsageError(f"--size must be 1 to {1 << 13} pixels, not {size}")
    names, classes, other = _listed(path, labels)
    if other:
        what = f"{other} file{'s are' if other > 1 else ' is'} left out"
        warnings.warn(f"{path}: {what}, which {'are' if other > 1 else 'is'} no {', '.join(SUFFIXES)}", stacklevel=4)
    shape = _shape(path, wanted, size, names)
    T, N = len(names), math.prod(shape)
    if (taken := 4 * T * N) > most_bytes:
        raise DataError(
            f"{path}: {T:,} images of {'×'.join(map(str, shape))} must take at most {most_bytes:,} bytes of memory, "
            f"but take {taken:,}: use a smaller --size or fewer images"
        )
    y, order = None, known
    if classes:
        y, order = numbered([name.split(os.sep, 1)[0] for name in names], classes, known, str(path))
    x = np.empty((T, N), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's opinions of files that can be read all the same
        for k, name in enumerate(names):
            x[k] = _decoded(path / name, shape, size or min(shape[1:]))
            if progress:
                progress((k + 1) / T)
    x *= np.float32(1 / 255)
    return Folder(x, y, shape, order, tuple(names))


def _listed(path: Path, labels: bool) -> tuple[list[str], list[str], int]:
    """Images as paths from the folder, in order; the classes; how many files are none."""
    try:
        entries = sorted(e.name for e in os.scandir(path) if not e.name.startswith("."))
    except OSError as e:
        raise FileError(f"a folder of images must be readable, but {path} is not: {e.strerror or e}") from None
    classes = [name for name in entries if (path / name).is_dir()]
    names, other = [], 0

    def add(name: str) -> None:
        nonlocal other
        if name.lower().endswith(SUFFIXES) and (path / name).is_file():
            names.append(name)
        else:
            other += 1

    here = [name for name in entries if name not in set(classes)]
    if labels and not classes:
        raise DataError(f"a folder of labelled images must have one subfolder a class, but {path} has none")
    if not labels and any(name.lower().endswith(SUFFIXES) for name in here):
        classes = []
    for name in here:
        add(name)
    if classes and names:
        raise DataError(f"images must be in the subfolders of their classes, but {path} holds {names[0]!r:.60} itself")
    for c in classes:
        for folder, below, inside in os.walk(path / c):
            below[:] = sorted(b for b in below if not b.startswith("."))
            for name in sorted(inside):
                if not name.startswith("."):
                    add(os.path.relpath(os.path.join(folder, name), path))
    if not names:
        raise DataError(f"a folder of images must hold {', '.join(SUFFIXES)} files, but {path} holds none")
    return names, classes, other


def _shape(path: Path, wanted: tuple[int, ...] | None, size: int | None, names: list[str]) -> tuple[int, int, int]:
    """(channels, height, width) that images are made to."""
    if wanted is not None and len(wanted) == 3:
        channels, height, width = wanted
        if channels not in _MODES:
            raise DataError(f"{path}: images can be made to 1, 3 or 4 channels, not to the network's {channels}")
        if size is not None and size < min(height, width):
            raise UsageError(f"--size must be at least the network's {min(height, width)} pixels, not {size}")
        return channels, height, width
    if size is None:
        raise UsageError(f"--size must say how many pixels high and wide the images of {path} are to be made")
    if wanted is not None:
        channels = next((c for c in _MODES if c * size * size == wanted[0]), 0)
        if not channels:
            raise UsageError(f"--size must give the network's {wanted[0]} values in 1, 3 or 4 channels, not {size}")
        return channels, size, size
    grey = all(_opened(path / name).mode in ("1", "L", "LA", "I", "I;16", "I;16B") for name in names)
    return (1 if grey else 3), size, size


def _opened(path: Path) -> Image:
    """An image whose header is read, and nothing else."""
    import PIL.Image

    try:
        image = PIL.Image.open(path, formats=FORMATS)
    except OSError as e:
        words = e.strerror or ("it is none of " + ", ".join(FORMATS))
        raise DataError(f"images must be readable, but {path} is not: {words}") from None
    except Exception as e:  # a decoder meets damage in as many ways as there are formats
        raise DataError(f"images must be readable, but {path} is not: {_words(e)}") from None
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise DataError(f"images must have at most {MAX_PIXELS:,} pixels, but {path} has {image.width}×{image.height}")
    return image


def _decoded(path: Path, shape: tuple[int, int, int], size: int) -> NDArray[np.uint8]:
    """The values of an image, (channels·height·width,), plane by plane."""
    import PIL.Image
    import PIL.ImageOps

    channels, height, width = shape
    with _opened(path) as image:
        try:
            # JPEGs can be decoded at a half, a quarter or an eighth: to no less than twice of what is needed.
            least = 2 * math.ceil(size * max(image.size) / min(image.size))
            image.draft(None, (least, least))
            turned: Any = PIL.ImageOps.exif_transpose(image)
            if turned.mode.startswith("I"):
                turned = PIL.Image.fromarray((np.asarray(turned) >> 8).clip(0, 255).astype(np.uint8))
            elif turned.mode == "P":
                turned = turned.convert("RGBA")
            turned = turned.convert(_MODES[channels])
            # The part that is cut out, in pixels of the image: as large as the input, in units of size / shorter side.
            scale = max(height / turned.height, width / turned.width) * size / min(height, width)
            high, wide = height / scale, width / scale
            left, top = (turned.width - wide) / 2, (turned.height - high) / 2
            box = (max(left, 0.0), max(top, 0.0), min(left + wide, turned.width), min(top + high, turned.height))
            made = turned.resize((width, height), PIL.Image.Resampling.BILINEAR, box)
        except MemoryError:
            raise
        except Exception as e:
            raise DataError(f"images must be readable, but {path} is not: {_words(e)}") from None
    values = np.asarray(made, np.uint8).reshape(height, width, channels)
    planes: NDArray[np.uint8] = values.transpose(2, 0, 1).reshape(-1)
    return planes


def _words(e: Exception) -> str:
    return " ".join(str(e).split())[:120] or type(e).__name__

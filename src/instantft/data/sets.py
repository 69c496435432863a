"""The public data sets of the papers: where they are, what they hold, and their files made of what comes from there.

The hashes of MNIST, Fashion-MNIST and SVHN are those that TensorFlow Datasets publishes for the same files; that of UCI
HAR is given by many who pinned the archive; those of the fan were taken from its authors' repository at the commit
named here. Digests of contents are of arrays made from the published values; of HAR and SVHN none is known, so their
files are checked for shapes and types alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import FileError, UsageError
from . import raw
from .download import download, sha256_of
from .triples import subject_cut

__all__ = ["SETS", "Made", "PublicSet", "Source", "check_made", "check_source", "chosen_sets", "fetch", "make"]

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Source:
    """A file as it is published: its name, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Made:
    """An ``.npz`` of the data folder, made from sources.

    Attributes:
        file: its name.
        arrays: type and shape of what it must hold; it may hold more.
        digest: SHA-256 over these arrays (`digest_of`), where the contents are known beforehand.
    """

    file: str
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    digest: str | None = None


@dataclass(frozen=True)
class PublicSet:
    """A data set.

    Attributes:
        hosts: URLs of folders that hold the sources, the first the one to be asked first.
        read: makes the arrays of every file of `makes`, in their order, from the folder of the sources.
    """

    name: str
    title: str
    licence: str
    home: str
    hosts: tuple[str, ...]
    sources: tuple[Source, ...]
    makes: tuple[Made, ...]
    read: Callable[[Path, Progress], Iterator[Arrays]]

    @property
    def size(self) -> int:
        """Bytes of all sources."""
        return sum(s.size for s in self.sources)

    def folder(self, data: Path) -> Path:
        """Where its sources are in a data folder."""
        return data / "raw" / self.name


def _read_idx_set(folder: Path, progress: Progress) -> Iterator[Arrays]:
    made: Arrays = {}
    for k, (part, prefix) in enumerate((("train", "train"), ("test", "t10k"))):
        made[f"{part}_x"] = raw.read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
        made[f"{part}_y"] = raw.read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
        progress((k + 1) / 2)
    yield made


def _read_svhn_set(folder: Path, progress: Progress) -> Iterator[Arrays]:
    made: Arrays = {}
    for k, part in enumerate(("train", "test", "extra")):
        made[f"{part}_x"], made[f"{part}_y"] = raw.read_svhn(folder / f"{part}_32x32.mat")
        progress((0.15, 0.2, 1.0)[k])
    yield made


def _read_har_set(folder: Path, progress: Progress) -> Iterator[Arrays]:
    made = raw.read_har(folder / HAR_ARCHIVE, progress)
    cut = subject_cut(made, HAR_DRIFTED, HAR_WINDOWS)
    yield made | {f"{part}_idx": rows.astype(np.int16) for part, rows in cut.items()}


def _read_fan_set(folder: Path, progress: Progress) -> Iterator[Arrays]:
    spectra = {}
    for k, name in enumerate(FAN_RECORDINGS):
        spectra[name] = raw.read_fan(folder / f"12cm_hmlo_{name}.zip")
        progress((k + 1) / len(FAN_RECORDINGS))
    for damage in ("damage1", "damage2"):
        yield {f"{prefix}_{key}": value for prefix, recording in FAN_PARTS.items()
               for key, value in _fan_pair(spectra, damage, recording).items()}  # fmt: skip


def _fan_pair(spectra: Arrays, damage: str, recording: str) -> Arrays:
    """A recording of the whole fan, then one of the damaged: class 1, class 2; class 0 where either stands still."""
    fans = [spectra[f"{fan}_{recording}"] for fan in ("normal", damage)]
    y = [np.where(np.arange(len(fan)) < raw.stop_onset(fan), k + 1, 0) for k, fan in enumerate(fans)]
    return {"x": np.concatenate(fans)[:, :FAN_FEATURES], "y": np.concatenate(y).astype(np.uint8)}


HAR_ARCHIVE = "human+activity+recognition+using+smartphones.zip"
HAR_DRIFTED, HAR_WINDOWS = (9, 14, 16, 19, 25), 210
"""Skip2-LoRA's persons, and how many of each one's windows are for fine-tuning: 1,050 in all, as in the paper."""

FAN_FEATURES = 256
FAN_PARTS = {
    "pretrain": "silentA_1",
    "finetune": "noisy_1",
    "test": "noisy_2",
    **{f"pretrain_{room}": room for room in ("silentA_2", "silentB_1", "silentB_2")},
}
"""Which recordings make which part (inferred from the paper's 470 / 470 / 470)."""

FAN_RECORDINGS = tuple(
    f"{fan}_{room}_{k}"
    for fan in ("damage1", "damage2", "normal")
    for room in ("noisy", "silentA", "silentB")
    for k in (1, 2)
)


def _images(train: int, test: int, *shape: int, extra: int = 0) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    counts = {"train": train, "test": test} | ({"extra": extra} if extra else {})
    return tuple(
        entry for part, T in counts.items() for entry in ((f"{part}_x", "u1", (T, *shape)), (f"{part}_y", "u1", (T,)))
    )


def _fan_arrays() -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    return tuple(e for p in FAN_PARTS for e in ((f"{p}_x", "f4", (470, FAN_FEATURES)), (f"{p}_y", "u1", (470,))))


SETS: dict[str, PublicSet] = {
    s.name: s
    for s in (
        PublicSet(
            "mnist",
            "MNIST: handwritten digits, 28×28",
            "CC BY-SA 3.0 (LeCun, Cortes, Burges)",
            "http://yann.lecun.com/exdb/mnist/",
            (
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            (
                Source(
                    "train-images-idx3-ubyte.gz",
                    9_912_422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                Source(
                    "train-labels-idx1-ubyte.gz",
                    28_881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                Source(
                    "t10k-images-idx3-ubyte.gz",
                    1_648_877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                Source(
                    "t10k-labels-idx1-ubyte.gz",
                    4_542,
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            ),
            (
                Made(
                    "mnist.npz",
                    _images(60_000, 10_000, 28, 28),
                    "1eeb366b68d33bc345dcb7a817e83dd22752b34bd23e568c505b651dcf39c86f",
                ),
            ),
            _read_idx_set,
        ),
        PublicSet(
            "fashion_mnist",
            "Fashion-MNIST: clothes, 28×28",
            "MIT (Zalando Research)",
            "https://github.com/zalandoresearch/fashion-mnist",
            (
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            ),
            (
                Source(
                    "train-images-idx3-ubyte.gz",
                    26_421_880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                Source(
                    "train-labels-idx1-ubyte.gz",
                    29_515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                Source(
                    "t10k-images-idx3-ubyte.gz",
                    4_422_102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                Source(
                    "t10k-labels-idx1-ubyte.gz",
                    5_148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            ),
            (
                Made(
                    "fashion_mnist.npz",
                    _images(60_000, 10_000, 28, 28),
                    "3bb2a168fd271cda2495a75a6bf2ea055223727c605e7d93d933fda0c281c468",
                ),
            ),
            _read_idx_set,
        ),
        PublicSet(
            "svhn",
            "SVHN: digits of house numbers, 32×32, colour",
            "for non-commercial use (Netzer et al., Stanford)",
            "http://ufldl.stanford.edu/housenumbers/",
            ("http://ufldl.stanford.edu/housenumbers/",),
            (
                Source(
                    "train_32x32.mat",
                    182_040_794,
                    "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
                ),
                Source(
                    "test_32x32.mat",
                    64_275_384,
                    "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
                ),
                Source(
                    "extra_32x32.mat",
                    1_329_278_602,
                    "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
                ),
            ),
            (Made("svhn.npz", _images(73_257, 26_032, 32, 32, 3, extra=531_131)),),
            _read_svhn_set,
        ),
        PublicSet(
            "har",
            "UCI HAR: human activity from a phone's sensors, 561 features",
            "CC BY 4.0 at the UCI; its README asks for a citation and forbids commercial use (Anguita et al.)",
            "https://archive.ics.uci.edu/dataset/240/human+activity+recognition+using+smartphones",
            ("https://archive.ics.uci.edu/static/public/240/",),
            (Source(HAR_ARCHIVE, 61_005_872, "c00b803081a5c797cd5e4b83700a9810b38d53d9d84e01917e090e1fdbc81031"),),
            (
                Made(
                    "har_features561.npz",
                    (
                        ("x", "f4", (10_299, 561)),
                        ("y", "u1", (10_299,)),
                        ("subject", "u1", (10_299,)),
                        ("split", "u1", (10_299,)),
                        ("pretrain_idx", "i2", (5_894,)),
                        ("finetune_idx", "i2", (1_050,)),
                        ("test_idx", "i2", (696,)),
                    ),
                ),
            ),
            _read_har_set,
        ),
        PublicSet(
            "fan",
            "Cooling fan: vibration spectra, whole and damaged, silent and noisy rooms",
            "none stated; cite Sunaga, Kondo, Matsutani, IEEE Micro 43(6), 2023",
            "https://github.com/matutani/cooling-fan",
            (
                "https://raw.githubusercontent.com/matutani/cooling-fan/fcd19b750f7c50bf145907063b0ff1047e73c010/DATA/",
                "https://github.com/matutani/cooling-fan/raw/fcd19b750f7c50bf145907063b0ff1047e73c010/DATA/",
            ),
            tuple(
                Source(f"12cm_hmlo_{name}.zip", size, sha256)
                for name, size, sha256 in (
                    ("damage1_noisy_1", 731_223, "7795fd2741062d5c51ffb4b01927ca7ea4d5352eb6b6f1efc65c1c2f8007be0d"),
                    ("damage1_noisy_2", 731_122, "b268d5b8cc2b742f60a01ee765267b0084d50a29ccc358adf30d379cb2acfd55"),
                    ("damage1_silentA_1", 713_404, "eb41e3d247dccf1ba26eea1717f35ce142d0f704817eb30233bb0d58d701715d"),
                    ("damage1_silentA_2", 713_889, "3c00a833387b05ccf2558d37fa564e747dcfa0bf0719a9ca3747e487ec2b0eb1"),
                    ("damage1_silentB_1", 714_654, "9c6d20cb1362d176b897b4067a3914b10a364e8e0dffbbd9207384f7957cf9b9"),
                    ("damage1_silentB_2", 714_585, "2784a5e76710e906bc74b02cf0cde28de2047ff63d93342fe61c540cc28501eb"),
                    ("damage2_noisy_1", 730_518, "9cce3d67746930fbc31cb332ff70ced1a43f23aefbc36da924c4e12650ba4983"),
                    ("damage2_noisy_2", 730_887, "9fee65602474a321328ba4103135bf42de47b5f14eac150a7ab4b451679d37c1"),
                    ("damage2_silentA_1", 715_466, "84f31ef22fa241fae8cd96dcb251ac9b5be4297739288bcdf1feca1b8f8fb03d"),
                    ("damage2_silentA_2", 717_398, "01ef93c3e1e7473b218011c2ecfd89b16908732b7dae281aa8581b76c00bff2c"),
                    ("damage2_silentB_1", 717_165, "756bbcb86107d747ef530e4fd1cf92f084f832779e8d90d4918938180f94eece"),
                    ("damage2_silentB_2", 716_003, "49d5b6bba0ed63c9f2bb06012ef505568db809dca47b23cffddf1661526b0a4b"),
                    ("normal_noisy_1", 730_469, "8266c411194f6aa71b814d1c1c43c141425c0a825c7600e0e943864eaa17a285"),
                    ("normal_noisy_2", 731_192, "3ea395d09681c054de21bd6c94161bc92be268df5e1f1630de2dce76d788b7e8"),
                    ("normal_silentA_1", 715_589, "5a2b0281bf97e0849001c4cea456b2bb670a463ce1acacc22288d55cdf817f0f"),
                    ("normal_silentA_2", 716_208, "c70961379f2020b76ad48d575703278f238b6f6b4a11cf6cc28f5e447fe002ad"),
                    ("normal_silentB_1", 715_577, "a7ef8a52e9b80ff32550d5491b1594166a484fc5dfc7a614f5a757964ce62217"),
                    ("normal_silentB_2", 715_090, "801f826ae209a15fa4a4f2bceb851455a101604c7626f4dc853e0c7717ef6fbb"),
                )
            ),
            (
                Made(
                    "fan_damage1.npz", _fan_arrays(), "e962038ac71509f44df37a133d08a8bcebccca0b1a92bf9d136c3d6cbabba91d"
                ),
                Made(
                    "fan_damage2.npz", _fan_arrays(), "6ffbbcaa6bbb76e9450a569001bd3287c40db74fc6a4f9e062f1d208bcc564b5"
                ),
            ),
            _read_fan_set,
        ),
    )
}


def chosen_sets(names: tuple[str, ...]) -> list[PublicSet]:
    """The sets of these names; all, if there are none.

    Raises:
        UsageError: there is no such set.
    """
    for name in names:
        if name not in SETS:
            raise UsageError(f"SET must be {', '.join(SETS)}, not {name!r:.60}")
    return [SETS[name] for name in names or SETS]


def fetch(s: PublicSet, data: Path, progress: Progress) -> None:
    """Download those sources of a set that are not there, or not right; `progress` is told the bytes that are there.

    Raises:
        FileError: as `download`.
    """
    done = 0
    for source in s.sources:
        target = s.folder(data) / source.name
        if check_source(target, source) is not None:
            urls = [host + source.name for host in s.hosts]
            download(urls, target, source.size, source.sha256, partial(_on_top, progress, done))
        done += source.size
        progress(done)


def _on_top(progress: Progress, before: int, here: float) -> None:
    progress(before + here)


def make(s: PublicSet, data: Path, progress: Progress) -> list[Path]:
    """Make the ``.npz`` files of a set from its sources; `progress` is told which share is read.

    Raises:
        FileError: a source is damaged, the arrays are not those that are known, or a file cannot be written.
    """
    paths = []
    for made, arrays in zip(s.makes, s.read(s.folder(data), progress), strict=True):
        if (wrong := _wrong(made, arrays)) is not None:
            raise FileError(f"{made.file} must hold what is known of the set, but {wrong}")

        def write(f: IO[bytes], arrays: Arrays = arrays) -> None:
            np.savez(f, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle

        paths.append(data / made.file)
        files.write_through(paths[-1], write, "a data set")
    return paths


def check_source(path: Path, source: Source, progress: Progress | None = None) -> str | None:
    """What is wrong with a source: None if nothing is."""
    if not path.is_file():
        return "is not there"
    if (size := path.stat().st_size) != source.size:
        return f"has {size:,} bytes, not {source.size:,}"
    found = sha256_of(path, progress)
    return None if found == source.sha256 else f"has SHA-256 {found}, not {source.sha256}"


def check_made(path: Path, made: Made) -> str | None:
    """What is wrong with an ``.npz`` of the data folder: None if nothing is."""
    from .protocols import read_set

    if not path.is_file():
        return "is not there"
    try:
        return _wrong(made, read_set(path, [name for name, _, _ in made.arrays]))
    except FileError as e:
        return str(e)


def _wrong(made: Made, arrays: Arrays) -> str | None:
    for name, kind, shape in made.arrays:
        if name not in arrays:
            return f"lacks {name}"
        found = arrays[name]
        if found.dtype != np.dtype(kind) or found.shape != shape:
            return f"{name} is {found.dtype} {list(found.shape)}, not {np.dtype(kind)} {list(shape)}"
    if made.digest is not None and (digest := digest_of(made, arrays)) != made.digest:
        return f"its arrays have digest {digest}, not {made.digest}"
    return None


def digest_of(made: Made, arrays: Arrays) -> str:
    """SHA-256 over name, type, shape and little-endian bytes of every array of `made`, in their order."""
    h = hashlib.sha256()
    for name, kind, shape in made.arrays:
        h.update(f"{name} {kind} {' '.join(map(str, shape))}\n".encode())
        if math.prod(shape):
            h.update(np.ascontiguousarray(arrays[name]).astype(f"<{kind}", copy=False).data)
    return h.hexdigest()

"""Adapter, base, cache and ONNX files that hypothesis changes, by chance or as somebody who knows the format would.

A trial is a run of hypothesis with its number as seed: what it does depends on neither cores nor other trials. Where
trial n fails, ``read_changed(n, EXAMPLES, folder)`` leaves the file that did it in the folder: of a crash or a hang,
that one; of an exception, the smallest change that hypothesis finds it with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from instantft.adapters import CONFIG_FILE, TENSOR_FILE, Adapter
from instantft.cache.store import open_store
from instantft.engine import get_engine
from instantft.errors import InstantFTError
from instantft.tuner import FineTuner, load

from ..samples import IMAGES, base
from ..watched import trained, world
from .crashes import few, tuned
from .work import Seen, scratch, trials

__all__ = ["mutated_files"]

EXAMPLES = 200
"""Files that a trial changes and reads."""

CODEC, CAPACITY = "nf4", 24

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "subprocess.Popen",
             "pickle.find_class", "socket.connect", "socket.bind", "ctypes.dlopen", "shutil.rmtree")  # fmt: skip
"""What reading a file must never lead to, by Python's audit events."""

WATCHED: list[str] = []

Draw = Callable[[st.SearchStrategy[Any]], Any]
Files = dict[str, bytes]
"""What is in the folder that is read from, by name."""


def _audit(event: str, _: Any) -> None:
    if WATCHED and event in FORBIDDEN:
        WATCHED.append(event)


@functools.cache
def originals() -> Files:
    """Good files: bases, adapters, a cache file, ONNX files where onnxruntime is there."""
    folder = scratch()
    trained().save(folder / "base")
    base(IMAGES).save(folder / "images")
    tuned().adapter.save(folder / "sgd")
    FineTuner(trained(), method="skip-ridge").fit_prepared(*few()).adapter.save(folder / "ridge")
    store = cache_of(folder / "cache")
    store.write(np.arange(CAPACITY), np.random.default_rng(0).normal(size=(CAPACITY, store.record.width)))
    store.flush()
    with contextlib.suppress(ImportError):
        import onnxruntime  # noqa: F401

        from instantft.export.onnx import export_onnx

        export_onnx(trained(), None, folder / "base.onnx")
        export_onnx(base(IMAGES), None, folder / "images.onnx")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("base", "images"):
        found[name] = steady(found[name])
    for name in ("sgd", "ridge"):
        raw, held = steady(found[f"{name}/{TENSOR_FILE}"]), json.loads(found[f"{name}/{CONFIG_FILE}"])
        held["sha256"] = hashlib.sha256(raw).hexdigest()
        found |= {f"{name}/{TENSOR_FILE}": raw, f"{name}/{CONFIG_FILE}": json.dumps(held).encode()}
    return found


def steady(raw: bytes) -> bytes:
    """A safetensors file with its header in order: the library writes metadata in another one each time."""
    n = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + n]), sort_keys=True).encode()
    return len(header).to_bytes(8, "little") + header + raw[8 + n :]


def cache_of(path: Path) -> Any:
    return open_store(path, CODEC, trained().spec.record, CAPACITY, trained().hash, "data")


# -- changes ----------------------------------------------------------------------------------------------------------


def of_ten(draw: Draw, n: int) -> bool:
    """True n times of ten."""
    return bool(draw(st.integers(0, 9)) < n)


def mutated(draw: Draw, raw: bytes) -> bytes:
    """A few changes at random places, half of them near the start."""
    data, other = bytearray(raw), originals()["cache"] + originals()["images"]
    for _ in range(draw(st.sampled_from([1, 1, 2, 4, 16]))):
        at = draw(st.integers(0, max(0, (len(data) if of_ten(draw, 5) else min(len(data), 600)) - 1)))
        kind = draw(st.sampled_from(["cut", "flip", "byte", "number", "splice", "drop", "insert"]))
        if not data or kind == "cut":
            data = data[:at]
        elif kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
        elif kind == "number":
            size = draw(st.sampled_from([4, 8]))
            number = draw(st.sampled_from([0, 1, (1 << 31) - 1, 1 << 31, 1 << 62, 10**12]))
            data[at : at + size] = number.to_bytes(8, "little")[:size]
        elif kind == "splice":
            start = draw(st.integers(0, len(other) - 1))
            piece = other[start : start + draw(st.integers(1, 200))]
            data[at : at + (len(piece) if of_ten(draw, 5) else 0)] = piece
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
    return bytes(data)


VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 1 << 31, 1 << 63, 10**30, 1.5, "", "x", "../../etc/passwd", "999999", None, True,
    [], [0], [1 << 40, 1 << 40], {}, [[]], "F64", "I64", "BF16", "skip-ridge", "full",
)  # fmt: skip

ODD = st.sampled_from(VALUES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
"""What stands in place of a value: something that means something elsewhere, or anything that is JSON."""


def bent(draw: Draw, value: Any) -> Any:
    """JSON with one value replaced, a key renamed or an entry dropped."""
    if isinstance(value, dict) and value and of_ten(draw, 9):
        key, out, kind = draw(st.sampled_from(list(value))), dict(value), draw(st.integers(0, 9))
        if kind == 0:
            del out[key]
        elif kind == 1:
            out[draw(st.sampled_from(["x", "__metadata__", "lora.0-2.A", "../a"]))] = out.pop(key)
        else:
            out[key] = bent(draw, value[key])
        return out
    if isinstance(value, list) and value and of_ten(draw, 7):
        at = draw(st.integers(0, len(value) - 1))
        return [bent(draw, v) if i == at else v for i, v in enumerate(value)]
    if isinstance(value, str) and value[:1] in "{[" and value and of_ten(draw, 8):
        try:
            return json.dumps(bent(draw, json.loads(value)))  # JSON within JSON: a network's shape
        except ValueError:
            pass
    return draw(ODD)


def bent_tensors(draw: Draw, raw: bytes) -> bytes:
    """A safetensors file changed by somebody who knows the format: its header, or a few of its values."""
    n = int.from_bytes(raw[:8], "little")
    if of_ten(draw, 3):
        values = np.frombuffer(raw[8 + n :], "<f4").copy()
        for _ in range(draw(st.integers(1, 3))):
            values[draw(st.integers(0, len(values) - 1))] = draw(st.floats(width=32))
        return raw[: 8 + n] + values.tobytes()
    header = json.dumps(bent(draw, json.loads(raw[8 : 8 + n]))).encode()
    size = len(header) if of_ten(draw, 9) else draw(st.integers(0, 1 << 62))
    return size.to_bytes(8, "little") + header + raw[8 + n :]


# -- files, and who reads them ----------------------------------------------------------------------------------------


@st.composite
def bases(draw: Draw) -> Files:
    raw = originals()[draw(st.sampled_from(["base", "images"]))]
    return {"base": bent_tensors(draw, raw) if of_ten(draw, 5) else mutated(draw, raw)}


@st.composite
def adapters(draw: Draw) -> Files:
    name = draw(st.sampled_from(["sgd", "ridge"]))
    raw, text = originals()[f"{name}/{TENSOR_FILE}"], originals()[f"{name}/{CONFIG_FILE}"]
    if of_ten(draw, 5):  # somebody who makes the checksum match
        raw = bent_tensors(draw, raw) if of_ten(draw, 6) else mutated(draw, raw)
        held = json.loads(text)
        if of_ten(draw, 5):
            held = bent(draw, held)
        if isinstance(held, dict):
            held["sha256"] = hashlib.sha256(raw).hexdigest()
        text = json.dumps(held).encode()
    elif of_ten(draw, 5):
        raw = mutated(draw, raw)
    else:
        text = mutated(draw, text)
    return {TENSOR_FILE: raw, CONFIG_FILE: text}


@st.composite
def caches(draw: Draw) -> Files:
    raw = originals()["cache"]
    if of_ten(draw, 5):  # the same
        n = struct.unpack("<I", raw[12:16])[0]
        header = json.dumps(bent(draw, json.loads(raw[20 : 20 + n]))).encode()
        return {"cache": raw[:12] + struct.pack("<II", len(header), zlib.crc32(header)) + header + raw[20 + n :]}
    return {"cache": mutated(draw, raw)}


@st.composite
def onnx_files(draw: Draw) -> Files:
    return {"net.onnx": mutated(draw, originals()[draw(st.sampled_from(["base.onnx", "images.onnx"]))])}


def predicted(network: Any) -> None:
    if network.spec.geometry[0].N > 1 << 16:
        return
    x = np.random.default_rng(0).normal(size=(3, network.spec.geometry[0].N)).astype(np.float32)
    network.bind(get_engine()).forward(network.spec, network.tensors, x)


def used(found: Adapter) -> None:
    FineTuner(trained()).use(found).predict(world(0, 4)[0])


@functools.cache
def good_cache() -> Any:
    path = scratch() / "cache"
    path.write_bytes(originals()["cache"])
    return cache_of(path)


def same_records(store: Any) -> None:
    held = np.flatnonzero(store.held(np.arange(CAPACITY)))
    assert (store.data[held] == good_cache().data[held]).all(), "a record that was changed counts"


KINDS: dict[str, tuple[st.SearchStrategy[Files], Callable[[Path], None]]] = {
    "base": (bases(), lambda folder: predicted(load(folder / "base"))),
    "adapter": (adapters(), lambda folder: used(Adapter.load(folder, trained()))),
    "cache": (caches(), lambda folder: same_records(cache_of(folder / "cache"))),
    "onnx": (onnx_files(), lambda folder: predicted(load(folder / "net.onnx"))),
}


def read_changed(number: int, examples: int, folder: Path) -> Counter[str]:
    """Read so many changed files: an error of ours, or a network, adapter or cache that can be used."""
    seen: Counter[str] = Counter()
    kinds = [kind for kind in KINDS if kind != "onnx" or "base.onnx" in originals()]

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet, report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.one_of(*(st.tuples(st.just(kind), KINDS[kind][0]) for kind in kinds)))
    def read(changed: tuple[str, Files]) -> None:
        kind, files = changed
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        seen[f"{kind} files {_said(lambda: KINDS[kind][1](folder))}"] += 1

    read()
    assert seen.total() == examples, f"{seen.total()} files were read, not {examples}"
    return seen


def _said(read: Callable[[], None]) -> str:
    WATCHED[:] = ["watching"]
    words = ""
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("ignore")
        try:
            read()
        except InstantFTError as e:
            words = str(e) or "?"
        finally:
            done, WATCHED[:] = WATCHED[1:], []
    assert not done, f"a file led to {done}"
    assert not printed.getvalue(), f"printed: {printed.getvalue()[:200]!r}"
    assert "\n" not in words, f"more than a line: {words[:200]!r}"
    assert len(words) < 1000, f"{len(words)} characters of an error"
    return "refused" if words else "usable"


def mutated_files(count: int) -> Seen:
    sys.addaudithook(_audit)
    for name, raw in originals().items():  # what is imported late is imported now
        if name in ("base", "base.onnx"):
            path = scratch() / name
            path.write_bytes(raw)
            predicted(load(path))
    good_cache()
    number = -(-count // EXAMPLES)
    seen = trials(lambda i, folder: read_changed(i, min(EXAMPLES, count - i * EXAMPLES), folder), number, limit=60.0)
    seen.count = count
    if "base.onnx" not in originals():
        seen.skipped = "ONNX files: onnxruntime is not installed"
    return seen

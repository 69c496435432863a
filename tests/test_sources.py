from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instantft.errors import FileError
from instantft.watch.loop import Command, Label, Sample, Skipped
from instantft.watch.sources import CsvLines, JsonLines, Lines, longest_line, read_folder

from .samples import IMAGES, SPEC, blobs

JSON = JsonLines(SPEC)
X = [0.5, -1, 2, 3e-3, 0, 7]


def message(**held: Any) -> Any:
    return JSON(json.dumps(held).encode())


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=8), longest=st.integers(1, 30))
@example(b"aaaa\nbb", [1, 2, 3], 3)
def test_lines_are_those_of_the_bytes_however_they_come(data: bytes, cuts: list[int], longest: int) -> None:
    ends = sorted({min(c, len(data)) for c in cuts} | {0, len(data)})
    chunks = iter([data[a:b] for a, b in itertools.pairwise(ends)] + [b""])
    wanted: list[bytes | None] = [line if len(line) <= longest else None for line in data.split(b"\n")]
    if wanted[-1] == b"":
        wanted.pop()
    assert list(Lines(lambda: next(chunks), longest)) == wanted


def test_a_line_without_end_takes_no_memory() -> None:
    import tracemalloc

    chunk, count = b"7" * 65536, iter(range(400))
    tracemalloc.start()
    found = list(Lines(lambda: chunk if next(count, None) is not None else b"", 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [None]
    assert peak < 1 << 20
    assert isinstance(JSON(None), Skipped)


def test_samples_labels_and_commands() -> None:
    found = message(x=X, id="a", label=2, user="anna", trusted=True)
    assert isinstance(found, Sample)
    assert (found.name, found.label, found.user, found.trusted) == ("a", 2, "anna", True)
    assert found.x.dtype == np.float32
    assert found.x.tolist() == np.array(X, np.float32).tolist()
    assert message(x=X).name is None
    assert message(id=7, label=0) == Label("7", 0)
    assert message(id="a", label=1, trusted=True) == Label("a", 1, True)
    assert message(command="rollback", to=3) == Command("rollback", {"to": 3})
    assert JSON(b"  \r\n") is None
    floats = base64.b64encode(np.array(X, "<f4").tobytes()).decode()
    assert message(x=floats).x.tolist() == found.x.tolist()
    pixels = np.arange(6, dtype=np.uint8) * 50
    assert message(x=base64.b64encode(pixels.tobytes()).decode(), dtype="uint8").x == pytest.approx(pixels / 255)


def test_images_may_be_nested_and_are_normalised() -> None:
    parse = JsonLines(IMAGES, (0.5, 0.25), (2.0,))
    x = np.arange(60, dtype=np.float64).reshape(2, 6, 5)
    found = parse(json.dumps({"x": x.tolist()}).encode())
    assert isinstance(found, Sample)
    wanted = (x - np.array([0.5, 0.25]).reshape(2, 1, 1)) / 2
    assert found.x == pytest.approx(wanted.ravel())
    assert isinstance(parse(json.dumps({"x": x[0].tolist()}).encode()), Skipped)


@pytest.mark.parametrize(
    ("line", "kind", "why"),
    [
        (b"{", "not JSON", "must be JSON, but"),
        (b"\xff\xfe", "not JSON", "must be JSON, but"),
        (b"[1]", "not JSON", "object, not list"),
        (b"[" * 5000, "not JSON", "must be JSON, but"),
        (b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", "unusable", ""),
        (b'{"x": [1, 2, 3]}', "unusable", "must be [6] as the network's input is, not [3]"),
        (b'{"x": []}', "unusable", ""),
        (b'{"x": 3}', "unusable", "list of numbers or base64, not int"),
        (b'{"x": [1, 2, 3, 4, 5, NaN]}', "unusable", "finite"),
        (b'{"x": [1, 2, 3, 4, 5, 1e39]}', "unusable", "beyond float32"),
        (b'{"x": [1, 2, 3, 4, 5, 1' + b"0" * 400 + b"]}", "unusable", ""),
        (b'{"x": [1, 2, 3, 4, 5, 1' + b"0" * 5000 + b"]}", "not JSON", ""),
        (b'{"x": [1, 2, 3, 4, 5, "a"]}', "unusable", "numbers"),
        (b'{"x": [[1, 2], [3]]}', "unusable", "one length"),
        (b'{"x": [1, 2, 3, 4, 5, null]}', "unusable", ""),
        (b'{"x": "a==="}', "unusable", "base64"),
        (b'{"x": "AAAA", "dtype": "object"}', "unusable", "uint8 or float32, not 'object'"),
        (b'{"x": [0, 0, 0, 0, 0, 0], "label": 3}', "unusable", "0 to 2, not '3'"),
        (b'{"x": [0, 0, 0, 0, 0, 0], "label": true}', "unusable", "0 to 2, not 'True'"),
        (b'{"x": [0, 0, 0, 0, 0, 0], "label": 1.0}', "unusable", "0 to 2, not '1.0'"),
        (b'{"x": [0, 0, 0, 0, 0, 0], "trusted": 1}', "unusable", "true or false, not '1'"),
        (b'{"x": [0, 0, 0, 0, 0, 0], "id": ""}', "unusable", "1 to 200 characters"),
        (b'{"x": [0, 0, 0, 0, 0, 0], "id": [1]}', "unusable", "1 to 200 characters"),
        (b'{"id": "a"}', "unusable", "must have x, or id and label, or command"),
        (b"{}", "unusable", "must have x"),
    ],
)
def test_what_cannot_be_used_is_skipped_with_a_reason(line: bytes, kind: str, why: str) -> None:
    found = JSON(line)
    assert isinstance(found, Skipped)
    assert found.kind == kind
    assert why in found.why
    assert "\n" not in found.why


@settings(max_examples=300, deadline=None)
@given(
    held=st.dictionaries(
        st.sampled_from(["x", "id", "label", "user", "trusted", "dtype", "command", "other"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=20)
        | st.lists(st.floats() | st.integers() | st.text(max_size=2), min_size=5, max_size=7)
        | st.lists(st.lists(st.integers(), max_size=3), max_size=4),
    )
)
def test_any_json_is_a_message_or_skipped(held: dict[str, Any]) -> None:
    found = JSON(json.dumps(held).encode("utf-8", "surrogatepass"))
    assert isinstance(found, Sample | Label | Command | Skipped)
    if isinstance(found, Sample):
        assert found.x.shape == (6,)
        assert np.isfinite(found.x).all()


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_skipped(lines: list[bytes]) -> None:
    comma = CsvLines(SPEC)
    for line in lines:
        for parse in (JSON, comma):
            found = parse(line)
            assert found is None or isinstance(found, Sample | Label | Command | Skipped)


def test_csv_has_a_header_and_columns_with_names() -> None:
    parse = CsvLines(SPEC)
    assert parse("\ufeffid,a,b,c,label,d,e,f,trusted".encode()) is None
    found = parse(b"7,1,2,3,2,4,5,6.5,yes\r")
    assert isinstance(found, Sample)
    assert (found.name, found.label, found.trusted, found.x.tolist()) == ("7", 2, True, [1, 2, 3, 4, 5, 6.5])
    assert parse(b"") is None
    late = parse(b"8,1,2,3,,4,5,6,")
    assert isinstance(late, Sample)
    assert late.label is None
    assert parse(b"8,,,,1,,,,") == Label("8", 1)
    for line, why in (
        (b"8,,,,,,,,", "id and label"),
        (b"8,1,2,3,9,4,5,6,", "0 to 2, not '9'"),
        (b"8,1,2,3,-1,4,5,6,", "0 to 2, not '-1'"),
        (b"8,1,2,x,1,4,5,6,", "numbers"),
        (b"8,1,2,nan,1,4,5,6,", "finite"),
        (b"8,1,2", "9 cells as the header has, not 3"),
        (b'8,"1', "CSV, but"),
        (b"\xff", "CSV, but"),
    ):
        found = parse(line)
        assert isinstance(found, Skipped)
        assert why in found.why


def test_a_folder_is_read_once_in_order_and_its_bad_files_are_skipped(tmp_path: Path) -> None:
    x, y = blobs(5)
    np.savez(tmp_path / "b.npz", x=x, y=y)
    np.savez(tmp_path / "c.npz", x=x[:2])
    (tmp_path / "a.jsonl").write_bytes(b'{"x": [0, 0, 0, 0, 0, 1], "id": "first"}\n\nnonsense\n')
    (tmp_path / "d.csv").write_text("id,1,2,3,4,5,6\nlast,1,1,1,1,1,1\n")
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 nothing")
    np.savez(tmp_path / "f.npz", x=np.zeros((2, 9), np.float32), y=y[:2])
    (tmp_path / ".half.npz").write_bytes(b"not yet")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    found = list(read_folder(tmp_path, SPEC, (), ()))
    names = [m.name for m in found if isinstance(m, Sample)]
    assert names == ["first", *(f"b.npz:{i}" for i in range(5)), "c.npz:0", "c.npz:1", "last"]
    assert [m.label for m in found if isinstance(m, Sample)] == [None, *y.tolist(), None, None, None]
    assert [m.kind for m in found if isinstance(m, Skipped)] == ["not JSON", "bad file", "bad file"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".half.npz", "folder.npz", "notes.txt", "read"]
    assert len(list((tmp_path / "read").iterdir())) == 6
    assert list(read_folder(tmp_path, SPEC, (), ())) == []
    with pytest.raises(FileError, match="folder must be readable"):
        list(read_folder(tmp_path / "none", SPEC, (), ()))


def test_the_longest_line_has_room_for_every_sample() -> None:
    line = json.dumps({"x": [-1.2345678901234567e-308] * 6, "id": "ü" * 200, "user": "ü" * 200}).encode()
    assert len(line) < longest_line(SPEC)

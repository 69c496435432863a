"""CSV files: what is in them comes out; what is wrong is named by file and line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instantft import cli
from instantft.adapters import Adapter
from instantft.data import load_samples, tables
from instantft.errors import DataError, FileError, InstantFTError, UsageError

from . import samples
from .samples import write_npz

X, Y = samples.blobs(12)


def lines(x: object = X, y: object = Y, by: str = ",", head: str = "") -> str:
    rows = [by.join([*map(repr, map(float, row)), str(label)]) for row, label in zip(x, y, strict=True)]  # type: ignore
    return "\n".join([*([head] if head else []), *rows]) + "\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("head", ["", "a,b,c,d,e,f,class", '"a","b, too",c,d,e,f,"class"'])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_last_column_is_the_label(tmp_path: Path, head: str, end: str) -> None:
    text = ("\ufeff" if head else "") + lines(head=head).replace("\n", end) + end
    got = load_samples(write(tmp_path / "a.csv", text), samples.SPEC)
    np.testing.assert_array_equal(got.x, X)
    np.testing.assert_array_equal(got.labels, Y)
    assert got.classes == ()


@pytest.mark.parametrize("by", [";", "\t"])
def test_other_delimiters(tmp_path: Path, by: str) -> None:
    got = load_samples(write(tmp_path / "a.TSV", lines(by=by)), samples.SPEC)
    np.testing.assert_array_equal(got.x, X)


@pytest.mark.parametrize("label", ["kind", "0", "-7"])
def test_a_label_by_name_or_number(tmp_path: Path, label: str) -> None:
    head = "kind,a,b,c,d,e,f"
    rows = [",".join([str(y), *map(repr, map(float, x))]) for x, y in zip(X, Y, strict=True)]
    got = load_samples(write(tmp_path / "a.csv", "\n".join([head, *rows])), samples.SPEC, label=label)
    np.testing.assert_array_equal(got.x, X)
    np.testing.assert_array_equal(got.labels, Y)


def test_names_of_classes(tmp_path: Path) -> None:
    names = np.array(["walk", "run, fast", "rest"])
    quoted = [f'"{name}"' for name in names[Y]]
    path = write(tmp_path / "a.csv", lines(y=quoted))
    got = load_samples(path, samples.SPEC)
    assert got.classes == ("rest", "run, fast", "walk")
    np.testing.assert_array_equal(np.array(got.classes)[got.labels], names[Y])
    known = load_samples(path, samples.SPEC, classes=("walk", "rest", "run, fast"))
    np.testing.assert_array_equal(known.labels, np.array([0, 2, 1])[Y])


def test_groups_and_weights_are_columns(tmp_path: Path) -> None:
    head = "who,a,b,c,d,e,f,w,class"
    rows = [",".join([str(k % 4), *map(repr, map(float, X[k])), f"{1 + k / 2}", str(Y[k])]) for k in range(12)]
    got = load_samples(write(tmp_path / "a.csv", "\n".join([head, *rows])), samples.SPEC, groups="who", weights="w")
    np.testing.assert_array_equal(got.x, X)
    assert got.groups is not None
    assert got.groups.tolist() == [k % 4 for k in range(12)]
    assert got.weights is not None
    assert got.weights[3] == 2.5


def test_numbers_to_be_learnt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", lines(y=Y / 3))
    got = load_samples(path, None, task="regression")
    np.testing.assert_allclose(got.labels[:, 0], Y / 3, rtol=1e-7)
    two = load_samples(path, None, task="regression", label="0,-1")
    np.testing.assert_allclose(two.labels, np.stack([X[:, 0], Y / 3], 1), rtol=1e-7)
    assert two.x.shape == (12, 5)


def test_without_labels_a_column_too_many_is_the_label(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.csv", "\n".join(",".join(map(repr, map(float, row))) for row in X))
    labelled = write(tmp_path / "b.csv", lines())
    for path in (plain, labelled):
        np.testing.assert_array_equal(load_samples(path, samples.SPEC, labels=False).x, X)


BAD = [
    ("word", "1,2,x,0\n1,2,3,0\n1,x,3,0\n", "features must be numbers"),
    ("ragged", "1,2,3,0\n1,2,3\n", "every line must have 4 columns, but line 2 has 3"),
    ("longer", "1,2,3,0\n1,2,3,4,0\n", "line 2 has 5"),
    ("quoted", '1,2,3,0\n1,2,"3,0"\n', "line 2 has 3"),
    ("hole", "1,,3,0\n1,,3,0\n", "features must be numbers"),
    ("NaN", "1,2,3,0\n1,nan,3,0\n", "finite values only, but sample 1"),
    ("huge", "1,2,3,0\n1,1e300,3,0\n", "finite values only, but sample 1"),
    ("header only", "a,b,c,d\n", "must hold at least one sample"),
    ("empty", "", "must begin with a line"),
    ("label only", "0\n1\n", "must have columns beside that of the label"),
]


@pytest.mark.parametrize(("name", "text", "words"), BAD, ids=[b[0] for b in BAD])
def test_bad_tables(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(DataError, match=words) as e:
        load_samples(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_bad_files_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(FileError, match="must be a readable file"):
        load_samples(path)
    path.write_bytes(b"1,2\xff\xfe,0\n")
    with pytest.raises(FileError, match="must be UTF-8 text"):
        load_samples(path)
    write(path, lines(head="a,b,c,d,e,f,class"))
    with pytest.raises(DataError, match=r"--label must be a column of .* \(a, b, c, .*\) or a number to 6, not 'kind'"):
        load_samples(path, label="kind")
    with pytest.raises(DataError, match="--groups or --sample-weights must be a column"):
        load_samples(path, groups="7")
    with pytest.raises(DataError, match="--label must be one column for classes"):
        load_samples(path, label="a,class")
    with pytest.raises(DataError, match=r"must be \[6\] as the network's input is, not \[5\]"):
        load_samples(path, samples.SPEC, groups="a")
    with pytest.raises(UsageError, match="--label must go with a CSV file"):
        load_samples(write_npz(tmp_path / "a.npz", x=X, y=Y), label="y")
    monkeypatch.setattr("instantft.data.MAX_BYTES", 12 * 6 * 4 - 1)
    with pytest.raises(DataError, match="features must take at most 287 bytes"):
        load_samples(path)
    monkeypatch.setattr(tables, "MAX_LINE", 20)
    with pytest.raises(FileError, match="at most 20 characters"):
        load_samples(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans()
)
def test_mutated_files_raise_only_our_errors(tmp_path: Path, changes: list[tuple[int, int]], cut: bool) -> None:
    raw = bytearray(lines(head="a,b,c,d,e,f,class").encode())
    for at, value in changes:
        raw[at % len(raw)] = value
    target = tmp_path / "mutated.csv"
    target.write_bytes(bytes(raw[: changes[0][0] % len(raw)] if cut else raw))
    with contextlib.suppress(InstantFTError):
        assert np.isfinite(load_samples(target, samples.SPEC).x).all()


def test_the_same_adapter_as_from_an_npz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run: Callable[..., int] = lambda *a: cli.run(list(a))  # noqa: E731
    x, y = samples.blobs(60)
    samples.base().save("b.safetensors")
    write(Path("ft.csv"), lines(x, y, head="a,b,c,d,e,f,class"))
    np.savez("ft.npz", x=x, y=y)
    for data, out in (("ft.csv", "a"), ("ft.npz", "b")):
        assert run("finetune", "b.safetensors", "--data", data, "--eval", "ft.npz", "--out", out, "--force") == 0
    a, b = (Adapter.load(tmp_path / out).tensors for out in "ab")
    for key, value in a.items():
        np.testing.assert_array_equal(value, b[key])
    capsys.readouterr()
    assert run("evaluate", "b.safetensors", "--adapter", "a", "--data", "ft.csv", "--label", "class", "--json") == 0
    assert json.loads(capsys.readouterr().out)["n"] == 60
    assert run("predict", "b.safetensors", "--data", "ft.csv", "--out", "p.npz") == 0

"""What an adapter remembers of its samples, and what is made of claims that make no sense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft.adapters import Adapter
from instantft.claims import NEW, UNKNOWN, claims, fingerprints, signed
from instantft.errors import FileError

from . import samples

BASE = samples.base()
X, _ = samples.blobs(40)
PLAIN = samples.adapter(BASE)


def test_fingerprints_tell_samples_apart() -> None:
    found = fingerprints(X)
    assert len(set(found.tolist())) == len(X)
    np.testing.assert_array_equal(fingerprints(X[::2].copy()), found[::2])


def test_answers_come_back_in_any_order(tmp_path: Path) -> None:
    said = np.arange(30) % 3
    said[::5] = UNKNOWN
    signed(PLAIN, X[:30], said, True).save(tmp_path / "a")
    found = claims(Adapter.load(tmp_path / "a", BASE))
    order = np.random.default_rng(0).permutation(40)
    want = np.concatenate([said, np.full(10, NEW)])[order]
    np.testing.assert_array_equal(found.about(X[order], True), want)
    other = np.where(want == NEW, NEW, UNKNOWN)
    np.testing.assert_array_equal(found.about(X[order], False), other)


def test_no_claims() -> None:
    np.testing.assert_array_equal(claims(PLAIN).about(X, False), np.full(40, NEW))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"seen": "A"}, "base64"),
        ({"seen": 3}, "base64"),
        ({"seen": "AAA="}, "whole words"),
        ({"said": None}, "base64"),
        ({"said": ""}, "said of each sample"),
        ({"seen": "AAAAAA==", "said": "AwAAAA=="}, "0 to 2"),
        ({"seen": "AAAAAA==", "said": "/f///w=="}, "0 to 2"),
    ],
)
def test_untrusted_claims(entry: dict[str, Any], words: str) -> None:
    good = signed(PLAIN, X, np.zeros(40, np.int64), False)
    with pytest.raises(FileError, match=words):
        claims(replace(good, config={"left_out": {**good.config["left_out"], **entry}}))
    with pytest.raises(FileError, match="must be an object"):
        claims(replace(good, config={"left_out": "yes"}))

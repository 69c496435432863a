"""A new adapter is compared with the old one on samples that neither was fitted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instantft.acceptance import decide, fingerprints, signed, untrained
from instantft.adapters import Adapter
from instantft.engine import forward, get_engine
from instantft.errors import FileError
from instantft.methods import METHODS
from instantft.tuner import FineTuner

from . import samples

BASE = samples.base()
X, Y = samples.blobs(150)
NOISE = np.random.default_rng(1).integers(0, 3, 150).astype(np.int32)


def tuned(x: Any = X, y: Any = Y, method: str = "auto", **more: Any) -> FineTuner:
    return FineTuner(BASE, method, engine="reference", **more).fit_prepared(x, y)


def kept(t: FineTuner, x: Any = X) -> Adapter:
    return signed(t.adapter, x, decide(t, x, None))


@pytest.mark.parametrize("method", ["auto", "skip2-lora", "ft-last", "ft-all"])
def test_against_the_frozen_network(method: str) -> None:
    t = tuned(method=method, **({} if method == "auto" else {"epochs": 30}))
    found = decide(t, X, None)
    assert found.accepted
    assert found.after > 0.7 > found.before
    assert found.interval[0] > 0
    assert not decide(tuned(y=NOISE, method=method), X, None).accepted


def test_the_same_data_again_is_no_advantage_for_the_old() -> None:
    """SGD that has learnt these samples by heart looks perfect on them; what counts is what it said then."""
    t = tuned(method="skip2-lora", epochs=200, lr=0.1)
    assert t.score(X, Y) == 1
    old = kept(t)
    found = decide(tuned(), X, old)
    assert found.before == old.config["estimate"]["accuracy"]


def test_the_same_data_again_is_no_reason_to_change() -> None:
    """Two estimates that differ by chance do not let a worse method take the place of a better one."""
    again = decide(tuned(), X, kept(tuned()))
    assert again.after == again.before
    assert not again.accepted
    low, high = again.interval
    assert low == pytest.approx(-high)
    assert high > 0.01  # all right so far is no certainty
    good = kept(tuned())
    perfect = {**good.config, "estimate": {"accuracy": 1.0, "samples": 150}}
    low, high = decide(tuned(), X, replace(good, config=perfect)).interval
    assert high - low > 0.02  # all right so far is no certainty
    hopeless = {**good.config, "estimate": {"accuracy": 0.4, "samples": 150}}
    assert decide(tuned(), X, replace(good, config=hopeless)).accepted


def test_new_samples_are_judged_one_by_one() -> None:
    old = kept(tuned(X[:100], Y[:100]), X[:100])
    t = tuned()
    found = decide(t, X, old)
    assert found.n == 50
    worse = decide(tuned(y=NOISE), X, old)
    assert worse.n == 50  # a sample with another label is no new sample
    assert not worse.accepted


def test_an_untrained_adapter_is_the_frozen_network() -> None:
    engine = get_engine("reference")
    for name in METHODS:
        plain = untrained(tuned(method=name).adapter, BASE.tensors)
        logits = forward(engine, BASE.spec, {**BASE.tensors, **plain.tensors}, X)
        np.testing.assert_array_equal(logits, forward(engine, BASE.spec, BASE.tensors, X))
        assert decide(tuned(), X, plain).before == decide(tuned(), X, None).before


def test_fingerprints_tell_samples_apart() -> None:
    found = fingerprints(X)
    assert len(set(found.tolist())) == len(X)
    np.testing.assert_array_equal(fingerprints(X[::2].copy()), found[::2])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"seen": "A"}, "base64"),
        ({"seen": 3}, "base64"),
        ({"seen": "AAA="}, "whole words"),
        ({"estimate": {"accuracy": "good", "samples": 3}}, "an accuracy and a number"),
        ({"estimate": {"accuracy": 2.0, "samples": 3}}, "an accuracy and a number"),
    ],
)
def test_untrusted_claims(entry: dict[str, Any], words: str) -> None:
    good = kept(tuned())
    bad = Adapter(good.method, good.rank, good.spec, good.base_hash, good.tensors, {**good.config, **entry})
    with pytest.raises(FileError, match=words):
        decide(tuned(), X, bad)

"""A new adapter is compared with the old one on samples that neither was fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.acceptance import continues, decide, frozen_wins, succeeds, untrained
from instantft.adapters import Adapter
from instantft.engine import forward, get_engine
from instantft.methods import METHODS
from instantft.tuner import FineTuner

from . import samples

BASE = samples.base()
X, Y = samples.blobs(150)
NOISE = np.random.default_rng(1).integers(0, 3, 150).astype(np.int32)


def tuned(x: Any = X, y: Any = Y, method: str = "auto", **more: Any) -> FineTuner:
    return FineTuner(BASE, method, engine="reference", **more).fit_prepared(x, y)


def kept(t: FineTuner) -> Adapter:
    t.judge()  # as finetune does, so that it is known what SGD says of left-out samples
    return t.adapter


@pytest.mark.parametrize("method", ["auto", "skip2-lora", "ft-last", "ft-all"])
def test_against_the_frozen_network(method: str) -> None:
    t = tuned(method=method, **({} if method == "auto" else {"epochs": 30}))
    found = decide(t, X, None)
    assert found.accepted
    assert found.after > 0.7 > found.before
    assert found.interval[0] > 0
    assert not decide(tuned(y=NOISE, method=method), X, None).accepted


def test_the_same_data_again_is_no_advantage_for_the_old() -> None:
    """SGD that has learnt these samples by heart looks perfect on them; what counts is what it said of others."""
    t = tuned(method="skip2-lora", epochs=200, lr=0.1)
    assert t.score(X, Y) == 1
    found = decide(tuned(), X, kept(t))
    assert found.n == 30  # those that were left out then
    held = t.left_out()
    assert found.before == np.mean(held.logits.argmax(axis=1) == Y[held.judge.rows])


def test_the_same_command_again_passes_but_chance_does_not() -> None:
    """Two methods that differ by chance do not take each other's place on the samples both know."""
    old = kept(tuned())
    again = decide(tuned(), X, old)
    assert again.after == again.before
    assert again.accepted
    other = decide(tuned(rank=1), X, old)
    assert other.n == 150
    assert not other.accepted
    assert decide(tuned(), X, kept(tuned(y=NOISE))).accepted


def test_new_samples_are_asked_of_the_old() -> None:
    old = kept(tuned(X[:100], Y[:100]))
    found = decide(tuned(), X, old)
    assert found.n == 150
    said = tuned(X[:100], Y[:100]).left_out().logits.argmax(axis=1)
    engine = get_engine("reference")
    fresh = forward(engine, BASE.spec, {**BASE.tensors, **old.tensors}, X[100:]).argmax(axis=1)
    assert found.before == np.mean(np.concatenate([said, fresh]) == Y)
    assert not decide(tuned(y=NOISE), X, old).accepted


def test_what_goes_on_from_the_old_need_only_be_better_at_all() -> None:
    """Where half of the labels are wrong, a few points of gain are within chance; but more of the same teaches. That it
    is better than the frozen network takes the margin still."""
    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noisy = np.where(rng.random(150) < 0.5, rng.integers(0, 3, 150), Y).astype(np.int32)
        old, new = kept(tuned(X[:30], noisy[:30])), tuned(y=noisy)
        plain, onward = decide(new, X, old), decide(new, X, old, onward=True)
        assert onward.gain == plain.gain
        assert onward.accepted == (plain.accepted or (plain.gain > 0 and new.judge().accepted))
        seen.add((plain.accepted, onward.accepted))
    assert seen == {(False, False), (False, True), (True, True)}


def test_what_goes_on_from_what() -> None:
    old, new = kept(tuned(X[:40], Y[:40])), kept(tuned())
    assert continues(old, X)
    assert continues(old, X[20:80])
    assert not continues(old, X[21:80])  # less than half of what it learnt from
    assert not continues(old, X[:40])  # nothing new
    assert not continues(untrained(old, {}), X)  # it learnt nothing
    assert succeeds(new, old)
    assert not succeeds(old, new)
    assert not succeeds(new, new)


@pytest.mark.parametrize("method", ["auto", "skip2-lora"])
def test_the_frozen_network_wins_where_the_old_adapter_is_worse_than_nothing(method: str) -> None:
    own = forward(get_engine("reference"), BASE.spec, BASE.tensors, X).argmax(axis=1).astype(np.int32)
    other = kept(tuned(y=((own + 1) % 3).astype(np.int32)))
    x = X[::-1].copy()
    found = frozen_wins(tuned(x, own[::-1].copy(), method=method), x, other)
    assert found.after == 1
    assert found.accepted
    assert not frozen_wins(tuned(method=method), X, kept(tuned())).accepted
    known_by_heart = tuned(method="ft-all", epochs=100).adapter
    assert not frozen_wins(tuned(method=method), X, known_by_heart).accepted


def test_groups_and_runs_are_not_compared() -> None:
    """Whoever finds out that neighbours flatter is not held to what they promised."""
    old = kept(tuned())
    grouped = FineTuner(BASE, engine="reference").fit_prepared(X, Y, groups=np.arange(150) // 15)
    assert decide(grouped, X, old) == grouped.judge()
    half = np.arange(150) // 15
    again = FineTuner(BASE, engine="reference").fit_prepared(X, Y, groups=half)
    assert decide(again, X, kept(grouped)).accepted


def test_one_class_is_never_enough() -> None:
    ones = np.ones(len(Y), np.int32)
    t = tuned(y=ones)
    assert t.judge().after == 1
    assert not t.judge().accepted


def test_an_untrained_adapter_is_the_frozen_network() -> None:
    engine = get_engine("reference")
    for name in METHODS:
        plain = untrained(tuned(method=name).adapter, BASE.tensors)
        logits = forward(engine, BASE.spec, {**BASE.tensors, **plain.tensors}, X)
        np.testing.assert_array_equal(logits, forward(engine, BASE.spec, BASE.tensors, X))
        assert decide(tuned(), X, plain).before == decide(tuned(), X, None).before


def test_adapters_from_python_remember_too() -> None:
    """What was learnt by heart and never judged cannot be asked: there is only the frozen network to compare with."""
    t = tuned(method="ft-all", epochs=100)
    assert decide(tuned(), X, t.adapter) == decide(tuned(), X, None)
    new = decide(tuned(), X, tuned(X[:50], Y[:50], method="ft-all", epochs=100).adapter)
    assert new.n == 100

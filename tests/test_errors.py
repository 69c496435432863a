"""The tree of errors, and the wording: one line, the rule first, then the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import instantft as ift
from instantft import errors
from instantft.backbones.builtin import check_preprocessing
from instantft.cache.codecs import codec
from instantft.cache.store import memory_store
from instantft.data import as_labels, as_samples
from instantft.data.drift import rotate
from instantft.engine import get_engine
from instantft.methods import method
from instantft.solvers.sgd import check_arguments

from . import samples

BASE = samples.base()


def test_tree() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), ift.InstantFTError)
        assert name in (errors.__doc__ or "")
    assert issubclass(ift.UsageError, ValueError)
    assert issubclass(ift.DataError, ValueError)
    assert issubclass(ift.FileError, OSError)
    assert issubclass(ift.MismatchError, ift.FileError)


@pytest.mark.parametrize(
    ("ask", "name", "meant"),
    [(method, "skip2lora", "skip2-lora"), (method, "FT-All", "ft-all"), (codec, "nf-4", "nf4"), (codec, "zip", None)],
)
def test_a_name_that_is_nearly_right(ask: Callable[[str], Any], name: str, meant: str | None) -> None:
    with pytest.raises(ift.UsageError) as e:
        ask(name)
    assert str(e.value).endswith(f"not {name!r} (did you mean {meant}?)" if meant else f"not {name!r}")


def test_a_method_that_is_nearly_right() -> None:
    x, y = samples.blobs(30)
    with pytest.raises(ift.UsageError, match=r"not 'skip2lora' \(did you mean skip2-lora\?\)$"):
        ift.FineTuner(BASE, method="skip2lora").fit(x, y)


def test_diverged_knows_its_step() -> None:
    error = ift.DivergedError(12, 0.5)
    assert error.step == 12
    assert str(error) == (
        "the loss must stay finite, but step 12 made it NaN or Inf at lr 0.5: "
        "use a smaller --lr, say 0.1; nothing was replaced"
    )


PROVOKED: list[tuple[Callable[[], Any], str]] = [
    (lambda: method("x"), "'x'"),
    (lambda: codec("x"), "'x'"),
    (lambda: get_engine("x"), "'x'"),
    (lambda: memory_store("fp32", BASE.spec.record, 0), "0"),
    (lambda: check_arguments(rank=0), "0"),
    (lambda: check_arguments(lr=-1.5), "-1.5"),
    (lambda: check_arguments(momentum=2.5), "2.5"),
    (lambda: check_preprocessing((1.0, 2.0), (), (3, 4, 4)), "2"),
    (lambda: check_preprocessing((), (-2.5,), (3, 4, 4)), "-2.5"),
    (lambda: ift.lenet5((5,)), "[5]"),
    (lambda: ift.dnn(0, 3), "[0]"),
    (lambda: as_samples(np.zeros((2, 7), np.float32), BASE.spec), "[7]"),
    (lambda: as_samples(np.zeros((2, 6), int)), "int64"),
    (lambda: as_samples(np.zeros(6, np.float32)), "[6]"),
    (lambda: as_labels(np.array([5]), 1, BASE.spec), "5"),
    (lambda: as_labels(np.array([0.5]), 1), "float64"),
    (lambda: as_labels(np.array([1, 2]), 3), "(2,)"),
    (lambda: rotate(np.zeros((2, 2), np.uint8), 1), "[2, 2]"),
    (lambda: ift.FineTuner(BASE, rank=-3), "-3"),
    (lambda: ift.FineTuner(BASE, cache_capacity=-3), "-3"),
    (lambda: ift.load("/nowhere/base.safetensors"), "/nowhere/base.safetensors"),
    (lambda: ift.Adapter.load("/nowhere"), "/nowhere"),
    (lambda: BASE.save("/proc/base.safetensors"), "/proc/base.safetensors"),
    (lambda: samples.adapter(BASE).check_base(samples.base(seed=1)), BASE.hash),
]


@pytest.mark.parametrize(("provoke", "value"), PROVOKED)
def test_rule_then_value(provoke: Callable[[], Any], value: str) -> None:
    with pytest.raises(ift.InstantFTError) as e:
        provoke()
    message = str(e.value)
    assert "\n" not in message
    assert re.search(r"\b(must|needs)\b", message), message
    assert value in message
    assert message.index(value) > re.search(r"\b(must|needs)\b", message).start() or str(value).startswith("/")  # type: ignore[union-attr]

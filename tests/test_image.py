"""DRAM images: every word where docs/hardware.md §7 wants it, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.errors import DataError, EngineError, UsageError
from instantft.hw import fixed, image
from instantft.hw.configs import CONFIGS, configured
from instantft.hw.formats import PROFILES, Ints
from instantft.hw.image import Launch
from instantft.hw.layout import BEAT, Build
from instantft.spec import NetSpec, dnn, lenet5

Q24 = PROFILES["q24"]
NETS = {"mnist": lenet5((1, 28, 28)), "colour": lenet5((3, 32, 32)), "dnn": dnn(20, 3, 24)}


def random_job(
    net: NetSpec, lanes: int = 32, rank: int = 4, T: int = 5, **changes: Any
) -> tuple[Launch, fixed.Frozen, fixed.Parameters, np.ndarray]:
    rng = np.random.default_rng(0)

    def ints(*shape: int) -> Ints:
        return rng.integers(-(1 << 15), 1 << 15, shape)

    build = Build(net, lanes, rank, Q24, "u8" if len(net.input_shape) == 3 else "q")
    shapes = net.parameters
    frozen = fixed.Frozen(
        tuple(ints(*shapes[f"layers.{k}.weight"]) for k in range(net.L)),
        tuple(ints(*shapes[f"layers.{k}.bias"]) for k in range(net.L)),
    )
    A, B = tuple(ints(n, rank) for n in net.tap_widths), tuple(ints(rank, net.C) for _ in net.tap_widths)
    parameters = fixed.Parameters(A, B, -5, rng.integers(-(1 << 23), 1 << 23, net.C))
    pixels = rng.integers(0, 256, (T, net.geometry[0].N))
    x = (pixels / 255).astype(np.float32) if build.input == "u8" else (pixels / 16 - 8).astype(np.float32)
    options = {"lr": 0.1, "batch_size": 2} | changes
    order = np.stack([rng.permutation(T) for _ in range(3)])
    job = image.launch(build, frozen, parameters, x, order, rng.integers(0, net.C, T), **options)
    return job, frozen, parameters, pixels


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("lanes", "rank"), [(16, 4), (48, 2), (96, 1)])
def test_the_adapter_comes_back_and_lies_column_by_column(name: str, lanes: int, rank: int) -> None:
    job, _, parameters, _ = random_job(NETS[name], lanes, rank)
    build, data = job.build, job.buffers["params"]
    assert data.size == BEAT * build.parameter_beats
    start = 32 * (build.weight_words + build.bias_words)
    A, B = image.parameters_of(build, data[start : start + BEAT * (build.a_beats + build.b_beats)])
    for ours, theirs in zip((*A, *B), (*parameters.A, *parameters.B), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # §6 in its own words: lane n of chunk j of a tap has column 16·(j·N/16) + n of its padded columns.
    words = data[start:].view("<i2")
    for tap, a in zip(build.taps, parameters.A, strict=True):
        for at, column in list(enumerate(tap.columns))[:: max(1, tap.size // 7)]:
            chunk, lane = tap.first_chunk + at // lanes, at % lanes
            stored = words[(chunk * lanes + lane) * rank :][:rank]
            np.testing.assert_array_equal(stored, a[column] if column >= 0 else np.zeros(rank))
    np.testing.assert_array_equal(data[-64:].view("<i4")[: build.net.C], parameters.bias)


def test_weights_of_lenet_lie_group_by_group_input_by_input_twice_where_two_pixels_go_at_once() -> None:
    job, frozen, _, _ = random_job(NETS["mnist"])
    words = job.buffers["params"].view("<i2").reshape(-1, 16)
    first, second, third = job.build.layers[:3]
    assert first.pair
    assert not second.pair
    w = frozen.weights[0]
    for c in range(6):
        assert words[7, c] == words[7, c + 8] == w[c, 0, 7 // 5, 7 % 5]
    assert not words[7, [6, 7, 14, 15]].any()
    assert words[second.first_word + 30, 9] == frozen.weights[1][9, 1, 1, 0]  # input 30: channel 1, row 1, column 0
    at = third.first_word + 7 * third.inputs + 399  # the eighth group of 16 outputs
    np.testing.assert_array_equal(words[at, :8], frozen.weights[2][399, 112:120])
    assert not words[at, 8:].any()
    biases = words[job.build.weight_words :]
    np.testing.assert_array_equal(biases[third.first_bias + 7, :8], frozen.biases[2][112:])
    np.testing.assert_array_equal(biases[0, 8:14], frozen.biases[0])


@pytest.mark.parametrize("name", NETS)
def test_rows_of_samples_and_their_order(name: str) -> None:
    job, _, _, pixels = random_job(NETS[name])
    build = job.build
    rows = job.buffers["x0"].reshape(5, build.input_beats * BEAT)
    if build.input == "u8":
        np.testing.assert_array_equal(rows[:, : pixels.shape[1]], pixels)
    else:
        np.testing.assert_array_equal(rows.view("<i4")[:, : pixels.shape[1]], (pixels - 128) << 12)
    order = job.buffers["order"].view("<u4")[:15].reshape(3, 5)
    assert (np.sort(order & 0xFFFFFF, axis=1) == np.arange(5)).all()
    assert (order >> 24 < build.net.C).all()
    assert (job.registers["T"], job.registers["E"]) == (5, 3)
    assert job.registers["ETA"] == round(0.1 / 2 * 2**24)
    assert job.registers["ETA_LAST"] == round(0.1 * 2**24)
    assert job.registers["GAIN"] == 0xFFFB
    assert job.steps == 9


def test_registers_hold_whole_addresses() -> None:
    job = random_job(NETS["dnn"])[0]
    addresses = {name: (i + 1) << 32 | 0x1000 * i for i, name in enumerate(image.BUFFERS)}
    written = dict(image.writes(job, addresses))
    assert written[0x30] == 0
    assert written[0x34] == 1
    assert written[0x58] == 0x5000
    assert written[0x5C] == 6
    assert written[0x10] == image.LOAD | image.FILL | image.TRAIN | image.STORE


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_status_is_an_outcome_or_an_error(status: int) -> None:
    def read(offset: int) -> int:
        return status if offset == 4 else offset

    if status & 2 and not status >> 8 & 255:
        result = image.outcome(read)
        assert result.cycles["total"] == 0x80
        assert result.cycles["waiting"] == 0x9C
        assert result.steps == 0xA0
        assert result.saturations == {"activations": 0xA4, "gradients": 0xA8, "parameters": 0xAC}
    else:
        with pytest.raises(EngineError, match="the core must finish"):
            image.outcome(read)


def test_a_network_that_a_device_cannot_hold_is_refused() -> None:
    for config in CONFIGS:
        configured(config, NETS["mnist"])
        with pytest.raises(UsageError, match=rf"must fit the [\d,]+ kB of block memory of {config}, but need at least"):
            configured(config, dnn(4000, 10, 2000), "q")


def test_what_does_not_fit_is_refused_and_the_limit_named() -> None:
    with pytest.raises(UsageError, match="batch size must be 1 to 20"):
        random_job(NETS["dnn"], batch_size=21)
    with pytest.raises(UsageError, match="learning rate over the samples of a batch must be"):
        random_job(NETS["dnn"], lr=3.0)
    with pytest.raises(UsageError, match="a cache of these samples must have 320 bytes"):
        random_job(NETS["dnn"], cache=np.zeros(3, np.uint8))
    job, frozen, parameters, _ = random_job(NETS["mnist"])
    with pytest.raises(DataError, match="must be pixels"):
        image.launch(
            job.build, frozen, parameters, np.full((1, 784), 0.5, np.float32), np.zeros((1, 1), np.int64),
            np.zeros(1, np.int64), lr=0.1, batch_size=1,
        )  # fmt: skip
    with pytest.raises(UsageError, match="rank must be 2, that of this build"):
        image.launch(
            Build(job.build.net, 32, 2, Q24), frozen, parameters, np.zeros((1, 784), np.float32),
            np.zeros((1, 1), np.int64), np.zeros(1, np.int64), lr=0.1, batch_size=1,
        )  # fmt: skip

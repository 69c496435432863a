"""Ways of keeping records that `benchmarks.frontier` compares: bytes and bases are what they are said to be."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import frontier
from instantft.backbones.builtin import Network
from instantft.engine import get_engine
from instantft.methods import METHODS
from instantft.spec import LayerSpec, NetSpec

from .nets import samples_for, tensors_for


@pytest.mark.parametrize(
    ("way", "nbytes"),
    [
        (frontier.Way("pca 3", "relu4", "pca", 3), 2 * (2 + 2) + 2 * 5),
        (frontier.Way("random 4", "int8", "random", 4), 2 * (4 + 4) + 4 + 5),
        (frontier.Way("frozen-A 2", "fp32", "frozen-A", 2), 4 * (3 * 2 + 5)),
    ],
)
def test_frontier_keeps_few_directions(way: frontier.Way, nbytes: int) -> None:
    """What comes back lies in the basis, near the record's projection; bytes are those of the coordinates."""
    spec = NetSpec((9,), (LayerSpec("fc", 30, relu=True), LayerSpec("fc", 20, relu=True), LayerSpec("fc", 5)))
    net = Network(spec, tensors_for(spec, METHODS["ft-last"]))
    x, _ = samples_for(spec, 40)
    engine = get_engine("reference")
    rows = engine.records(spec, net.tensors, x)
    g = frontier.given(engine, way, "fashion", net, 0, x)
    assert g.nbytes == nbytes
    assert sorted(g.bases) == ([0, 1, 2] if way.whole else [1, 2])
    before, after = frontier.taps(net, x, rows), frontier.taps(net, g.x, g.rows)
    for k, P in g.bases.items():
        np.testing.assert_allclose(P.T @ P, np.eye(way.d), atol=1e-5)
        np.testing.assert_allclose(after[k] @ P @ P.T, after[k], atol=1e-4)
        exact = before[k] @ P
        # half the widest gap of NF4, in units of the largest coordinate, which bfloat16 rounds up
        bound = 0.16 if way.codec == "relu4" else 0.005
        assert (np.abs(after[k] @ P - exact).max(axis=1) <= bound * np.abs(exact).max(axis=1) + 1e-5).all()
    if not way.whole:
        np.testing.assert_array_equal(g.x, x)


def test_frontier_pca_holds_more_than_random_directions() -> None:
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(50, 40)) * 0.5 ** np.arange(40)).astype(np.float32)
    P = frontier.top_directions(X, 6)
    exact = np.linalg.svd(X, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(X @ P), np.linalg.norm(exact[:6]), rtol=1e-4)

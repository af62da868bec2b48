"""The first pass equals a plain dense computation, however the stream is cut and ordered."""

from __future__ import annotations

import math

import numpy as np
import pytest

from saeforge.errors import ConfigError
from saeforge.features.aggregate import (
    FIELDS,
    PER_RANGE,
    RANGES,
    TOP,
    Aggregate,
    _mix,
    pack_keys,
    segment_keys,
    unpack_keys,
)

ROOM = 16
D_SAE = 12


def make_dense(n: int = 3000, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Latents (n, D_SAE) of many strengths with ties, from never to always active; keys of the rows in any order."""
    rng = np.random.default_rng(seed)
    dense = np.exp(rng.normal(0, 2, (n, D_SAE))).astype(np.float32)
    dense[:, 1] = np.round(dense[:, 1])  # many equal values, zeros among them
    dense[:, 2] = 1.5  # all equal
    for latent, density in ((3, 0.3), (4, 0.02), (5, 0.002), (6, 0.5)):
        dense[rng.random(n) >= density, latent] = 0
    dense[:, 0] = 0
    dense[1:, 7] = 0
    dense[:, 8] = np.linspace(1e-3, 40, n)  # the maximum rises all the time
    documents = np.sort(rng.integers(0, 40, n))
    positions = np.arange(n) - np.searchsorted(documents, documents)
    order = rng.permutation(n)
    return dense, pack_keys(documents, positions)[order]


def feed(dense: np.ndarray, keys: np.ndarray, sizes: list[int], **options: int) -> Aggregate:
    """An aggregate of these rows, in steps of the given sizes, over and over."""
    aggregate = Aggregate(dense.shape[1], n_documents=options.pop("n_documents", 40), room=ROOM, **options)
    start, step = 0, 0
    while start < len(dense):
        stop = min(start + sizes[step % len(sizes)], len(dense))
        row, latent = np.nonzero(dense[start:stop])
        aggregate.update(latent, dense[start:stop][row, latent], keys[start:stop][row], stop - start)
        start, step = stop, step + 1
    return aggregate


def test_statistics_equal_a_dense_computation() -> None:
    dense, keys = make_dense()
    aggregate = feed(dense, keys, [700])
    assert aggregate.rows == len(dense)
    np.testing.assert_array_equal(aggregate.count, (dense != 0).sum(0))
    np.testing.assert_array_equal(aggregate.largest, dense.max(0))
    documents = unpack_keys(keys)[0]
    for latent in range(D_SAE):
        values = dense[dense[:, latent] != 0, latent].astype(np.float64)
        assert aggregate.mean()[latent] == pytest.approx(values.mean() if len(values) else 0, rel=1e-12)
        assert aggregate.documents()[latent] == len(np.unique(documents[dense[:, latent] != 0]))
        octaves = np.zeros(32, dtype=int)
        for value in values:
            octaves[math.floor(math.log2(value)) + 16] += 1
        np.testing.assert_array_equal(aggregate.octaves()[latent], octaves)


@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_quantiles_are_within_their_bound(share: float) -> None:
    dense, keys = make_dense()
    found = feed(dense, keys, [999]).quantile(share)
    for latent in range(D_SAE):
        values = np.sort(dense[dense[:, latent] != 0, latent])
        exact = float(values[math.ceil(share * len(values)) - 1]) if len(values) else 0.0
        assert abs(found[latent] - exact) <= exact / 32
        assert found[latent] <= dense[:, latent].max()


def test_strongest_contexts_are_one_hit_a_segment_with_ties_to_the_lowest_place() -> None:
    dense, keys = make_dense()
    aggregate = feed(dense, keys, [512])
    segments = segment_keys(keys, ROOM)
    for latent in range(D_SAE):
        best: dict[int, tuple[float, int]] = {}
        for value, key, segment in zip(dense[:, latent].tolist(), keys.tolist(), segments.tolist(), strict=True):
            if value and (segment not in best or (-value, key) < best[segment]):
                best[segment] = (-value, key)
        expected = sorted(best.values())[:TOP]
        found = [(-v, k) for v, k in zip(aggregate.top_value[latent], aggregate.top_key[latent], strict=True) if v > 0]
        assert found == expected, latent


def test_samples_are_the_lowest_hashes_of_each_octave_below_the_maximum() -> None:
    dense, keys = make_dense()
    aggregate = feed(dense, keys, [512], seed=3)
    of_latent = _mix(np.arange(D_SAE, dtype=np.uint64) + _mix(np.full(1, 3, dtype=np.uint64)))
    for latent in range(D_SAE):
        ranges: list[list[tuple[int, int, float]]] = [[] for _ in range(RANGES)]
        top = dense[:, latent].max()
        for value, key in zip(dense[:, latent], keys, strict=True):
            if value:
                steps = math.floor(math.log2(top)) - math.floor(math.log2(value))
                number = int(_mix(np.array([key ^ of_latent[latent]]))[0])
                ranges[min(steps, RANGES - 1)].append((number, int(key), float(value)))
        for which, entries in enumerate(ranges):
            expected = sorted(entries)[:PER_RANGE]
            count = len(expected)
            assert aggregate.sample_hash[latent, which, :count].tolist() == [entry[0] for entry in expected]
            assert aggregate.sample_key[latent, which, :count].tolist() == [entry[1] for entry in expected]
            assert aggregate.sample_value[latent, which, :count].tolist() == [entry[2] for entry in expected]
            assert not aggregate.sample_value[latent, which, count:].any()


def test_a_range_is_sampled_evenly() -> None:
    """Over many seeds every activation of an octave is drawn about equally often, early or late in the stream."""
    dense = np.full((100, 1), 1.5, dtype=np.float32)
    keys = pack_keys(np.zeros(100, dtype=int), np.arange(100))
    drawn = np.zeros(100)
    for seed in range(400):
        aggregate = feed(dense, keys, [30], n_documents=1, seed=seed)
        drawn[unpack_keys(aggregate.sample_key[0, 0])[1]] += 1
    assert drawn.sum() == 400 * PER_RANGE
    assert drawn.max() <= 45  # 20 expected, standard deviation 4.4
    assert drawn.min() >= 3
    assert abs(drawn[:50].sum() - drawn[50:].sum()) < 150


@pytest.mark.parametrize("sizes", [[1], [7, 300, 1], [10_000]])
def test_nothing_depends_on_batch_size_or_order(sizes: list[int]) -> None:
    dense, keys = make_dense(800)
    expected = feed(dense, keys, [256])
    order = np.random.default_rng(1).permutation(len(dense))
    found = feed(dense[order], keys[order], sizes)
    for name in FIELDS:
        if name == "total":
            np.testing.assert_allclose(found.total, expected.total, rtol=1e-12)
        else:
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_a_restored_state_goes_on_as_if_nothing_had_happened() -> None:
    dense, keys = make_dense(1000)
    whole = feed(dense, keys, [100])
    half = feed(dense[:500], keys[:500], [100])
    state = {name: array.copy() for name, array in half.state().items()}
    other = Aggregate(D_SAE, n_documents=40, room=ROOM)
    other.restore(state)
    for start in range(500, 1000, 100):
        row, latent = np.nonzero(dense[start : start + 100])
        other.update(latent, dense[start : start + 100][row, latent], keys[start : start + 100][row], 100)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)


def test_many_documents_are_counted_from_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeforge.features.aggregate.DOCUMENT_BITS", 4096 * 2)
    aggregate = Aggregate(2, n_documents=100_000, room=ROOM)
    assert not aggregate.documents_exact
    keys = pack_keys(np.arange(1000) * 97, np.zeros(1000, dtype=int))
    aggregate.update(np.zeros(1000, dtype=int), np.ones(1000, dtype=np.float32), keys, 1000)
    assert aggregate.documents()[0] == pytest.approx(1000, rel=0.05)
    assert aggregate.documents()[1] == 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_values_that_no_sae_yields_are_refused(value: float) -> None:
    aggregate = Aggregate(2, n_documents=1, room=ROOM)
    with pytest.raises(ConfigError, match="expected finite, positive"):
        aggregate.update(np.array([0]), np.array([value], dtype=np.float32), np.zeros(1, dtype=np.uint64), 1)


def test_extreme_values_and_silence_are_taken() -> None:
    aggregate = Aggregate(3, n_documents=1, room=ROOM)
    aggregate.update(np.array([], dtype=int), np.array([], dtype=np.float32), np.array([], dtype=np.uint64), 5)
    keys = pack_keys(np.zeros(3, dtype=int), np.arange(3))
    aggregate.update(np.array([0, 1, 1]), np.array([1e-30, 1e30, 0], dtype=np.float32), keys, 3)
    assert aggregate.rows == 8
    assert aggregate.count.tolist() == [1, 1, 0]
    assert 0 < aggregate.quantile(0.99)[0] <= np.float32(1e-30)
    assert aggregate.examples()["latent"].tolist() == [0, 0, 1, 1]

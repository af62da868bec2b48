"""Synthetic activations fall by the law that they claim, and a block is a pure function of configuration and number."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import saeforge
from saeforge.data.loader import TrainLoader
from saeforge.data.plan import Plan
from saeforge.data.synthetic import (
    SMALL,
    SYNTH_SAE_BENCH_16K,
    Activity,
    SyntheticConfig,
    SyntheticFiles,
    SyntheticSource,
    Truth,
    write_rows,
)
from saeforge.data.synthetic.random import Stream, normals
from saeforge.data.synthetic.sample import Sampler
from saeforge.data.synthetic.truth import spread_directions
from saeforge.errors import ConfigError, DatasetError

#: Two trees of 1 + 2 + 4 features and two free ones, strongly correlated; often enough active to be counted.
TINY = SyntheticConfig(
    features=16,
    d_in=8,
    max_rate=0.5,
    min_rate=0.05,
    roots=2,
    branching=2,
    depth=2,
    correlation_rank=3,
    correlation_scale=0.4,
    orthogonal_steps=5,
    seed=1,
)


def dense(activity: Activity, features: int) -> np.ndarray:
    """(rows, features) magnitudes, 0 where a feature is silent."""
    values = np.zeros((len(activity), features))
    values[activity.rows(), activity.features] = activity.values
    return values


def by_the_book(truth: Truth, rows: int, seed: int) -> np.ndarray:
    """The law feature by feature, one Gaussian each, as the paper has it: (rows, features) magnitudes."""
    config, rng = truth.config, np.random.default_rng(seed)
    own = np.sqrt(1 - np.square(truth.loadings).sum(1))
    gaussians = rng.standard_normal((rows, truth.loadings.shape[1])) @ truth.loadings.T
    gaussians += rng.standard_normal(gaussians.shape) * own
    values = np.maximum(truth.means + truth.spreads * rng.standard_normal(gaussians.shape), 0)
    values *= gaussians > truth.thresholds
    for parent in range(config.features):  # parents come before their children
        children = np.flatnonzero(truth.parents == parent)
        if len(children) == 0:
            continue
        above = values[:, parent]
        values[:, children] *= (above / truth.means[parent] if config.scale_by_parent else above > 0)[:, None]
        if config.exclusive:
            ticket = rng.random((rows, len(children))) * (values[:, children] > 0)
            values[:, children] *= (ticket == ticket.max(1, keepdims=True)) & (ticket > 0)
    return values


class TestTheLaw:
    def test_published_proportions(self) -> None:
        assert SYNTH_SAE_BENCH_16K.level_sizes == [128, 512, 2048, 8192]
        assert SYNTH_SAE_BENCH_16K.in_trees == 10_880
        assert SMALL.in_trees / SMALL.features == SYNTH_SAE_BENCH_16K.in_trees / SYNTH_SAE_BENCH_16K.features

    def test_rates_run_by_zipf_from_most_to_least(self) -> None:
        rates = Truth.of(replace(TINY, zipf=1.0)).rates
        assert rates[0] == 0.5
        assert rates[-1] == pytest.approx(0.05)
        # 1/r over 16 ranks, moved to these ends: rank 2 is (1/2 - 1/16) / (1 - 1/16) of the way up.
        assert rates[1] == pytest.approx(0.05 + 0.45 * (7 / 16) / (15 / 16))

    def test_trees_are_breadth_first(self) -> None:
        assert Truth.of(TINY).parents.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1]

    def test_children_ask_for_more_to_make_up_for_parent_and_siblings(self) -> None:
        truth = Truth.of(TINY)
        raised = torch.special.ndtr(torch.from_numpy(-truth.thresholds)).numpy()
        rates = truth.rates
        assert raised[0] == pytest.approx(rates[0])
        assert raised[15] == pytest.approx(rates[15])
        assert raised[6] == pytest.approx(min(1, rates[6] / rates[2] * (1 + rates[7] / rates[2])))

    @pytest.mark.parametrize("exclusive", [True, False])
    @pytest.mark.parametrize("scaled", [True, False])
    def test_draws_agree_with_the_law_written_out(self, exclusive: bool, scaled: bool) -> None:
        config = replace(TINY, exclusive=exclusive, scale_by_parent=scaled)
        truth, rows = Truth.of(config), 40_000
        ours = dense(Sampler(truth).draw(rows, 5), config.features)
        book = by_the_book(truth, rows, 6)
        for a, b in ((ours > 0, book > 0), (ours, book)):
            # Means, and means of products of all pairs: co-firing, and so correlation, trees and exclusion.
            x, y = a.astype(float), b.astype(float)
            for left, right in ((x, y), (pairs(x), pairs(y))):
                deviation = np.sqrt((left.var(0) + right.var(0)) / rows)
                # 5.5 deviations: of 4 * 2 * (16 + 136) comparisons one in 100,000 runs would fail by chance.
                assert (np.abs(left.mean(0) - right.mean(0)) <= 5.5 * deviation + 1e-12).all()

    def test_no_child_without_its_parent_and_no_two_siblings(self) -> None:
        truth = Truth.of(TINY)
        fires = dense(Sampler(truth).draw(20_000, 9), 16) > 0
        children = truth.children()
        assert not (fires[:, children] & ~fires[:, truth.parents[children]]).any()
        for parent in set(truth.parents[children].tolist()):
            assert fires[:, truth.parents == parent].sum(1).max() == 1

    def test_rare_features_of_the_published_law_fire_at_their_rates(self) -> None:
        source = SyntheticSource(SMALL, rows=1, validation_rows=0)
        counts = np.zeros(SMALL.features)
        blocks = 30
        for block in range(blocks):
            counts += np.bincount(source.activity("train", block).features, minlength=SMALL.features)
        rows = blocks * 2048
        free = np.arange(SMALL.in_trees, SMALL.features)
        expected = source.truth.rates[free] * rows
        # Correlation between features does not move their own rates; 688 features, 5.5 deviations each.
        assert (np.abs(counts[free] - expected) < 5.5 * np.sqrt(expected)).all()
        assert counts[free].sum() == pytest.approx(expected.sum(), rel=0.02)
        # SAELens 6.54.12's generator of the same law: 10.89 on 204,800 rows, for another draw of the correlations.
        assert counts.sum() / rows == pytest.approx(10.89, abs=0.2)

    def test_the_large_preset_is_as_active_as_the_published_data(self) -> None:
        # Its documentation: mean L0 about 34, about 25 of them among the 4,096 most frequent features.
        truth = Truth.of(replace(SYNTH_SAE_BENCH_16K, d_in=2, orthogonal_steps=0))  # what fires knows no directions
        activity = Sampler(truth).draw(2048, 1)
        assert len(activity.features) / 2048 == pytest.approx(34, abs=1.0)
        assert (activity.features < 4096).sum() / 2048 == pytest.approx(25, abs=0.7)

    def test_rows_are_directions_times_magnitudes_plus_bias(self) -> None:
        source = SyntheticSource(TINY, rows=1, validation_rows=0)
        values = torch.from_numpy(dense(source.activity("train", 0), 16)).float()
        expected = values @ source.truth.directions + source.truth.bias
        # The order of a sum of at most 16 numbers below 10.
        torch.testing.assert_close(source.read_block("train", 0)[0], expected, rtol=0, atol=1e-5)
        assert source.truth.bias.norm() == pytest.approx(0.5)

    def test_directions_are_unit_rows_nearer_to_orthogonal(self) -> None:
        rows = torch.from_numpy(normals(64 * 24, 3).reshape(64, 24)).float()
        rows = rows / rows.norm(dim=1, keepdim=True)

        def overlap(w: torch.Tensor) -> float:
            return float((w @ w.T - torch.eye(64)).square().sum())

        spread = spread_directions(rows, 200, 1e-2)
        torch.testing.assert_close(spread.norm(dim=1), torch.ones(64))
        # No less than n (n / d - 1) is possible in d dimensions (Welch 1974).
        welch = 64 * (64 / 24 - 1)
        assert overlap(rows) > 1.4 * welch
        assert overlap(spread) == pytest.approx(welch, rel=1e-4)

    def test_the_gradient_of_the_overlap_is_right(self) -> None:
        w = torch.from_numpy(normals(5 * 3, 8).reshape(5, 3)).requires_grad_()
        gram = w @ w.T
        loss = (gram - torch.diag(gram.diag())).square().sum() + 5 * (gram.diag() - 1).square().sum()
        loss.backward()
        squares = w.detach().square().sum(1, keepdim=True)
        by_hand = 4 * (w @ (w.T @ w) + (5 * (squares - 1) - squares) * w)
        torch.testing.assert_close(w.grad, by_hand.detach())


def pairs(x: np.ndarray) -> np.ndarray:
    """(rows, pairs) products of every two columns."""
    left, right = np.triu_indices(x.shape[1])
    return x[:, left] * x[:, right]


class TestBlocks:
    def test_pure_function_of_configuration_split_and_index(self) -> None:
        a, b = (SyntheticSource(TINY, rows=10_000, validation_rows=4096) for _ in range(2))
        order = [("train", 3), ("validation", 0), ("train", 0), ("validation", 1)]
        first = {key: a.read_block(*key)[0] for key in order}
        with ThreadPoolExecutor(4) as pool:
            again = dict(zip(order[::-1], pool.map(lambda key: b.read_block(*key)[0], order[::-1]), strict=True))
        assert all(torch.equal(first[key], again[key]) for key in order)
        assert a.fingerprint == b.fingerprint
        assert len({part.numpy().tobytes() for part in first.values()}) == 4

    def test_another_seed_or_law_is_another_dataset(self) -> None:
        prints = {
            SyntheticSource(config, rows=1, validation_rows=0, dtype=dtype).fingerprint
            for config, dtype in (
                (TINY, torch.float32),
                (replace(TINY, seed=2), torch.float32),
                (replace(TINY, min_rate=0.06), torch.float32),
                (TINY, torch.bfloat16),
            )
        }
        assert len(prints) == 4

    def test_the_loader_draws_all_rows(self) -> None:
        source = SyntheticSource(TINY, rows=8 * 2048, validation_rows=0)
        batches = list(TrainLoader(source, Plan(8, 2048, 1024, window_blocks=1), 16))
        drawn = torch.cat([batch[0] for batch in batches])
        made = torch.cat([source.read_block("train", block)[0] for block in range(8)])
        assert torch.equal(drawn.sum(1).sort().values, made.sum(1).sort().values)

    def test_statistics_are_those_of_training_rows(self) -> None:
        source = SyntheticSource(TINY, rows=65_536, validation_rows=0)
        rows = torch.cat([source.read_block("train", block)[0] for block in range(32)]).double()
        assert source.statistics[0].mean == pytest.approx(rows.mean(0).tolist())
        assert source.statistics[0].mean_square_norm == pytest.approx(float(rows.square().sum(1).mean()))

    def test_trains_and_remembers_the_law(self) -> None:
        source = SyntheticSource(TINY, rows=20_000, validation_rows=2048)
        sae = saeforge.train(source, variant="topk", d_sae=16, k=3, batch_size=512, tokens=20_000, progress=False)
        assert SyntheticConfig.from_json(sae.meta["synthetic"]) == TINY
        with pytest.raises(ConfigError, match="leave out target, site, group_rows"):
            saeforge.train(source, site="mlp")


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_hold_the_very_same_rows_and_truth(self, tmp_path: Path, dtype: torch.dtype) -> None:
        source = SyntheticSource(TINY, rows=6000, validation_rows=4096, dtype=dtype)
        seen: list[tuple[int, int]] = []
        write_rows(source, tmp_path, threads=2, on_progress=lambda *at: seen.append(at))
        assert seen == [(done, 5) for done in range(1, 6)]
        files = SyntheticFiles(tmp_path)
        assert (files.fingerprint, files.statistics, files.pairs) == (
            source.fingerprint,
            source.statistics,
            source.pairs,
        )
        for split in ("train", "validation"):
            assert files.n_blocks(split) == source.n_blocks(split)
            for block in range(source.n_blocks(split)):
                assert torch.equal(files.read_block(split, block)[0], source.read_block(split, block)[0])
        assert torch.equal(files.sample(3000)[0], source.sample(3000)[0])
        for block in range(2):
            ours, theirs = (each.activity("validation", block) for each in (source, files))
            for name in ("values", "features", "offsets"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(files.truth.directions, source.truth.directions)
        assert np.array_equal(files.truth.parents, source.truth.parents)

    def test_a_peer_reads_them_with_numpy_alone(self, tmp_path: Path) -> None:
        source = SyntheticSource(TINY, rows=1, validation_rows=2048, dtype=torch.bfloat16)
        write_rows(source, tmp_path)
        bits = np.load(tmp_path / "train.npy")
        assert bits.dtype == np.uint16
        rows = (bits.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(rows, source.read_block("train", 0)[0].float().numpy())

    def test_the_same_rows_are_not_written_twice_and_others_not_over_them(self, tmp_path: Path) -> None:
        write_rows(SyntheticSource(TINY, rows=1, validation_rows=2048), tmp_path)
        before = (tmp_path / "train.npy").stat().st_mtime_ns
        write_rows(SyntheticSource(TINY, rows=1, validation_rows=2048), tmp_path)
        assert (tmp_path / "train.npy").stat().st_mtime_ns == before
        with pytest.raises(DatasetError, match="other synthetic rows"):
            write_rows(SyntheticSource(TINY, rows=4000, validation_rows=2048), tmp_path)

    def test_errors_say_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"synthetic\.json is missing"):
            SyntheticFiles(tmp_path)
        write_rows(SyntheticSource(TINY, rows=1, validation_rows=2048), tmp_path)
        with pytest.raises(DatasetError, match="2048 training rows, 5000 were asked for"):
            SyntheticFiles(tmp_path, rows=5000)
        with pytest.raises(ConfigError, match="held-out rows only"):
            SyntheticFiles(tmp_path).activity("train", 0)
        head = tmp_path / "synthetic.json"
        head.write_text(json.dumps({**json.loads(head.read_text()), "config": {"colour": 1}}))
        with pytest.raises(DatasetError, match=r"damaged.*no field 'colour'"):
            SyntheticFiles(tmp_path)


class TestConfig:
    def test_json_round_trip(self) -> None:
        assert SyntheticConfig.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"features": 10}, "need 14 features, there are 10"),
            ({"max_rate": 1.0}, "max_rate < 1"),
            ({"d_in": 0}, "d_in = 0"),
            ({"roots": -1}, "roots = -1"),
            ({"last_magnitude": 0.0}, "magnitudes must be positive"),
        ],
    )
    def test_impossible_laws_are_refused(self, changes: dict[str, float], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            replace(TINY, **changes)  # type: ignore[arg-type]

    def test_source_refuses_what_it_cannot_make(self) -> None:
        with pytest.raises(ConfigError, match="rows = 0"):
            SyntheticSource(TINY, rows=0)
        with pytest.raises(ConfigError, match=r"torch\.float16"):
            SyntheticSource(TINY, rows=1, dtype=torch.float16)


def test_stream_is_uniform_normal_and_named_by_its_key() -> None:
    stream = Stream(1, 2)
    uniform, normal, upper = stream.uniform(100_000), stream.normal(100_001), stream.bytes(100_000)
    assert len(normal) == 100_001
    # Five deviations of the mean and of the second moment.
    assert uniform.mean() == pytest.approx(0.5, abs=5 * 0.2887 / 316)
    assert normal.mean() == pytest.approx(0, abs=5 / 316)
    assert np.square(normal).mean() == pytest.approx(1, abs=5 * 1.4142 / 316)
    assert upper.mean() == pytest.approx(127.5, abs=5 * 73.9 / 316)
    assert np.array_equal(Stream(1, 2).uniform(10), uniform[:10])
    assert not np.array_equal(Stream(1, 3).uniform(10), uniform[:10])

"""The order of data is arithmetic: every row at most once a pass, the same for any ranks, threads and restarts."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from saeforge.data.plan import Plan, permutation, stable_order
from saeforge.errors import ConfigError, DatasetError


def batch_rows(plan: Plan, batch: int) -> list[np.ndarray]:
    """Row numbers of a global batch, one array a lane."""
    pass_index, pieces = plan.pieces(batch)
    lanes = []
    for lane in range(plan.lanes):
        parts = []
        for piece in pieces:
            blocks = np.array(plan.blocks(pass_index, lane, piece.window))
            rows = (blocks[:, None] * plan.block_rows + np.arange(plan.block_rows)).ravel()
            parts.append(rows[plan.rows(pass_index, lane, piece.window)][piece.start : piece.stop])
        lanes.append(np.concatenate(parts))
    return lanes


GRID = [
    (blocks, lanes, window, batch, unit)
    for blocks, lanes, window, batch, unit in product(
        (8, 9, 17, 31), (1, 2, 8), (1, 3, 4, 100), (16, 24, 56, 128), (1, 4)
    )
    if batch % (lanes * unit) == 0 and blocks // lanes * 16 >= batch // lanes
]


@pytest.mark.parametrize(("blocks", "lanes", "window", "batch", "unit"), GRID)
def test_a_pass_reads_every_row_at_most_once_and_drops_only_tails(
    blocks: int, lanes: int, window: int, batch: int, unit: int
) -> None:
    plan = Plan(blocks, 16, batch, lanes, window, seed=3, unit=unit)
    for pass_index in (0, 1):
        first = pass_index * plan.batches_per_pass
        batches = [batch_rows(plan, first + i) for i in range(plan.batches_per_pass)]
        for lanes_of_batch in batches:
            assert {len(rows) for rows in lanes_of_batch} == {batch // lanes}
        seen = np.concatenate([rows for lanes_of_batch in batches for rows in lanes_of_batch])
        assert len(np.unique(seen)) == len(seen) == plan.batches_per_pass * batch
        assert 0 <= seen.min()
        assert seen.max() < blocks * 16
        dropped = blocks * 16 - len(seen)
        sitting_out = (blocks % lanes) * 16  # whole blocks, fewer than there are lanes
        assert dropped - sitting_out < batch  # and less than one batch of rows


def test_lanes_share_no_block_and_windows_differ_by_at_most_one_block() -> None:
    plan = Plan(37, 16, 48, lanes=3, window_blocks=5)
    sizes = [stop - start for start, stop in map(plan.window_bounds, range(plan.windows_per_lane))]
    assert sum(sizes) == plan.blocks_per_lane == 12
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 5
    blocks = [b for lane in range(3) for w in range(plan.windows_per_lane) for b in plan.blocks(2, lane, w)]
    assert len(set(blocks)) == len(blocks) == 36


def test_all_blocks_are_read_within_a_few_passes_though_some_sit_out_each_time() -> None:
    plan = Plan(15, 16, 8, lanes=8)
    per_pass = [{plan.blocks(p, lane, 0)[0] for lane in range(8)} for p in range(12)]
    assert all(len(blocks) == 8 for blocks in per_pass)
    assert set.union(*per_pass) == set(range(15))


@pytest.mark.parametrize("unit", [2, 4, 8])
def test_units_stay_together_in_order(unit: int) -> None:
    plan = Plan(9, 16, 48, lanes=2, window_blocks=2, unit=unit, seed=1)
    for batch in range(2 * plan.batches_per_pass):
        for rows in batch_rows(plan, batch):
            groups = rows.reshape(-1, unit)
            assert (groups[:, 0] % unit == 0).all()
            assert (np.diff(groups, axis=1) == 1).all()


def test_seeds_and_passes_give_other_orders_and_equal_ones_the_same() -> None:
    def order(seed: int, pass_index: int) -> tuple[int, ...]:
        plan = Plan(16, 16, 32, lanes=2, seed=seed)
        first = pass_index * plan.batches_per_pass
        return tuple(int(r) for i in range(plan.batches_per_pass) for rows in batch_rows(plan, first + i) for r in rows)

    orders = [order(seed, pass_index) for seed in (0, 1, 2**40) for pass_index in (0, 1, 2)]
    assert len(set(orders)) == len(orders)
    assert order(1, 2) == order(1, 2)


def test_rows_of_one_window_are_mixed_across_its_blocks_and_lanes_differ() -> None:
    plan = Plan(16, 16, 32, lanes=2, window_blocks=4)
    order = plan.rows(0, 0, 0)
    assert sorted(order.tolist()) == list(range(64))
    assert len({row // 16 for row in order[:16].tolist()}) == 4
    assert order.tolist() != plan.rows(0, 1, 0).tolist() != plan.rows(0, 0, 1).tolist()


def test_pinned_orders() -> None:
    """A change here changes the order of every run: raise `RNG` in saeforge/data/plan.py with it."""
    assert permutation(12, 0, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 11, 2, 10, 6, 4]
    assert permutation(12, 7, 1, 3, 2, 1).tolist() == [10, 3, 9, 5, 11, 1, 8, 2, 0, 7, 6, 4]
    plan = Plan(n_blocks=9, block_rows=16, batch_rows=32, lanes=2, window_blocks=2, seed=5)
    assert plan.blocks(1, 1, 0) == [3, 2]
    assert plan.rows(1, 1, 0)[:8].tolist() == [9, 8, 30, 10, 18, 12, 19, 31]


@pytest.mark.parametrize("hash_seed", ["0", "1234"])
def test_the_order_does_not_depend_on_pythons_hash_seed(hash_seed: str) -> None:
    script = "from saeforge.data.plan import permutation; print(permutation(50, 3, 1, 4).tolist())"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(permutation(50, 3, 1, 4).tolist())


@pytest.mark.parametrize("values", [2, 30, 2**63])
@pytest.mark.parametrize("n", [0, 1, 2, 1000, 65_537])
def test_the_order_is_that_of_a_stable_argsort_with_and_without_ties(n: int, values: int) -> None:
    raw = np.random.default_rng(n).integers(0, values, n, dtype=np.uint64)
    order = stable_order(raw)
    assert order.dtype == np.int64
    assert np.array_equal(order, np.argsort(raw, kind="stable"))


def test_permutations_are_uniform_enough_to_be_shuffles() -> None:
    first = np.array([permutation(8, seed, 0, 0)[0] for seed in range(800)])
    counts = np.bincount(first, minlength=8)
    assert counts.min() > 60  # 100 expected, standard deviation 9.4
    assert counts.max() < 140


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_rows": 0}, ConfigError, "must be positive"),
        ({"lanes": 0}, ConfigError, "must be positive"),
        ({"window_blocks": 0}, ConfigError, "must be positive"),
        ({"unit": 0}, ConfigError, "must be positive"),
        ({"batch_rows": 36}, ConfigError, "batch_size = 36 is not a multiple of lanes = 8; use 32"),
        ({"batch_rows": 40, "unit": 2}, ConfigError, "use 32"),
        ({"block_rows": 18, "unit": 4, "batch_rows": 32}, ConfigError, "18 rows do not divide into units of 4"),
        ({"seed": -1}, ConfigError, "seed = -1"),
        ({"batch_rows": 8192}, DatasetError, "hold no batch of 8192"),
        ({"n_blocks": 7}, DatasetError, "7 blocks"),
    ],
)
def test_numbers_that_do_not_fit_are_named(options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Plan(**{"n_blocks": 32, "block_rows": 16, "batch_rows": 32, "lanes": 8, **options})

"""The loader: the plan's rows, the same for any number of ranks, and an exact position."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from saeforge.data.loader import TrainLoader, ValidationLoader, _Stream
from saeforge.data.plan import Plan
from saeforge.data.source import Rows, empty_rows
from saeforge.data.tensor_source import TensorSource
from saeforge.errors import CheckpointError, ConfigError, DatasetError

N, BATCH = 1500, 64


def numbered(n: int = N) -> Tensor:
    """Row i holds (i, -i): any row of a batch tells where it came from."""
    ids = torch.arange(n, dtype=torch.float32)[:, None]
    return torch.cat([ids, -ids], 1)


def source(share: float = 0.2, *, paired: bool = False) -> TensorSource:
    x = numbered()
    return TensorSource(x, x.repeat(1, 2)[:, :3] * 10 if paired else None, validation_share=share)


def loader(
    total: int | None = None, *, of: Any = None, rank: int = 0, world: int = 1, reuse: bool = False, **options: int
) -> TrainLoader:
    of = of or source()
    given = {"batch_rows": BATCH, "lanes": 8, "window_blocks": 2, "seed": 3, **options}
    plan = Plan(of.n_blocks("train"), of.block_rows("train"), **given)
    total = 2 * plan.batches_per_pass + 5 if total is None else total  # into the third pass
    return TrainLoader(of, plan, total, rank=rank, world=world, reuse=reuse)


def ids(batch: Rows) -> list[int]:
    return [int(row) for row in batch[0][:, 0].tolist()]


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("saeforge-read")]


class Failing(TensorSource):
    """Its block 5 cannot be read."""

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        if index == 5 and hasattr(self, "fingerprint"):
            raise DatasetError("shard train-000000.tar, block 5: checksum")
        return super().read_block(split, index, into)


def test_batches_hold_the_rows_of_the_plan_in_its_order() -> None:
    of = source()
    mine = loader(of=of)
    blocks = [of.read_block("train", index)[0] for index in range(of.n_blocks("train"))]
    batches = list(mine)
    assert len(batches) == len(mine) == mine.total
    for index, batch in enumerate(batches):
        assert len(batch) == 1
        pass_index, pieces = mine.plan.pieces(index)
        expected = []
        for lane, piece in itertools.product(range(8), pieces):
            window = torch.cat([blocks[b] for b in mine.plan.blocks(pass_index, lane, piece.window)])
            order = mine.plan.rows(pass_index, lane, piece.window)[piece.start : piece.stop]
            expected.append(window[torch.from_numpy(order)])
        assert torch.equal(batch[0], torch.cat(expected))


def test_one_pass_reads_training_rows_once_and_no_held_out_row() -> None:
    of = source()
    mine = loader(loader(of=of).plan.batches_per_pass, of=of)
    seen = [row for batch in mine for row in ids(batch)]
    held_out = {int(r) for i in range(of.n_blocks("validation")) for r in of.read_block("validation", i)[0][:, 0]}
    assert len(set(seen)) == len(seen) == mine.total * BATCH
    assert not held_out & set(seen)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_ranks_of_any_world_share_the_batches_of_one_rank(world: int) -> None:
    single = [batch[0] for batch in loader()]
    ranks = [list(loader(rank=rank, world=world)) for rank in range(world)]
    lane_rows = BATCH // 8
    for index, whole in enumerate(single):
        lanes = whole.split(lane_rows)
        for rank in range(world):
            assert torch.equal(ranks[rank][index][0], torch.cat(lanes[rank::world]))


def test_resuming_at_every_batch_gives_the_same_tail_to_the_bit() -> None:
    whole = [batch[0] for batch in loader()]
    states = []
    running = loader()
    for _ in running:
        states.append(running.state_dict())
    assert [state["position"] for state in states] == list(range(1, len(whole) + 1))
    for k, state in enumerate(states, start=1):
        resumed = loader()
        resumed.load_state_dict(state)
        tail = [batch[0] for batch in resumed]
        assert len(tail) == len(whole) - k
        assert all(torch.equal(a, b) for a, b in zip(tail, whole[k:], strict=True))


def test_a_position_saved_by_one_rank_resumes_under_another_number_of_ranks() -> None:
    whole = [sorted(ids(batch)) for batch in loader()]
    first = loader(rank=0, world=2)
    running = iter(first)
    for _ in range(7):
        next(running)
    running.close()  # type: ignore[attr-defined]
    state = first.state_dict()
    rest = []
    for rank in range(4):
        resumed = loader(rank=rank, world=4)
        resumed.load_state_dict(state)
        rest.append([ids(batch) for batch in resumed])
    assert [sorted(itertools.chain(*parts)) for parts in zip(*rest, strict=True)] == whole[7:]


def test_only_a_consumed_batch_moves_the_position() -> None:
    mine = loader()
    running = iter(mine)
    assert mine.position == 0
    first = next(running)
    assert mine.position == 1
    again = iter(mine)  # a second iterator goes on where the first one stands
    second = next(again)
    assert mine.position == 2
    third = next(running)
    assert mine.position == 3
    expected = [batch[0] for batch in itertools.islice(loader(), 3)]
    assert all(torch.equal(a[0], b) for a, b in zip((first, second, third), expected, strict=True))
    running.close()  # type: ignore[attr-defined]
    assert torch.equal(next(again)[0], [batch[0] for batch in loader(4)][3])
    again.close()  # type: ignore[attr-defined]
    assert mine.position == 4


def test_an_aborted_loader_reads_nothing_more() -> None:
    """A process that ends joins its reading threads after all that waits in their queue."""
    gate = threading.Event()
    reads: list[int] = []

    class Slow(TensorSource):
        def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
            if into is not None and len(reads) >= 16 and not gate.wait(20):
                pytest.fail("nobody opened the gate")
            reads.append(index)
            return super().read_block(split, index, into)

    mine = loader(of=Slow(numbered(), validation_share=0.2))
    reads.clear()
    running = iter(mine)
    next(running)  # 8 windows of two blocks are here, 8 more are begun
    mine.abort()
    gate.set()
    for thread in [t for t in threading.enumerate() if t.name.startswith("saeforge-read")]:
        thread.join(20)
    assert len(reads) <= 16 + 2
    running.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("total", [1, 2, 5, 12, 13, 17, 29])
def test_nothing_is_read_that_no_batch_takes_from(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live source would run its model for it."""
    mine = loader(total)
    plan, blocks = mine.plan, Plan.blocks
    read: set[tuple[int, int, int]] = set()

    def note(self: Plan, pass_index: int, lane: int, window: int) -> list[int]:
        read.add((pass_index, lane, window))
        return blocks(self, pass_index, lane, window)

    monkeypatch.setattr(Plan, "blocks", note)
    assert len(list(mine)) == total
    taken = set()
    for index in range(total):
        pass_index, pieces = plan.pieces(index)
        taken |= {(pass_index, lane, piece.window) for lane in range(8) for piece in pieces}
    assert read == taken


def test_a_finished_loader_yields_nothing_more() -> None:
    mine = loader(3)
    assert len(list(mine)) == 3
    assert list(mine) == []
    assert len(mine) == 3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda: loader(seed=4), "seed"),
        (lambda: loader(batch_rows=128), "batch_size"),
        (lambda: loader(lanes=4), "lanes"),
        (lambda: loader(window_blocks=3), "window_blocks"),
        (lambda: loader(unit=2), "unit"),
        (lambda: loader(of=TensorSource(numbered() + 1, validation_share=0.2)), "dataset"),
        (lambda: loader(of=source(0.3)), "blocks"),  # the same rows, another split
    ],
)
def test_a_checkpoint_of_other_data_or_another_order_is_refused(change: Callable[[], TrainLoader], name: str) -> None:
    state = loader().state_dict()
    other = change()
    with pytest.raises(CheckpointError, match=f"data {name} = "):
        other.load_state_dict(state)
    assert other.position == 0


def test_a_state_of_something_else_is_refused() -> None:
    state = loader().state_dict()
    for broken in ({}, {**state, "schema": 99}, {**state, "rng": "mt19937"}):
        with pytest.raises(CheckpointError):
            loader().load_state_dict(broken)


def test_state_is_plain_and_equal_on_all_ranks() -> None:
    states = []
    for rank in range(2):
        mine = loader(rank=rank, world=2)
        running = iter(mine)
        next(running)
        running.close()  # type: ignore[attr-defined]
        states.append(mine.state_dict())
    assert states[0] == states[1]
    assert all(isinstance(value, (int, str)) for value in states[0].values())


def test_an_error_of_a_reader_reaches_the_training_thread_and_ends_the_threads() -> None:
    mine = loader(of=Failing(numbered(), validation_share=0.2))
    read: list[Rows] = []
    with pytest.raises(DatasetError, match="block 5: checksum"):
        read.extend(iter(mine))
    assert mine.position == len(read) < mine.plan.batches_per_pass
    assert reading_threads() == []


def test_threads_end_with_the_generator_however_it_ends() -> None:
    running = iter(loader())
    next(running)
    assert reading_threads()
    running.close()  # type: ignore[attr-defined]
    assert reading_threads() == []
    list(loader(2))
    assert reading_threads() == []


def test_the_memory_of_windows_goes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def count(of: Any, rows: int, **options: Any) -> Rows:
        taken.append(rows)
        return empty_rows(of, rows, **options)

    monkeypatch.setattr("saeforge.data.loader.empty_rows", count)
    mine = loader(reuse=True)
    most = sum(1 for _ in mine)
    windows = [rows for rows in taken if rows != BATCH]
    assert most > 30
    assert len(windows) <= 3 * len(mine.lanes)  # what a batch spans, and one window ahead
    assert set(windows) == {max(windows)}
    assert len(taken) - len(windows) == 3  # batches


def test_reused_batches_hold_the_same_rows_until_the_third_after_them() -> None:
    fresh = [batch[0] for batch in loader()]
    last: list[Tensor] = []
    for index, batch in enumerate(loader(reuse=True)):
        last = [*last[-2:], batch[0]]
        assert all(torch.equal(a, b) for a, b in zip(last, fresh[max(0, index - 2) : index + 1], strict=True))


@pytest.mark.parametrize("paired", [False, True])
def test_rows_staged_for_a_device_are_the_same(paired: bool) -> None:
    """A device other than the CPU has windows of its own; `cpu:0` takes that way without a GPU."""

    class Staged(TrainLoader):
        def __iter__(self) -> Iterator[Rows]:
            stream = _Stream(self.source, self.plan, self.lanes, torch.device("cpu"), 2)
            stream.staged = True
            try:
                for index in range(self.total):
                    yield stream.batch(index, False, self.total)
            finally:
                stream.close()

    of = source(paired=paired)
    plain = loader(of=of)
    staged = Staged(of, plain.plan, plain.total)
    for a, b in zip(plain, staged, strict=True):
        assert len(a) == len(b) == 1 + paired
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_reading_is_counted() -> None:
    mine = loader(20)
    batches = [batch[0] for batch in mine]
    stats = mine.read_stats()
    assert stats.batches == 20
    assert stats.bytes >= sum(x.nbytes for x in batches) > 0
    assert stats.read_seconds > 0
    assert stats.wait_seconds > 0
    assert set(stats.figures(1.0)) == {"wait_ms", "windows_ready", "gb_per_second", "read_gb_per_second"}
    assert mine.read_stats().batches == 0


def test_paired_targets_stay_beside_their_rows() -> None:
    of = source(paired=True)
    batches = [*loader(of=of), *ValidationLoader(of, 100), of.sample(300)]
    assert len(batches) > 20
    for batch in batches:
        assert len(batch) == 2
        assert torch.equal(batch[1], batch[0].repeat(1, 2)[:, :3] * 10)


def test_lanes_that_do_not_divide_among_ranks_are_named() -> None:
    with pytest.raises(ConfigError, match="lanes = 8 is not a multiple of 3 ranks"):
        loader(rank=0, world=3)


# Held-out rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 50, 10_000])
def test_held_out_rows_are_read_exactly_once_over_the_ranks_and_no_rank_is_left_without(world: int, batch: int) -> None:
    of = source()
    expected = sorted(int(r) for i in range(of.n_blocks("validation")) for r in of.read_block("validation", i)[0][:, 0])
    seen = []
    for rank in range(world):
        mine = ValidationLoader(of, batch, rank=rank, world=world)
        batches = list(mine)
        assert len(batches) == len(mine) >= 1  # Lightning refuses a loader that is empty on one rank alone
        assert all(len(b[0]) <= max(batch, of.block_rows("validation")) and len(b) == 1 for b in batches)
        seen += [row for b in batches for row in ids(b)]
    assert sorted(seen) == expected


def test_max_rows_limits_the_held_out_rows_over_all_ranks() -> None:
    of = source()
    assert of.block_rows("validation") == 16
    # At least a block for each rank: Lightning cannot validate on a rank that has nothing.
    for max_rows, rows in ((1, 32), (16, 32), (47, 32), (10**9, of.n_blocks("validation") * 16)):
        loaders = [ValidationLoader(of, 32, max_rows=max_rows, rank=rank, world=2) for rank in range(2)]
        assert all(len(mine) for mine in loaders)
        assert sum(len(batch[0]) for mine in loaders for batch in mine) == rows


def test_fewer_held_out_blocks_than_ranks_are_refused() -> None:
    of = source()
    world = of.n_blocks("validation") + 1
    with pytest.raises(DatasetError, match="held-out blocks"):
        ValidationLoader(of, 32, world=world)


def test_without_held_out_rows_there_are_no_batches() -> None:
    assert len(ValidationLoader(source(0.0), 32)) == 0


# Rows for initialisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 100, 1000, 10**6])
def test_sampled_rows_are_spread_distinct_training_rows_the_same_each_time(rows: int) -> None:
    of = source()
    n_blocks = of.n_blocks("train")
    first, second = of.sample(rows), of.sample(rows)
    assert torch.equal(first[0], second[0])
    assert len(first) == 1
    found = ids(first)
    assert len(set(found)) == len(found)
    assert min(rows, n_blocks * 16) <= len(found) <= max(rows + n_blocks, n_blocks)
    training = {int(r) for i in range(n_blocks) for r in of.read_block("train", i)[0][:, 0]}
    assert set(found) <= training
    assert {int(of.read_block("train", i)[0][0, 0]) for i in range(n_blocks)} <= set(found)  # some of every block

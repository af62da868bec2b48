"""Sources of blocks: rows in memory and on disk look the same to the loader, and bad rows are named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeforge.data.loader import TrainLoader, ValidationLoader
from saeforge.data.plan import Plan
from saeforge.data.shard_source import ShardSource
from saeforge.data.source import BlockSource
from saeforge.data.tensor_source import TensorSource
from saeforge.data.writer import write_dataset
from saeforge.errors import ConfigError, DatasetError, SaeforgeError

D = 3


def rows(n: int = 1000, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 2


def numbers(n: int = 1000) -> Tensor:
    return torch.arange(n, dtype=torch.float32)[:, None].repeat(1, D)


def held(source: BlockSource, split: str) -> list[int]:
    """First components of all rows of a split."""
    return [int(r) for i in range(source.n_blocks(split)) for r in source.read_block(split, i)[0][:, 0]]


# In memory --------------------------------------------------------------------------------------------------------


def chunks(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(130)


@pytest.mark.parametrize("kind", ["tensor", "array", "float64 array", "iterator", "list of arrays", "parameter"])
def test_every_kind_of_input_gives_the_same_source(kind: str) -> None:
    x = rows()
    given: dict[str, Any] = {
        "tensor": x,
        "array": x.numpy(),
        "float64 array": x.numpy().astype(np.float64),
        "iterator": chunks(x),
        "list of arrays": [part.numpy() for part in x.split(333)],
        "parameter": torch.nn.Parameter(x),
    }
    source, expected = TensorSource(given[kind]), TensorSource(x)
    assert source.fingerprint == expected.fingerprint
    assert source.x.dtype == torch.float32
    assert not source.x.requires_grad
    assert torch.equal(source.x, x)


def test_a_read_only_memory_map_is_read_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows().numpy())
    assert torch.equal(TensorSource(np.load(tmp_path / "x.npy", mmap_mode="r")).x, rows())


def test_a_transposed_array_and_a_strided_tensor_are_read_in_their_logical_order() -> None:
    x = rows()
    assert torch.equal(TensorSource(np.asfortranarray(x.numpy())).x, x)
    assert TensorSource(x.T.contiguous().T).fingerprint == TensorSource(x).fingerprint


def test_bf16_rows_stay_bf16() -> None:
    source = TensorSource(rows().bfloat16())
    assert source.read_block("train", 0)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_the_splits_are_disjoint_and_together_all_whole_blocks(share: float) -> None:
    source = TensorSource(numbers(1003), validation_share=share)
    train, validation = held(source, "train"), held(source, "validation")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == list(range(1003 // 16 * 16))
    assert len(validation) == pytest.approx(share * 1003, abs=16)
    assert (len(validation) == 0) == (share == 0)
    if validation:
        assert max(np.diff(sorted(validation))) > 16  # taken from all over, not the end


def test_blocks_grow_with_the_data_but_leave_sixteen_a_lane() -> None:
    for n, block in ((256, 16), (4096, 32), (5000, 32), (40_000, 256)):
        source = TensorSource(numbers(n), validation_share=0.0)
        assert source.block_rows("train") == block
        assert source.n_blocks("train") == n // block


@pytest.mark.parametrize("paired", [False, True])
def test_statistics_are_those_of_the_training_rows_alone(paired: bool) -> None:
    x = rows() * 100
    target = x[:, :2] * 2 + 1 if paired else None
    source = TensorSource(x, target, validation_share=0.3)
    blocks = [source.read_block("train", i) for i in range(source.n_blocks("train"))]
    for which, stats in enumerate(source.statistics):
        part = torch.cat([b[which] for b in blocks]).double().numpy()
        norms = np.linalg.norm(part, axis=1)
        assert stats.count == len(part)
        np.testing.assert_allclose(stats.mean, part.mean(0), rtol=1e-10)
        np.testing.assert_allclose(stats.variance, part.var(0), rtol=1e-10)
        assert stats.mean_norm == pytest.approx(norms.mean(), rel=1e-10)
        assert stats.mean_square_norm == pytest.approx((norms**2).mean(), rel=1e-10)
        assert stats.max_norm == pytest.approx(norms.max(), rel=1e-10)
    assert source.widths == ((D, 2) if paired else (D,))
    assert (source.pairs[0].inputs, source.pairs[0].targets) == ((0,), (int(paired),))


def test_the_fingerprint_changes_with_any_value_shape_type_or_target() -> None:
    x = rows()
    other = x.clone()
    other[999, 2] += 1e-3
    sources = [
        TensorSource(x),
        TensorSource(other),
        TensorSource(x.bfloat16()),
        TensorSource(x[:992]),
        TensorSource(x, x[:, :2]),
        TensorSource(x, x),
    ]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert TensorSource(x).fingerprint == TensorSource(x.clone()).fingerprint
    assert sources[0].pairs[0].identity["dataset"] == sources[0].fingerprint


def bad(value: float) -> Tensor:
    x = rows(70_000, 2)
    x[65_999, 1] = value
    return x


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: bad(float("nan")), DatasetError, "X row 65999 holds NaN or infinite"),
        (lambda: bad(float("-inf")), DatasetError, "X row 65999 holds NaN or infinite"),
        (lambda: rows().reshape(10, 100, D), ConfigError, r"shape \(10, 100, 3\).*flatten leading dimensions"),
        (lambda: rows()[:, 0], ConfigError, r"shape \(1000,\)"),
        (lambda: torch.ones(1000, D, dtype=torch.int64), ConfigError, "int64"),
        (lambda: np.ones((1000, D), dtype=np.int32), ConfigError, "int32"),
        (lambda: rows(255), DatasetError, "X has 255 rows; training needs at least 256"),
        (lambda: 7, ConfigError, "X is a int"),
        (lambda: iter([]), DatasetError, "X yielded nothing"),
        (lambda: [rows(500), rows(500, 4)], ConfigError, "X chunk 1 is 4 wide, the first 3"),
        (lambda: [rows(500), bad(1.0)[:500], rows(500)], ConfigError, "X chunk 1 is 2 wide, the first 3"),
        (lambda: [rows(500), rows(500).fill_(float("nan"))], DatasetError, "X chunk 1 row 0 holds NaN"),
        (lambda: {"x": rows()}, ConfigError, "X is a dict"),
        (lambda: "activations.npy", ConfigError, "X is a str"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TensorSource(given())


def test_a_target_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="X has 1000 rows and target 999"):
        TensorSource(rows(), rows(999))
    with pytest.raises(DatasetError, match="target row 4 "):
        TensorSource(rows(), rows().index_fill(0, torch.tensor([4]), float("nan")))


@pytest.mark.parametrize("share", [-0.1, 1.0, 7.0])
def test_a_validation_share_outside_its_range_is_named(share: float) -> None:
    with pytest.raises(ConfigError, match="validation_share"):
        TensorSource(rows(), validation_share=share)


def test_a_validation_share_that_leaves_nothing_to_train_on_is_an_error_of_ours() -> None:
    with pytest.raises(SaeforgeError, match=r"validation_share = 0\.99"):
        TensorSource(rows(256), validation_share=0.99)


# On disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "d"
    write_dataset(root, {"train": numbers(4096) + 1, "validation": -numbers(2048) - 1}, site="blocks.3:out")
    return root


def test_a_dataset_on_disk_is_read_by_the_loader_once_a_pass(dataset: Path) -> None:
    source = ShardSource(str(dataset))
    assert source.widths == (D,)
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), 64)
    seen = [int(r) for batch in TrainLoader(source, plan, plan.batches_per_pass) for r in batch[0][:, 0]]
    assert sorted(seen) == list(range(1, 4097))
    held_out = [int(r) for batch in ValidationLoader(source, 512) for r in batch[0][:, 0]]
    assert sorted(held_out) == list(range(-2048, 0))


def test_rows_in_memory_stay_with_their_neighbours_where_that_is_asked_for() -> None:
    source = TensorSource(numbers(4096), unit=2)
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), 64, unit=source.unit)
    pairs = [source.pairs[0].batch(rows) for rows in TrainLoader(source, plan, plan.batches_per_pass)]
    for batch in pairs:
        first, second = batch.x[:, 0].view(-1, 2).T
        assert torch.equal(second, first + 1)
        assert batch.group is not None
        assert batch.group.tolist() == [row // 2 for row in range(64)]
    order = torch.cat([batch.x[::2, 0] for batch in pairs])
    assert not torch.equal(order, order.sort().values)
    with pytest.raises(ConfigError, match="group_rows = 3: expected 1, 2, 4, 8 or 16"):
        TensorSource(numbers(), unit=3)


def test_a_dataset_tells_its_statistics_and_where_it_is_from(dataset: Path) -> None:
    source = ShardSource(str(dataset))
    assert source.statistics[0].mean == pytest.approx([2048.5] * D)
    assert len(source.statistics) == 1
    site = {"id": "blocks.3:out", "module_path": "blocks.3", "where": "out", "d": D, "dtype": "float32"}
    assert source.pairs[0].identity["site"] == site
    assert source.pairs[0].identity["target"] is None
    assert source.pairs[0].identity["dataset"] == source.fingerprint == ShardSource(str(dataset)).fingerprint


def test_a_target_that_is_the_input_is_one_tensor(dataset: Path) -> None:
    source = ShardSource(str(dataset), target="blocks.3:out")
    batch = source.pairs[0].batch(source.read_block("train", 3))
    assert batch.target is batch.x
    assert source.pairs[0].identity["target"] is None


def test_a_dataset_without_held_out_rows_has_no_such_blocks(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", {"train": numbers(2048)})
    source = ShardSource(str(tmp_path / "d"))
    assert source.n_blocks("validation") == 0
    assert len(ValidationLoader(source, 64)) == 0


def test_a_damaged_block_stops_the_loader_with_its_name(dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    shard = next((root / "blocks.3.out").glob("train-*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    source = ShardSource(str(root))
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), 64)
    with pytest.raises(DatasetError, match=rf"{shard.name}, block \d+"):
        list(TrainLoader(source, plan, plan.batches_per_pass))


def test_a_missing_dataset_or_site_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere"):
        ShardSource(str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match=r"blocks\.9:out"):
        ShardSource(str(dataset), input="blocks.9:out")
    with pytest.raises(DatasetError, match=r"blocks\.9:in"):
        ShardSource(str(dataset), target="blocks.9:in")

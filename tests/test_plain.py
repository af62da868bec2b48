"""`PlainTarSource`: plain webdataset tars of `.npy` members as blocks, never fewer rows silently."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from saeforge.data.loader import TrainLoader
from saeforge.data.plain import PlainTarSource
from saeforge.data.plan import Plan
from saeforge.errors import ConfigError, DatasetError

D = 8

pytestmark = pytest.mark.filterwarnings("ignore:.*plain tars without a manifest:UserWarning")


def write_tar(path: Path, arrays: Sequence[np.ndarray], first: int = 0) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, array in enumerate(arrays, first):
            buffer = io.BytesIO()
            np.save(buffer, array)
            info = tarfile.TarInfo(f"{number:06d}.acts.npy")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    return path


def data(rows: int, dtype: str = "<f4") -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, D)).astype(dtype)


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Two tars, 10,000 rows in members of 1 to 999 rows (and some without the dimension of rows)."""
    cuts = np.sort(np.random.default_rng(1).choice(np.arange(1, 10_000), size=60, replace=False))
    parts = [part[0] if len(part) == 1 else part for part in np.split(data(10_000), cuts)]
    return [write_tar(tmp_path / "a-000.tar", parts[:40]), write_tar(tmp_path / "a-001.tar", parts[40:], first=40)]


def read(source: PlainTarSource, split: str) -> torch.Tensor:
    return torch.cat([source.read_block(split, block)[0] for block in range(source.n_blocks(split))])


def test_members_are_one_array_cut_into_equal_blocks(tars: list[Path], tmp_path: Path) -> None:
    source = PlainTarSource(f"{tmp_path}/a-{{000..001}}.tar", validation_share=0)
    rows = source.block_rows("train")
    assert rows & (rows - 1) == 0
    assert source.n_blocks("train") == 10_000 // rows
    assert torch.equal(read(source, "train"), torch.from_numpy(data(10_000)[: 10_000 // rows * rows]))
    assert (source.widths, source.dtypes, source.n_blocks("validation")) == ((D,), (torch.float32,), 0)


def test_the_last_members_are_held_out(tars: list[Path]) -> None:
    source = PlainTarSource(tars, validation_share=0.4)
    train = sum(span.rows for span in source.spans["train"])
    assert [len(source.spans[split]) for split in ("train", "validation")] == [37, 24]
    held_out = read(source, "validation")
    assert torch.equal(held_out, torch.from_numpy(data(10_000)[train:][: len(held_out)]))
    assert train - source.block_rows("train") < len(read(source, "train")) <= train


def test_more_members_are_held_out_if_their_rows_are_few(tmp_path: Path) -> None:
    source = PlainTarSource(write_tar(tmp_path / "x.tar", np.split(data(10_000), 100)))
    assert [len(source.spans[split]) for split in ("train", "validation")] == [79, 21]
    assert source.n_blocks("validation") * source.block_rows("validation") == 2096 // 16 * 16


def test_a_block_is_read_into_the_buffer_that_is_given(tars: list[Path]) -> None:
    source = PlainTarSource(tars, validation_share=0)
    out = torch.empty(source.block_rows("train"), D)
    (x,) = source.read_block("train", 3, (out,))
    assert x is out
    assert torch.equal(out, source.read_block("train", 3)[0])
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        source.read_block("train", 3, (out[1:],))
    with pytest.raises(IndexError):
        source.read_block("train", source.n_blocks("train"))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["<f4"], torch.float32),
        (["<f2"], torch.float32),
        (["<u2"], torch.bfloat16),
        (["<u2", "<f4", "<f2"], torch.float32),
    ],
)
def test_other_dtypes_are_converted_exactly(tmp_path: Path, dtypes: list[str], expected: torch.dtype) -> None:
    x = torch.from_numpy(data(6144)).bfloat16().half().bfloat16()  # fits into all of them
    stored = {
        "<f4": x.float().numpy(),
        "<f2": x.half().numpy(),
        "<u2": x.view(torch.int16).numpy().view("<u2"),
    }
    parts = [stored[dtypes[i % len(dtypes)]][i * 512 : (i + 1) * 512] for i in range(12)]
    source = PlainTarSource(write_tar(tmp_path / "x.tar", parts), validation_share=0)
    assert source.dtypes == (expected,)
    assert torch.equal(read(source, "train"), x.to(expected))


def test_statistics_are_those_of_all_rows_where_these_are_few(tars: list[Path]) -> None:
    source = PlainTarSource(tars, validation_share=0)
    (statistics,) = source.statistics
    x = data(10_000).astype(np.float64)
    assert statistics.count == 10_000
    assert np.allclose(statistics.mean, x.mean(axis=0), rtol=1e-12)
    assert np.allclose(statistics.variance, x.var(axis=0), rtol=1e-12)
    assert np.isclose(statistics.mean_square_norm, (x**2).sum(axis=1).mean(), rtol=1e-12)


def test_statistics_of_many_rows_are_those_of_a_spread_sample(
    tars: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeforge.data.plain.STATISTICS_ROWS", 4096)
    (statistics,) = PlainTarSource(tars, validation_share=0).statistics
    assert statistics.count == 4096
    assert np.allclose(statistics.mean, data(10_000).mean(axis=0), atol=0.1)


def test_the_sample_is_spread_and_the_same_each_time(tars: list[Path]) -> None:
    source = PlainTarSource(tars, validation_share=0.4)
    (first,), (second,) = source.sample(1024), source.sample(1024)
    assert first.shape == (1024, D)
    assert torch.equal(first, second)
    (everything,) = source.sample(10**6)
    assert len(everything) == sum(span.rows for span in source.spans["train"])


def test_it_is_a_block_source_that_trains(tars: list[Path]) -> None:
    from saeforge.data.source import BlockSource

    source: BlockSource = PlainTarSource(tars, validation_share=0.4)
    (pair,) = source.pairs
    batch = pair.batch(source.sample(256))
    assert batch.x is batch.target
    assert pair.identity["dataset"] == source.fingerprint
    assert source.counters() == {}


def test_a_loader_serves_every_row_once_and_resumes(tars: list[Path]) -> None:
    source = PlainTarSource(tars, validation_share=0)
    plan = Plan(source.n_blocks("train"), source.block_rows("train"), 128)
    total = plan.batches_per_pass
    batches = [x.clone() for (x,) in TrainLoader(source, plan, total)]
    served = torch.cat(batches)
    rows = {row.tobytes() for row in data(10_000)}
    assert len({row.tobytes() for row in served.numpy()} & rows) == len(served) == total * 128
    first = TrainLoader(source, plan, total)
    stream = iter(first)
    for _ in range(total // 2):
        next(stream)
    again = TrainLoader(PlainTarSource(tars, validation_share=0), plan, total)
    again.load_state_dict(first.state_dict())
    rest = [x.clone() for (x,) in again]
    assert len(rest) == total - total // 2
    assert all(torch.equal(a, b) for a, b in zip(rest, batches[total // 2 :], strict=True))


def test_it_warns_that_there_are_no_checksums(tars: list[Path]) -> None:
    with pytest.warns(UserWarning, match=r"no checksums.*resumes exactly only while.*saeforge data import"):
        PlainTarSource(tars, validation_share=0)


def test_the_fingerprint_follows_names_sizes_headers_and_options(tars: list[Path], tmp_path: Path) -> None:
    first = PlainTarSource(tars, validation_share=0.4).fingerprint
    assert PlainTarSource(tars, validation_share=0.4).fingerprint == first
    assert PlainTarSource(tars[::-1], validation_share=0.4).fingerprint != first
    assert PlainTarSource(tars, validation_share=0.3).fingerprint != first
    moved = tars[0].rename(tmp_path / "b-000.tar")
    assert PlainTarSource([moved, tars[1]], validation_share=0.4).fingerprint != first


# ---- damage


def test_a_truncated_tar_or_flipped_header_is_an_error_with_its_name(tars: list[Path]) -> None:
    content = tars[1].read_bytes()
    for damaged in (content[:-10240], content[: len(content) // 2], bytes(1) + content[1:]):
        tars[1].write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"a-001\.tar"):
            PlainTarSource(tars)


def test_a_value_that_is_not_finite_names_file_member_and_row(tmp_path: Path) -> None:
    x = data(4096)
    x[3000, 5] = np.nan
    path = write_tar(tmp_path / "x.tar", np.split(x, 8))
    with pytest.raises(DatasetError, match=r"x\.tar, 000005\.acts\.npy, row 440: NaN or infinite"):
        read(PlainTarSource(path, validation_share=0), "train")


def test_a_file_that_changes_while_it_is_used_is_an_error(tars: list[Path]) -> None:
    source = PlainTarSource(tars, validation_share=0)
    tars[1].write_bytes(tars[1].read_bytes()[:-20_000])
    with pytest.raises(DatasetError, match=r"a-001\.tar, .*changed its size"):
        read(source, "train")
    tars[1].unlink()
    with pytest.raises(DatasetError, match=r"a-001\.tar, .*cannot be opened"):
        read(source, "train")


def test_what_it_does_not_read_is_refused(tars: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs a shell command and is refused"):
        PlainTarSource("pipe:cat x.tar")
    with pytest.raises(ConfigError, match=r"expected tar files, for example .*/\*\.tar"):
        PlainTarSource(tmp_path)
    with pytest.raises(ConfigError, match="given twice"):
        PlainTarSource([tars[0], tars[0]])
    with pytest.raises(DatasetError, match=r"000061\.acts\.npy is 3 wide, .*000000\.acts\.npy 8"):
        PlainTarSource([*tars, write_tar(tmp_path / "b.tar", [np.zeros((5, 3), "<f4")], first=61)])
    with pytest.raises(DatasetError, match=r"split train has 2,000 rows, at least 2,048"):
        PlainTarSource(write_tar(tmp_path / "c.tar", [data(2000)]), validation_share=0)
    with pytest.raises(DatasetError, match=r"4,096 rows in 1 member\(s\) are too few to hold some out"):
        PlainTarSource(write_tar(tmp_path / "c.tar", [data(4096)]))
    with pytest.raises(DatasetError, match=r"4,096 rows in 2 member\(s\) are too few.*saeforge data import"):
        PlainTarSource(write_tar(tmp_path / "c.tar", [data(1096), data(3000)]))


def test_members_are_chosen_by_pattern(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(8):
            for name, array in (("acts", data(512)), ("tokens", np.zeros((512, 1), "<u2"))):
                buffer = io.BytesIO()
                np.save(buffer, array)
                info = tarfile.TarInfo(f"{number}.{name}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    with pytest.raises(DatasetError, match="name the members to take by a pattern"):
        PlainTarSource(path)
    assert PlainTarSource(path, key="*.acts.npy", validation_share=0).n_blocks("train") == 128

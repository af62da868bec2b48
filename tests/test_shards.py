"""Shards: what is written is what is read, by anyone; and no damaged byte goes unnoticed."""

from __future__ import annotations

import dataclasses
import errno
import gc
import io
import shutil
import subprocess
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from saeforge.data import tario
from saeforge.data.layout import SiteSpec, SplitPlan, bucket_permutation
from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.data.tario import ALIGNMENT, write_shard
from saeforge.data.verify import Finding, verify_dataset
from saeforge.data.writer import DatasetWriter, write_dataset
from saeforge.errors import DatasetError, SaeforgeError

D = 24


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "train": torch.randn(5000, D, generator=generator).to(dtype),
        "validation": torch.randn(2048, D, generator=generator).to(dtype),
    }


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "d", tensors(), bucket_rows=1024)
    return tmp_path / "d"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_row_is_stored_once_with_its_provenance(tmp_path: Path, dtype: torch.dtype) -> None:
    data = tensors(dtype)
    write_dataset(tmp_path, data, bucket_rows=1024)
    dataset = ActivationDataset.open(tmp_path)
    for split, x in data.items():
        seen = []
        for index in range(dataset.n_blocks(split)):
            block, rows = dataset.read_block(split, index), dataset.read_rows(split, index)
            assert block.dtype == dataset.dtype == dtype
            assert block.shape == (dataset.block_rows(split), D)
            assert torch.equal(block, x[torch.from_numpy(rows[:, 0].astype(np.int64))])
            seen.append(rows[:, 0])
        stored = dataset.n_blocks(split) * dataset.block_rows(split)
        assert sorted(np.concatenate(seen).tolist()) == list(range(stored))
        assert stored + dataset.manifest.splits[split].dropped_rows == len(x)


def test_rows_are_shuffled_within_their_bucket_only(dataset: Path) -> None:
    opened = ActivationDataset.open(dataset)
    per_bucket = 1024 // opened.block_rows("train")
    for bucket in range(3):
        blocks = [opened.read_rows("train", bucket * per_bucket + i)[:, 0] for i in range(per_bucket)]
        rows = np.concatenate(blocks)
        assert set(rows // 1024) == {bucket}
        assert np.array_equal(rows - bucket * 1024, bucket_permutation(0, "train", bucket, 1024))
        assert np.abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.15


def test_statistics_are_those_of_the_stored_train_rows(dataset: Path) -> None:
    x = tensors()["train"][:4992].double().numpy()
    statistics = ActivationDataset.open(dataset).site.statistics
    norms = np.linalg.norm(x, axis=1)
    assert statistics.count == len(x)
    np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(statistics.variance, x.var(0), rtol=1e-12)
    np.testing.assert_allclose(
        [statistics.mean_norm, statistics.mean_square_norm, statistics.max_norm],
        [norms.mean(), (norms**2).mean(), norms.max()],
        rtol=1e-12,
    )


def test_reading_into_a_given_tensor_fills_it_and_checks_its_shape(dataset: Path) -> None:
    opened = ActivationDataset.open(dataset)
    ring = torch.zeros(3, opened.block_rows("train"), D, dtype=torch.bfloat16)
    assert opened.read_block("train", 5, out=ring[1]).data_ptr() == ring[1].data_ptr()
    assert torch.equal(ring[1], opened.read_block("train", 5))
    assert not ring[0].any()
    assert not ring[2].any()
    for wrong in (ring[:2, :, 0], ring[0].float(), ring[0, 1:], ring[1].T.contiguous().T):
        with pytest.raises(ValueError, match="out must be a contiguous CPU tensor"):
            opened.read_block("train", 5, out=wrong)
    with pytest.raises(IndexError):
        opened.read_block("train", opened.n_blocks("train"))


def test_threads_read_the_same_blocks(dataset: Path) -> None:
    opened = ActivationDataset.open(dataset)
    indices = list(range(opened.n_blocks("train"))) * 3
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(lambda i: opened.read_block("train", i), indices))
    assert all(torch.equal(block, opened.read_block("train", i)) for block, i in zip(blocks, indices, strict=True))


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_numpy_and_tar_read_a_shard(dataset: Path) -> None:
    opened = ActivationDataset.open(dataset)
    shard = dataset / "array.out" / "train-000001.tar"
    first = 1024 // opened.block_rows("train")
    samples = list(wds.WebDataset(str(shard), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{first + i:08d}" for i in range(len(samples))]
    for sample in samples:
        bits = opened.read_block("train", int(sample["__key__"])).view(torch.uint16).numpy()
        assert np.array_equal(sample["acts.npy"], bits)
    listing = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
    assert listing.stderr == ""
    assert listing.stdout.split() == [f"{first + i:08d}.acts.npy" for i in range(len(samples))]
    with tarfile.open(shard) as tar:
        member = tar.extractfile(listing.stdout.split()[0])
        assert member is not None
        assert np.load(io.BytesIO(member.read())).shape == (opened.block_rows("train"), D)
    rows = list(wds.WebDataset(str(dataset / "rows" / "validation-000000.tar"), shardshuffle=False).decode())
    assert np.array_equal(rows[0]["rows.npy"], opened.read_rows("validation", 0))
    gc.collect()  # while the filter above holds


def test_payloads_are_aligned_and_bytes_are_reproducible(dataset: Path, tmp_path: Path) -> None:
    opened = ActivationDataset.open(dataset)
    for shards in opened.site.shards.values():
        assert all(block.offset % ALIGNMENT == 0 for shard in shards for block in shard.blocks)
    write_dataset(tmp_path / "again", tensors(), bucket_rows=1024)
    for path in sorted(dataset.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(dataset)).read_bytes(), path


@pytest.mark.parametrize("shape", [(16, 1), (16, 3), (64, 1024), (1, 8192)])
def test_odd_shapes_survive(tmp_path: Path, shape: tuple[int, int]) -> None:
    arrays = [(f"{i:08d}.acts.npy", np.full(shape, i, dtype="<f4")) for i in range(3)]
    record = write_shard(tmp_path / "s.tar", arrays)
    assert (tmp_path / "s.tar").stat().st_size == record.nbytes
    with tarfile.open(tmp_path / "s.tar") as tar:
        for (name, array), block in zip(arrays, record.blocks, strict=True):
            member = tar.extractfile(name)
            assert member is not None
            assert np.array_equal(np.load(io.BytesIO(member.read())), array)
            assert (block.offset % ALIGNMENT, block.nbytes, block.rows) == (0, array.nbytes, shape[0])


@pytest.mark.parametrize("family", ["array.out", "rows"])
def test_a_flipped_bit_anywhere_in_a_payload_is_an_error(dataset: Path, family: str) -> None:
    opened = ActivationDataset.open(dataset)
    shards = opened.site.shards["train"] if family == "array.out" else opened.manifest.rows["train"]
    path = dataset / family / shards[2].file
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    first = sum(len(shard.blocks) for shard in shards[:2])
    read: Any = opened.read_block if family == "array.out" else opened.read_rows
    for inside, block in enumerate(shards[2].blocks):
        for at in (0, block.nbytes - 1, int(rng.integers(block.nbytes))):
            damaged = bytearray(whole)
            damaged[block.offset + at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(damaged))
            with pytest.raises(DatasetError, match=rf"{path.name}, block {inside}: checksum mismatch"):
                read("train", first + inside)
    path.write_bytes(whole)
    read("train", first)


def test_truncated_and_missing_shards_are_errors_at_open_and_at_read(dataset: Path) -> None:
    opened = ActivationDataset.open(dataset)
    path = dataset / "array.out" / "validation-000001.tar"
    whole = path.read_bytes()
    last = opened.n_blocks("validation") - 1
    for size in range(0, len(whole), 3 * 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(DatasetError, match=r"validation-000001\.tar has .* bytes, the manifest says"):
            ActivationDataset.open(dataset)
        with pytest.raises(DatasetError, match=r"validation-000001\.tar, block \d+: the file ends"):
            opened.read_block("validation", last)
    path.unlink()
    with pytest.raises(DatasetError, match=r"validation-000001\.tar is missing"):
        ActivationDataset.open(dataset)
    with pytest.raises(DatasetError, match=r"validation-000001\.tar, block \d+: the shard is missing"):
        opened.read_block("validation", last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_non_finite_values_are_refused_at_write_and_found_by_verify(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    data = tensors(dtype)
    data["train"][77, 3] = value
    with pytest.raises(DatasetError, match="array:out: NaN or infinite"):
        write_dataset(tmp_path / "refused", data)
    assert not list((tmp_path / "refused").rglob("*.tar"))
    # A dataset of another writer, with right checksums: reading trusts them, verify looks for itself.
    write_dataset(tmp_path / "foreign", tensors(dtype))
    manifest = Manifest.load(tmp_path / "foreign" / "manifest.json")
    shard = manifest.sites[0].shards["train"][0]
    path = tmp_path / "foreign" / "array.out" / shard.file
    block = shard.blocks[3]
    whole = bytearray(path.read_bytes())
    bits = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
    whole[block.offset + 8 : block.offset + 8 + len(bits)] = bits
    path.write_bytes(bytes(whole))
    crc32 = zlib.crc32(whole[block.offset : block.offset + block.nbytes])
    blocks = tuple(dataclasses.replace(b, crc32=crc32) if b == block else b for b in shard.blocks)
    family = {**manifest.sites[0].shards, "train": (dataclasses.replace(shard, blocks=blocks),)}
    site = dataclasses.replace(manifest.sites[0], shards=family)
    dataclasses.replace(manifest, sites=(site,)).save(tmp_path / "foreign" / "manifest.json")
    opened = ActivationDataset.open(tmp_path / "foreign")
    assert not opened.read_block("train", 3).isfinite().all()
    findings = verify_dataset(tmp_path / "foreign")
    assert Finding(f"array.out/{shard.file}", 3, "holds NaN or infinite activations") in findings
    assert {finding.block for finding in findings if finding.shard.startswith("array.out")} == {3}
    with pytest.raises(DatasetError, match=r"NaN or infinite|not those of index"):
        opened.verify()


def test_large_finite_values_are_not_taken_for_infinite(tmp_path: Path) -> None:
    x = torch.full((2048, 4), 3e38)  # their sum overflows
    write_dataset(tmp_path, {"train": x}, shuffle=False)
    assert torch.equal(ActivationDataset.open(tmp_path).read_block("train", 0), x[:16])


def test_verify_finds_damage_outside_of_payloads(dataset: Path) -> None:
    opened = ActivationDataset.open(dataset)
    opened.verify()
    path = dataset / "rows" / "train-000000.tar"
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(DatasetError, match=r"rows/train-000000.tar, block 0: its tar header is damaged"):
        opened.verify()


def test_a_full_disk_leaves_no_temporary_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tario.os, "fsync", full)
    with pytest.raises(SaeforgeError, match=r"no space left under .*free some space and run the same command again"):
        write_shard(tmp_path / "s.tar", [("a.npy", np.zeros((4, 4), dtype="<f4"))])
    assert list(tmp_path.iterdir()) == []


def make_writer(root: Path, sha: str = "x") -> DatasetWriter:
    sites = [SiteSpec("a:out", "a", "out", 4, "float32"), SiteSpec("b:in", "b", "in", 6, "bfloat16")]
    return DatasetWriter(
        root, sites, {"train": SplitPlan(2048 + 100, 16)}, bucket_rows=512, config_sha256=sha, shard_bytes=6000
    )


def write_bucket(w: DatasetWriter, split: str, bucket: int) -> None:
    start, stop = w.bucket_range(split, bucket)
    rows = np.arange(start, stop, dtype=np.uint32)[:, None].repeat(4, axis=1)
    x = torch.arange(start, stop).float()[:, None]
    w.write_bucket(split, bucket, {"a:out": x.expand(-1, 4).contiguous(), "b:in": x.expand(-1, 6).bfloat16()}, rows)


def test_buckets_can_be_written_in_any_order_and_redone(tmp_path: Path) -> None:
    first = make_writer(tmp_path / "1")
    assert [first.bucket_range("train", b) for b in range(first.n_buckets("train"))][-1] == (2048, 2144)
    for key in first.buckets():
        write_bucket(first, *key)
    second = make_writer(tmp_path / "2")
    for split, bucket in (("train", 3), ("train", 1)):
        write_bucket(second, split, bucket)
    (tmp_path / "2" / "a.out" / "train-000000.tar.part-1").write_bytes(b"half")
    (tmp_path / "2" / "a.out" / "train-000003.tar.part-2").write_bytes(b"another process is at this one")
    second = make_writer(tmp_path / "2")
    assert second.missing_buckets() == [("train", 0), ("train", 2), ("train", 4)]
    with pytest.raises(DatasetError, match="train bucket 0 is missing"):
        second.finish(alignment_sha256="")
    for key in second.missing_buckets():
        write_bucket(second, *key)
    (left,) = (tmp_path / "2").rglob("*.part-*")  # only what was of the buckets written is removed
    assert left.name == "train-000003.tar.part-2"
    left.unlink()
    assert first.finish(alignment_sha256="") == second.finish(alignment_sha256="")
    files = [p.relative_to(tmp_path / "1") for p in sorted((tmp_path / "1").rglob("*")) if p.is_file()]
    assert len(files) > 3 * 5
    for path in files:
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes()
    opened = ActivationDataset.open(tmp_path / "1", site="b:in")
    for index in range(opened.n_blocks("train")):
        expected = torch.arange(16 * index, 16 * index + 16).float().bfloat16()
        assert torch.equal(opened.read_block("train", index)[:, 5], expected)
    with pytest.raises(DatasetError, match="holds several sites, name one of them: a:out, b:in"):
        ActivationDataset.open(tmp_path / "1")


def test_a_record_of_another_configuration_or_with_a_lost_shard_does_not_count(tmp_path: Path) -> None:
    w = make_writer(tmp_path)
    for key in w.buckets():
        write_bucket(w, *key)
    assert w.missing_buckets() == []
    assert len(make_writer(tmp_path, sha="y").missing_buckets()) == 5
    (tmp_path / "rows" / w.record("train", 2)["shards"]["rows"][0]["file"]).unlink()  # type: ignore[index]
    assert w.missing_buckets() == [("train", 2)]
    record = tmp_path / "index" / "train-000004.json"
    record.write_text(record.read_text().replace("2144", "2145"))
    assert w.missing_buckets() == [("train", 2), ("train", 4)]


def test_a_dataset_can_be_moved(dataset: Path, tmp_path: Path) -> None:
    opened = ActivationDataset.open(dataset)
    shutil.move(dataset, tmp_path / "moved")
    again = ActivationDataset.open(tmp_path / "moved")
    assert again.fingerprint == opened.fingerprint
    assert again.read_block("train", 0).isfinite().all()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_reading_keeps_no_file_open(dataset: Path) -> None:
    opened = ActivationDataset.open(dataset)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(20):
        opened.read_block("train", index)
    assert len(list(Path("/proc/self/fd").iterdir())) == before

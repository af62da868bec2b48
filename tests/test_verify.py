"""Damage of every kind: a reader gives the right rows or names shard and block; `verify_dataset` lists all of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from saeforge.data.manifest import Manifest, ShardRecord, sha256_json
from saeforge.data.shards import ActivationDataset
from saeforge.data.verify import Finding, verify_dataset
from saeforge.data.writer import write_dataset
from saeforge.errors import DatasetError

D = 8
BLOCKS = 128


def rows(seed: int = 1) -> dict[str, torch.Tensor]:
    return {"train": torch.randn(16 * BLOCKS, D, generator=torch.Generator().manual_seed(seed)).bfloat16()}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify") / "acts"
    write_dataset(root, rows(), bucket_rows=256)
    return root


@pytest.fixture(scope="module")
def expected(template: Path) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    opened = ActivationDataset.open(template)
    return [opened.read_block("train", i) for i in range(BLOCKS)], [opened.read_rows("train", i) for i in range(BLOCKS)]


@pytest.fixture
def dataset(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "acts")


@contextmanager
def changed(path: Path, at: int, bits: int) -> Iterator[None]:
    """One byte of a file is another one."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))
        file.flush()
        yield
        file.seek(at)
        file.write(bytes([byte]))


def read_all(
    opened: ActivationDataset, expected: tuple[list[torch.Tensor], list[np.ndarray]], blocks: range = range(BLOCKS)
) -> list[str]:
    """Read blocks of both families; return the errors. What is read is right."""
    errors = []
    for index in blocks:
        try:
            assert torch.equal(opened.read_block("train", index), expected[0][index])
        except DatasetError as error:
            errors.append(str(error))
        try:
            assert np.array_equal(opened.read_rows("train", index), expected[1][index])
        except DatasetError as error:
            errors.append(str(error))
    return errors


def shards(root: Path, folder: str) -> tuple[ShardRecord, ...]:
    manifest = Manifest.load(root / "manifest.json")
    return manifest.rows["train"] if folder == "rows" else manifest.sites[0].shards["train"]


def block_at(shard: ShardRecord, at: int) -> int | None:
    """The block that a byte of a shard belongs to: its headers, payload and padding; None behind the last one."""
    return next((i for i, b in enumerate(shard.blocks) if at < b.offset + -(-b.nbytes // 512) * 512), None)


def test_a_sound_dataset_has_no_findings_and_progress_ends_at_the_end(template: Path) -> None:
    told: list[tuple[int, int]] = []
    assert verify_dataset(template, progress=lambda done, total: told.append((done, total))) == []
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in template.rglob("*.tar"))
    ActivationDataset.open(template).verify()


def test_200_flipped_bytes_each_is_found_where_it_is_and_no_row_is_ever_wrong(
    dataset: Path, expected: tuple[list[torch.Tensor], list[np.ndarray]]
) -> None:
    rng = np.random.default_rng(0)
    tars = sorted(dataset.rglob("*.tar"))
    opened = ActivationDataset.open(dataset)
    per_shard = BLOCKS // len(shards(dataset, "rows"))
    payloads = 0
    for _ in range(200):
        path = tars[int(rng.integers(len(tars)))]
        at, bits = int(rng.integers(path.stat().st_size)), 1 << int(rng.integers(8))
        folder, number = path.parent.name, int(path.stem.split("-")[1])
        shard = shards(dataset, folder)[number]
        block = block_at(shard, at)
        in_payload = block is not None and 0 <= at - shard.blocks[block].offset < shard.blocks[block].nbytes
        blocks = range(number * per_shard, (number + 1) * per_shard)
        with changed(path, at, bits):
            errors = read_all(opened, expected, blocks)
            findings = verify_dataset(dataset)
        assert {(finding.shard, finding.block) for finding in findings} == {(f"{folder}/{path.name}", block)}, findings
        if in_payload:
            payloads += 1
            assert len(errors) == 1
            assert f"{path}, block {block}: checksum mismatch" in errors[0]
        else:
            assert errors == []
    assert payloads > 3  # most of such small blocks is padding; the test below sees to every payload byte
    for _ in range(30):
        path = dataset / "index" / f"train-{int(rng.integers(8)):06d}.json"
        record = json.loads(path.read_bytes())
        with changed(path, int(rng.integers(path.stat().st_size - 2)), 1 << int(rng.integers(8))):
            findings = verify_dataset(dataset)
            try:
                same = json.loads(path.read_bytes()) == record  # white space
            except ValueError:
                same = False
        assert {finding.shard for finding in findings} == (set() if same else {f"index/{path.name}"}), findings
    assert verify_dataset(dataset) == []


def test_every_byte_of_a_block_headers_payload_and_padding_is_watched(dataset: Path) -> None:
    path = dataset / "array.out" / "train-000001.tar"
    block = shards(dataset, "array.out")[1].blocks[2]
    start = shards(dataset, "array.out")[1].blocks[1].offset
    start += -(-shards(dataset, "array.out")[1].blocks[1].nbytes // 512) * 512
    header = list(range(start, start + 512, 7)) + list(range(start + 512, block.offset, 211))
    for at in [*header, block.offset - 1, *range(block.offset, block.offset + block.nbytes, 37)]:
        with changed(path, at, 0x10):
            findings = verify_dataset(dataset, sites=["array.out"])
        assert {(finding.shard, finding.block) for finding in findings} == {("array.out/train-000001.tar", 2)}, at


def test_truncation_at_every_512_bytes(dataset: Path, expected: tuple[list[torch.Tensor], list[np.ndarray]]) -> None:
    opened = ActivationDataset.open(dataset)
    path = dataset / "array.out" / "train-000003.tar"
    record = shards(dataset, "array.out")[3]
    whole = path.read_bytes()
    per_shard = len(record.blocks)
    for size in range(0, len(whole), 512):
        path.write_bytes(whole[:size])
        lost = [i for i, block in enumerate(record.blocks) if block.offset + block.nbytes > size]
        with pytest.raises(DatasetError, match=rf"train-000003\.tar has {size} bytes, the manifest says {len(whole)}"):
            ActivationDataset.open(dataset)
        errors = read_all(opened, expected, range(3 * per_shard, 4 * per_shard))
        assert [re.sub(r".*/", "", error.split(":")[0]) for error in errors] == [
            f"train-000003.tar, block {number}" for number in lost
        ]
        if size % 4096 == 0:
            found = [f.block for f in verify_dataset(dataset) if f.shard == "array.out/train-000003.tar"]
            assert found[0] is None
            assert set(found[1:]) >= set(lost)


def test_missing_swapped_and_grown_shards(dataset: Path, expected: tuple[list[torch.Tensor], list[np.ndarray]]) -> None:
    opened = ActivationDataset.open(dataset)
    first, second = (dataset / "array.out" / f"train-00000{number}.tar" for number in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    per_shard = len(shards(dataset, "array.out")[0].blocks)
    first.write_bytes(two)
    second.write_bytes(one)  # of the same size: open cannot see it, reading does
    errors = read_all(ActivationDataset.open(dataset), expected, range(2 * per_shard))
    assert len(errors) == 2 * per_shard
    assert all(re.search(r"train-00000[01]\.tar, block \d+: checksum mismatch", error) for error in errors)
    found = verify_dataset(dataset)
    assert {(f.shard, f.block) for f in found} == {
        (f"array.out/{path.name}", block) for path in (first, second) for block in range(per_shard)
    }
    first.write_bytes(one)
    second.write_bytes(two + b"\0")
    with pytest.raises(DatasetError, match=r"train-000001\.tar has .* bytes"):
        ActivationDataset.open(dataset)
    second.unlink()
    with pytest.raises(DatasetError, match=r"train-000001\.tar is missing"):
        ActivationDataset.open(dataset)
    assert [str(f) for f in verify_dataset(dataset)] == [
        "array.out/train-000001.tar: is missing; restore it, or remake it with the same harvest command"
    ]
    errors = read_all(opened, expected, range(per_shard, 2 * per_shard))
    assert all(re.search(r"train-000001\.tar, block \d+: the shard is missing", error) for error in errors)
    assert len(errors) == per_shard


def test_a_stale_manifest_never_gives_rows_of_another_dataset(
    dataset: Path, tmp_path: Path, expected: tuple[list[torch.Tensor], list[np.ndarray]]
) -> None:
    write_dataset(tmp_path / "newer", rows(seed=2), bucket_rows=256)
    shutil.copy(dataset / "manifest.json", tmp_path / "newer" / "manifest.json")
    stale = ActivationDataset.open(tmp_path / "newer")  # of the same shape, so that sizes agree
    errors = read_all(stale, expected)
    assert len(errors) == BLOCKS  # the provenance happens to be the same
    assert all("checksum mismatch" in error for error in errors)
    findings = verify_dataset(tmp_path / "newer")
    assert {f.block for f in findings if f.shard == "array.out/train-000002.tar"} == set(range(16))
    assert any(f.shard == "manifest.json" and "are not those of index/" in f.message for f in findings)


def test_a_damaged_manifest_is_a_finding_and_a_missing_one_an_error(dataset: Path) -> None:
    path = dataset / "manifest.json"
    path.write_text(path.read_text().replace("train-000001.tar", "train-000002.tar"))
    (finding,) = verify_dataset(dataset)
    assert (finding.shard, finding.block) == ("manifest.json", None)
    assert "its checksum does not match" in finding.message
    path.unlink()
    with pytest.raises(DatasetError, match=r"no manifest\.json in"):
        verify_dataset(dataset)
    with pytest.raises(DatasetError, match="no such folder"):
        verify_dataset(dataset / "nowhere")


def test_commit_records_are_held_against_the_manifest(dataset: Path) -> None:
    record = dataset / "index" / "train-000002.json"
    whole = record.read_text()
    record.write_text(whole.replace("512", "513", 1))
    (finding,) = verify_dataset(dataset)
    assert (finding.shard, finding.message) == (
        "index/train-000002.json",
        "the commit record is damaged (its checksum does not match)",
    )
    data = json.loads(whole)
    del data["sha256"]
    data["moments"]["array:out"]["mean"][0] += 1.0
    record.write_text(json.dumps({**data, "sha256": sha256_json(data)}))
    assert verify_dataset(dataset) == [
        Finding("manifest.json", None, "statistics of array:out are not those of index/")
    ]
    data = json.loads(whole)
    del data["sha256"]
    data["shards"]["rows"][0]["sha256"] = "0" * 64
    record.write_text(json.dumps({**data, "sha256": sha256_json(data)}))
    assert verify_dataset(dataset) == [Finding("manifest.json", None, "shards of rows, train, are not those of index/")]
    record.unlink()
    (dataset / "index" / "train-000005.json").unlink()
    assert verify_dataset(dataset) == [
        Finding("index/train-000002.json", None, "the commit record is missing, and 1 more")
    ]


def test_several_faults_are_all_listed(dataset: Path) -> None:
    acts, table = dataset / "array.out" / "train-000000.tar", dataset / "rows" / "train-000004.tar"
    places = [shards(dataset, "array.out")[0].blocks[i].offset for i in (1, 5)]
    with (
        changed(acts, places[0], 1),
        changed(acts, places[1], 1),
        changed(acts, acts.stat().st_size - 1, 1),
        changed(table, 3, 1),
    ):
        found = [(f.shard, f.block) for f in verify_dataset(dataset)]
        opened = ActivationDataset.open(dataset)
        with pytest.raises(DatasetError, match=r"array\.out/train-000000\.tar, block 1: .* \(and 3 more\); restore it"):
            opened.verify()
    a, r = "array.out/train-000000.tar", "rows/train-000004.tar"
    assert found == [(a, 1), (a, 5), (a, None), (r, 0)]

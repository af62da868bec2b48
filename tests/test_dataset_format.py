"""The format as documented: a second reader, made from docs/dataset-format.md alone, finds what the first one does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from saeforge.data.shards import ActivationDataset
from saeforge.harvest import harvest
from tests.tiny_models import make_documents, save_model, write_text_folder


# ---- the second reader: nothing of saeforge, no tarfile, no numpy.load ----------------------------------------------
def canonical(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(root: Path) -> dict[str, Any]:
    manifest = json.loads((root / "manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("saeforge-acts", 1)
    assert canonical({key: value for key, value in manifest.items() if key != "sha256"}) == manifest["sha256"]
    return dict(manifest)


def read_family(folder: Path, shards: list[dict[str, Any]], dtype: str, width: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and rows of each block, all bytes of each shard accounted for."""
    for shard in shards:
        data = (folder / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["nbytes"], shard["sha256"])
        at = 0
        for offset, nbytes, rows, crc in shard["blocks"]:
            header = data[at : at + 512]
            assert header[257:263] == b"ustar\0"
            assert sum(header[:148]) + 8 * 32 + sum(header[156:]) == int(header[148:156].rstrip(b"\0 "), 8)
            name, size = header[:100].rstrip(b"\0").decode(), int(header[124:136].rstrip(b"\0 "), 8)
            assert (header[156:157], int(header[136:148].rstrip(b"\0 "), 8)) == (b"0", 0)
            npy, payload = data[at + 512 : offset], data[offset : offset + nbytes]
            assert offset % 4096 == 0
            assert 512 <= len(npy) <= 4096
            assert size == len(npy) + nbytes
            assert npy[:8] == b"\x93NUMPY\x01\x00"
            assert int.from_bytes(npy[8:10], "little") == len(npy) - 10
            literal = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
            assert npy[10:].decode() == literal.ljust(len(npy) - 11) + "\n"
            assert zlib.crc32(payload) == crc
            yield name, np.frombuffer(payload, dtype).reshape(rows, width)
            at = -(-(offset + nbytes) // 512) * 512
        assert data[at:] == bytes(len(data) - at)
        assert 1024 <= len(data) - at < 1024 + 10240
        assert len(data) % 10240 == 0


def read_site(root: Path, manifest: dict[str, Any], number: int, split: str) -> tuple[list[str], np.ndarray]:
    """Return names of blocks and float32 rows of a site."""
    site = manifest["sites"][number]
    stored = {"bfloat16": "<u2", "float32": "<f4"}[site["dtype"]]
    blocks = list(read_family(root / site["folder"], site["shards"][split], stored, site["d"]))
    x = np.concatenate([block for _, block in blocks])
    return [name for name, _ in blocks], (x.astype("<u4") << 16).view("<f4") if stored == "<u2" else x


def read_rows(root: Path, manifest: dict[str, Any], split: str) -> tuple[list[str], np.ndarray]:
    """Return names of blocks and provenance."""
    blocks = list(read_family(root / "rows", manifest["rows"][split], "<u4", 4))
    return [name for name, _ in blocks], np.concatenate([block for _, block in blocks])


def kept_rows(root: Path, split: str) -> np.ndarray:
    """Return provenance of all kept rows in their order before buckets, from the stored tokens."""
    load = {n: np.load(root / "tokens" / f"{split}.{n}.npy") for n in "documents positions tokens keep offsets".split()}
    context = np.repeat(np.arange(len(load["offsets"]) - 1), np.diff(load["offsets"]))
    columns = [load["documents"], load["positions"], load["tokens"], context]
    return np.stack(columns, axis=1)[load["keep"]].astype("<u4")


def bucket_order(manifest: dict[str, Any], split: str, bucket: int, rows: int) -> list[int]:
    seed, group = manifest["shuffle"]["seed"], manifest["shuffle"].get("group_rows", 1)
    digest = hashlib.sha256(f"saeforge bucket {seed} {split} {bucket}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], "<u8")))
    return [group * g + j for g in generator.permutation(rows // group) for j in range(group)]


# ---- what it finds ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites, two splits, groups of two, and a limit on norms that takes a good part of the rows out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    harvest(
        model=str(save_model("llama", home / "llama")),
        sites=["resid_post.1", "layers.0.mlp"],
        out=str(home / "out"),
        text=str(write_text_folder(home / "text", make_documents(200))),
        n_tokens=8_001,
        context_length=48,
        validation_share=0.4,
        bucket_rows=1024,
        store_dtype=request.param,
        group_rows=2,
        max_norm=1.8,
        device="cpu",
    )
    torch.set_num_threads(before)
    return home / "out"


def test_both_readers_read_the_same(root: Path) -> None:
    manifest = read_manifest(root)
    for number, site in enumerate(manifest["sites"]):
        dataset = ActivationDataset.open(root, site=site["id"])
        assert dataset.fingerprint == manifest["sha256"]
        for split in manifest["splits"]:
            _, x = read_site(root, manifest, number, split)
            _, rows = read_rows(root, manifest, split)
            blocks = range(dataset.n_blocks(split))
            assert np.array_equal(torch.cat([dataset.read_block(split, i) for i in blocks]).float().numpy(), x)
            assert np.array_equal(np.concatenate([dataset.read_rows(split, i) for i in blocks]), rows)


def test_counts_and_statistics_are_those_of_the_rows(root: Path) -> None:
    manifest = read_manifest(root)
    kept = 0
    for split, counts in manifest["splits"].items():
        names, rows = read_rows(root, manifest, split)
        assert len(names) == counts["n_blocks"]
        assert len(rows) == counts["n_blocks"] * counts["block_rows"]
        kept += len(rows) + counts["dropped_rows"] + counts["outlier_rows"]
    assert kept == manifest["packing"]["counts"]["kept_tokens"]
    for number, site in enumerate(manifest["sites"]):
        x = read_site(root, manifest, number, "train")[1].astype(np.float64)
        norms, said = np.linalg.norm(x, axis=1), site["statistics"]
        assert said["count"] == len(x)
        np.testing.assert_allclose(said["mean"], x.mean(0), rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(said["variance"], x.var(0), rtol=1e-11)
        assert said["mean_norm"] == pytest.approx(norms.mean(), rel=1e-12)
        assert said["mean_square_norm"] == pytest.approx((norms**2).mean(), rel=1e-12)
        assert said["max_norm"] == pytest.approx(norms.max(), rel=1e-14)
        assert norms.max() <= manifest["outliers"]["sites"][site["id"]]["threshold"] * (1 + 1e-6)
        bins, counts = np.unique(np.floor(8 * np.log2(norms)), return_counts=True)
        assert said["norm_histogram"] == [[int(b), int(n)] for b, n in zip(bins, counts, strict=True)]


def test_order_and_records_are_as_documented(root: Path) -> None:
    """The stored provenance, rebuilt from the tokens: only which groups are outliers is taken from what is stored."""
    manifest = read_manifest(root)
    bucket_rows, group = manifest["shuffle"]["bucket_rows"], manifest["shuffle"]["group_rows"]
    gaps = 0
    for split, counts in manifest["splits"].items():
        names, stored = read_rows(root, manifest, split)
        everything, size = kept_rows(root, split), counts["block_rows"]
        usable = len(everything) // size * size
        rows_at = block_at = 0
        for bucket in range(-(-usable // bucket_rows)):
            record = json.loads((root / "index" / f"{split}-{bucket:06d}.json").read_text())
            assert canonical({key: value for key, value in record.items() if key != "sha256"}) == record["sha256"]
            start, stop = record["rows"]
            assert (start, stop) == (bucket * bucket_rows, min((bucket + 1) * bucket_rows, usable))
            wanted = everything[start:stop][bucket_order(manifest, split, bucket, stop - start)]
            n_blocks = (stop - start - record["outlier_rows"]) // size
            assert record["stored_rows"] == n_blocks * size
            mine = stored[rows_at : rows_at + n_blocks * size]
            # Groups of the bucket in their order, those left out left out: what is stored is a subsequence, to its end.
            left = iter(map(bytes, wanted.reshape(-1, group, 4)))
            assert all(bytes(pair) in left for pair in mine.reshape(-1, group, 4))
            first = bucket * (bucket_rows // size)
            assert names[block_at : block_at + n_blocks] == [f"{first + i:08d}.rows.npy" for i in range(n_blocks)]
            gaps += n_blocks < (stop - start) // size
            rows_at, block_at = rows_at + n_blocks * size, block_at + n_blocks
        assert rows_at == len(stored)
    assert gaps, "outliers left gaps in the numbers of blocks, as a reader must bear"


def test_sites_share_names_and_buckets_are_whole_shards(root: Path) -> None:
    manifest = read_manifest(root)
    for split in manifest["splits"]:
        names = [name.split(".")[0] for name in read_rows(root, manifest, split)[0]]
        for number in range(2):
            assert [name.split(".")[0] for name in read_site(root, manifest, number, split)[0]] == names
        for family in (manifest["rows"], *(site["shards"] for site in manifest["sites"])):
            records = [json.loads(path.read_text()) for path in sorted((root / "index").glob(f"{split}-*"))]
            assert sum(len(record["shards"]["rows"]) for record in records) == len(family[split])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tar_and_webdataset_read_every_shard(root: Path) -> None:
    manifest = read_manifest(root)
    families = {"rows": manifest["rows"], **{site["folder"]: site["shards"] for site in manifest["sites"]}}
    for folder, family in families.items():
        for split, shards in family.items():
            paths = [root / folder / shard["file"] for shard in shards]
            listed = [subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True) for path in paths]
            names = [name for done in listed for name in done.stdout.split()]
            samples = list(
                wds.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False).decode()
            )
            kind = "rows.npy" if folder == "rows" else "acts.npy"
            assert [f"{sample['__key__']}.{kind}" for sample in samples] == names
            assert len(names) == manifest["splits"][split]["n_blocks"]
            if folder == "rows":
                assert np.array_equal(np.concatenate([s[kind] for s in samples]), read_rows(root, manifest, split)[1])

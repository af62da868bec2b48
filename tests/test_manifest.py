"""The manifest: strict reading, statistics that merge exactly, the rule for block rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeforge.data.layout import MAX_BLOCK_BYTES, MIN_ROWS, choose_block_rows
from saeforge.data.manifest import FORMAT_VERSION, Manifest, sha256_json
from saeforge.data.moments import Moments
from saeforge.data.shards import ActivationDataset
from saeforge.data.writer import write_dataset
from saeforge.errors import DatasetError


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_dataset(tmp_path / "d", {"train": torch.randn(4200, 8), "validation": torch.randn(2100, 8)})
    return tmp_path / "d"


def rewrite(dataset: Path, change: dict[str, object]) -> None:
    """Change keys of a manifest and put its checksum right."""
    path = dataset / "manifest.json"
    data = {**json.loads(path.read_text()), **change}
    del data["sha256"]
    path.write_text(json.dumps({**data, "sha256": sha256_json(data)}))


def test_saved_manifest_reads_back_equal(dataset: Path) -> None:
    manifest = Manifest.load(dataset / "manifest.json")
    manifest.save(dataset / "copy.json")
    again = Manifest.load(dataset / "copy.json")
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint


def test_unknown_keys_are_ignored_and_newer_versions_refused(dataset: Path) -> None:
    rewrite(dataset, {"later_addition": 1})
    assert ActivationDataset.open(dataset).n_blocks("train") > 0
    rewrite(dataset, {"format_version": FORMAT_VERSION + 1})
    with pytest.raises(DatasetError, match="format version 2, this saeforge reads 1 to 1; upgrade"):
        ActivationDataset.open(dataset)


def test_missing_manifest_tells_to_harvest(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="run `saeforge harvest --out"):
        ActivationDataset.open(tmp_path)
    with pytest.raises(DatasetError, match="no such folder; run `saeforge harvest --out"):
        ActivationDataset.open(tmp_path / "nowhere")


def test_every_changed_byte_of_a_manifest_is_an_error(dataset: Path) -> None:
    path = dataset / "manifest.json"
    whole = path.read_bytes()
    data = json.loads(whole)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), size=150):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(0, 7))
        path.write_bytes(bytes(damaged))
        try:
            same = json.loads(damaged) == data  # white space and letter case of an escape change nothing
        except ValueError:
            same = False
        if not same:
            with pytest.raises(DatasetError):
                ActivationDataset.open(dataset)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="damaged"):
        ActivationDataset.open(dataset)


def test_inconsistent_counts_are_an_error(dataset: Path) -> None:
    data = json.loads((dataset / "manifest.json").read_text())
    data["splits"]["train"]["n_blocks"] += 1
    rewrite(dataset, {"splits": data["splits"]})
    with pytest.raises(DatasetError, match="do not add up"):
        ActivationDataset.open(dataset)
    del data["sites"][0]["statistics"]
    rewrite(dataset, {"sites": data["sites"]})
    with pytest.raises(DatasetError, match="lacks or garbles a field"):
        ActivationDataset.open(dataset)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.floats(-1e4, 1e4),
    st.integers(0, 2**32 - 1),
)
def test_merged_moments_equal_numpy_on_all_rows(sizes: list[int], offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 1.0, size=(size, 3)).astype(np.float32) for size in sizes]
    everything = np.concatenate(parts).astype(np.float64)
    total = Moments.empty(3)
    for part in parts:
        # Through JSON, as commit records go.
        total = total.merge(Moments.from_json(json.loads(json.dumps(Moments.of(part).to_json()))))
    if len(everything) == 0:
        with pytest.raises(ValueError, match="no rows"):
            total.statistics()
        return
    statistics = total.statistics()
    norms = np.linalg.norm(everything, axis=1)
    assert statistics.count == len(everything)
    np.testing.assert_allclose(statistics.mean, everything.mean(0), rtol=1e-12, atol=1e-11)
    # The offset is up to 1e4 times the deviation: a sum of squares would lose 8 of 16 digits, Chan's form does not.
    np.testing.assert_allclose(statistics.variance, everything.var(0), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(statistics.mean_norm, norms.mean(), rtol=1e-12)
    np.testing.assert_allclose(statistics.mean_square_norm, (norms**2).mean(), rtol=1e-12)
    np.testing.assert_allclose(statistics.max_norm, norms.max(), rtol=1e-14)


@given(st.integers(1, 300), st.integers(1, 9000), st.floats(-1e3, 1e3), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_moments_of_bits_are_those_of_their_values(rows: int, d: int, offset: float, seed: int) -> None:
    """Whatever the chunks; bfloat16 goes in as its bits."""
    d = min(d, 200_000 // rows + 1)
    x = (torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)) + offset).bfloat16()
    bits, values = Moments.of(x.view(torch.int16).numpy().view(np.uint16)), x.double().numpy()
    assert bits.to_json() == Moments.of(x.float().numpy()).to_json() == Moments.of(values).to_json()
    np.testing.assert_allclose(bits.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bits.m2, values.var(0) * rows, rtol=1e-9, atol=1e-9)
    assert bits.norm_max == pytest.approx(np.linalg.norm(values, axis=1).max(), rel=1e-14)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200), st.integers(0, 200))
def test_the_norm_histogram_counts_every_row_and_holds_the_median(norms: list[float], cut: int) -> None:
    x = np.array(norms, dtype=np.float32)[:, None]
    statistics = Moments.of(x[:cut]).merge(Moments.of(x[cut:])).statistics()
    assert statistics.norm_histogram is not None
    assert statistics.norm_histogram == sorted(statistics.norm_histogram)
    assert sum(rows for _, rows in statistics.norm_histogram) == np.count_nonzero(x)
    for number, rows in statistics.norm_histogram:
        # A norm may lie on an edge to within rounding of the logarithm.
        low, high = 2.0 ** (number / 8) * (1 - 1e-12), 2.0 ** ((number + 1) / 8) * (1 + 1e-12)
        assert 0 < rows <= ((x >= low) & (x <= high)).sum()
    median = float(np.sort(x[:, 0].astype(np.float64))[(len(x) - 1) // 2])
    assert statistics.median_norm == pytest.approx(median, rel=0.05)


def test_a_manifest_from_before_the_histogram_keeps_its_fingerprint(dataset: Path) -> None:
    data = json.loads((dataset / "manifest.json").read_text())
    for site in data["sites"]:
        del site["statistics"]["norm_histogram"]
    assert not {"outliers", "outlier_rows"} & {*data, *data["splits"]["train"]}, "what says nothing is not written"
    rewrite(dataset, {"sites": data["sites"]})
    written = json.loads((dataset / "manifest.json").read_text())["sha256"]
    manifest = Manifest.load(dataset / "manifest.json")
    assert manifest.fingerprint == written
    assert manifest.sites[0].statistics.median_norm is None
    assert manifest.splits["train"].outlier_rows == 0


@given(st.integers(1, 2**34), st.integers(2, 2**20))
def test_block_rows_are_the_largest_power_of_two_that_fits(rows: int, row_bytes: int) -> None:
    if rows < MIN_ROWS:
        with pytest.raises(DatasetError, match=f"at least {MIN_ROWS} are needed"):
            choose_block_rows(rows, row_bytes, split="train")
        return

    def fits(block: int) -> bool:
        return block * row_bytes <= MAX_BLOCK_BYTES and rows // block >= 128

    block = choose_block_rows(rows, row_bytes, split="train")
    assert block >= 16
    assert block & (block - 1) == 0
    assert fits(block)
    assert not fits(2 * block)


@pytest.mark.parametrize(("d", "expected"), [(768, 8192), (2304, 2048), (4096, 2048), (8192, 1024)])
def test_block_rows_of_usual_widths(d: int, expected: int) -> None:
    assert choose_block_rows(10**8, 2 * d, split="train") == expected


def test_sites_are_found_by_any_of_their_names_and_a_wrong_one_lists_them(dataset: Path) -> None:
    manifest = Manifest.load(dataset / "manifest.json")
    assert {manifest.site(name, root=dataset).id for name in (None, "array", "array:out", "array.out")} == {"array:out"}
    with pytest.raises(DatasetError, match="holds no site 'arra'; it holds: array:out"):
        manifest.site("arra", root=dataset)

"""Rows of a bucket against brute force: any range, order, batch size, precision; groups; outliers and their count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from saeforge.data.layout import SiteSpec, SplitPlan, bucket_permutation
from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.data.writer import DatasetWriter
from saeforge.errors import ConfigError, DatasetError
from saeforge.harvest import harvest
from saeforge.harvest.buckets import make_rows
from saeforge.harvest.outliers import PILOT_CONTEXTS, measure_pilot, pilot_batches
from saeforge.lm.capture import Capture, TokenBatch
from saeforge.lm.load import quiet
from saeforge.lm.pack import Contexts, write_contexts
from saeforge.lm.tokens import NO_POSITION, Cutter, Segment, Specials
from tests.tiny_models import make_documents, save_model, write_text_folder

SITES = {"a:out": torch.float32, "b:out": torch.bfloat16}
D = 3


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakeCapture:
    """A model whose activations are known: site a holds the token id in each dimension, site b its half."""

    def __call__(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        x = batch.input_ids[..., None].float().expand(-1, -1, D)
        return {"a:out": x, "b:out": x / 2, "unwanted:out": x}


CAPTURE = cast(Capture, FakeCapture())


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    """Some 30 packed contexts of up to 24 tokens; kept tokens come in pairs."""
    rng = np.random.default_rng(0)
    segments = []
    for document in range(60):
        n = int(rng.integers(3, 25))
        keep = np.repeat(rng.random(n // 2 + 1) < 0.7, 2)[:n]
        keep[n // 2 * 2 :] = False
        tokens = rng.integers(1, 100, n).astype(np.uint32)
        positions = np.where(keep, np.arange(n), NO_POSITION).astype(np.uint32)
        segments.append(Segment(document, tokens, positions, keep))
    folder = tmp_path_factory.mktemp("tokens")
    write_contexts(folder, "train", segments, capacity=24, packed=True, seed=0)
    return Contexts(folder, "train", packed=True, pad=0)


def kept_rows(contexts: Contexts) -> np.ndarray:
    """All kept rows of a split, straight from the arrays: document, position, token, context."""
    number = np.repeat(np.arange(len(contexts)), np.diff(contexts.offsets))
    columns = [contexts.arrays[name] for name in ("documents", "positions", "tokens")]
    return np.stack([*columns, number], axis=1)[contexts.arrays["keep"]].astype(np.uint32)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), batch_contexts=st.integers(1, 40), group_rows=st.sampled_from([1, 2]))
def test_rows_equal_brute_force(contexts: Contexts, data: st.DataObject, batch_contexts: int, group_rows: int) -> None:
    everything = kept_rows(contexts)
    start = data.draw(st.integers(0, len(everything) // 2 - 1)) * 2
    stop = data.draw(st.integers(start // 2 + 1, len(everything) // 2)) * 2
    threshold = data.draw(st.sampled_from([None, 50.0, 90.0, 0.5]))
    order = bucket_permutation(data.draw(st.integers(0, 9)), "train", 0, stop - start, group_rows)
    seen: list[int] = []
    made = make_rows(
        CAPTURE,
        contexts,
        start,
        stop,
        order,
        SITES,
        batch_contexts=batch_contexts,
        thresholds=None if threshold is None else {"a:out": threshold * D**0.5, "b:out": 1e9},
        group_rows=group_rows,
        progress=seen.append,
    )
    wanted = everything[start:stop][order]
    over = wanted[:, 2] > (1e9 if threshold is None else threshold + 1e-3)
    lost = np.repeat(over.reshape(-1, group_rows).any(axis=1), group_rows)
    assert np.array_equal(made.provenance, wanted[~lost])
    assert made.dropped == lost.sum()
    assert made.outliers == ({} if threshold is None else {"a:out": over.sum(), "b:out": 0})
    assert sum(seen) == stop - start
    assert made.data.keys() == SITES.keys()
    for site, factor in (("a:out", 1.0), ("b:out", 0.5)):
        expected = torch.from_numpy(wanted[~lost][:, 2].astype(np.float32) * factor)[:, None].expand(-1, D)
        assert made.data[site].dtype == SITES[site]
        assert torch.equal(made.data[site], expected.to(SITES[site]))


def test_batches_begin_with_the_range(contexts: Contexts) -> None:
    """No context is computed twice at a boundary of buckets that falls between contexts."""
    batches = []

    class Recorder(FakeCapture):
        def __call__(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
            batches.append(len(batch.input_ids))
            return super().__call__(batch)

    first, last = 5, 18
    start, stop = (int(contexts.kept_before[c]) for c in (first, last))
    make_rows(cast(Capture, Recorder()), contexts, start, stop, np.arange(stop - start), SITES, batch_contexts=4)
    assert batches == [4, 4, 4, 1]


def test_a_value_that_is_not_finite_is_named(contexts: Contexts) -> None:
    rows = kept_rows(contexts)
    token = int(rows[40, 2])

    class Broken(FakeCapture):
        def __call__(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
            found = super().__call__(batch)
            return found | {"b:out": torch.where(found["a:out"] == token, torch.nan, found["b:out"])}

    document, position = next((row[0], row[1]) for row in rows if row[2] == token)
    with pytest.raises(DatasetError, match=rf"b:out: NaN or infinite .* document {document} at token {position} "):
        make_rows(cast(Capture, Broken()), contexts, 0, len(rows), np.arange(len(rows)), SITES, batch_contexts=50)


@given(st.integers(1, 5000), st.integers(1, 200))
def test_the_pilot_is_spread_over_all_contexts(n: int, batch: int) -> None:
    ranges = pilot_batches(n, batch)
    chosen = [context for start, stop in ranges for context in range(start, stop)]
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < n
    if n <= PILOT_CONTEXTS:
        assert chosen == list(range(n))
    else:
        assert PILOT_CONTEXTS // 2 < len(chosen) <= PILOT_CONTEXTS
        assert n - chosen[-1] <= n // len(ranges) + 1  # the last stands in the last part of the split
    assert all(stop - start <= batch for start, stop in ranges)


@pytest.mark.parametrize("batch_contexts", [1, 7, 100])
def test_the_pilots_median_is_that_of_its_rows(contexts: Contexts, batch_contexts: int) -> None:
    """Fewer than 64 contexts: the pilot is the whole split, however it is batched."""
    pilot = measure_pilot(CAPTURE, contexts, SITES, batch_contexts=batch_contexts, max_norm=4.0)
    tokens = kept_rows(contexts)[:, 2]
    assert pilot["pilot_rows"] == len(tokens)
    for site, factor in (("a:out", 1.0), ("b:out", 0.5)):
        assert pilot["sites"][site]["median"] == pytest.approx(np.median(tokens) * factor * D**0.5, rel=1e-6)
        assert pilot["sites"][site]["threshold"] == 4 * pilot["sites"][site]["median"]
    assert json.loads(json.dumps(pilot)) == pilot


def test_a_median_of_zero_is_refused(contexts: Contexts) -> None:
    class Silent(FakeCapture):
        def __call__(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
            return {site: x * (x > 60) for site, x in super().__call__(batch).items()}

    with pytest.raises(ConfigError, match=r"site a:out: the median norm of \d+ tokens is 0.0; give --max_norm null"):
        measure_pilot(cast(Capture, Silent()), contexts, SITES, batch_contexts=8, max_norm=10)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(5, 30),
    st.booleans(),
    st.none() | st.integers(0, 40),
)
def test_kept_tokens_are_whole_groups_of_neighbours(
    ids: list[int], group: int, length: int, drop_first: bool, budget: int | None
) -> None:
    specials = Specials((7,), (), frozenset({0, 7}), 0)
    cutter = Cutter(specials, length, drop_first=drop_first, group_rows=group)
    segments = cutter.cut(3, ids, budget=budget)
    plain = Cutter(specials, length, drop_first=drop_first).cut(3, ids)
    kept = [position for segment in segments for position in segment.positions[segment.keep].tolist()]
    wanted = [position for segment in plain for position in segment.positions[segment.keep].tolist()]
    assert set(kept) <= set(wanted)
    for segment in segments:
        runs = segment.positions[segment.keep].astype(np.int64).reshape(-1, group)
        assert (np.diff(runs, axis=1) == 1).all()
    room = length - 1
    possible = 0  # by hand: walk through each piece and count what whole runs hold
    for start in range(0, len(ids), room):
        run = 0
        for position in range(start, min(start + room, len(ids)) + 1):
            if position in wanted and position < start + room:
                run += 1
            else:
                possible += run // group * group
                run = 0
    assert len(kept) == (possible if budget is None else min(possible, budget // group * group))
    if budget is None:
        assert cutter.ungrouped == len(wanted) - possible


def test_groups_move_whole() -> None:
    order = bucket_permutation(0, "train", 3, 4096, 8).reshape(-1, 8)
    assert (np.diff(order, axis=1) == 1).all()
    assert (order[:, 0] % 8 == 0).all()
    assert np.array_equal(np.sort(order.ravel()), np.arange(4096))
    assert (np.diff(order[:, 0]) == 8).mean() < 0.02
    assert np.array_equal(bucket_permutation(0, "train", 3, 512, 1), bucket_permutation(0, "train", 3, 512))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a token whose activations are hundreds of times larger than those of others, and text."""
    home = tmp_path_factory.mktemp("home")
    save_model("llama", home / "llama")
    model, tokenizer = AutoModel.from_pretrained(home / "llama"), AutoTokenizer.from_pretrained(home / "llama")
    with torch.no_grad():
        model.get_submodule("embed_tokens").weight[sink(home)] *= 500
    model.eval()
    with quiet():
        model.save_pretrained(home / "sink")
    tokenizer.save_pretrained(home / "sink")
    write_text_folder(home / "text", make_documents(120))
    return home


def sink(home: Path) -> int:
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    return int(tokenizer(" spain", add_special_tokens=False)["input_ids"][0])


def options(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(home / "sink"),
        "sites": ["resid_pre.1", "layers.1.mlp"],
        "out": str(out),
        "text": str(home / "text"),
        "n_tokens": 4_000,
        "context_length": 32,
        "validation_share": 0,
        "bucket_rows": 512,
        "store_dtype": "float32",
        "device": "cpu",
    } | changes


def bucket_rows(root: Path) -> list[tuple[np.ndarray, torch.Tensor, dict[str, Any]]]:
    """Provenance, activations and record of each bucket."""
    dataset = ActivationDataset.open(root, site="resid_pre.1")
    size, at, found = dataset.block_rows("train"), 0, []
    for path in sorted((root / "index").iterdir()):
        record = json.loads(path.read_text())
        blocks = range(at, at + record["stored_rows"] // size)
        rows = [dataset.read_rows("train", i) for i in blocks]
        x = [dataset.read_block("train", i) for i in blocks]
        found.append((np.concatenate(rows), torch.cat(x), record))
        at = blocks.stop
    assert at == dataset.n_blocks("train")
    return found


def test_outliers_go_from_all_sites_and_are_counted(home: Path, tmp_path: Path) -> None:
    harvest(**options(home, tmp_path / "all", max_norm=None))
    manifest = harvest(**options(home, tmp_path / "o"))
    token = sink(home)
    thresholds = manifest.outliers["sites"]["layers.1:in"]
    assert thresholds["threshold"] == 10 * thresholds["median"]
    total = 0
    for everything, some in zip(bucket_rows(tmp_path / "all"), bucket_rows(tmp_path / "o"), strict=True):
        over = everything[0][:, 2] == token
        assert ((everything[1].norm(dim=1) > thresholds["threshold"]).numpy() == over).all()
        kept, x = everything[0][~over], everything[1][torch.from_numpy(~over)]
        assert np.array_equal(some[0], kept[: len(some[0])])
        assert torch.equal(some[1], x[: len(some[1])])
        assert 0 <= len(kept) - len(some[0]) < manifest.splits["train"].block_rows
        assert some[2]["outlier_rows"] == over.sum() == some[2]["outliers"]["layers.1:in"]
        total += int(over.sum())
    assert total > 100
    split = manifest.splits["train"]
    assert split.outlier_rows == total == thresholds["rows"]
    stored = split.n_blocks * split.block_rows
    assert stored + split.dropped_rows + split.outlier_rows == manifest.packing["counts"]["kept_tokens"]
    for site in manifest.sites:  # the other site's rows went with them
        assert site.statistics.count == stored
    assert manifest.site("resid_pre.1", root=tmp_path).statistics.max_norm <= thresholds["threshold"]
    assert Manifest.load(tmp_path / "o" / "manifest.json") == manifest


def test_which_rows_are_outliers_does_not_depend_on_buckets_or_batches(home: Path, tmp_path: Path) -> None:
    sets = []
    for name, changes in (("a", {}), ("b", {"bucket_rows": 2048, "batch_contexts": 5})):
        harvest(**options(home, tmp_path / name, max_norm=3, n_tokens=4_096, **changes))
        records = [json.loads(path.read_text()) for path in (tmp_path / name / "index").iterdir()]
        sets.append(sum(record["outlier_rows"] for record in records))
    assert sets[0] == sets[1] > 100


def test_groups_stay_together_in_blocks_and_go_together(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = harvest(**options(home, tmp_path / "o", group_rows=4, n_tokens=4_003))
    said = capsys.readouterr().out
    assert "ran out" not in said, "the last three tokens could fill no group"
    assert f"{manifest.packing['counts']['ungrouped']:,} tokens filled no group of 4" in said
    assert f"{manifest.splits['train'].outlier_rows:,} outliers)" in said
    assert manifest.shuffle["group_rows"] == 4
    counts = manifest.packing["counts"]
    assert counts["kept_tokens"] == 4_000
    assert counts["ungrouped"] > 0
    dataset = ActivationDataset.open(tmp_path / "o", site="resid_pre.1")
    groups = np.concatenate([dataset.read_rows("train", i) for i in range(dataset.n_blocks("train"))])
    groups = groups.astype(np.int64).reshape(-1, 4, 4)
    assert (np.diff(groups[:, :, 1], axis=1) == 1).all(), "positions of a group are consecutive"
    assert (np.ptp(groups[:, :, 0], axis=1) == 0).all(), "one document"
    assert (np.ptp(groups[:, :, 3], axis=1) == 0).all(), "one context"
    assert np.mean(groups[1:, 0, 0] == groups[:-1, 0, 0]) < 0.2, "neighbouring groups are strangers"
    assert sink(home) not in groups[:, :, 2]
    over = manifest.outliers["sites"]["layers.1:in"]["rows"]
    assert manifest.splits["train"].outlier_rows % 4 == 0
    assert over < manifest.splits["train"].outlier_rows <= 4 * over
    stored = len(groups) * 4
    assert stored + manifest.splits["train"].dropped_rows + manifest.splits["train"].outlier_rows == 4_000


def test_a_bucket_may_lose_everything(tmp_path: Path) -> None:
    site = SiteSpec("a:out", "a", "out", 4, "float32")
    writer = DatasetWriter(tmp_path, [site], {"train": SplitPlan(2048, 16)}, bucket_rows=512, config_sha256="x")
    x = torch.arange(512.0)[:, None].expand(-1, 4).contiguous()
    rows = np.zeros((512, 4), dtype=np.uint32)
    for bucket, kept in enumerate((512, 0, 15, 40)):
        writer.write_bucket(
            "train", bucket, {"a:out": x[:kept]}, rows[:kept], outlier_rows=512 - kept, outliers={"a:out": 512 - kept}
        )
    assert writer.missing_buckets() == []
    manifest = writer.finish()
    split = manifest.splits["train"]
    assert (split.n_blocks, split.dropped_rows, split.outlier_rows) == (32 + 0 + 0 + 2, 15 + 8, 512 + 497 + 472)
    dataset = ActivationDataset.open(tmp_path)
    assert torch.equal(dataset.read_block("train", 33), x[16:32])
    with pytest.raises(ValueError, match=r"a:out: got \(512, 4\) .* not \(100, 4\)"):
        writer.write_bucket("train", 0, {"a:out": x}, rows[:100], outlier_rows=412)
    with pytest.raises(ValueError, match=r"provenance of shape \(512, 4\), not \(100, 4\)"):
        writer.write_bucket("train", 0, {"a:out": x[:100]}, rows, outlier_rows=412)
    for bucket in (0, 3):
        writer.write_bucket("train", bucket, {"a:out": x[:0]}, rows[:0], outlier_rows=512)
    with pytest.raises(DatasetError, match="every training row is an outlier; give a larger max_norm, or null"):
        writer.finish()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_rows": 3}, "group_rows = 3: expected 1, 2, 4, 8 or 16"),
        ({"group_rows": 32}, "group_rows = 32: expected 1"),
        ({"max_norm": 1.0}, "max_norm = 1.0: expected more than 1, or null"),
        ({"max_norm": "ten"}, "max_norm = 'ten'"),
    ],
)
def test_wrong_options_are_told(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        harvest(**options(home, tmp_path / "o") | changes)

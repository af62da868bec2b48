"""Live activations: the rows of the harvest that they stand for, one forward pass for all sites, exact resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import saeforge
from saeforge.cli.main import main
from saeforge.data.loader import TrainLoader
from saeforge.data.manifest import Manifest
from saeforge.data.plan import Plan
from saeforge.data.shard_source import ShardSource
from saeforge.data.shards import ActivationDataset
from saeforge.data.verify import verify_dataset
from saeforge.errors import ConfigError, DatasetError
from saeforge.harvest import HarvestConfig, harvest
from saeforge.harvest.live import LiveSource
from saeforge.lm.capture import Capture
from saeforge.training.data import ActivationData
from tests.test_fit import interrupt
from tests.tiny_models import make_documents, save_model, write_jsonl

ROWS = 1024


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and text for about 12 training blocks."""
    home = tmp_path_factory.mktemp("home")
    save_model("llama", home / "llama")
    write_jsonl(home / "text.jsonl", make_documents(420))
    return home


def options(home: Path, **changes: Any) -> dict[str, Any]:
    return {
        "n_tokens": 16_000,
        "context_length": 64,
        "batch_contexts": 8,
        "store_dtype": "float32",
        "validation_share": 0.2,
        "bucket_rows": ROWS,
        "device": "cpu",
    } | changes


def config(home: Path, out: Path, sites: tuple[str, ...] = ("resid_post.*",), **changes: Any) -> HarvestConfig:
    given = {"model": str(home / "llama"), "text": str(home / "text.jsonl"), "sites": list(sites), "out": str(out)}
    return HarvestConfig.build(None, given | options(home, **changes))


def arguments(home: Path, run: Path, *more: str, **changes: Any) -> list[str]:
    return [
        "fit",
        "--data.source=live",
        f"--data.model={home / 'llama'}",
        f"--data.text={home / 'text.jsonl'}",
        f"--data.harvest={json.dumps(options(home, **changes))}",
        "--data.batch_size=256",
        f"--data.tokens={256 * 60}",
        "--data.validation_rows=2048",
        "--model.variant=topk",
        "--model.variant.d_sae=64",
        "--model.variant.k=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=20",
        f"--run={run}",
        *more,
    ]


def assert_same(one: Path, other: Path) -> None:
    a, b = saeforge.load(one), saeforge.load(other)
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def test_blocks_are_the_buckets_of_the_same_harvest(home: Path, tmp_path: Path) -> None:
    harvest(config(home, tmp_path / "stored"))
    live = LiveSource(config(home, tmp_path / "live"))
    stored = [ActivationDataset.open(tmp_path / "stored", site=f"layers.{i}:out") for i in range(4)]
    per_bucket = ROWS // stored[0].block_rows("train")
    assert live.n_blocks("train") >= 8
    for index in reversed(range(live.n_blocks("train"))):  # in any order, at any time
        for dataset, rows in zip(stored, live.read_block("train", index), strict=True):
            blocks = range(index * per_bucket, (index + 1) * per_bucket)
            assert torch.equal(rows, torch.cat([dataset.read_block("train", block) for block in blocks]))
    held_out = live.read_block("validation", 0)
    assert all(torch.equal(d.read_block("validation", 0), x) for d, x in zip(stored, held_out, strict=True))
    live.close()


def test_all_sites_share_one_forward_pass(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveSource(config(home, tmp_path / "live"))
    calls: list[int] = []
    forward = Capture.__call__

    def count(self: Capture, batch: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        return forward(self, batch)

    monkeypatch.setattr(Capture, "__call__", count)
    assert len(live.read_block("train", 0)) == 4
    contexts = live._prepared.contexts["train"]
    blocks_contexts = int((contexts.kept_before < ROWS).sum())
    assert len(calls) == -(-blocks_contexts // 8)
    live.close()


def test_statistics_are_those_of_a_sample_near_those_of_all(home: Path, tmp_path: Path) -> None:
    manifest = harvest(config(home, tmp_path / "stored", ("resid_post.2",)))
    live = LiveSource(config(home, tmp_path / "live", ("resid_post.2",)))
    exact, sampled = manifest.sites[0].statistics, live.statistics[0]
    assert sampled.mean_norm == pytest.approx(exact.mean_norm, rel=0.05)
    assert sampled.mean_square_norm == pytest.approx(exact.mean_square_norm, rel=0.05)
    assert live.sample(100)[0].shape == (100, 32)
    assert torch.equal(live.sample(100)[0], live.sample(200)[0][:100])
    first = {tuple(row) for row in live._rows(0, 1000, None)["layers.2:out"].tolist()}
    assert sum(tuple(row) in first for row in live.sample(1000)[0].tolist()) < 200  # of about 12,800 rows, 78 expected
    live.close()


def test_a_run_stopped_and_resumed_has_the_same_bits(home: Path, tmp_path: Path) -> None:
    sites = "--data.sites=resid_post.2"
    stop = "--trainer.callbacks=" + interrupt(23)["trainer.callbacks"]
    assert main(arguments(home, tmp_path / "whole", sites)) == 0
    assert main(arguments(home, tmp_path / "parts", sites, stop)) == 130
    assert main(arguments(home, tmp_path / "parts", sites, "--ckpt_path=last")) == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_nothing_but_tokens_and_held_out_rows_is_stored(home: Path, tmp_path: Path) -> None:
    assert main(arguments(home, tmp_path / "run", "--data.sites=resid_post.2")) == 0
    root = tmp_path / "run" / "data"
    assert not list(root.rglob("train-*.tar"))
    assert list(root.rglob("validation-*.tar"))
    assert verify_dataset(root) == []
    assert ShardSource(str(root)).n_blocks("train") == 0
    meta = saeforge.load(tmp_path / "run").meta
    assert meta["site"]["id"] == "layers.2:out"
    assert Path(meta["dataset_path"]) == root.resolve()


def test_an_sae_of_a_live_run_can_be_judged(home: Path, tmp_path: Path) -> None:
    assert main(arguments(home, tmp_path / "run", "--data.sites=resid_post.[12]")) == 0
    for site in ("resid_post.1", "resid_post.2"):
        assert main(["evaluate", str(tmp_path / "run" / site)]) == 0
        found = json.loads((tmp_path / "run" / site / "evaluation.json").read_text())
        assert 0 < found["metrics"]["fvu"] < 1


def test_blocks_that_are_written_make_the_dataset_and_change_no_bit(home: Path, tmp_path: Path) -> None:
    """The run is long enough to see every block; a harvest makes the rest, and finds nothing to do but that."""
    sites = "--data.sites=resid_post.2"
    assert main(arguments(home, tmp_path / "plain", sites)) == 0
    assert main(arguments(home, tmp_path / "writing", sites, "--data.write=true")) == 0
    assert_same(tmp_path / "plain", tmp_path / "writing")
    root = tmp_path / "writing" / "data"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("train-*.tar") if path.parent.name != "rows"}
    assert len(before) >= 8
    harvest(config(home, root, ("resid_post.2",)))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    harvest(config(home, tmp_path / "stored", ("resid_post.2",)))
    written, stored = (Manifest.load(folder / "manifest.json") for folder in (root, tmp_path / "stored"))
    assert written.alignment_sha256 == stored.alignment_sha256
    assert written.sites == stored.sites
    assert verify_dataset(root) == []


def test_a_second_pass_reads_what_the_first_one_wrote(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveSource(config(home, tmp_path / "live", ("resid_post.2",)), write=True)
    plan = Plan(live.n_blocks("train"), ROWS, 256, window_blocks=1)
    first = [rows[0].clone() for rows in TrainLoader(live, plan, plan.batches_per_pass)]
    made = sum(1 for _ in (tmp_path / "live").glob("index/train-*.json"))
    monkeypatch.setattr(Capture, "__call__", lambda self, batch: pytest.fail("the model ran again"))
    again = [rows[0].clone() for rows in TrainLoader(live, plan, plan.batches_per_pass)]
    assert made >= 8
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    live.close()


def test_rows_in_place_of_outliers_are_counted(home: Path, tmp_path: Path) -> None:
    harvest(config(home, tmp_path / "stored", ("resid_post.2",), max_norm=1.1))
    outliers = Manifest.load(tmp_path / "stored" / "manifest.json").splits["train"].outlier_rows
    live = LiveSource(config(home, tmp_path / "live", ("resid_post.2",), max_norm=1.1))
    assert live._folder.card["plan"]["outliers"]["sites"]["layers.2:out"]["threshold"] > 0
    norms = []
    for index in range(live.n_blocks("train")):
        (rows,) = live.read_block("train", index)
        assert rows.shape == (ROWS, 32)
        norms.append(rows.norm(dim=1))
    largest = live._folder.card["plan"]["outliers"]["sites"]["layers.2:out"]["threshold"]
    assert torch.cat(norms).max() <= largest
    # Beside the outliers, what they leave of the last stored block of 64 rows.
    assert 0 < outliers <= live.counters()["rows_repeated"] <= outliers + 63 * live.n_blocks("train")
    assert live.counters()["blocks_made"] == live.n_blocks("train")
    live.close()


def test_a_block_of_nothing_but_outliers_is_an_error(home: Path, tmp_path: Path) -> None:
    live = LiveSource(config(home, tmp_path / "live", ("resid_post.2",)))
    live._folder.card["plan"]["outliers"]["sites"]["layers.2:out"]["threshold"] = 0.0
    with pytest.raises(DatasetError, match=r"outliers leave too few of its 1024 tokens; give a larger max_norm"):
        live.read_block("train", 0)
    live.close()


def test_blocks_with_outliers_are_the_same_written_or_not_and_read_again(home: Path, tmp_path: Path) -> None:
    plain = LiveSource(config(home, tmp_path / "plain", ("resid_post.2",), max_norm=1.1))
    writing = LiveSource(config(home, tmp_path / "writing", ("resid_post.2",), max_norm=1.1), write=True)
    for index in range(plain.n_blocks("train")):
        (rows,) = plain.read_block("train", index)
        for _ in range(2):  # made, then read
            assert torch.equal(rows, writing.read_block("train", index)[0])
    assert plain.counters()["rows_repeated"] > 0
    plain.close()
    writing.close()


def test_small_blocks_are_stored_in_smaller_ones(home: Path, tmp_path: Path) -> None:
    """Whatever the width of the model asks for: an outlier must not cost a whole block."""
    live = LiveSource(config(home, tmp_path / "live", ("resid_post.2",), bucket_rows=32))
    assert live.manifest.splits["train"].block_rows == 16
    assert live.n_blocks("train") > 300
    assert live.read_block("train", 300)[0].shape == (32, 32)
    live.close()


def test_a_closed_source_says_so(home: Path, tmp_path: Path) -> None:
    live = LiveSource(config(home, tmp_path / "live", ("resid_post.2",)))
    live.close()
    with pytest.raises(DatasetError, match="was closed when its run ended"):
        live.read_block("train", 0)


def test_a_finished_dataset_stays_finished(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "stored"
    harvest(config(home, root, ("resid_post.2",)))
    before = (root / "manifest.json").read_bytes()
    live = LiveSource(config(home, root, ("resid_post.2",)))
    live.read_block("train", 0)
    live.close()
    assert json.loads((root / "dataset.json").read_text())["status"] == "finished"
    assert (root / "manifest.json").read_bytes() == before


def test_a_lost_held_out_shard_is_made_again_and_the_dataset_stays_whole(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "stored"
    harvest(config(home, root, ("resid_post.2",)))
    before = Manifest.load(root / "manifest.json")
    next(iter(sorted((root / "layers.2.out").glob("validation-*.tar")))).unlink()
    live = LiveSource(config(home, root, ("resid_post.2",)))
    live.close()
    after = Manifest.load(root / "manifest.json")
    assert after.sites == before.sites
    assert after.splits == before.splits
    assert verify_dataset(root) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sites": ["resid_post.1"]}, "needs data.model"),
        ({"model": "llama", "sites": ["resid_post.1"]}, "needs data.path"),
        ({"model": "llama", "path": "x"}, "needs data.sites"),
        ({"model": "llama", "path": "x", "sites": ["a"], "input": "a"}, "leave out data.input"),
        ({"model": "llama", "path": "x", "sites": ["a"], "harvest": {"text": "b"}}, "data.harvest.text is given twice"),
        ({"model": "llama", "path": "x", "sites": ["a"], "harvest": {"n_token": 1}}, "did you mean n_tokens"),
        ({"model": "llama", "path": "x", "sites": ["a"], "window_blocks": 4}, "data.window_blocks = 4: a live block"),
        ({"source": "shards", "path": "x", "model": "llama"}, "data.model is for data.source = live"),
        ({"source": "shards"}, "data.path is missing"),
    ],
)
def test_wrong_options_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActivationData(**{"source": "live", **given})


def test_overwriting_a_run_replaces_the_tokens_in_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--data.sites=resid_post.2", "--data.tokens=512", "--trainer.log_every_n_steps=1")
    run = tmp_path / "run"
    assert main(arguments(home, run, *short)) == 0
    assert main(arguments(home, run, *short, "--overwrite=true", n_tokens=15_000)) == 0
    assert json.loads((run / "data" / "dataset.json").read_text())["config"]["n_tokens"] == 15_000
    assert "overwrite: true" not in (run / "config.yaml").read_text()
    capsys.readouterr()
    # A folder that is not the run's own is replaced only by name, and a resumed run replaces nothing.
    elsewhere = (*short, f"--data.path={run / 'data'}", f"--run={tmp_path / 'other'}", "--overwrite=true")
    for given in (elsewhere, (*short, "--ckpt_path=last")):
        assert main(arguments(home, run, *given)) == 2
        said = capsys.readouterr().err
        assert "n_tokens differ" in said
        assert "give --data.harvest.overwrite true to replace it, or another --data.path" in said


def test_a_run_folder_that_cannot_be_made_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(arguments(home, tmp_path / "file" / "run", "--data.sites=resid_post.2")) == 2
    assert "cannot be made" in capsys.readouterr().err.strip().splitlines()[-1]


def test_too_little_text_for_the_block_is_told_and_in_nobodys_way(home: Path, tmp_path: Path) -> None:
    given = {"source": "live", "model": str(home / "llama"), "text": str(home / "text.jsonl"), "batch_size": 256}
    given |= {"path": str(tmp_path / "live"), "sites": ["resid_post.2"], "validation_rows": 1024}
    short = options(home, bucket_rows=None, n_tokens=10_000_000)
    with pytest.raises(DatasetError, match=r"fill 0 blocks of 16,384, fewer than 8 lanes; set .*bucket_rows to 256,"):
        ActivationData(**given, harvest=short)  # type: ignore[arg-type]
    ActivationData(**given, harvest={**short, "bucket_rows": 256}).teardown("fit")  # type: ignore[arg-type]


def test_a_pattern_without_a_site_is_told(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(home, tmp_path / "run", "--data.sites=resid_past.*")) == 2
    assert "resid_past.*" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()

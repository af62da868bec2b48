"""`saeforge data`: the card says what is in a dataset, verify finds every bad block, import makes a dataset."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from saeforge.cli import main as cli
from saeforge.cli.data_card import BAR_WIDTH, HISTOGRAM_LINES, histogram_lines, size
from saeforge.data.card import describe_dataset
from saeforge.data.layout import SiteSpec, SplitPlan
from saeforge.data.manifest import Manifest, write_json
from saeforge.data.moments import Moments
from saeforge.data.writer import DatasetWriter, write_dataset
from saeforge.errors import DatasetError

D = 24


def activations(n: int = 4096) -> torch.Tensor:
    """Dimension 5 is far larger than the others."""
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 40 + 3 * x[:, 5]
    return x


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "d", {"train": activations(), "validation": activations(2048)}, site="layers.1:out")
    return tmp_path / "d"


@pytest.fixture
def harvested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of two sites whose rows are the tokens of 32 documents of 128 tokens, with labels."""
    root = tmp_path / "h"
    sites = [
        SiteSpec("layers.1:out", "layers.1", "out", D, "float32"),
        SiteSpec("layers.2:in", "layers.2", "in", D, "float32"),
    ]
    writer = DatasetWriter(root, sites, {"train": SplitPlan(4096, 32)}, bucket_rows=4096, config_sha256="0")
    rows = np.zeros((4096, 4), np.uint32)
    rows[:, 0], rows[:, 1], rows[:, 2] = np.arange(4096) // 128, np.arange(4096) % 128, np.arange(4096) + 1000
    rows[:, 3] = rows[:, 0]
    writer.write_bucket("train", 0, {"layers.1:out": activations(), "layers.2:in": 2 * activations()}, rows)
    limit = {"median": 10.0, "threshold": 50.0}
    writer.finish(
        model={"name": "no/such-model"},
        packing={"rule": "one each", "context_length": 129, "files": {}},
        outliers={"max_norm": 5.0, "pilot_rows": 64, "sites": {"layers.1:out": limit, "layers.2:in": limit}},
    )
    (root / "tokens").mkdir()
    # Each context begins with a special token that is not kept.
    tokens = np.concatenate([[1, *range(1000 + 128 * i, 1128 + 128 * i)] for i in range(32)])
    arrays = {
        "tokens": tokens,
        "documents": np.repeat(np.arange(32), 129),
        "positions": np.tile([0, *range(128)], 32),
        "keep": np.tile([False] + 128 * [True], 32),
        "offsets": np.arange(33) * 129,
    }
    for name, array in arrays.items():
        np.save(root / "tokens" / f"train.{name}.npy", array)
    lines = [
        {"id": i, "name": f"text{i}", "label": "even" if i % 2 == 0 else None, "split": "train", "kept": 128}
        for i in range(32)
    ]
    (root / "tokens" / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


# ---- inspect


def test_the_card_tells_what_is_in_the_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", str(dataset)]) == 0
    card = capsys.readouterr().out
    for line in (
        "model       unknown",
        "train       4,096 rows in 128 blocks of 32",
        "validation  2,048 rows in 128 blocks of 16",
        "site        layers.1:out: width 24, float32, ",
        "norms of all training rows",
        "outliers    dimensions 5 (mean 40",
    ):
        assert line in card
    bars = re.findall(r"^ +[\d.e+]+ to [\d.e+]+ +([\d.]+)%  [▏▎▍▌▋▊▉█]*$", card, re.MULTILINE)
    assert abs(sum(map(float, bars)) - 100) < 0.1
    assert "token ids" not in card  # nobody knows the tokens of a tensor


def test_json_carries_the_same_facts_as_numbers(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", str(dataset), "--json", "--samples", "3"]) == 0
    facts = json.loads(capsys.readouterr().out)
    x = activations().double()
    s = facts["sites"][0]["statistics"]
    assert s["mean_norm"] == pytest.approx(float(x.norm(dim=1).mean()))
    assert s["rms_norm"] == pytest.approx(float(x.square().sum(1).mean().sqrt()))
    assert s["mean_share"] == pytest.approx(float(x.mean(0).square().sum() / x.square().sum(1).mean()))
    variance = x.var(0, correction=0).sort(descending=True).values
    for n, share in s["variance_share"].items():
        assert share == pytest.approx(float(variance[: int(n)].sum() / variance.sum()))
    (outlier,) = s["outlier_dimensions"]
    rms = x.square().mean(0).sqrt()
    assert outlier["dimension"] == 5
    assert outlier["times_median"] == pytest.approx(float(rms[5] / np.median(rms.numpy())))
    assert sum(rows for _, rows in s["norm_histogram"]) == s["norm_histogram_rows"] == 4096
    assert facts["splits"]["train"] == {
        "rows": 4096,
        "blocks": 128,
        "block_rows": 32,
        "dropped_rows": 0,
        "outlier_rows": 0,
    }
    assert len(facts["samples"]) == 3
    assert all(sample["token"] is None for sample in facts["samples"])


def test_samples_stand_in_their_text(harvested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe_dataset(harvested, samples=4)
    assert len(facts["sites"]) == 2
    assert [(entry["label"], entry["documents"], entry["tokens"]) for entry in facts["labels"]] == [
        (None, 16, 2048),
        ("even", 16, 2048),
    ]
    for sample in facts["samples"]:
        first = 1000 + 128 * sample["document"]
        assert sample["token"] == first + sample["position"]
        assert sample["name"] == f"text{sample['document']}"
        around = [*sample["before"], sample["token"], *sample["after"]]
        assert sample["after"] == list(range(sample["token"] + 1, min(sample["token"] + 9, first + 128)))
        kept = [token for token in around if token != 1]
        assert kept == list(range(kept[0], kept[0] + len(kept)))
    # The model is not on this machine: token ids, and no download.
    assert cli.main(["data", "inspect", str(harvested), "--samples", "2", "--sites", "[layers.2:in]"]) == 0
    card = capsys.readouterr().out
    assert "token ids 1 [1000] 1001 1002" in card
    assert "layers.2:in" in card
    assert "left out    0 rows with norms over 50, 5 times the median 10 of a pilot of 64 rows" in card
    assert "layers.1:out" not in card
    assert re.search(r"^  even +2,048 tokens \(0 held out\), 16 documents$", card, re.MULTILINE)


def test_a_dataset_in_work_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "d"
    plan = {"train": SplitPlan(8192, 32)}
    writer = DatasetWriter(
        root, [SiteSpec("a:out", "a", "out", D, "float32")], plan, bucket_rows=4096, config_sha256="0"
    )
    card = {
        "status": "harvesting",
        "model": {"name": "gpt2"},
        "plan": {
            "sites": [{"id": "a:out", "alias": None, "d": D, "dtype": "float32"}],
            "splits": {"train": {"kept_rows": 8192, "block_rows": 32}},
        },
    }
    write_json(root / "dataset.json", card)
    writer.write_bucket("train", 1, {"a:out": activations()}, np.zeros((4096, 4), np.uint32))
    assert cli.main(["data", "inspect", str(root)]) == 0
    told = capsys.readouterr().out
    assert "not finished: harvesting" in told
    assert "train       4,096 of 8,192 rows (50%)" in told
    assert "run the same command again" in told
    write_json(root / "dataset.json", {"status": "harvesting"})
    assert "nothing stored yet" in (cli.main(["data", "inspect", str(root)]), capsys.readouterr().out)[1]


def test_a_dataset_without_a_histogram_shows_that_of_some_blocks(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.load(dataset / "manifest.json").to_json()
    manifest["sites"][0]["statistics"]["norm_histogram"] = None
    from saeforge.data.manifest import sha256_json

    write_json(dataset / "manifest.json", {**manifest, "sha256": sha256_json(manifest)})
    assert cli.main(["data", "inspect", str(dataset), "--samples", "0"]) == 0
    assert "norms of 256 rows" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_histogram_counts_every_row_and_fits(scale: float) -> None:
    norms = np.concatenate([np.random.default_rng(0).lognormal(size=5000), [1e5]]) * scale
    histogram = Moments.of(norms[:, None]).statistics().norm_histogram
    assert histogram is not None
    lines = list(histogram_lines(histogram))
    assert len(lines) <= HISTOGRAM_LINES + 2
    shares = [float(line.split("%")[0].split()[-1]) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=0.05)
    bars = [line.partition("%  ")[2] for line in lines]
    assert max(map(len, bars)) == BAR_WIDTH == len(bars[shares.index(max(shares))])
    assert all(bars)  # even a single row is seen
    low, high = lines[-1].split()[0], lines[-1].split()[2]
    assert float(low) <= 1e5 * scale <= float(high)


def test_the_histogram_of_equal_norms_is_one_bar() -> None:
    assert len(list(histogram_lines([[8, 100]]))) == 1
    assert list(histogram_lines([])) == []


def test_bytes_are_told_in_binary_units() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 * 2**20)] == ["0 bytes", "1,023 bytes", "1.0 KiB", "1.5 GiB"]


def test_what_is_no_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["data", "inspect", str(path)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("saeforge: error: no activation dataset at ")
        assert err.count("\n") == 1


# ---- verify


def damage(root: Path, site: str, block: int) -> None:
    """Flip a bit in the payload of a training block."""
    (shard,) = Manifest.load(root / "manifest.json").site(site, root=root).shards["train"]
    path = root / site.replace(":", ".") / shard.file
    content = bytearray(path.read_bytes())
    content[shard.blocks[block].offset + 7] ^= 1
    path.write_bytes(content)


def test_verify_of_a_whole_dataset_is_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "verify", str(dataset)]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{re.escape(str(dataset))}: all is well \([\d.,]+ MiB of shards read\)\n", out)
    assert err == ""


def test_verify_names_every_bad_block(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in (3, 77, 100):
        damage(dataset, "layers.1:out", block)
    assert cli.main(["data", "verify", str(dataset)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for block in (3, 77, 100):
        assert any(line.startswith(f"layers.1.out/train-000000.tar, block {block}: ") for line in lines)
    assert cli.main(["data", "verify", str(dataset), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert {finding["block"] for finding in told["findings"]} >= {3, 77, 100}


def test_verify_looks_only_at_the_sites_that_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "two"
    sites = [SiteSpec(f"{name}:out", name, "out", D, "float32") for name in ("a", "b")]
    writer = DatasetWriter(root, sites, {"train": SplitPlan(4096, 32)}, bucket_rows=4096, config_sha256="0")
    x = {site.id: activations() for site in sites}
    writer.write_bucket("train", 0, x, np.zeros((4096, 4), np.uint32))
    writer.finish()
    damage(root, "b:out", 0)
    assert cli.main(["data", "verify", str(root), "--sites", "[a]"]) == 0
    assert cli.main(["data", "verify", str(root)]) == 1
    assert cli.main(["data", "verify", str(root), "--sites", "[c]"]) == 2
    assert "holds no site 'c'" in capsys.readouterr().err


# ---- import


def test_import_makes_a_dataset_that_inspect_and_verify_accept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", activations(24576).numpy().astype("<f2"))
    out = tmp_path / "out"
    command = ["data", "import", str(tmp_path / "x.npy"), "--out", str(out), "--site", "layers.1:out"]
    assert cli.main([*command, "--model", "gpt2", "--shuffle", "false"]) == 0
    told, notes = capsys.readouterr()
    assert "text        imported from 1 file (x.npy)" in told
    assert "as in the sources (not shuffled)" in told
    assert "note: float16 values are stored exactly as float32" in notes
    for word in ("inspect", "verify"):
        assert cli.main(["data", word, str(out)]) == 0
    assert "validation block 0" in capsys.readouterr().out
    facts = describe_dataset(out)
    assert {sample["name"] for sample in facts["samples"]} == {"x.npy"}
    assert cli.main([*command, "--seed", "3"]) == 2
    assert "made with other options" in capsys.readouterr().err


def test_import_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", activations(24576).numpy())
    command = ["data", "import", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out"), "--json"]

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "write_bucket", stop)
        assert cli.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(DatasetError):
        Manifest.load(tmp_path / "out" / "manifest.json")
    assert describe_dataset(tmp_path / "out")["status"] == "importing"
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished"


def test_wrong_words_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, says in (
        (["data", "inspekt"], "did you mean 'inspect'?"),
        (["data", "import", "x.npy"], "out"),
        (["data", "inspect", ".", "--samples", "-1"], "expected at least 0"),
        (["data", "inspect", ".", "--decode", "maybe"], "expected auto, true or false"),
        (["data", "import", "x.npy", "--out", "o", "--shufle", "false"], "shuffle"),
    ):
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert cli.main(["data"]) == 2
    assert "commands:" in capsys.readouterr().out

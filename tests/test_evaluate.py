"""`saeforge evaluate`: the same numbers for any batch size, and mistakes of one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import saeforge
from saeforge.cli.main import main
from saeforge.data.shards import ActivationDataset
from saeforge.data.writer import write_dataset
from saeforge.evaluation.reconstruction import CONVENTIONS
from tests.toy import toy_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN folder of a short run."""
    folder = tmp_path_factory.mktemp("evaluate")
    dataset = toy_dataset(folder / "acts")
    saeforge.train(dataset, d_sae=128, k=4, tokens=256 * 50, batch_size=256, progress=False, run=folder / "run")
    return folder / "run"


def test_metrics_do_not_depend_on_the_batch_size(run: Path) -> None:
    results = [asdict(saeforge.evaluate(run, batch_size=size).metrics) for size in (7, 256, 4096)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)
    assert results[0]["tokens"] == 2048


def test_metrics_are_those_of_a_plain_computation(run: Path) -> None:
    sae = saeforge.load(run)
    dataset = ActivationDataset.open(sae.meta["dataset_path"])
    x = torch.cat([dataset.read_block("validation", i) for i in range(dataset.n_blocks("validation"))]).double()
    code = sae.encode(x.float()).to_dense().double()
    residual = x - (code @ sae.W_dec.double() + sae.b_dec.double())
    fvu = residual.square().sum() / (x - x.mean(0)).square().sum()
    metrics = saeforge.evaluate(run).metrics
    assert metrics.fvu == pytest.approx(fvu.item(), rel=1e-5)
    assert metrics.l0_mean == pytest.approx((code != 0).sum(1).double().mean().item(), rel=1e-9)
    assert metrics.dead == int((code != 0).sum(0).eq(0).sum())


def test_the_result_names_its_conventions_and_where_it_is_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "evaluation.json").read_text())
    assert printed["conventions"] == CONVENTIONS
    named = {name.strip() for key in CONVENTIONS for name in key.split(",")}
    assert all(any(metric.startswith(name) for name in named) for metric in printed["metrics"])
    assert printed["split"] == "validation"
    assert printed["trained_on_this_dataset"] is True


def test_the_sae_folder_and_the_sae_itself_are_judged_too(run: Path) -> None:
    expected = saeforge.evaluate(run).metrics
    assert saeforge.evaluate(run / "sae").metrics == expected
    result = saeforge.evaluate(saeforge.load(run))
    assert result.metrics == expected
    assert result.path is None
    assert saeforge.evaluate(run, split="train", max_tokens=512).metrics.tokens == 512


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must fail."""
    assert main(["evaluate", *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("saeforge: error: ")
    return error


def test_another_width_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "wide", {"train": torch.randn(2048, 48), "validation": torch.randn(2048, 48)})
    error = fails([str(run), "--data", str(tmp_path / "wide")], capsys)
    assert "48 wide" in error
    assert "reads 32" in error


def test_other_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in fails([str(tmp_path / "nowhere")], capsys)
    assert "manifest" in fails([str(run), "--data", str(tmp_path)], capsys)
    assert "'validation' or 'train'" in fails([str(run), "--split", "test"], capsys)
    assert "did you mean 'split'" in fails([str(run), "--splt", "test"], capsys)
    assert "run" in fails([], capsys)
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    assert "--ckpt_path last" in fails([str(tmp_path / "half")], capsys)
    write_dataset(tmp_path / "train-only", {"train": torch.randn(2048, 32)})
    assert "no validation split" in fails([str(run), "--data", str(tmp_path / "train-only")], capsys)


@pytest.mark.parametrize(
    ("option", "words"),
    [("--device=cudda", "'cudda'"), ("--max_tokens=0", "max_tokens = 0"), ("--batch_size=0", "batch_size = 0")],
)
def test_impossible_options_are_one_line(
    option: str, words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails([str(run), option], capsys)


def test_an_sae_that_does_not_name_its_data_asks_for_it(run: Path, tmp_path: Path) -> None:
    sae = saeforge.load(run)
    sae.meta = {}
    with pytest.raises(saeforge.SaeforgeError, match="--data"):
        saeforge.evaluate(sae)

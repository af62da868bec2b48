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
from saeforge.evaluation import Evaluation
from saeforge.evaluation.reconstruction import CONVENTIONS
from saeforge.evaluation.table import summary_rows
from saeforge.metrics import ReconstructionMetrics, conventions, weight_figures
from saeforge.ops import SparseCode
from tests.toy import toy_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN folder of a short run."""
    folder = tmp_path_factory.mktemp("evaluate")
    dataset = toy_dataset(folder / "acts")
    saeforge.train(dataset, d_sae=128, k=4, tokens=256 * 50, batch_size=256, progress=False, run=folder / "run")
    return folder / "run"


def test_metrics_do_not_depend_on_the_batch_size(run: Path) -> None:
    found = [saeforge.evaluate(run, batch_size=size) for size in (7, 256, 4096)]
    results = [asdict(result.metrics) for result in found]
    for result in results[1:]:
        for name, value in result.items():
            assert value == (results[0][name] if isinstance(value, int) else pytest.approx(results[0][name], rel=1e-6))
    assert results[0]["tokens"] == 2048
    assert found[0].firing == found[1].firing == found[2].firing


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
    assert set(printed["metrics"]) == conventions.names(CONVENTIONS)
    for part in ("firing", "weights"):
        told = printed[part].pop("conventions")
        assert set(printed[part]) == conventions.names(told)
    assert sum(printed["firing"]["latents"]) + printed["firing"]["dead"] == 128
    assert printed["firing"]["documents"] is printed["firing"]["dead_bound"] is None  # rows of an array
    assert printed["weights"]["decoder_norm"]["p50"] > 0
    assert printed["split"] == "validation"
    assert printed["trained_on_this_dataset"] is True


def test_the_sae_folder_and_the_sae_itself_are_judged_too(run: Path) -> None:
    expected = saeforge.evaluate(run).metrics
    assert saeforge.evaluate(run / "sae").metrics == expected
    result = saeforge.evaluate(saeforge.load(run))
    assert result.metrics == expected
    assert result.path is None
    assert saeforge.evaluate(run, split="train", max_tokens=512).metrics.tokens == 512


def test_figures_are_finite_and_the_table_has_every_set(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    for name in ("L1", "l2 ratio", "ev_legacy", "nmse_global", "of all firings", "decoder cosine", "encoder · decoder"):
        assert name in shown, name
    assert "undefined" not in shown
    assert "nan" not in shown


def test_another_run_is_compared_with(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--against", str(run)]) == 0
    assert "one-to-one partner" in capsys.readouterr().out
    written = json.loads((run / "evaluation.json").read_text())
    told = written["against"].pop("conventions")
    assert set(written["against"]) == conventions.names(told)
    assert written["against"]["shared"] == 1
    assert written["against"]["latents_a"] == 128 - written["metrics"]["dead"]
    assert written["against_sae"] == str(run)
    other = saeforge.load(run)
    other.W_dec = torch.randn(64, 32, generator=torch.Generator().manual_seed(77))
    found = saeforge.evaluate(run, against=other).against
    assert found is not None
    assert found.latents_b == 64
    assert found.shared < 0.2
    write_dataset(tmp_path / "wide", {"train": torch.randn(4096, 48), "validation": torch.randn(2048, 48)})
    wide = saeforge.train(tmp_path / "wide", d_sae=64, k=4, tokens=2560, batch_size=256, progress=False)
    with pytest.raises(saeforge.SaeforgeError, match="32 and 48 wide"):
        saeforge.evaluate(run, against=wide)
    assert "does not exist" in fails([str(run), "--against", str(tmp_path / "nowhere")], capsys)


def test_what_is_undefined_is_null_in_the_json() -> None:
    empty = ReconstructionMetrics(2, 3)
    empty.update(torch.zeros(4, 2), torch.zeros(4, 2), SparseCode.from_dense(torch.zeros(4, 3)))
    weights = weight_figures(torch.ones(3, 2))
    result = Evaluation(empty.compute(), empty.firing(), weights, None, "none", 3, {"split": "validation"})
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["metrics"]["fvu"] is plain["metrics"]["l1"] is plain["weights"]["encoder_norm"] is None
    assert any("undefined" in value for _, _, value in summary_rows(result))


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

"""The benchmark's report says what the tables say, failed claims included."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saeforge.features.concepts import Concept, ConceptTable, Failure, TopLatent
from saeforge.features.concepts.score import Estimate, Score

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_concepts")


def make_score(auroc: float, active: float) -> Score:
    estimate = Estimate(auroc, auroc - 0.01, auroc + 0.01)
    return Score(estimate, estimate, 0.9, 0.8, 0.7, 0.1, 0.6, 0.5, None, 0.9, 0.9, active, 0.05)


def make_table(failures: tuple[Failure, ...]) -> ConceptTable:
    row = Concept(
        label="french",
        against=("spanish", "italian"),
        top=(TopLatent(12, 0.2, make_score(0.71, 0.6)),),
        random=make_score(0.62, 0.3),
        random_draws=(make_score(0.6, 0.3), make_score(0.64, 0.3)),
        difference_of_means=make_score(0.97, 1.0),
        probe=None,
        control=None,
        failures=failures,
    )
    about = {
        "documents": {"french": {"train": 20, "test": 21}},
        "tokens": {"train": 1000, "test": 1100},
        "resamples": 1000,
        "texts": "demo",
        "site": "layers.3:out",
        "choose_by": "token",
        "l0": 31.97,
    }
    return ConceptTable((row,), about, ("the logistic probe was left out",))


def test_the_report_holds_every_figure_and_every_failure(bench: Any) -> None:
    failure = Failure("difference_of_means", 0.71, 0.92)
    tables = {"topk": make_table((failure,)), "gated": make_table(())}
    run = {"variant": "topk", "d_sae": 4096, "tokens": 5}
    about = {
        "date": "2026-01-01",
        "machine": {"cpu": ["a cpu"], "cores": 2, "versions": {"torch": "2"}},
        "runs": {"topk": run, "gated": run},
    }
    lines = bench.report(tables, "python x", about).splitlines()
    assert "## french against spanish, italian" in lines
    (mine,) = (line for line in lines if line.startswith("| **topk** | latent 12, density 0.200"))
    assert "0.710 [0.700, 0.720] | 0.800 |" in mine  # the ceiling of a latent that fires on 0.6 of the tokens
    assert sum("difference of means | 0.970 [0.960, 0.980] |  |" in line for line in lines) == 1  # dense: no ceiling
    assert not any("logistic probe |" in line or "control's best" in line for line in lines)
    claims = [line.split(" | ")[1:] for line in lines if line.startswith("| french: ")]
    assert claims == [["holds", "holds |"], ["**fails**: 0.710 <= 0.920", "holds |"]]
    assert lines[-1] == "Note: the logistic probe was left out."


def test_a_run_that_is_not_there_is_one_line(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().startswith("bench_concepts.py: error: ")
    assert not list(tmp_path.iterdir())


def test_a_control_adds_its_row_and_its_claim(bench: Any) -> None:
    table = make_table((Failure("control", 0.7, 0.75),))
    table = replace(table, concepts=(replace(table.concepts[0], control=make_score(0.74, 0.5)),))
    about = {"date": "", "machine": {"cpu": [], "cores": 2, "versions": {}}, "runs": {}}
    lines = bench.report({"topk": table}, "", about).splitlines()
    assert any("re-initialised model's best latent | 0.740" in line for line in lines)
    assert any("control's best latent | **fails**: 0.700 <= 0.750 |" in line for line in lines)

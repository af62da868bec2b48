"""What the steering bench measures, on cases that a hand can check, and what its report says of missed goals."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from saeforge.sae import SAE

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pytest.importorskip("sklearn", reason="the bench's classifier needs scikit-learn")


def script(name: str) -> Any:
    return importlib.import_module(name)


def measures() -> Any:
    return script("steering_measures")


def test_distinct_2_sees_repetition_inside_and_between_the_continuations_of_a_prompt() -> None:
    distinct = measures().distinct_2
    assert distinct([[[1, 2, 3]]]) == 1.0
    assert distinct([[[1, 2, 1, 2, 1]]]) == 0.5  # four pairs, two kinds
    assert distinct([[[1, 2, 3], [1, 2, 3]]]) == 0.5
    assert distinct([[[1, 2, 3]], [[1, 2, 3]]]) == 1.0  # two prompts are no repetition


def test_kl_is_a_mean_over_tokens_and_zero_for_equal_models() -> None:
    kl = measures().mean_kl
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl([p], [p]) == 0.0
    assert kl([p], [q]) == pytest.approx(expected)
    assert kl([p, p.repeat(3, 1)], [q, p.repeat(3, 1)]) == pytest.approx(expected / 4)


@pytest.mark.parametrize("start", [0.01, 1.0, 50.0])
def test_a_strength_is_found_from_either_side(start: float) -> None:
    strength, reached = measures().match(lambda s: s**2, 9.0, start)
    assert reached == pytest.approx(9.0, rel=0.03)
    assert strength == pytest.approx(3.0, rel=0.02)


def test_a_target_out_of_reach_gives_the_nearest_and_says_so() -> None:
    strength, reached = measures().match(lambda s: min(s, 5.0), 9.0, 1.0)
    assert reached == 5.0
    assert strength >= 5.0


def test_the_bootstrap_holds_the_mean_and_shrinks_with_the_number_of_units() -> None:
    few, many = (measures().bootstrap([0.0, 1.0] * n) for n in (5, 500))
    assert few.low < few.mean == 0.5 < few.high
    assert many.high - many.low < (few.high - few.low) / 5


@dataclass(frozen=True)
class Setting:
    prompts: int = 2
    seeds: int = 1
    prompt_tokens: int = 3
    new_tokens: int = 4
    temperature: float = 0.8
    top_p: float = 0.95


def test_the_report_names_the_goals_that_are_missed(tmp_path: Path) -> None:
    outcome, report, interval = script("bench_steering").Outcome, script("steering_report").report, measures().Interval
    good, poor = interval(0.7, 0.6, 0.8), interval(0.01, -0.02, 0.03)
    latent = outcome(good, distinct=0.9, excess_loss=1.2)
    results = {
        "chosen": {"latent": 3, "factor": 1.0, "value": 2.0, "kl": 0.5, "norm": 1.0},
        "plain": outcome(poor, 1.0, 0.1),
        "latent": latent,
        "controls": {"difference of means, same KL": [outcome(good, 0.9, 0.5, kl=0.9)]},
        "tried": [{"latent": 3, "factor": 1.0, "outcome": latent}],
        "suppression": {"clamp 0": {"target": poor, "english": poor, "difference": poor}},
        "classifier_accuracy": 0.99,
        "machine": "a test",
    }
    sae = SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), rule="topk", k=1)
    report(tmp_path / "report.md", sae, "french", Setting(), results)
    text = (tmp_path / "report.md").read_text()
    assert "- met: at least 60% of continuations in french" in text
    assert "- **missed**: at most 1 nat a token" in text
    assert "reached within 5% by 0 of 1 controls" in text
    assert "| no effect |" in text
    assert json.loads((tmp_path / "report.json").read_text())["latent"]["excess_loss"] == 1.2

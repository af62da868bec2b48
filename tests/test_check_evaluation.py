"""scripts/check_evaluation*.py without the peer: what is the same definition, what fails, which texts go where."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saeforge.metrics.conventions import RECONSTRUCTION, WEIGHTS, names

#: Imports a script by its name.
Script = Callable[[str], Any]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module


def numbers(rows: Any) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """An evaluation.json, what SAELens says and what its definitions give, all equal to each other."""
    own: dict[str, Any] = {}
    for row in rows.ROWS:
        if row.ours is not None:
            *folders, last = row.ours.removeprefix("1 - ").split(".")
            place = own
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = 0.5
    return own, dict.fromkeys((row.theirs for row in rows.ROWS), 0.5), dict.fromkeys(
        (row.theirs for row in rows.ROWS), 0.5
    )  # fmt: skip


def failing(rows: Any, own: Any, theirs: Any, here: Any, setting: str = "alone", unit: bool = True) -> set[str]:
    judged = rows.judge(own, theirs, here, setting, unit_decoder=unit)
    return {found.row.theirs.rpartition(".")[2] for found in judged if found.fails}


def test_a_number_of_the_same_definition_must_agree_and_one_of_another_need_not(script: Script) -> None:
    rows = script("check_evaluation_rows")
    own, theirs, here = numbers(rows)
    assert failing(rows, own, theirs, here) == set()
    own["metrics"] |= {"mse": 0.5 * 1.003, "fvu": 0.51, "reconstruction_bias": 0.9, "l1": 0.9}
    assert failing(rows, own, theirs, here) == {"mse", "explained_variance", "l1"}
    assert failing(rows, own, theirs, here, unit=False) == {"mse", "explained_variance"}
    assert failing(rows, own, theirs, here, setting="packed") == set()
    own["weights"]["encoder_norm"]["mean"] = 0.6  # weights do not hang on texts
    assert failing(rows, own, theirs, here, setting="special") == {"encoder_norm"}


@pytest.mark.parametrize("value", [0.5 * 1.0002, math.nan, math.inf])
@pytest.mark.parametrize("setting", ["alone", "packed", "special"])
def test_its_own_definition_must_give_its_number_in_every_row(script: Script, setting: str, value: float) -> None:
    rows = script("check_evaluation_rows")
    own, theirs, here = numbers(rows)
    here = dict.fromkeys(here, value)
    assert len(failing(rows, own, theirs, here, setting)) == len(rows.ROWS)


def test_a_zero_beside_a_number_is_apart(script: Script) -> None:
    relative = script("check_evaluation_rows").relative
    assert relative(0, 0) == 0
    assert relative(1, 0) == math.inf
    assert relative(0, 2) == 1


def test_every_difference_has_an_explanation_and_every_figure_is_one_of_ours(script: Script) -> None:
    rows = script("check_evaluation_rows")
    assert {reason for row in rows.ROWS for reason in row.why("special", unit_decoder=False)} == set(rows.REASONS)
    figures = {
        row.ours.removeprefix("1 - ").split(".")[1] for row in rows.ROWS if row.ours and "effect" not in row.ours
    }
    assert figures <= names(RECONSTRUCTION) | names(WEIGHTS)


def test_rows_of_an_incomplete_block_may_be_missing_and_predictions_may_not(script: Script) -> None:
    miscounted = script("check_evaluation_rows").miscounted
    own = {"metrics": {"tokens": 1000}, "effect": {"overall": {"tokens": 90}}}
    assert miscounted(own, {"tokens": 1009, "predictions": 90}, block=10) == 0
    assert miscounted(own, {"tokens": 1010, "predictions": 90}, block=10) == 1
    assert miscounted(own, {"tokens": 999, "predictions": 91}, block=10) == 2


def test_batches_hold_every_text_once_without_padding(script: Script) -> None:
    check = script("check_evaluation")
    texts = [torch.full((length,), i) for i, length in enumerate([3, 5, *[3] * check.CONTEXTS, 4])]
    batches = check.of_one_length(texts)
    assert [tuple(batch.shape) for batch in batches] == [(check.CONTEXTS, 3), (1, 3), (1, 4), (1, 5)]
    assert sorted(int(row[0]) for batch in batches for row in batch) == list(range(len(texts)))


def test_the_peer_reads_its_batches_again_after_a_reset(script: Script) -> None:
    """The loss is taken on the first batches, and what comes after it must see all of them."""
    texts = script("check_evaluation_peer").Texts([torch.zeros(2, 3), torch.ones(1, 4)])
    assert [texts.get_batch_tokens().sum() for _ in range(2)] == [0, 4]
    texts.reset_input_dataset()
    assert texts.get_batch_tokens(7).shape == (2, 3)

"""scripts/bench_synthetic*.py without the peer: the rows it reads, what is matched to what, the verdict."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeforge.benchmark.cells import Cells
from saeforge.benchmark.report import Summary
from saeforge.data.synthetic import SyntheticConfig
from saeforge.errors import SaeforgeError

#: Imports a script by its name.
Script = Callable[[str], Any]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module


def test_the_peer_reads_rows_and_bits_in_file_order(script: Script, tmp_path: Path) -> None:
    peer = script("bench_synthetic_peer")
    rows = torch.randn(12, 4).bfloat16()
    bits = rows.view(torch.int16).numpy().view(np.uint16)
    np.save(tmp_path / "train.npy", bits)
    batches = peer.batches(tmp_path / "train.npy", 4, 1)
    read = [next(batches) for _ in range(4)]
    assert [torch.equal(read[n], rows[4 * m : 4 * m + 4].float()) for n, m in enumerate((1, 2, 0, 1))] == [True] * 4
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert torch.equal(peer.to_rows(plain), torch.from_numpy(plain))


def summary(side: str, f1: list[float], seconds: float) -> Summary:
    records = tuple({"f1": value, "mcc": 0.7, "seconds": seconds} for value in f1)
    return Summary("topk", side, 8.0, records, ())


class TestVerdict:
    def test_holds_within_one_pooled_deviation(self, script: Script) -> None:
        theirs = summary("theirs", [0.60, 0.62, 0.64], 100.0)  # deviation 0.02
        assert (
            script("bench_synthetic_report")
            .verdict(summary("ours", [0.59, 0.61, 0.63], 40.0), theirs)
            .endswith("holds")
        )
        lost = script("bench_synthetic_report").verdict(summary("ours", [0.57, 0.59, 0.61], 40.0), theirs)
        assert lost.endswith("F1 0.5900 is below 0.6000")
        assert lost.startswith("F1 -0.0300, MCC +0.0000, 2.5 times as fast")

    def test_half_the_time(self, script: Script) -> None:
        slow = script("bench_synthetic_report").verdict(summary("ours", [0.6], 51.0), summary("theirs", [0.5], 100.0))
        assert slow.endswith("only 1.96 times as fast")

    def test_nothing_measured(self, script: Script) -> None:
        assert (
            script("bench_synthetic_report").verdict(summary("ours", [], 1.0), summary("theirs", [0.5], 1.0))
            == "not measured"
        )


class TestMatched:
    """Penalties of both sides differ: the peer trains once a seed, and ours is brought to the L0 it got."""

    @staticmethod
    def cells(tmp_path: Path, ours: list[tuple[float, float, float]]) -> Cells:
        cells = Cells(tmp_path / "cells.json", {})
        cells.add(
            {"variant": "l1_relu", "side": "theirs", "seed": 0, "value": 4.0, "l0": 7.5, "f1": 0.5, "exact": False}
        )
        for value, l0, f1 in ours:
            record = {"variant": "l1_relu", "side": "ours", "seed": 0, "value": value, "l0": l0, "f1": f1}
            cells.add({**record, "exact": False, "target": 8.0})
        return cells

    def test_ours_is_interpolated_at_theirs(self, script: Script, tmp_path: Path) -> None:
        ours, theirs = script("bench_synthetic_report").matched(
            self.cells(tmp_path, [(2.0, 8.0, 0.6), (3.0, 7.0, 0.4)]), "l1_relu"
        )
        assert (ours.target, theirs.target) == (7.5, 7.5)
        assert (ours.mean("f1"), theirs.mean("f1")) == (0.5, 0.5)

    def test_a_seed_without_a_match_is_missing(self, script: Script, tmp_path: Path) -> None:
        ours, theirs = script("bench_synthetic_report").matched(self.cells(tmp_path, [(2.0, 12.0, 0.6)]), "l1_relu")
        assert ours.records == theirs.records == ()
        assert ours.missing == (0,)

    def test_the_peer_runs_once_and_then_ours_towards_it(self, script: Script, tmp_path: Path) -> None:
        module = script("bench_synthetic")
        arguments = argparse.Namespace(match=module.parse_matches(["l1_relu=4"]))
        knob = module.PEERS["l1_relu"].knob
        empty = Cells(tmp_path / "empty.json", {})
        assert module.next_run(arguments, empty, "l1_relu", "theirs", knob, 8.0, 0) == 4.0
        assert module.next_run(arguments, empty, "l1_relu", "ours", knob, 8.0, 0) is None
        cells = self.cells(tmp_path, [(2.0, 12.0, 0.6)])
        assert module.next_run(arguments, cells, "l1_relu", "theirs", knob, 8.0, 0) is None
        value = module.next_run(arguments, cells, "l1_relu", "ours", knob, 8.0, 0)
        assert value is not None
        assert value > 2.0  # fewer latents: a larger penalty

    @pytest.mark.parametrize("text", ["topk=8", "l1_relu", "l1_relu=much", "unknown=1"])
    def test_bad_matches(self, script: Script, text: str) -> None:
        with pytest.raises(SaeforgeError, match=f"--match {text}"):
            script("bench_synthetic").parse_matches([text])


def test_the_report_stands_beside_its_plot_and_runs(script: Script, tmp_path: Path) -> None:
    cells = Cells(
        tmp_path / "cells.json",
        {
            "protocol": {"d_sae": 512, "samples": 1000, "batch_size": 10, "lr": 1e-3, "precision": "32-true"},
            "threads": 2,
        },
    )
    for side, seconds in (("ours", 10.0), ("theirs", 30.0)):
        about = {
            "variant": "topk",
            "side": side,
            "seed": 0,
            "target": 8.0,
            "value": 8.0,
            "exact": True,
            "version": "6.54",
        }
        cells.add({**about, "l0": 7.9, "f1": 0.5, "mcc": 0.6, "explained_variance": 0.8, "seconds": seconds})
    script("bench_synthetic_report").write_report(cells, ["topk"], [8.0], {}, tmp_path / "docs" / "report.md")
    text = (tmp_path / "docs" / "report.md").read_text()
    assert "| topk | 8 | F1 +0.0000, MCC +0.0000, 3.0 times as fast: holds |" in text
    assert (tmp_path / "docs" / "report.svg").exists()
    assert json.loads((tmp_path / "docs" / "report.json").read_text()) == cells.content


def test_the_law_is_compared_level_by_level(script: Script) -> None:

    config = SyntheticConfig(features=8, d_in=4, roots=1, branching=2, depth=1, correlation_rank=1)
    module = script("bench_synthetic_law")
    law = module.ours(config, 2048)
    rows = module.table(config, {"a": law, "b": law})
    assert [row[0] for row in rows[4::2]] == [
        f"{name}, active features of a row" for name in ("level 0", "level 1", "free")
    ]
    active = sum(float(row[1]) for row in rows[4::2])
    assert active == pytest.approx(law["l0"][0], abs=2e-4)

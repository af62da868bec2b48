"""scripts/bench_synthetic*.py without the peer: its saved SAEs read as ours, the rows it reads, the verdict."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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


def saved(folder: Path, config: dict[str, Any], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random weights in SAELens's layout (x @ W_enc, acts @ W_dec): 6 inputs, 10 latents."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"W_enc": draw(6, 10), "W_dec": draw(10, 6), "b_dec": draw(6), **more}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"apply_b_dec_to_input": True, **config}))
    return weights


X = torch.randn(50, 6, generator=torch.Generator().manual_seed(4))
BIAS = torch.randn(10, generator=torch.Generator().manual_seed(5)) / 2


class TestSavedByThePeer:
    @pytest.mark.parametrize("shifted", [True, False])
    def test_standard(self, script: Script, tmp_path: Path, shifted: bool) -> None:
        w = saved(tmp_path, {"architecture": "standard", "apply_b_dec_to_input": shifted}, b_enc=BIAS)
        acts = ((X - w["b_dec"] * shifted) @ w["W_enc"] + BIAS).relu()
        self.compare(script, tmp_path, w, acts)

    def test_topk(self, script: Script, tmp_path: Path) -> None:
        w = saved(tmp_path, {"architecture": "topk", "k": 3}, b_enc=BIAS)
        acts = (X - w["b_dec"]) @ w["W_enc"] + BIAS
        kept = acts >= acts.topk(3, dim=1).values[:, -1:]
        self.compare(script, tmp_path, w, (acts * kept).relu())

    def test_jumprelu(self, script: Script, tmp_path: Path) -> None:
        threshold = BIAS.abs() * 3
        w = saved(tmp_path, {"architecture": "jumprelu"}, b_enc=BIAS, threshold=threshold)
        acts = (X - w["b_dec"]) @ w["W_enc"] + BIAS
        self.compare(script, tmp_path, w, acts * (acts > threshold) * (acts > 0))

    def test_gated(self, script: Script, tmp_path: Path) -> None:
        r_mag, b_mag = BIAS.flip(0), BIAS * 2
        w = saved(tmp_path, {"architecture": "gated"}, b_gate=BIAS, b_mag=b_mag, r_mag=r_mag)
        pi = (X - w["b_dec"]) @ w["W_enc"]
        self.compare(script, tmp_path, w, (pi + BIAS > 0) * (pi * r_mag.exp() + b_mag).relu())

    def test_others_are_refused(self, script: Script, tmp_path: Path) -> None:
        saved(tmp_path, {"architecture": "temporal"}, b_enc=BIAS)
        with pytest.raises(SaeforgeError, match="'temporal'"):
            script("bench_synthetic").read_peer(tmp_path)

    def compare(self, script: Script, folder: Path, w: dict[str, torch.Tensor], acts: torch.Tensor) -> None:
        sae = script("bench_synthetic").read_peer(folder)
        torch.testing.assert_close(sae.encode(X).to_dense(), acts, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(X), acts @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-5)


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
    script("bench_synthetic_report").write_report(cells, ["topk"], [8.0], tmp_path / "docs" / "report.md")
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

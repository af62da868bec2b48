"""The quality benchmark's own functions, on tiny data and without the peer: its controls are what it says they are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeforge.data.shard_source import ShardSource
from saeforge.data.writer import write_dataset
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.variants import Batch, DataStatistics, StepOutput, TopK

SCRIPTS = Path(__file__).parent.parent / "scripts"
D = 12


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_quality")


@pytest.fixture
def rows() -> Tensor:
    """Anisotropic rows off the origin, so that mean and principal axes matter."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4096, D, generator=generator) * torch.linspace(3, 0.3, D) + torch.linspace(-1, 2, D)


@pytest.fixture
def source(rows: Tensor, tmp_path: Path) -> ShardSource:
    write_dataset(tmp_path / "acts", {"train": rows[:2048], "validation": rows[2048:]}, dtype="bfloat16")
    return ShardSource(str(tmp_path / "acts"))


@pytest.fixture
def setting(bench: Any) -> Any:
    return bench.Setting(d_sae=24, k=4, steps=6, batch_size=64, warmup_steps=2, k_aux=4, l0_tolerance=3.0, threads=1)


def split_rows(source: ShardSource, split: str) -> np.ndarray:
    blocks = [source.read_block(split, i)[0].double() for i in range(source.n_blocks(split))]
    return torch.cat(blocks).numpy()


def test_the_peer_is_given_the_batches_that_ours_trains_on(
    bench: Any, source: ShardSource, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    step = TopK.step

    def spy(self: TopK, batch: Batch, schedule: Mapping[str, float]) -> StepOutput:
        seen.append(batch.x.clone())
        return step(self, batch, schedule)

    monkeypatch.setattr(TopK, "step", spy)
    bench.train(source, bench.topk(setting), setting, 3)
    bench.write_batches(source, setting, 3, tmp_path / "batches.npy")
    written = torch.from_numpy(np.load(tmp_path / "batches.npy")).view(torch.bfloat16)
    assert written.shape == (setting.steps, setting.batch_size, D)
    assert torch.equal(written, torch.stack(seen))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_decoder_stays_at_its_random_start(
    bench: Any, source: ShardSource, setting: Any, freeze: bool
) -> None:
    start: list[Tensor] = []
    build = bench.topk(setting)

    class Recorded:
        def __call__(self, d_in: int, d_out: int) -> TopK:
            variant: TopK = build(d_in, d_out)
            initialise = variant.initialise

            def record(stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
                initialise(stats, x, target, generator)
                start.extend([variant.W_dec.detach().clone(), variant.W_enc.detach().clone()])

            object.__setattr__(variant, "initialise", record)
            return variant

    trained = bench.train(source, Recorded(), setting, 0, freeze=freeze)
    moved_dec = float((trained.sae.W_dec - start[0]).abs().max())
    moved_enc = float((trained.sae.W_enc - start[1]).abs().max())
    assert moved_enc > 1e-4
    assert moved_dec < 1e-6 if freeze else moved_dec > 1e-4


def test_the_folded_peer_computes_the_peers_formula(bench: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (24, D), "b_enc": (24,), "W_dec": (24, D), "b_dec": (D,)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    x, scale, k = torch.randn(50, D, generator=generator) * 7, 0.13, 4
    sae = bench.fold_peer(weights, scale, k)
    post = ((x * scale - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]).relu()
    top = post.topk(k, dim=1)
    dense = torch.zeros_like(post).scatter(1, top.indices, top.values)
    expected = (dense @ weights["W_dec"] + weights["b_dec"]) / scale
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected, rtol=1e-4, atol=1e-4)


def test_pca_is_fitted_on_training_rows_and_judged_on_held_out_ones(bench: Any, source: ShardSource) -> None:
    train, held_out = split_rows(source, "train"), split_rows(source, "validation")
    mean = train.mean(0)
    axes = np.linalg.svd(train - mean, full_matrices=False)[2][:5]
    residual = (held_out - mean) - (held_out - mean) @ axes.T @ axes
    expected = (residual**2).sum() / ((held_out - held_out.mean(0)) ** 2).sum()
    assert bench.judge_pca(source, 5).fvu == pytest.approx(expected, rel=1e-9)


def test_the_search_finds_the_penalty_of_a_power_law(bench: Any) -> None:
    asked: list[float] = []

    def l0_of(coefficient: float) -> float:
        asked.append(coefficient)
        return 50 * coefficient**-0.6

    found = bench.tune(l0_of, 10.0, target=32, tolerance=0.1)
    assert abs(50 * found.coefficient**-0.6 - 32) <= 0.1
    assert found.runs == len(asked) <= 4
    assert found.slope == pytest.approx(-0.6)
    assert found.coefficient == asked[-1]  # the caller keeps the last run


def test_a_search_that_gets_nowhere_says_so(bench: Any) -> None:
    with pytest.raises(SaeforgeError, match="no coefficient with L0 32"):
        bench.tune(lambda coefficient: 100.0, 1.0, target=32, tolerance=1, max_runs=3)


def test_a_failing_peer_is_an_error(bench: Any, source: ShardSource, setting: Any) -> None:
    with pytest.raises(SaeforgeError, match="failed with code 1"):
        bench.train_peer(source, "/bin/false", setting, 0)


def test_a_benchmark_goes_on_where_it_was_and_refuses_other_settings(
    bench: Any, source: ShardSource, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = replace(setting, steps=50, lr=0.05)  # long enough for a penalty to act
    out = tmp_path / "quality.json"
    header = {"setting": asdict(setting), "data": bench.identity(source), "random_data": bench.identity(source)}
    with monkeypatch.context() as patch:
        patch.setattr(bench, "SPARSE", {"gated": bench.SPARSE["gated"]})
        bench.benchmark(source, source, setting, 1, bench.Results(out, header), None)
        patch.setattr(bench, "train", None)  # nothing is left to train
        again = bench.Results(out, header)
        bench.benchmark(source, source, setting, 1, again, None)
    controls = ["topk, frozen random decoder", "topk, random model"]
    starts = ["topk, encoder_init tied", "topk, encoder_init unit_probes"]
    assert [run["name"] for run in again.runs] == ["pca", "pca, random model", "topk", *controls, *starts, "gated"]
    fvu = {run["name"]: run["fvu"] for run in again.runs}
    assert len({fvu[name] for name in ["topk", *starts]}) == 3
    assert abs(again.runs[-1]["l0_mean"] - setting.k) <= setting.l0_tolerance
    assert {run["l0_mean"] for run in again.runs if run["name"].startswith("pca")} == {4.0}
    table = bench.table(again.runs)
    assert f"| topk | 1 | {again.runs[2]['fvu']:.4f} |" in table
    with pytest.raises(ConfigError, match="another setting"):
        bench.Results(out, {**header, "setting": {**asdict(setting), "lr": 1.0}})


def test_the_table_shows_mean_and_range_over_seeds(bench: Any) -> None:
    runs = [
        {"name": "a", "fvu": fvu, "l0_mean": 32.0, "cosine": 0.5, "reconstruction_bias": 1.0, "dead": dead}
        for fvu, dead in [(0.1, 0), (0.2, 1), (0.3, 5)]
    ]
    assert "| a | 3 | 0.2000 (0.1000 to 0.3000) | 32.00 | 0.5000 | 1.0000 | 2 (0 to 5) |  |" in bench.table(runs)

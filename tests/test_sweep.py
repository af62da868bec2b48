"""A sweep: several SAEs of one site from one stream, each what it would be alone, side by side in the run's folder."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import saeforge
from saeforge.cli.main import main
from saeforge.data.source import Rows
from saeforge.data.tensor_source import TensorSource
from saeforge.errors import ConfigError, PluginError
from saeforge.sae import SAE
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.settings import Settings
from saeforge.training.sweep import entries, expand
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Gated, TopK
from tests.test_fit import interrupt
from tests.test_several import arguments, dataset
from tests.toy import toy_rows
from tests.wandb_file import each_run

__all__ = ["dataset"]  # the fixture

SITE = "--data.input=resid_post.0"
#: Differences in everything that a sweep is for, and how the same SAE is asked for alone.
SWEEP: dict[str, dict[str, Any] | None] = {
    "base": None,
    "seed": {"seed": 5},
    "wide": {"d_sae": 96, "k": 6, "lr": 1e-3, "lr_decay_share": 0.5},
    "gated": {"variant": "gated", "l1": 0.02, "target_l0": 6},
    "relu": {"variant": {"class_path": "l1_relu", "init_args": {"l1": 2.0}}, "ema_half_life_steps": 5},
}
ALONE = {
    "base": [],
    "seed": ["--model.seed=5"],
    "wide": [
        "--model.variant.d_sae=96",
        "--model.variant.k=6",
        "--model.lr=1e-3",
        "--model.lr_decay_share=0.5",
    ],
    "gated": ["--model.variant=gated", "--model.variant.d_sae=64", "--model.variant.l1=0.02", "--model.target_l0=6"],
    "relu": [
        "--model.variant=l1_relu",
        "--model.variant.d_sae=64",
        "--model.variant.l1=2",
        "--model.ema_half_life_steps=5",
    ],
}


def given(sweep: dict[str, Any]) -> str:
    return f"--model.sweep={json.dumps(sweep)}"


def assert_same(one: SAE, other: SAE) -> None:
    assert one.rule == other.rule
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(("precision", "names"), [("32-true", list(SWEEP)), ("bf16-mixed", ["base", "wide", "gated"])])
def test_each_sae_is_what_it_is_alone_to_the_bit_also_after_a_resume(
    precision: str, names: list[str], dataset: Path, tmp_path: Path
) -> None:
    args = functools.partial(arguments, dataset)
    common, sweep = [SITE, f"--trainer.precision={precision}"], given({name: SWEEP[name] for name in names})
    stop = "--trainer.callbacks=" + interrupt(13)["trainer.callbacks"]
    assert main(args(tmp_path / "all", *common, sweep)) == 0
    assert main(args(tmp_path / "parts", *common, sweep, stop)) == 130
    assert main(args(tmp_path / "parts", *common, sweep, "--ckpt_path=last")) == 0
    found = set()
    for name in names:
        assert main(args(tmp_path / name, *common, *ALONE[name])) == 0
        alone = saeforge.load(tmp_path / name)
        for run in ("all", "parts"):
            together = saeforge.load(tmp_path / run / name)
            assert_same(together, alone)
            assert together.meta == alone.meta
        found.add(str(alone.W_enc.flatten()[:8].tolist()))
    assert len(found) == len(names)  # no two of them are the same SAE
    assert not (tmp_path / "all" / "sae").exists()


def test_a_sweep_of_several_sites_trains_every_one_of_the_product(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    grid = ["--model.grid.k=[2, 4]", "--model.grid.d_sae=[64, 48]"]
    assert main(arguments(dataset, run, "--data.sites=[resid_post.*]", "--data.tokens=2560", *grid)) == 0
    points = ["k2-d64", "k2-d48", "k4-d64", "k4-d48"]
    assert {path.parents[1].name for path in run.glob("*/sae/sae.json")} == {
        f"resid_post.{layer}-{point}" for layer in (0, 1) for point in points
    }
    for layer in (0, 1):
        one = ["--model.variant.k=2", "--model.variant.d_sae=48", f"--data.input=resid_post.{layer}"]
        assert main(arguments(dataset, tmp_path / str(layer), "--data.tokens=2560", *one)) == 0
        assert_same(saeforge.load(run / f"resid_post.{layer}-k2-d48"), saeforge.load(tmp_path / str(layer)))


def test_the_run_folder_is_that_of_several_saes(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = arguments(dataset, run, SITE, "--model.sweep.a={k: 2}", "--model.sweep.b=null", "--data.tokens=2560")
    assert main(args) == 0
    assert str(run / "a" / "sae") in capsys.readouterr().out
    names = (run / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"a/train/l0", "b/train/l0", "a/val/fvu", "data/wait_ms", "speed/tokens_per_second"} <= set(names)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["sweep"] == {"a": {"k": 2}, "b": None}
    assert main(args) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 2
    assert f"holds several SAEs: {run / 'a'}, {run / 'b'}" in capsys.readouterr().err
    assert main(["evaluate", str(run / "a"), "--data", str(dataset)]) == 0
    assert (run / "a" / "evaluation.json").exists()
    assert main(["fit", "--config", str(run / "config.yaml"), "--overwrite=true"]) == 0
    assert not (run / "a" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model.sweep.b={k: 3}"], "k: 4 -> 3"),
        (["--model.sweep={a: {k: 2}, c: }"], "name: b -> c"),
        (["--model.sweep={a: {k: 2}}"], "holds 2 SAEs (a, b), this run trains 1"),
        (["--model.sweep.b={variant: gated}"], "holds variant saeforge.variants.TopK, this run asks for"),
        (["--model.sweep.b={seed: 3}"], "seed: 0 -> 3"),
    ],
)
def test_another_sweep_is_refused_at_resume(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    args = arguments(dataset, tmp_path / "run", SITE, "--model.sweep={a: {k: 2}, b: }", "--data.tokens=2560")
    assert main(args) == 0
    assert main([*args, *changed, "--ckpt_path=last"]) == 2
    assert message in capsys.readouterr().err


def test_wandb_gets_a_run_for_each_in_one_group(dataset: Path, tmp_path: Path) -> None:
    logger = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline=true"]
    sweep = "--model.sweep={top: , gated: {variant: gated, l1: 0.02}}"
    assert main(arguments(dataset, tmp_path / "run", SITE, sweep, "--data.tokens=5120", *logger)) == 0
    runs = {
        record.display_name: (record, history, config)
        for record, history, config in each_run(tmp_path / "run", finished=True)
    }
    assert runs.keys() == {"run-top", "run-gated"}
    for record, history, config in runs.values():
        assert record.run_group == "run"
        assert {"train/l0", "train/fvu", "latents/log10_density", "val/fvu", "data/wait_ms", "train/tokens"} <= history
        assert not [name for name in history if name.startswith(("top/", "gated/"))]
        assert len(config["resolved"]["members"]) == 1
    assert "schedule/l1" in runs["run-gated"][1]
    assert "schedule/l1" not in runs["run-top"][1]
    assert [runs[name][2]["variant"]["name"] for name in ("run-top", "run-gated")] == ["topk", "gated"]
    assert runs["run-gated"][2]["resolved"]["members"][0]["options"]["l1"] == 0.02


def test_a_logger_for_one_run_only_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline=true"]
    args = arguments(dataset, tmp_path / "run", SITE, "--model.grid.k=[2, 4]", *logger, "--trainer.logger.id=mine")
    assert main(args) == 2
    assert "leave out the logger's id" in capsys.readouterr().err


class Counted(TensorSource):
    """Counts the blocks that are read."""

    def __init__(self, x: Any) -> None:
        self.reads: list[int] = []  # several threads read
        super().__init__(x)

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """One more."""
        self.reads.append(index)
        return super().read_block(split, index, into)


def test_the_data_is_read_once_for_all() -> None:
    """And the language model, where there is one, makes a block when it is read."""
    reads = {}
    for n in (1, 3):
        source = Counted(toy_rows(4096))
        data = ActivationData.of(source, batch_size=256, tokens=256 * 20, seed=0)
        grid: dict[str, list[Any]] = {"k": [2, 4, 8][:n]}
        module = SAEModule(functools.partial(TopK, d_sae=64), data.d_in, data.d_out, grid=grid)
        trainer = SAETrainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, val_check_interval=10
        )
        trainer.fit(module, data)
        reads[n] = len(source.reads)
    assert reads[1] == reads[3] > 0


# In Python ----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"d_sae": 64, "k": 4, "tokens": 256 * 10, "batch_size": 256}


def test_train_returns_them_by_name_each_as_alone() -> None:
    x = toy_rows(4096)
    found = saeforge.train(x, sweep={"small": {"k": 2}, "seed": {"seed": 7}, "cls": {"variant": Gated}}, **OPTIONS)
    assert list(found) == ["small", "seed", "cls"]
    assert_same(found["small"], saeforge.train(x, **{**OPTIONS, "k": 2}))
    assert_same(found["seed"], saeforge.train(x, training={"seed": 7}, **OPTIONS))
    gated = saeforge.train(x, variant=Gated, d_sae=64, tokens=OPTIONS["tokens"], batch_size=256)
    assert_same(found["cls"], gated)
    assert list(saeforge.train(x, grid={"variant": ["topk", "l1_relu"]}, **OPTIONS)) == ["topk", "l1_relu"]


def test_each_may_start_from_its_own_of_a_former_sweep(tmp_path: Path) -> None:
    x, run = toy_rows(4096), tmp_path / "first"
    first = saeforge.train(x, grid={"k": [2, 4]}, run=run, trainer={"logger": False}, **OPTIONS)
    again = saeforge.train(
        x, grid={"k": [2, 4]}, training={"init_from": str(run)}, lr=1e-30, **{**OPTIONS, "tokens": 256}
    )
    for name in ("k2", "k4"):  # folded and unfolded: a few roundings of fp32
        assert torch.allclose(first[name].W_dec, again[name].W_dec, rtol=0, atol=1e-5)
    assert not torch.allclose(first["k2"].W_dec, first["k4"].W_dec, rtol=0, atol=1e-3)


def test_an_optimizer_may_differ_too() -> None:
    x = toy_rows(4096)
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
    found = saeforge.train(x, sweep={"own": None, "adam": {"optimizer": adam}}, **OPTIONS)
    alone = saeforge.train(x, training={"optimizer": functools.partial(torch.optim.Adam, lr=1e-3)}, **OPTIONS)
    assert_same(found["adam"], alone)
    assert not torch.equal(found["own"].W_dec, found["adam"].W_dec)


# What is refused ----------------------------------------------------------------------------------------------------


def made(sweep: Any = None, grid: Any = None) -> dict[str, Any]:
    build = functools.partial(TopK, d_sae=64, k=4, pre_bias=False)
    return {entry.name: entry for entry in entries(build, Settings(lr=1e-3), sweep, grid, (8, 8))}


def test_an_entry_is_the_base_but_for_what_it_names() -> None:
    found = made({"same": None, "k": {"k": 8, "lr": None}, "other": {"variant": "gated", "seed": 3}})
    same, k, other = (found[name].build(8, 8).arguments for name in ("same", "k", "other"))
    assert (same["k"], same["pre_bias"], k["k"], k["pre_bias"]) == (4, False, 8, False)
    assert (found["same"].settings.lr, found["k"].settings.lr, found["other"].settings.lr) == (1e-3, None, 1e-3)
    # Another variant keeps the width; pre_bias is its own default again.
    assert (other["d_sae"], other["pre_bias"], found["other"].settings.seed) == (64, True, 3)


def test_names_of_a_grid() -> None:
    grid: dict[str, list[Any]] = {
        "variant": ["topk", "saeforge.variants.Gated"],
        "d_sae": [64],
        "lr": [1e-4, None],
        "skip": [False],
    }
    assert list(expand(None, grid)) == [
        f"{name}-d64-{lr}-skip-false" for name in ("topk", "Gated") for lr in ("lr0.0001", "lr-null")
    ]
    assert list(expand({"a": None, "b": {"skip": True}}, {"k": [2, 4]})) == ["a-k2", "a-k4", "b-k2", "b-k4"]


@pytest.mark.parametrize(
    ("sweep", "grid", "message"),
    [
        ({"a": {"kk": 8}}, None, r"model.sweep.a: neither the run nor TopK has an option 'kk'; did you mean 'k'\?"),
        ({"a": {"target_10": 8}}, None, "did you mean 'target_l0'"),
        ({"a": {"k": "many"}}, None, "model.sweep.a: .*'?int'?.*many"),
        ({"a": {"lr": "fast"}}, None, "model.sweep.a: .*lr.*fast"),
        ({"a": {"variant": {"init_args": {"k": 3}}, "k": 4}}, None, "k is given twice"),
        ({"a": {"variant": {"k": 3}}}, None, "expected a variant's name, or a mapping of class_path and init_args"),
        ({"a": 3}, None, "expected a mapping such as"),
        ({}, None, "model.sweep is empty"),
        (None, {}, "model.grid is empty"),
        (None, {"k": 4}, "model.grid.k = 4: expected a list"),
        (None, {"k": []}, "expected a list of values"),
        (None, {"k": [4, 4]}, "two SAEs are called 'k4'"),
        (None, {"resample_steps": [[3], [4]]}, "gives no name; list these SAEs in model.sweep"),
        (None, {"variant": ["topk", "gated"], "k": [2]}, "model.sweep.gated-k2: neither the run nor Gated has"),
        ({"a": {"k": 3}}, {"k": [3, 4]}, "k is in model.sweep.a and in model.grid"),
        ({"a": None, "A": None}, None, "two SAEs are called 'A'"),
        ({"../a": None}, None, "'../a' is to name a folder"),
        ({"a/b": None}, None, "'a/b' is to name a folder"),
        ({"": None}, None, "'' is to name a folder"),
        ({"wandb": None}, None, "'wandb' lies in the RUN folder already"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_line(sweep: Any, grid: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        made(sweep, grid)
    assert "\n" not in str(refused.value)


def test_a_wrong_value_names_its_entry() -> None:
    x = toy_rows(4096)
    with pytest.raises(ConfigError, match=r"model.sweep.k99: k = 99 with d_sae = 64"):
        saeforge.train(x, grid={"k": [4, 99]}, **OPTIONS)
    with pytest.raises(ConfigError, match=r"model.sweep.a: model.target_l0 = 4.0: TopK names no sparsity"):
        saeforge.train(x, sweep={"a": {"target_l0": 4}}, **OPTIONS)
    with pytest.raises(PluginError, match=r"unknown variant 'topkk'.*did you mean 'topk'"):
        saeforge.train(x, sweep={"a": {"variant": "topkk"}}, **OPTIONS)


def test_names_that_meet_across_sites_are_refused() -> None:
    source = TensorSource(toy_rows(4096))
    (pair,) = source.pairs
    source.pairs = tuple(replace(pair, name=name) for name in ("a", "a-b"))
    module = SAEModule(functools.partial(TopK, d_sae=64), [32, 32], [32, 32], sweep={"b-c": None, "c": None})
    with pytest.raises(ConfigError, match="two SAEs are called 'a-b-c'"):
        module.names(source)


def test_a_key_below_an_entry_says_what_to_write(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path / "run", SITE, "--model.sweep.a.k=2")) == 2
    assert "--model.sweep.a='{k: 32}'" in capsys.readouterr().err

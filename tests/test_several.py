"""Several SAEs from one stream: each is what it would be alone, and the run's folder holds them side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saeforge
from saeforge.cli.main import main
from saeforge.data.layout import SiteSpec, SplitPlan, choose_block_rows
from saeforge.data.writer import DatasetWriter
from saeforge.errors import CheckpointError
from tests.test_fit import interrupt
from tests.toy import toy_rows

D, ROWS = 32, 8192


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of different width, row-aligned, beside a third that nobody asks for."""
    root = tmp_path_factory.mktemp("several") / "acts"
    x = toy_rows(ROWS)
    sites = {"layers.0:out": x, "layers.1:out": x[:, : D // 2] * 2, "final:out": x + 1}
    specs = [
        SiteSpec(name, name.split(":")[0], "out", rows.shape[1], "float32", f"resid_post.{i}" if i < 2 else None)
        for i, (name, rows) in enumerate(sites.items())
    ]
    share = {"train": slice(0, ROWS * 3 // 4), "validation": slice(ROWS * 3 // 4, ROWS)}
    plans = {
        split: SplitPlan(len(x[part]), choose_block_rows(len(x[part]), D * 4, split=split))
        for split, part in share.items()
    }
    writer = DatasetWriter(root, specs, plans, bucket_rows=ROWS, config_sha256="0" * 64)
    for split, bucket in writer.buckets():
        start, stop = writer.bucket_range(split, bucket)
        provenance = torch.arange(start, stop)[:, None].repeat(1, 4).numpy()
        rows = {name: tensor[share[split]][start:stop].contiguous() for name, tensor in sites.items()}
        writer.write_bucket(split, bucket, rows, provenance)
    writer.finish(alignment_sha256="0" * 64)
    return root


def arguments(dataset: Path, run: Path, *more: str) -> list[str]:
    return [
        "fit",
        "--model.variant=topk",
        "--model.variant.d_sae=64",
        "--model.variant.k=4",
        f"--data.path={dataset}",
        "--data.batch_size=256",
        f"--data.tokens={256 * 40}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=10",
        f"--run={run}",
        *more,
    ]


def test_each_sae_is_what_it_is_alone_to_the_bit(dataset: Path, tmp_path: Path) -> None:
    assert main(arguments(dataset, tmp_path / "both", "--data.sites=[resid_post.*]")) == 0
    for alias, site in (("resid_post.0", "layers.0:out"), ("resid_post.1", "layers.1:out")):
        assert main(arguments(dataset, tmp_path / alias, f"--data.input={alias}")) == 0
        together, alone = saeforge.load(tmp_path / "both" / alias), saeforge.load(tmp_path / alias)
        assert together.meta["site"]["id"] == alone.meta["site"]["id"] == site
        for name, tensor in alone.state_dict().items():
            assert torch.equal(tensor, together.state_dict()[name]), name
    assert not (tmp_path / "both" / "sae").exists()
    assert not (tmp_path / "both" / "final.out").exists()


def test_figures_carry_the_name_of_their_sae(dataset: Path, tmp_path: Path) -> None:
    args = arguments(dataset, tmp_path / "run", "--data.sites=[resid_post.*]")
    assert main(args) == 0
    names = (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("train/l0", "train/fvu", "val/fvu", "schedule/lr"):
        assert f"resid_post.0/{name}" in names
        assert f"resid_post.1/{name}" in names
    assert {"data/wait_ms", "data/windows_ready", "speed/tokens_per_second"} <= set(names)


def test_a_run_of_several_goes_on_to_the_bit(dataset: Path, tmp_path: Path) -> None:
    sites = "--data.sites=[resid_post.*]"
    stop = "--trainer.callbacks=" + interrupt(13)["trainer.callbacks"]
    assert main(arguments(dataset, tmp_path / "whole", sites)) == 0
    assert main(arguments(dataset, tmp_path / "parts", sites, stop)) == 130
    assert main(arguments(dataset, tmp_path / "parts", sites, "--ckpt_path=last")) == 0
    for name in ("resid_post.0", "resid_post.1"):
        whole, parts = saeforge.load(tmp_path / "whole" / name), saeforge.load(tmp_path / "parts" / name)
        assert all(torch.equal(tensor, parts.state_dict()[key]) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize("what", ["one SAE", "no list of dead latents"])  # as checkpoints once were
def test_a_checkpoint_of_an_earlier_saeforge_is_refused(
    what: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(dataset, tmp_path / "run", "--data.input=resid_post.0")
    assert main(args) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    if what == "one SAE":
        checkpoint["saeforge"] = checkpoint["saeforge"]["members"][0]
    else:
        del checkpoint["state_dict"][next(k for k in checkpoint["state_dict"] if k.endswith("listed_as_dead"))]
    torch.save(checkpoint, path)
    assert main([*args, "--ckpt_path=last"]) == 2
    assert "is an earlier saeforge's" in capsys.readouterr().err


def test_another_number_of_sites_is_refused_at_resume(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path / "run", "--data.sites=[resid_post.*]")) == 0
    assert main(arguments(dataset, tmp_path / "run", "--data.input=resid_post.0", "--ckpt_path=last")) == 2
    assert "holds 2 SAEs (resid_post.0, resid_post.1), this run trains 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data.sites=[resid_pre.*]"], "no site like 'resid_pre.*'; it holds: layers.0:out, layers.1:out, final:out"),
        (["--data.sites=[resid_post.*]", "--data.input=final"], "leave out data.input and data.target"),
    ],
)
def test_wrong_sites_are_named(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert main(arguments(dataset, tmp_path / "run", *given)) == 2
    assert message in capsys.readouterr().err


def test_python_fit_returns_all_of_them(dataset: Path, tmp_path: Path) -> None:
    config = {
        "run": str(tmp_path / "run"),
        "data": {"path": str(dataset), "sites": ["resid_post.*"], "batch_size": 256, "tokens": 256 * 4},
        "model": {"variant": {"class_path": "topk", "init_args": {"d_sae": 64, "k": 4}}},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    found = saeforge.fit(config)
    assert {name: sae.d_in for name, sae in found.items()} == {"resid_post.0": 32, "resid_post.1": 16}


def test_a_run_without_checkpoints_is_not_overwritten_unasked(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(dataset, tmp_path / "run", "--data.sites=[resid_post.*]", "--trainer.enable_checkpointing=false")
    assert main(args) == 0
    assert str(tmp_path / "run" / "resid_post.1" / "sae") in capsys.readouterr().out
    assert main(args) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_run_of_several_says_how_to_name_one(dataset: Path, tmp_path: Path) -> None:
    assert main(arguments(dataset, tmp_path / "run", "--data.sites=[resid_post.*]")) == 0
    with pytest.raises(CheckpointError, match=r"holds several SAEs: .*resid_post.0, .*resid_post.1"):
        saeforge.load(tmp_path / "run")

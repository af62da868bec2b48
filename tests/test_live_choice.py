"""Live transcoders of all layers, and live crosscoders: their rows are those of the harvest, their resume is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saeforge
from saeforge.cli.main import main
from saeforge.data.choice import SitesWanted
from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError
from saeforge.harvest import harvest
from saeforge.harvest.live import LiveSource
from saeforge.training.data import ActivationData
from tests.test_fit import interrupt
from tests.test_live import ROWS, _one_thread, arguments, assert_same, config, home

__all__ = ["_one_thread", "home"]  # fixtures

SITES = ("mlp_out.*", "mlp_in.*", "resid_post.*")


@pytest.mark.parametrize(
    ("wanted", "target"), [("mlp_in.*", "mlp_out.*"), (["resid_post.3", "resid_post.0"], None)], ids=str
)
def test_rows_are_those_of_the_harvest(home: Path, tmp_path: Path, wanted: SitesWanted, target: SitesWanted) -> None:
    harvest(config(home, tmp_path / "stored", SITES))
    stored = ShardSource(str(tmp_path / "stored"), input=wanted, target=target)
    live = LiveSource(config(home, tmp_path / "live", SITES), input=wanted, target=target)
    assert [pair.name for pair in live.pairs] == [pair.name for pair in stored.pairs]
    per_bucket = ROWS // stored.block_rows("train")
    made = live.read_block("train", 1)
    blocks = [stored.read_block("train", block) for block in range(per_bucket, 2 * per_bucket)]
    rows = tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))
    held_out = live.read_block("validation", 0), stored.read_block("validation", 0)
    assert len(live.pairs) == (4 if target else 1)
    for one, other in zip(live.pairs, stored.pairs, strict=True):
        assert one.widths(live) == other.widths(stored)
        for found, expected in ((made, rows), held_out):
            for part, same in zip(one.batch(found)[:2], other.batch(expected)[:2], strict=True):
                assert torch.equal(part, same)
        x = one.batch(live.sample(1000)).x
        mean = torch.tensor(one.statistics(live)[0].mean)
        assert (x.mean(0) - mean).norm() < 0.2 * (x - mean).square().sum(1).mean().sqrt()
    live.close()


def test_skip_transcoders_of_all_layers_resume_to_the_bit(home: Path, tmp_path: Path) -> None:
    more = (
        "--data.input=mlp_in.*",
        "--data.target=mlp_out.*",
        "--model.skip=true",
        "--model.variant.pre_bias=false",
    )
    stop = "--trainer.callbacks=" + interrupt(23)["trainer.callbacks"]
    assert main(arguments(home, tmp_path / "whole", *more)) == 0
    assert main(arguments(home, tmp_path / "parts", *more, stop)) == 130
    assert main(arguments(home, tmp_path / "parts", *more, "--ckpt_path=last")) == 0
    for layer in range(4):
        assert_same(tmp_path / "whole" / f"mlp_in.{layer}", tmp_path / "parts" / f"mlp_in.{layer}")
    sae = saeforge.load(tmp_path / "whole" / "mlp_in.2")
    assert sae.W_skip is not None
    assert (sae.meta["site"]["where"], sae.meta["target"]["where"]) == ("in", "out")
    # Its model, too: the reconstruction of the MLP's output, with the skip path, takes that output's place.
    result = saeforge.evaluate(tmp_path / "whole" / "mlp_in.2", effect=True, effect_tokens=500)
    assert result.effect is not None
    assert result.effect.overall.tokens >= 500


@pytest.mark.parametrize(
    ("wanted", "target", "words"),
    [
        ("mlp_in.*", None, "data.sites = mlp_in"),
        ("mlp_in.*", "mlp_out.1", "patterns in both"),
        (["a#resid_post.1"], None, "all sites are of one model; leave out PATH#"),
        (None, "mlp_out.1", "needs data.sites"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    tmp_path: Path, wanted: str | list[str] | None, target: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        ActivationData(str(tmp_path / "d"), source="live", model="none", input=wanted, target=target)

"""Sites side by side, transcoders by pattern: the right tensors beside each other, clear words where nothing fits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saeforge
from saeforge.cli.main import main
from saeforge.data.layout import SiteSpec, SplitPlan, choose_block_rows
from saeforge.data.shard_source import ShardSource
from saeforge.data.tensor_source import TensorSource
from saeforge.data.writer import DatasetWriter
from saeforge.errors import ConfigError, DatasetError, SaeforgeError
from saeforge.steering.delta import Delta
from tests.toy import toy_rows

ROWS = 8192


def write(root: Path, sites: dict[str, Tensor], aliases: dict[str, str], *, shift: int = 0, **finish: Any) -> Path:
    """A dataset of several sites; `shift` is added to the documents, so that the rows are other tokens."""
    share = {"train": slice(0, ROWS * 3 // 4), "validation": slice(ROWS * 3 // 4, ROWS)}
    specs = [
        SiteSpec(name, name.split(":")[0], name.split(":")[1], rows.shape[1], "float32", aliases.get(name))
        for name, rows in sites.items()
    ]
    counts = {split: part.stop - part.start for split, part in share.items()}
    plans = {split: SplitPlan(n, choose_block_rows(n, 128, split=split)) for split, n in counts.items()}
    writer = DatasetWriter(root, specs, plans, bucket_rows=ROWS, config_sha256="0" * 64)
    for split, bucket in writer.buckets():
        start, stop = writer.bucket_range(split, bucket)
        provenance = torch.arange(start + shift, stop + shift)[:, None].repeat(1, 4).numpy()
        rows = {name: tensor[share[split]][start:stop].contiguous() for name, tensor in sites.items()}
        writer.write_bucket(split, bucket, rows, provenance)
    writer.finish(**finish)
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets `base` and `chat` of the same tokens, and `other` of others. Two layers with an MLP each."""
    root, x = tmp_path_factory.mktemp("choice"), toy_rows(ROWS)
    sites, aliases = {}, {}
    for layer in (0, 1):
        sites[f"layers.{layer}:out"] = x * (layer + 1)
        sites[f"layers.{layer}.mlp:in"] = x[:, : 16 + layer] + layer
        sites[f"layers.{layer}.mlp:out"] = -x[:, : 8 + layer] - layer
        aliases[f"layers.{layer}:out"] = f"resid_post.{layer}"
        aliases[f"layers.{layer}.mlp:in"] = f"mlp_in.{layer}"
        aliases[f"layers.{layer}.mlp:out"] = f"mlp_out.{layer}"
    write(root / "base", sites, aliases)
    write(root / "chat", {"layers.0:out": x.flip(1)}, {"layers.0:out": "resid_post.0"})
    write(root / "other", {"layers.0:out": x}, {}, shift=1)
    return root


def fit(home: Path, run: Path, *more: str, tokens: int = 256 * 12) -> int:
    return main(
        [
            "fit",
            "--model.variant=topk",
            "--model.variant.d_sae=64",
            "--model.variant.k=4",
            f"--data.path={home / 'base'}",
            "--data.batch_size=256",
            f"--data.tokens={tokens}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.log_every_n_steps=4",
            f"--run={run}",
            *more,
        ]
    )


# Which tensors ------------------------------------------------------------------------------------------------------


def test_sites_in_a_list_stand_side_by_side_in_its_order(home: Path) -> None:
    source = ShardSource(str(home / "base"), input=["resid_post.1", "mlp_in.0"])
    (pair,) = source.pairs
    batch = pair.batch(source.read_block("train", 2))
    assert batch.target is batch.x
    one, two = (ShardSource(str(home / "base"), input=name) for name in ("resid_post.1", "mlp_in.0"))
    parts = [one.read_block("train", 2)[0], two.read_block("train", 2)[0]]
    assert torch.equal(batch.x, torch.cat(parts, 1))
    assert pair.widths(source) == (48, 48)
    assert [part["site"]["id"] for part in pair.identity["sources"]] == ["layers.1:out", "layers.0.mlp:in"]
    assert [part["d"] for part in pair.identity["sources"]] == [32, 16]
    assert pair.identity["sources"][0]["rms_norm"] == pytest.approx(one.statistics[0].mean_square_norm ** 0.5)


def test_a_pattern_in_a_list_stands_for_all_sites_like_it(home: Path) -> None:
    source = ShardSource(str(home / "base"), input=["resid_post.*"], target=["mlp_out.[!0]", "mlp_out.0"])
    assert source.widths == (32, 32, 9, 8)
    assert (source.pairs[0].inputs, source.pairs[0].targets) == ((0, 1), (2, 3))


def test_sites_of_several_datasets_of_the_same_tokens_stand_side_by_side(home: Path) -> None:
    names = [f"{home / 'base'}#resid_post.0", f"{home / 'chat'}#"]
    source = ShardSource(None, input=names)
    x = source.pairs[0].batch(source.read_block("validation", 0)).x
    assert torch.equal(x[:, :32], x[:, 32:].flip(1))
    assert source.fingerprint not in {
        ShardSource(name[: name.index("#")], input="layers.0").fingerprint for name in names
    }
    assert ShardSource(str(home / "base"), input=["resid_post.0", names[1]]).fingerprint == source.fingerprint


def test_transcoders_of_all_layers_are_paired_by_what_the_pattern_stands_for(home: Path) -> None:
    source = ShardSource(str(home / "base"), input="mlp_in.*", target="layers.*.mlp:out")
    assert [pair.name for pair in source.pairs] == ["mlp_in.0", "mlp_in.1"]
    assert [pair.widths(source) for pair in source.pairs] == [(16, 8), (17, 9)]
    assert [pair.identity["target"]["id"] for pair in source.pairs] == ["layers.0.mlp:out", "layers.1.mlp:out"]


def test_a_transcoder_between_models_remembers_both(home: Path) -> None:
    source = ShardSource(str(home / "base"), input="resid_post.0", target=f"{home / 'chat'}#resid_post.0")
    identity = source.pairs[0].identity
    assert identity["site"] is None
    assert identity["targets"][0]["dataset_path"] == str(home / "chat")


@pytest.mark.parametrize(
    ("wanted", "target", "words"),
    [
        ("mlp_in.*", "mlp_out.[1-9]", r"do not pair: layers\.0\.mlp:in has no target; harvest both"),
        ("mlp_in.0*", "mlp_out.*", r"layers\.0\.mlp:out has no input.*layers\.1\.mlp:out has no input"),
        (
            "resid_post.*",
            None,
            r"a pattern: data\.sites = resid_post\.\* trains an SAE for each.*\(\[resid_post\.\*\]\)",
        ),
        ("mlp_in.0", "mlp_out.*", "expected patterns in both"),
        (["resid_post.0", "layers.0:out"], None, "names layers.0:out of .* twice"),
        ([], None, "empty list"),
        (["resid_post.7"], None, "no site 'resid_post.7'; it holds: layers.0:out"),
        (["resid_mid.*"], None, r"no site like 'resid_mid\.\*'"),
        ("*layers.*:out", "mlp_out.*", "make it more definite|do not pair"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(home: Path, wanted: Any, target: Any, words: str) -> None:
    with pytest.raises(SaeforgeError, match=words) as error:
        ShardSource(str(home / "base"), input=wanted, target=target)
    assert "\n" not in str(error.value)


def test_a_name_without_a_dataset_is_said_in_one_line(home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.input 'resid_post\.0' names no dataset: give data\.path, or PATH#SITE"
    ):
        ShardSource(None, input=["resid_post.0", f"{home / 'chat'}#"])


def test_datasets_of_other_tokens_are_refused_with_what_differs(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"base and \S+other are not row by row.*\(provenance of the rows\); harvest"
    ):
        ShardSource(str(home / "base"), input=["resid_post.0", f"{home / 'other'}#"])
    x = toy_rows(ROWS)
    write(tmp_path / "seed", {"a:out": x}, {}, shuffle={"seed": 1}, shift=5)
    with pytest.raises(DatasetError, match=r"shuffle: \{\} and \{'seed': 1\}"):
        ShardSource(str(home / "base"), input=["resid_post.0", f"{tmp_path / 'seed'}#"])


# In memory ----------------------------------------------------------------------------------------------------------


def test_rows_in_memory_stand_side_by_side() -> None:
    x = toy_rows(2048)
    source = TensorSource((x, x[:, :5] * 2), (x[:, :3],))
    assert (source.pairs[0].inputs, source.pairs[0].targets) == ((0, 1), (2,))
    batch = source.pairs[0].batch(source.read_block("train", 0))
    assert (batch.x.shape[1], batch.target.shape[1]) == (37, 3)
    assert torch.equal(batch.x[:, 32:], batch.x[:, :5] * 2)
    sae = saeforge.train([x, x[:, :5]], d_sae=64, k=4, tokens=512, batch_size=64, progress=False)
    assert (sae.d_in, sae.d_out) == (37, 37)
    assert [part["d"] for part in sae.meta["sources"]] == [32, 5]


def test_sources_of_different_lengths_are_refused_with_a_word_on_chunks() -> None:
    x = toy_rows(2048)
    with pytest.raises(ConfigError, match=r"X\[1\] has 2000 rows, X\[0\] 2048.*as an iterator"):
        saeforge.train([x, x[:2000]], d_sae=64, k=4)
    assert saeforge.train(iter([x, x[:2000]]), d_sae=64, k=4, tokens=512, batch_size=64, progress=False).d_in == 32


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_over_two_datasets_goes_on_to_the_same_sae_and_is_evaluated(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, chat = tmp_path / "run", f"--data.input=[resid_post.0, {home / 'chat'}#resid_post.0]"
    assert fit(home, run, chat) == 0
    sae = saeforge.load(run)
    assert (sae.d_in, sae.d_out) == (64, 64)
    by_name = saeforge.train(
        home / "base",
        site=["resid_post.0", f"{home / 'chat'}#resid_post.0"],
        d_sae=64,
        k=4,
        tokens=256 * 12,
        batch_size=256,
        progress=False,
    )
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, by_name.state_dict()[name]), name
    result = saeforge.evaluate(run)
    assert 0 < result.metrics.fvu < 1
    assert result.effect is None
    assert "several sites side by side" in str(result.effect_reason)
    with pytest.raises(ConfigError, match="several sites side by side"):
        saeforge.build_features(run, texts="demo")
    with pytest.raises(ConfigError, match="several sites side by side"):
        saeforge.build_features(run)
    with pytest.raises(ConfigError, match="several sites side by side"):
        Delta.of(sae, {3: saeforge.Clamp(0)}, None)
    assert result.about["site"] == "layers.0:out + layers.0:out"
    capsys.readouterr()
    swapped = f"--data.input=[{home / 'chat'}#, resid_post.0]"
    assert fit(home, tmp_path / "swapped", swapped, f"--ckpt_path={run}/checkpoints/last.ckpt") != 0
    assert re.search(r"sites: (\S+) \+ (\S+) -> \2 \+ \1\)", capsys.readouterr().err)


def test_transcoders_of_all_layers_in_one_run_are_what_they_are_alone(home: Path, tmp_path: Path) -> None:
    more = ("--model.variant.pre_bias=false", "--model.skip=true", "--model.lr=0.01")
    assert fit(home, tmp_path / "all", "--data.input=mlp_in.*", "--data.target=mlp_out.*", *more) == 0
    assert fit(home, tmp_path / "one", "--data.input=mlp_in.1", "--data.target=mlp_out.1", *more) == 0
    together, alone = saeforge.load(tmp_path / "all" / "mlp_in.1"), saeforge.load(tmp_path / "one")
    assert alone.W_skip is not None
    assert alone.W_skip.abs().max() > 0
    assert together.meta["target"]["id"] == alone.meta["target"]["id"] == "layers.1.mlp:out"
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, together.state_dict()[name]), name
    result = saeforge.evaluate(tmp_path / "all" / "mlp_in.0")
    assert result.metrics.fvu < 1

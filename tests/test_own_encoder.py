"""Variants that cannot fold: their SAE has the same interface, and says whose package it needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

import saeforge
from saeforge.errors import CheckpointError, ConfigError
from saeforge.ops import SparseCode, TopK, decode, encode
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.variants import Batch, DataStatistics, Recipe, StepOutput, Variant, random_unit_rows
from tests.toy import toy_rows

D, D_SAE = 32, 96


@final
class Signed(Variant):
    """The k latents of largest magnitude, whatever their sign: a top-k of the absolute values.

    Args:
        d_in: width of the input.
        d_out: width of the target.
        d_sae: number of latents.
        k: active latents of each token.
    """

    def __init__(self, d_in: int, d_out: int, *, d_sae: int = 64, k: int = 4) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale="rms")
        self.k = k
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))

    @torch.no_grad()
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        self.set_scale(stats)
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))

    def _code(self, x: Tensor) -> SparseCode:
        # Both signs of each row compete: the encoder's rows are those of the decoder and their negatives.
        both = encode(x, torch.cat([self.W_dec, -self.W_dec]), None, TopK(self.k))
        dense = both.with_values(both.values.relu()).to_dense()
        return SparseCode.from_dense(dense[:, : self.d_sae] - dense[:, self.d_sae :])

    def step(self, batch: Batch, schedule: Any) -> StepOutput:
        x, target = self.scaled(batch)
        code = self._code(x)
        error = (target - decode(code, self.W_dec)).square().sum(1)
        return self.output({"mse": self.mean_rows(error, batch.weight)}, code, error)

    def encode(self, x: Tensor) -> SparseCode:
        """See `OwnEncoder`."""
        code = self._code(x * self.scale)
        return code.with_values(code.values / self.target_scale)

    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        return {}

    def recipe(self, total_steps: int) -> Recipe:
        return Recipe(lr=1e-2)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.W_dec], "constraint": "unit_norm"}]

    def fold(self) -> SAE:
        return self.kept(self.W_dec, torch.zeros(self.d_out))


@pytest.fixture
def registered() -> Iterator[None]:
    with VARIANTS.register("signed", Signed):
        yield


@pytest.fixture
def trained(registered: None) -> SAE:
    return saeforge.train(toy_rows(4096), variant="signed", d_sae=D_SAE, k=4, tokens=40_000, batch_size=256)


def test_it_has_the_interface_of_every_sae(trained: SAE) -> None:
    x = toy_rows(64)
    code = trained.encode(x)
    assert (code.values < 0).any()
    assert (code.l0() <= 4).all()
    assert (trained.rule, trained.d_in, trained.d_out, trained.d_sae) == ("plugin", D, D, D_SAE)
    torch.testing.assert_close(trained(x), code.to_dense() @ trained.W_dec + trained.b_dec)
    fvu = (trained(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.5


def test_save_and_load_keep_every_bit(trained: SAE, tmp_path: Path) -> None:
    x = toy_rows(64)
    loaded = saeforge.load(trained.save(tmp_path))
    assert torch.equal(loaded(x), trained(x))
    assert loaded.meta["variant"]["name"] == "signed"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_without_its_package_the_message_says_which(trained: SAE, tmp_path: Path) -> None:
    trained.save(tmp_path)
    meta = json.loads((tmp_path / "sae.json").read_text())
    meta["encoder"] |= {"class_path": "elsewhere.Signed", "distribution": "sae-signed", "version": "2.1"}
    (tmp_path / "sae.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"variant 'signed' of sae-signed 2\.1 .* pip install sae-signed"):
        saeforge.load(tmp_path)


@pytest.mark.parametrize("encoder", [None, {}, {"class_path": "os.system", "options": {}}, {"options": 3}])
def test_no_module_is_imported_because_a_file_names_it(trained: SAE, tmp_path: Path, encoder: Any) -> None:
    trained.save(tmp_path)
    meta = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps({**meta, "encoder": encoder}))
    with pytest.raises(CheckpointError, match=r"damaged|not installed here"):
        saeforge.load(tmp_path)


def test_options_that_no_longer_fit_are_an_error_in_one_line(trained: SAE, tmp_path: Path) -> None:
    trained.save(tmp_path)
    meta = json.loads((tmp_path / "sae.json").read_text())
    for options in ({"d_sae": D_SAE + 1, "k": 4}, {"gone": 1}):
        meta["encoder"]["options"] = options
        (tmp_path / "sae.json").write_text(json.dumps(meta))
        with pytest.raises(CheckpointError, match="does not fit what is installed") as caught:
            saeforge.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_rule_and_parts_must_agree() -> None:
    with pytest.raises(ConfigError, match="needs encoder and nothing else"):
        SAE(None, None, torch.zeros(4, 2), torch.zeros(2), rule="plugin")

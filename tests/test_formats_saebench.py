"""The object for SAEBench and sae-probes: their attributes, the SAE's latents and outputs, unit decoder rows."""

from __future__ import annotations

import json

import pytest
import torch

from saeforge.errors import ConfigError
from saeforge.formats.saebench import for_saebench
from saeforge.sae import SAE
from tests.test_formats import D_SAE, D, random_sae, rows

RULES = ("threshold", "relu", "topk")


@pytest.mark.parametrize("rule", RULES)
def test_it_computes_what_the_sae_computes(rule: str) -> None:
    sae = random_sae(rule)
    dense, x = for_saebench(sae), rows(60).reshape(3, 20, D)
    latents = dense.encode(x)
    assert latents.shape == (3, 20, D_SAE)
    own = sae.encode(x).to_dense().reshape(3, 20, D_SAE)
    assert torch.equal(latents != 0, own != 0)
    torch.testing.assert_close(latents, own * sae.W_dec.norm(dim=1))
    torch.testing.assert_close(dense.decode(latents), sae(x), rtol=1e-5, atol=1e-4)  # sums in another order
    torch.testing.assert_close(dense(x), sae(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", ["threshold", "relu"])
def test_its_weights_give_the_same_latents_by_the_formula(rule: str) -> None:
    """Weights alone are judged too: with rows of norm 1, and the encoder in their units."""
    sae = random_sae(rule)
    dense, x = for_saebench(sae), rows(50)
    torch.testing.assert_close(dense.W_dec.norm(dim=1), torch.ones(D_SAE))
    pre = x @ dense.W_enc + dense.b_enc
    assert sae.threshold is not None
    expected = pre * (pre > sae.threshold * sae.W_dec.norm(dim=1))
    torch.testing.assert_close(dense.encode(x), expected, rtol=1e-4, atol=1e-4)


def test_it_has_what_base_sae_has() -> None:
    """Of SAEBench 0.6.0: `custom_saes/base_sae.py`, `custom_sae_config.py`, `general_utils._standardize_sae_cfg`."""
    dense = for_saebench(random_sae("topk"), context_size=128)
    assert (dense.W_enc.shape, dense.W_dec.shape) == ((D, D_SAE), (D_SAE, D))
    assert (dense.b_enc.shape, dense.b_dec.shape) == ((D_SAE,), (D,))
    assert (dense.device, dense.dtype) == (torch.device("cpu"), torch.float32)
    cfg = dense.cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("demo", "blocks.3.hook_resid_post", 3)
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.context_size) == (D, D_SAE, "float32", 128)
    cfg.architecture_str = cfg.architecture  # type: ignore[attr-defined]  # they add to it
    json.dumps(cfg.to_dict())
    half = dense.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(rows(4).bfloat16()).dtype == torch.bfloat16


def test_a_latent_that_writes_nothing_stays_finite() -> None:
    sae = random_sae("relu")
    silent = SAE(
        sae.W_enc, sae.b_enc, sae.W_dec * 0, sae.b_dec, rule="threshold", threshold=sae.threshold, meta=sae.meta
    )
    dense = for_saebench(silent)
    assert torch.equal(dense(rows(3)), silent.b_dec.expand(3, D))
    assert bool(torch.isfinite(dense.W_dec).all())


def test_what_they_cannot_take_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="this is a transcoder"):
        for_saebench(random_sae("relu", target=True))
    with pytest.raises(ConfigError, match="this is a transcoder"):
        for_saebench(random_sae("relu", skip=True))
    unknown = random_sae("relu")
    unknown.meta = {}
    with pytest.raises(ConfigError, match="give model_name and hook_name"):
        for_saebench(unknown)
    given = for_saebench(unknown, model_name="gpt2-small", hook_name="blocks.8.hook_resid_pre")
    assert (given.cfg.model_name, given.cfg.hook_layer) == ("gpt2-small", 8)

"""Cosines of weights without a matrix of all, and the agreement of two decoders."""

from __future__ import annotations

from dataclasses import astuple
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saeforge
from saeforge.errors import ConfigError
from saeforge.metrics import Spread, match_rows, matching, weight_figures, weights
from saeforge.metrics.weights import nearest, unit_rows
from saeforge.sae import SAE

EYE = torch.eye(4)


def rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def all_cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=2)


@pytest.fixture(params=[1 << 24, 64, 1], ids=["one piece", "pieces", "rows"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines in pieces of this size."""
    monkeypatch.setattr(weights, "_PIECE_ELEMENTS", request.param)


def test_spread_has_values_that_occur() -> None:
    assert Spread.of(torch.tensor([4.0, 1.0, 2.0, 3.0])) == Spread(2.5, 1, 2, 4)
    assert Spread.of(torch.arange(1, 101)) == Spread(50.5, 5, 50, 95)


@pytest.mark.usefixtures("pieces")
class TestWeights:
    def test_nearest_other_rows_equal_those_of_the_whole_matrix(self) -> None:
        W = rows(37, 6, 0)
        cosines = all_cosines(W, W).fill_diagonal_(-2)
        found = nearest(W, W, torch.arange(37), others=True)
        torch.testing.assert_close(found.double(), cosines.amax(1), rtol=0, atol=1e-6)
        chosen = torch.tensor([3, 4, 30])
        # A product of other shapes may round otherwise.
        torch.testing.assert_close(nearest(W, W, chosen, others=True), found[chosen], rtol=0, atol=1e-6)

    def test_by_hand(self) -> None:
        W_dec = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        W_enc = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
        found = weight_figures(W_dec, W_enc, torch.tensor([0.0, -1.0, -2.0, -3.0]))
        # Latents 0 and 1 are twins; 2 and 3 are opposite, their nearest others are orthogonal.
        assert found.decoder_nearest == Spread(0.5, 0, 0, 1)
        assert found.decoder_twins == 0.5
        assert found.decoder_norm == Spread(9 / 4, 1, 1, 5)
        assert found.encoder_bias == Spread(-1.5, -3, -2, 0)
        assert found.encoder_decoder is not None
        assert astuple(found.encoder_decoder) == pytest.approx(((1 + 0.6 - 1 + 0) / 4, -1, 0, 1))
        # Rows 0 and 1 have 0.6; row 2 has -0.8 with row 1, 0 with the others; a row of zeros has 0 with all.
        assert found.encoder_nearest is not None
        assert astuple(found.encoder_nearest) == pytest.approx((0.3, 0, 0, 0.6))
        assert (found.latents, found.sampled) == (4, 4)

    def test_a_sample_looks_among_all(self) -> None:
        W = torch.cat([rows(20, 6, 0)] * 2)  # each row has a twin in the other half
        found = weight_figures(W, sample=5)
        assert (found.sampled, found.decoder_twins) == (5, 1)
        assert found.encoder_nearest is found.encoder_norm is found.encoder_decoder is None

    def test_mutual_nearest_equal_those_of_the_whole_matrix(self) -> None:
        a, b = rows(40, 3, 0), rows(23, 3, 1)
        cosines = all_cosines(a, b)
        of_a, of_b = cosines.argmax(1), cosines.argmax(0)
        pairs = [(i, int(j)) for i, j in enumerate(of_a) if of_b[j] == i]
        found = match_rows(a, b, method="mutual")
        assert found.pairs == len(pairs) > 5
        assert found.cosine is not None
        assert found.cosine.mean == pytest.approx(float(sum(cosines[pair] for pair in pairs)) / len(pairs), abs=1e-6)
        assert found.nearest_a.mean == pytest.approx(float(cosines.amax(1).mean()), abs=1e-6)
        assert found.nearest_b.mean == pytest.approx(float(cosines.amax(0).mean()), abs=1e-6)
        assert found.shared == sum(float(cosines[pair]) >= 0.7 for pair in pairs) / 23


def test_weights_of_a_transcoder_and_of_a_single_latent() -> None:
    assert weight_figures(rows(5, 4, 0), rows(5, 3, 1), torch.zeros(5)).encoder_decoder is None
    alone = weight_figures(rows(1, 4, 0))
    assert alone.decoder_nearest is None
    assert alone.decoder_twins is None


def test_tiny_and_zero_rows_have_no_wrong_norm() -> None:
    unit = unit_rows(torch.tensor([[3e-30, 4e-30], [0.0, 0.0], [3e30, 4e30]]))
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("method", ["hungarian", "mutual"])
def test_the_same_features_in_another_order_and_scale_agree(method: matching.Method) -> None:
    a = rows(50, 16, 0)
    b = a[torch.randperm(50, generator=torch.Generator().manual_seed(1))] * torch.rand(50, 1) + 0.0
    found = match_rows(a, b, method=method)
    assert (found.pairs, found.shared) == (50, 1)
    assert found.cosine is not None
    assert found.cosine.p5 == pytest.approx(1, abs=1e-6)
    assert 0.3 < found.chance < 0.8


def test_random_decoders_agree_no_more_than_by_chance() -> None:
    found = match_rows(rows(300, 64, 0), rows(300, 64, 1), seed=5)
    assert found.shared == 0
    assert found.nearest_a.mean == pytest.approx(found.chance, abs=0.01)


def test_the_assignment_is_the_best_not_the_greedy_one() -> None:
    a, b = rows(4, 6, 0), rows(5, 6, 1)
    cosines = all_cosines(a, b)
    best = max(sum(float(cosines[i, j]) for i, j in enumerate(order)) for order in permutations(range(5), 4))
    found = match_rows(a, b, method="hungarian")
    assert found.cosine is not None
    assert found.cosine.mean == pytest.approx(best / 4, abs=1e-6)
    assert found.pairs == 4


def test_an_opposite_direction_is_another_feature_unless_signs_are_ignored() -> None:
    assert match_rows(EYE, -EYE).shared == 0
    assert match_rows(EYE, -EYE, absolute=True).shared == 1
    assert match_rows(EYE, -EYE, absolute=True, method="mutual").shared == 1
    assert match_rows(EYE, EYE).shared == 1


def test_two_latents_for_one_feature_share_one_partner() -> None:
    found = match_rows(EYE[[0, 0, 1]], EYE[[0, 1, 2]])
    assert found.shared == pytest.approx(2 / 3)
    assert found.nearest_a.mean == 1  # one way, both of them have found it
    assert match_rows(EYE[[0, 0, 1]], EYE[[0, 1, 2]], method="mutual").pairs == 2


def test_many_latents_are_matched_without_the_hungarian_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "HUNGARIAN_LIMIT", 9)
    assert match_rows(rows(9, 4, 0), rows(8, 4, 1)).method == "hungarian"
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    assert match_rows(rows(9, 4, 0), rows(10, 4, 1)).method == "mutual"
    with pytest.raises(ConfigError, match="method 'mutual'"):
        match_rows(EYE, EYE)


def sae_of(W_dec: Tensor) -> SAE:
    zero = torch.zeros(len(W_dec))
    return SAE(W_dec, zero, W_dec, torch.zeros(W_dec.shape[1]), rule="threshold", threshold=zero)


def test_agreement_of_saes_leaves_dead_latents_out_when_told(tmp_path: Path) -> None:
    a, b = sae_of(torch.cat([EYE[:2], rows(2, 4, 3)])), sae_of(EYE[:3])
    b.save(tmp_path / "sae")
    alive = torch.tensor([True, True, False, False])
    found = saeforge.agreement(a, tmp_path, alive_a=alive)
    assert (found.latents_a, found.latents_b, found.shared) == (2, 3, 1)
    assert saeforge.agreement(a, b, alive_a=alive, alive_b=torch.tensor([True, False, False])).shared == 1


def test_what_cannot_agree_is_one_line() -> None:
    a = sae_of(EYE)
    with pytest.raises(ConfigError, match="4 and 3 wide"):
        saeforge.agreement(a, sae_of(torch.eye(3)))
    with pytest.raises(ConfigError, match=r"alive_b is torch.float32 of shape \(4,\)"):
        saeforge.agreement(a, a, alive_b=torch.ones(4))
    with pytest.raises(ConfigError, match="0 and 4 latents"):
        saeforge.agreement(a, a, alive_a=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="'auto', 'hungarian' or 'mutual'"):
        saeforge.agreement(a, a, method="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rows of one width"):
        match_rows(EYE, torch.eye(3))

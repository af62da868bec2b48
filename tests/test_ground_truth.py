"""Ground truth by hand: a few features on the axes, SAEs whose every latent can be followed."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeforge.data.moments import Moments
from saeforge.data.synthetic import Activity, SyntheticConfig, SyntheticSource, Truth
from saeforge.errors import ConfigError, DatasetError
from saeforge.evaluation import ground_truth
from saeforge.evaluation.ground_truth import match_latents, measure_ground_truth
from saeforge.sae import SAE

EYE = torch.eye(4)


class ByHand:
    """Held-out rows given as magnitudes (rows, features), of features on the axes; a block is one row or more."""

    def __init__(
        self, values: list[list[float]], *, parents: tuple[int, ...] = (-1, -1, -1, -1), blocks: int = 1
    ) -> None:
        self.values = torch.tensor(values)
        n = self.values.shape[1]
        config = SyntheticConfig(features=n, d_in=n, roots=0, max_rate=0.5, min_rate=0.5)
        none: Any = np.zeros(n)
        self.truth = Truth(config, torch.eye(n), torch.zeros(n), none, none, none, none, none, np.array(parents))
        self.statistics = (Moments.of(self.values.numpy()).statistics(),)
        self.blocks = blocks

    def n_blocks(self, split: str) -> int:
        return self.blocks if split == "validation" else 0

    def block_rows(self, split: str) -> int:
        return len(self.values) // self.blocks

    def part(self, index: int) -> Tensor:
        size = self.block_rows("validation")
        return self.values[index * size : (index + 1) * size]

    def read_block(self, split: str, index: int) -> tuple[Tensor]:
        return (self.part(index),)

    def activity(self, split: str, index: int) -> Activity:
        part = self.part(index)
        rows, features = part.nonzero(as_tuple=True)
        counts = np.bincount(rows.numpy(), minlength=len(part))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Activity(part[rows, features].numpy(), features.numpy(), offsets)


def relu_sae(W_enc: Tensor, W_dec: Tensor, threshold: float = 0.0) -> SAE:
    zero = torch.zeros(len(W_enc))
    return SAE(W_enc, zero, W_dec, torch.zeros(W_dec.shape[1]), rule="threshold", threshold=zero + threshold)


ROWS = [[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0], [1.0, 1.0, 0.0, 5.0]]


class TestMeasures:
    def test_an_sae_that_is_the_truth(self) -> None:
        found = measure_ground_truth(relu_sae(EYE, EYE), ByHand(ROWS))  # type: ignore[arg-type]
        for name in ("mcc", "uniqueness", "precision", "recall", "f1", "accuracy", "f1_assigned"):
            assert getattr(found, name) == pytest.approx(1), name
        assert (found.explained_variance, found.shrinkage) == pytest.approx((1, 1))
        assert (found.l0, found.true_l0, found.dead, found.rows) == (2.0, 2.0, 0, 4)

    def test_order_and_sign_of_latents_do_not_matter(self) -> None:
        turned = EYE[[2, 0, 3, 1]]
        found = measure_ground_truth(relu_sae(turned, turned), ByHand(ROWS))  # type: ignore[arg-type]
        assert found.f1 == found.mcc == 1
        assert match_latents(-turned, EYE).best.tolist() == [2, 0, 3, 1]

    def test_detection_counted_by_hand(self) -> None:
        # Latent 0 fires above 1.5 only: of feature 0's rows (1, 3, 1) it has the second. The others see all of theirs.
        sae = relu_sae(EYE, EYE)
        sae.threshold = torch.tensor([1.5, 0.0, 0.0, 0.0])
        # And latent 3 fires on feature 2 as well, whose rows are not its own: 1 of its 3 is right.
        sae.W_enc = EYE.clone()
        sae.W_enc[3, 2] = 1.0
        found = measure_ground_truth(sae, ByHand(ROWS))  # type: ignore[arg-type]
        assert found.precision == pytest.approx((1 + 1 + 1 + 1 / 3) / 4)
        assert found.recall == pytest.approx((1 / 3 + 1 + 1 + 1) / 4)
        # F1 of (1, 1/3) and of (1/3, 1) is 1/2.
        assert found.f1 == pytest.approx((0.5 + 1 + 1 + 0.5) / 4)
        # Latent 0 is silent on two rows where it should not be; latent 3 fires on two where it should not.
        assert found.accuracy == pytest.approx((2 / 4 + 1 + 1 + 2 / 4) / 4)
        assert found.l0 == (1 + 3 + 2 + 2) / 4

    def test_dead_latents_count_as_zero(self) -> None:
        W_enc = EYE.clone()
        W_enc[1] = 0
        found = measure_ground_truth(relu_sae(W_enc, EYE), ByHand(ROWS))  # type: ignore[arg-type]
        assert found.dead == 1
        assert (found.precision, found.recall, found.f1) == pytest.approx((0.75, 0.75, 0.75))
        assert found.accuracy == pytest.approx((1 + 0.5 + 1 + 1) / 4)
        assert found.mcc == 1

    def test_two_latents_for_one_feature(self) -> None:
        twice = EYE[[0, 0, 1]]
        found = measure_ground_truth(relu_sae(twice, twice / 2), ByHand(ROWS))  # type: ignore[arg-type]
        assert found.uniqueness == pytest.approx(2 / 3)
        assert found.f1 == 1
        # One of the two is given a feature that it does not point at: |cosine| 0.
        assert found.mcc == pytest.approx(2 / 3)
        assert found.f1_assigned < 1

    def test_more_latents_than_features(self) -> None:
        wide = torch.cat([EYE, EYE[:1]])
        matching = match_latents(wide, EYE)
        assert matching.mcc == 1
        assert matching.assigned.tolist().count(-1) == 1
        assert matching.uniqueness == 4 / 5
        assert measure_ground_truth(relu_sae(wide, wide), ByHand(ROWS)).f1_assigned == 1  # type: ignore[arg-type]

    def test_shrinkage_and_explained_variance(self) -> None:
        found = measure_ground_truth(relu_sae(EYE, EYE / 2), ByHand(ROWS))  # type: ignore[arg-type]
        rows = torch.tensor(ROWS)
        assert found.shrinkage == pytest.approx(0.5)
        assert found.explained_variance == pytest.approx(
            1 - float((rows / 2).square().sum() / rows.var(0, False).sum() / 4)
        )

    def test_the_best_assignment_not_the_greedy_one(self) -> None:
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
        cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).abs()
        best = max(sum(float(cosines[i, f]) for i, f in enumerate(order)) for order in permutations(range(5), 4))
        assert match_latents(a, b).mcc == pytest.approx(best / 4)

    def test_several_blocks_are_one_set(self) -> None:
        sae = relu_sae(EYE, EYE / 2, threshold=1.5)
        assert measure_ground_truth(sae, ByHand(ROWS)) == measure_ground_truth(sae, ByHand(ROWS, blocks=2))  # type: ignore[arg-type]
        assert measure_ground_truth(sae, ByHand(ROWS, blocks=2), max_rows=1).rows == 2  # type: ignore[arg-type]


class TestAbsorption:
    #: Feature 0 is the parent of 1 and 2. Rows: parent alone twice, with child 1 twice, with child 2 once.
    FAMILY = ([[1, 0, 0, 0], [1, 0, 0, 3], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], (-1, 0, 0, -1))

    def measure(self, W_enc: Tensor, W_dec: Tensor) -> ground_truth.GroundTruth:
        values, parents = self.FAMILY
        return measure_ground_truth(relu_sae(W_enc, W_dec), ByHand(values, parents=parents))  # type: ignore[arg-type]

    def test_none_where_the_parent_always_fires(self) -> None:
        found = self.measure(EYE, EYE)
        assert (found.absorption, found.parent_miss, found.pairs) == (0, 0, 2)

    def test_a_child_that_takes_its_parent_over(self) -> None:
        # The parent's latent is silenced by child 1, whose latent also writes the parent's direction.
        W_enc, W_dec = EYE.clone(), EYE.clone()
        W_enc[0, 1], W_dec[1, 0] = -1.0, 0.9
        found = self.measure(W_enc, W_dec)
        # Child 1 on both of its rows, child 2 never.
        assert found.absorption == pytest.approx((1 + 0) / 2)
        assert found.parent_miss == 0

    def test_a_parent_that_is_found_nowhere_is_no_absorption_alone(self) -> None:
        # It misses one of its two rows alone: the control says so.
        W_enc = EYE.clone()
        W_enc[0, 3] = -1.0
        found = self.measure(W_enc, EYE)
        assert (found.absorption, found.parent_miss) == (0, 0.5)

    def test_a_latent_that_points_elsewhere_is_not_the_parents(self) -> None:
        W_dec = EYE.clone()
        W_dec[0] = torch.tensor([0.4, 0.0, 0.0, 0.9])
        W_dec[3] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        found = self.measure(EYE, W_dec)
        assert found.pairs == 0
        assert (found.absorption, found.parent_miss) == (None, None)


def test_every_number_has_its_convention() -> None:
    names = {part.strip() for key in ground_truth.CONVENTIONS for part in key.split(",")}
    assert set(ground_truth.GroundTruth.__dataclass_fields__) - names == {"rows", "pairs"}


def test_errors() -> None:
    with pytest.raises(ConfigError, match="is 3 wide, the features 4"):
        match_latents(torch.eye(3), EYE)
    source = SyntheticSource(SyntheticConfig(features=8, d_in=4, roots=0), rows=1, validation_rows=0)
    with pytest.raises(DatasetError, match="no held-out rows"):
        measure_ground_truth(relu_sae(EYE, EYE), source)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"pip install 'saeforge\[synthetic\]'"):
        match_latents(EYE, EYE)

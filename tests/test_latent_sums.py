"""Latents shared out over ranks: what a run counts, steers by, validates and resamples is that of one device."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from saeforge.data.tensor_source import TensorSource
from saeforge.errors import ConfigError
from saeforge.metrics import ReconstructionMetrics
from saeforge.ops import Group, Shard, SparseCode, latents_over
from saeforge.optim import RowAdam
from saeforge.registry import VARIANTS
from saeforge.training.latent_histograms import histogram, latent_histograms
from saeforge.training.member import Member
from saeforge.training.readout import ReadOut
from saeforge.training.resampling import Resampling
from saeforge.training.settings import Settings
from saeforge.training.target_l0 import TargetL0
from saeforge.variants import L1ReLU, RunSettings, StepOutput, shard_
from tests.latents import together
from tests.ranks import Threads, on_mesh
from tests.toy import D_IN, toy_rows

D_SAE, ROWS, STEPS, RESAMPLED = 48, 64, 8, 6
#: Silent from the start: three of the first rank of four, none of the second, all of the third, one of the last.
SILENT = (1, 5, 11, *range(24, 36), 47)
CASES: dict[str, tuple[dict[str, Any], Settings]] = {
    "topk": ({"k": 4, "aux": 0.5, "k_aux": 4}, Settings(lr=1e-3)),
    "l1_relu": ({"l1": 1.0}, Settings(lr=1e-3, target_l0=4.0)),
    "gated": ({"l1": 0.1}, Settings(lr=1e-3, target_l0=4.0)),
    "batchtopk": ({"k": 4, "aux": 0.5, "k_aux": 4}, Settings(lr=1e-3)),
    "jumprelu": ({"bandwidth": 0.3}, Settings(lr=1e-3, target_l0=4.0)),
}
INSTALLED = {record.name for record in VARIANTS.records()}
SOURCE = TensorSource(toy_rows(2048), lanes=4)


class Seen(NamedTuple):
    """What a rank has after a run."""

    figures: list[dict[str, float]]
    validation: dict[str, float]
    density: list[float]
    resampled: dict[str, Tensor]
    state: dict[str, Tensor]
    names: frozenset[str]
    steered: list[float]


def run(name: str, latents: Group, group: Group, *, resample_from: TensorSource = SOURCE) -> Seen:
    """A run of one member, in float64, so that no rounding decides who is active."""
    options, settings = CASES[name]
    variant = VARIANTS.load(name)(D_IN, D_IN, d_sae=D_SAE, **options)
    member = Member(variant, settings)
    if latents.size > 1:
        shard_(variant, Shard.of(D_SAE, latents))
    variant.double()
    member.prepare(SOURCE.pairs[0], SOURCE.statistics, RunSettings(STEPS, 2 * ROWS, torch.float64, group))
    x = toy_rows(STEPS * ROWS, seed=3).double()
    figures, steered = [], []
    with latents_over(variant.shard):
        member.initialise(SOURCE.sample(512))
        silence(member)
        optimizer = member.make_optimizer()
        assert isinstance(optimizer, RowAdam)
        optimizer.share_out([p for key, p in variant.named_parameters() if key in variant.latent_names], latents)
        resampled: dict[str, Tensor] = {}
        for step in range(STEPS):
            rows = x[step * ROWS : (step + 1) * ROWS].chunk(group.size)[group.rank]
            optimizer.zero_grad()
            member.step((rows,), step).backward()
            for parameter in variant.parameters():
                if parameter.grad is not None:
                    parameter.grad = group.mean(parameter.grad)
            optimizer.step()
            member.after_step(step)
            if member.target_l0 is not None:
                steered.append(float(member.target_l0.scaled(1.0)))
            figures.append(member.readout.read(group, variant.latent_group))
            figures[-1]["dead"] = float(variant.latent_group.sum(variant.dead().sum()))
            if step + 1 == RESAMPLED and hasattr(variant, "reset_latents_"):
                data: Any = SimpleNamespace(rows_per_step=ROWS, source=resample_from)
                Resampling()._resample(member, data, RESAMPLED)
                resampled = {key: value.detach().clone() for key, value in variant.named_parameters()}
                resampled["tokens_since_fired"] = variant.tokens_since_fired.clone()
                for key, value in variant.named_parameters():
                    resampled[f"v of {key}"] = optimizer.state[value]["exp_avg_sq"].clone()
    counts = latent_histograms(member, STEPS * ROWS)["latents/log10_density"].counts
    # Outside of the context, as callbacks are: a member knows its own latents.
    member.start_validation()
    member.validate((toy_rows(128, seed=5).chunk(group.size)[group.rank],))
    validation = asdict(member.validation_result())
    names = variant.latent_names | {f"v of {key}" for key in variant.latent_names}
    return Seen(figures, validation, counts.tolist(), resampled, dict(variant.state_dict()), names, steered)


@torch.no_grad()
def silence(member: Member) -> None:
    """Takes all input, and all strength, from some latents, so that they never fire."""
    variant = member.variant
    first = 0 if variant.shard is None else variant.shard.first
    here = [latent - first for latent in SILENT if 0 <= latent - first < len(variant.tokens_since_fired)]
    for name, parameter in variant.named_parameters():
        if name in ("W_enc", "W_gate"):
            parameter[here] = 0.0
        if name in ("b_enc", "b_gate"):
            parameter[here] = -100.0


@pytest.mark.parametrize(("rows", "latents"), [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("name", CASES)
def test_figures_validation_and_resampling_are_those_of_one_device(name: str, rows: int, latents: int) -> None:
    if name not in INSTALLED:
        pytest.skip(f"saeforge-{name} is not installed")
    one = run(name, Group(), Group())
    mesh = on_mesh(rows, latents, lambda latents, group: run(name, latents, group))
    assert one.figures[RESAMPLED - 1]["dead"] >= len(SILENT), "no dead latents were compared"
    for ranks in mesh:
        for rank in ranks:
            for step, (found, wanted) in enumerate(zip(rank.figures, one.figures, strict=True)):
                assert found.keys() == wanted.keys()
                for figure in ("active", "rows", "dead"):
                    assert found[figure] == wanted[figure], (figure, step)
                assert found == pytest.approx(wanted, rel=1e-6), step
            assert rank.steered == pytest.approx(one.steered, rel=1e-9)
            assert rank.steered == ranks[0].steered, "ranks steer by different counts"
            assert rank.density == one.density
            for figure, value in one.validation.items():
                exact = isinstance(value, int)
                assert rank.validation[figure] == (value if exact else pytest.approx(value, rel=1e-6)), figure
            assert rank.validation == ranks[0].validation
        for kind in ("resampled", "state"):
            whole = together([getattr(rank, kind) for rank in ranks], ranks[0].names)
            assert whole.keys() == getattr(one, kind).keys()
            for key, value in getattr(one, kind).items():
                torch.testing.assert_close(whole[key], value, rtol=1e-6, atol=1e-9, msg=f"{kind}: {key}")
    if one.resampled:
        again = one.resampled["tokens_since_fired"][list(SILENT)]
        assert (again == 0).all(), "nothing was resampled"


def test_where_rows_are_fewer_than_dead_latents_the_first_ones_get_them() -> None:
    few = TensorSource(toy_rows(320), lanes=4)
    few._blocks["train"] = few._blocks["train"][:1]
    n = few.block_rows("train")
    assert n == 16
    few._rows = 10  # a block of 10 rows for at least 16 dead latents
    one = run("gated", Group(), Group(), resample_from=few)
    (ranks,) = on_mesh(1, 4, lambda latents, group: run("gated", latents, group, resample_from=few))
    whole = together([rank.resampled for rank in ranks], ranks[0].names)
    for key, value in one.resampled.items():
        torch.testing.assert_close(whole[key], value, rtol=1e-6, atol=1e-9, msg=key)
    again = (one.resampled["tokens_since_fired"] == 0)[list(SILENT)]
    assert again.any()
    assert not again.all()


# The parts --------------------------------------------------------------------------------------------------------


def test_the_metrics_of_ranks_that_share_out_latents_are_those_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    dense = torch.randn(200, 40, generator=generator, dtype=torch.float64)
    dense *= torch.rand(200, 40, generator=generator) < torch.logspace(-3, 0, 40)
    dense[:, [0, 13]] = 0
    norms, pivot, x_hat = torch.rand(40, generator=generator), x.mean(0), 0.9 * x + 0.1

    def measure(latents: Group, group: Group) -> tuple[dict[str, float], Any]:
        shard = Shard.of(40, latents) if latents.size > 1 else None
        own = slice(None) if shard is None else slice(shard.first, shard.last)
        metrics = ReconstructionMetrics(8, 40, pivot=pivot, decoder_norms=norms[own], shard=shard)
        for a, b, f in zip(*(part.chunk(group.size)[group.rank].split(33) for part in (x, x_hat, dense)), strict=True):
            metrics.update(a, b, SparseCode.from_dense(f[:, own]))
        if shard is not None:
            with pytest.raises(ValueError, match="reduce"):
                metrics.compute()
        metrics.reduce(group)
        return asdict(metrics.compute()), metrics.firing(7)

    wanted, firing = measure(Group(), Group())
    assert wanted["dead"] >= 2
    for rank in chain.from_iterable(on_mesh(2, 4, measure)):
        figures, fires = rank
        assert figures == pytest.approx(wanted, rel=1e-12)
        assert {key: value for key, value in figures.items() if isinstance(value, int)} == {
            key: value for key, value in wanted.items() if isinstance(value, int)
        }
        assert fires == firing


def test_a_shard_of_other_latents_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_sae = 20"):
        ReconstructionMetrics(8, 20, shard=Shard.of(40, Group(2, 1)))


def test_a_readout_adds_active_latents_over_both_groups_and_everything_else_over_rows() -> None:
    def read(latents: Group, group: Group) -> dict[str, float]:
        out = ReadOut()
        code = SparseCode.from_dense(torch.ones(3, 1 + latents.rank))
        for _ in range(2):
            loss = torch.tensor(1.0 + group.rank)
            out.add(loss, StepOutput({"mse": loss}, code, {"squared_error": torch.tensor(5.0)}))
        return out.read(group, latents)

    for values in chain.from_iterable(on_mesh(3, 2, read)):
        assert values["active"] == 2 * 3 * 3 * (1 + 2)
        assert values["rows"] == 2 * 3 * 3
        assert values["loss"] == values["term/mse"] == 2.0
        assert values["counter/squared_error"] == 2 * 3 * 5.0


def test_the_controller_sees_the_latents_of_all_ranks() -> None:
    """The first rank's latents alone would be too sparse, the second's too dense."""

    def steer(latents: Group) -> tuple[float, int]:
        controller = TargetL0(L1ReLU(4, 4, d_sae=8), 2.0)
        controller.bind({"l1": lambda step: 1.0}, 10)
        controller.observe(torch.full((4,), 5 * latents.rank), 10)
        before = latents.sent["sum"]
        controller.update(1.0, 1.0, latents)
        return float(controller.integral), latents.sent["sum"] - before

    assert Threads(2).run(steer) == [(0.0, 8), (0.0, 8)]
    alone = TargetL0(L1ReLU(4, 4, d_sae=8), 2.0)
    alone.bind({"l1": lambda step: 1.0}, 10)
    alone.observe(torch.full((4,), 5), 10)
    alone.update(1.0, 1.0)
    assert float(alone.integral) == pytest.approx(0.0)
    alone.observe(torch.zeros(4), 10)
    alone.update(1.0, 1.0)
    assert math.isclose(float(alone.integral), -2.0)


def test_a_histogram_is_that_of_all_latents() -> None:
    values = torch.tensor([0.5, 1, 5, 5.5, 90, 0, torch.inf, 100])
    whole, edges = histogram(values, Group())
    assert whole.sum() == 7
    for found, bounds in Threads(4).run(lambda group: histogram(values.chunk(4)[group.rank], group)):
        assert found.tolist() == whole.tolist()
        assert bounds.tolist() == edges.tolist()

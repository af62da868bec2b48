"""The step as a CUDA graph: where it cannot be one, the log says why and nothing changes; on a GPU it is the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saeforge.data.batch import Batch
from saeforge.ops import Group
from saeforge.optim import RowAdam
from saeforge.training.graph import GraphedStep
from saeforge.variants import L1ReLU, RunSettings, TopK, Variant


def variant_of(cls: Callable[..., Variant], device: str = "cpu", **run: Any) -> Variant:
    torch.manual_seed(0)
    variant = cls(16, 16, d_sae=64)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.normal_()
    variant.to(device).bind(RunSettings(100, 10_000, **run))
    return variant


def test_on_a_cpu_steps_run_as_usual_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    variant, x = variant_of(TopK), torch.randn(8, 16)
    step = GraphedStep(variant)
    with caplog.at_level(logging.INFO, "saeforge.training"):
        outs = [step(Batch(x, x), {}) for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == ["no CUDA graph: the step runs on cpu"]
    expected = variant.step(Batch(x, x), {})
    assert all(torch.equal(out.terms["mse"], expected.terms["mse"]) for out in outs)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("several", "2 devices share"),
        ("weights", "rows have weights"),
        ("l1", "has schedules"),
        ("dead", "are dead"),
        ("skip", "skip path"),
    ],
)
def test_what_a_graph_cannot_repeat_is_named(case: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run: dict[str, Any] = {"group": Group(2, 0)} if case == "several" else {}
    variant = variant_of(L1ReLU if case == "l1" else TopK, **run)
    if case == "dead":
        variant.tokens_since_fired[3] = 10**6
        variant.list_dead()

    class OnGPU:
        device = torch.device("cuda")
        requires_grad = case == "skip"

    batch = Batch(OnGPU(), OnGPU(), torch.ones(8) if case == "weights" else None)  # type: ignore[arg-type]
    assert reason in str(GraphedStep(variant)._why_not(batch, {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_step_trains_like_an_eager_one() -> None:
    losses: dict[bool, list[float]] = {}
    for graphed in (False, True):
        variant = variant_of(TopK, "cuda", compute_dtype=torch.bfloat16)
        step = GraphedStep(variant) if graphed else variant.step
        optimizer, losses[graphed] = RowAdam(variant.param_groups(), lr=1e-3), []
        torch.manual_seed(1)
        for _ in range(30):
            x = torch.randn(32, 16, device="cuda")
            out = step(Batch(x, x), {})
            loss = torch.stack(list(out.terms.values())).sum()
            variant.observe(out.code)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[graphed].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]

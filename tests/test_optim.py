"""RowAdam: project, clip, Adam, renormalise, and nothing else."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.optim import RowAdam
from saeforge.optim.row_adam import project_rows_, unit_rows_

SHAPES = {"dec": (7, 5), "enc": (7, 5), "bias": (7,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(4)
    found = {k: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for k, s in SHAPES.items()}
    with torch.no_grad():
        found["dec"].div_(found["dec"].norm(dim=1, keepdim=True))
    return {name: nn.Parameter(value.detach().to(dtype)) for name, value in found.items()}


def groups(p: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [p["dec"]], "constraint": "unit_norm"}, {"params": [p["enc"], p["bias"]], "constraint": None}]


def gradient(step: int) -> dict[str, Tensor]:
    """Some steps below the clipping norm, some far above."""
    generator = torch.Generator().manual_seed(step)
    size = 0.05 if step % 3 else 5.0
    return {k: torch.randn(s, generator=generator, dtype=torch.float64) * size for k, s in SHAPES.items()}


def set_gradients(p: dict[str, nn.Parameter], step: int) -> None:
    for name, value in gradient(step).items():
        p[name].grad = value.to(p[name].dtype)


@pytest.mark.parametrize("mode", ["auto", "stock"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_1000_steps_equal_project_clip_adam_renormalise_done_one_by_one(
    max_grad_norm: float | None, dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    ours, theirs = parameters(dtype), parameters(torch.float64)
    optimizer = RowAdam(groups(ours), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, max_grad_norm=max_grad_norm)
    adam = torch.optim.Adam(theirs.values(), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, foreach=False, fused=False)
    for step in range(1000):
        set_gradients(ours, step)
        optimizer.step()
        g = gradient(step)
        rows = theirs["dec"].detach()
        g["dec"] = g["dec"] - torch.einsum("rd,rd->r", g["dec"], rows)[:, None] * rows
        total = torch.cat([value.flatten() for value in g.values()]).norm()
        if max_grad_norm is not None and total > max_grad_norm:
            g = {name: value * (max_grad_norm / (total + 1e-6)) for name, value in g.items()}
        for name, value in g.items():
            theirs[name].grad = value
        adam.step()
        with torch.no_grad():
            theirs["dec"].copy_(rows / rows.square().sum(1).sqrt()[:, None])
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)


def test_projection_comes_before_clipping() -> None:
    """A gradient along the row uses up none of the clipping budget."""
    p = parameters(torch.float64)
    optimizer = RowAdam(groups(p), max_grad_norm=1.0)
    p["dec"].grad = p["dec"].detach() * 1e6
    p["bias"].grad = torch.full((7,), 0.1, dtype=torch.float64)
    optimizer.step()
    assert p["dec"].grad is not None
    assert p["dec"].grad.abs().max() < 1e-9 * 1e6
    torch.testing.assert_close(p["bias"].grad, torch.full((7,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0)


def test_state_dict_resumes_bit_identically() -> None:
    def run(p: dict[str, nn.Parameter], optimizer: RowAdam, steps: range) -> None:
        for step in steps:
            set_gradients(p, step)
            optimizer.step()

    straight = parameters()
    run(straight, RowAdam(groups(straight), lr=1e-2), range(20))
    first = parameters()
    optimizer = RowAdam(groups(first), lr=1e-2)
    run(first, optimizer, range(9))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": first}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    second: dict[str, nn.Parameter] = saved["weights"]
    resumed = RowAdam(groups(second), lr=0.5)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["constraint"] == "unit_norm"
    run(second, resumed, range(9, 20))
    assert all(torch.equal(straight[name], second[name]) for name in SHAPES)


def test_it_is_a_drop_in_optimizer_with_closure_zero_grad_and_schedulers() -> None:
    p = parameters()
    optimizer = RowAdam(groups(p), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    target = torch.randn(7, 5)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p["dec"] + p["enc"] + p["bias"][:, None] - target).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**5)
    optimizer.zero_grad()
    assert all(value.grad is None for value in p.values())
    before = {name: value.detach().clone() for name, value in p.items()}
    optimizer.step()  # nothing has a gradient
    for name, value in before.items():
        torch.testing.assert_close(p[name].detach(), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constraint", [None, "unit_norm"])
def test_a_group_added_later_trains_and_keeps_its_constraint(constraint: str | None) -> None:
    p = parameters()
    optimizer = RowAdam([p["enc"]])
    late: dict[str, Any] = {"params": [p["dec"]]}
    optimizer.add_param_group(late if constraint is None else {**late, "constraint": constraint})
    before = p["dec"].detach().clone()
    for step in range(3):
        set_gradients(p, step)
        optimizer.step()
    assert not torch.equal(p["dec"], before)
    unit = (p["dec"].norm(dim=1) - 1).abs().max() < 1e-6
    assert bool(unit) == (constraint == "unit_norm")


def test_step_hooks_run_once_even_after_a_plain_adam_was_made() -> None:
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # torch wraps Adam.step for its hooks at this moment
    p = parameters()
    optimizer = RowAdam(groups(p))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    set_gradients(p, 1)
    optimizer.step()
    assert calls == ["before", "after"]


def test_helpers_project_orthogonally_and_leave_zero_rows_alone() -> None:
    rows = torch.randn(6, 4, dtype=torch.float64)
    rows[2] = 0
    unit_rows_(rows)
    assert torch.equal(rows[2], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(rows.norm(dim=1), torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.float64))
    grad = torch.randn(6, 4, dtype=torch.float64)
    whole = grad.clone()
    project_rows_(grad, rows)
    assert (grad * rows).sum(1).abs().max() < 1e-14
    torch.testing.assert_close(grad + (whole * rows).sum(1, keepdim=True) * rows, whole)


def test_wrong_settings_are_named() -> None:
    p = parameters()
    with pytest.raises(ConfigError, match="max_grad_norm = 0"):
        RowAdam(groups(p), max_grad_norm=0)
    with pytest.raises(ConfigError, match="constraint 'unit'"):
        RowAdam([{"params": [p["dec"]], "constraint": "unit"}])
    optimizer = RowAdam([p["enc"]])
    with pytest.raises(ConfigError, match="constraint 'unit'"):
        optimizer.add_param_group({"params": [p["dec"]], "constraint": "unit"})

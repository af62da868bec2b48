"""A skip path beside a transcoder: gradients of the dense formula for every variant, an exact fold, an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

import saeforge
from saeforge.data.moments import Moments
from saeforge.data.source import Pair
from saeforge.data.tensor_source import TensorSource
from saeforge.errors import CheckpointError, ConfigError
from saeforge.training.data import ActivationData
from saeforge.training.member import Member
from saeforge.training.module import SAEModule
from saeforge.training.settings import Settings
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Gated, L1ReLU, RunSettings, TopK, Variant
from tests import oracle
from tests.toy import toy_rows

F64 = torch.float64
D, D_OUT, D_SAE, ROWS = 6, 4, 24, 40
CLASSES: list[type[Variant]] = [L1ReLU, TopK, Gated]
OPTIONS: dict[type[Variant], dict[str, Any]] = {
    L1ReLU: {"l1": 0.7, "l1_warmup_share": 0.0},
    TopK: {"k": 4, "k_aux": 3, "pre_bias": False},
    Gated: {"l1": 0.3, "l1_warmup_share": 0.0, "pre_bias": False},
}


def rows_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, D, dtype=F64, generator=generator) * torch.linspace(0.5, 4, D, dtype=F64) + 3
    return x, x @ torch.randn(D, D_OUT, dtype=F64, generator=generator) * 9 + 1


def member(cls: type[Variant], x: Tensor, target: Tensor, *, dead: bool) -> Member:
    """With random weights, in float64; `dead` makes half of the latents so."""
    made = Member(cls(D, D_OUT, d_sae=D_SAE, **OPTIONS[cls]), Settings(skip=True)).double()
    statistics = tuple(Moments.of(part.numpy()).statistics() for part in (x, target))
    made.prepare(Pair("", (0,), (1,), {}), statistics, RunSettings(100, 50, F64))
    made.initialise((x, target))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=generator) * 0.5)
    if dead:
        made.variant.tokens_since_fired[: D_SAE // 2] = 1000
        made.variant.list_dead()
    return made


def dense_gradients(made: Member, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Of all parameters and W_skip, by the papers' formulas."""
    variant = made.variant
    assert made.skip is not None
    p = {name: value.detach().clone().requires_grad_() for name, value in variant.named_parameters()}
    skip = made.skip.W_skip.detach().clone().requires_grad_()
    scaled = x * variant.scale
    rest = target * variant.target_scale - (scaled - x.mean(0) * variant.scale) @ skip.T
    if isinstance(variant, L1ReLU):
        terms, _ = oracle.l1_relu(p, scaled, rest, l1=0.7)
    elif isinstance(variant, Gated):
        terms, _ = oracle.gated(p, scaled, rest, l1=0.3, pre_bias=False)
    else:
        assert isinstance(variant, TopK)
        terms, _ = oracle.topk(
            p,
            scaled,
            rest,
            k=4,
            mse_of_mean=variant.mse_of_mean.item(),
            aux=variant.auxk.coefficient,
            k_aux=3,
            dead=variant.dead(),
            pre_bias=False,
        )
    torch.stack(list(terms.values())).sum().backward()
    return {name: value.grad for name, value in {**p, "W_skip": skip}.items() if value.grad is not None}


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_equal_the_dense_formula(cls: type[Variant], dead: bool) -> None:
    x, target = rows_and_targets()
    made = member(cls, x, target, dead=dead)
    schedule = {"l1": float(getattr(made.variant, "l1", 0.0))}
    out = made.variant.step(made.batch((x, target)), schedule)
    torch.stack(list(out.terms.values())).sum().backward()
    truth = dense_gradients(made, x, target)
    assert made.skip is not None
    found = {name: value.grad for name, value in [*made.variant.named_parameters(), *made.skip.named_parameters()]}
    assert "W_skip" in found
    assert truth["W_skip"].abs().max() > 0.01
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_fold_reconstructs_what_the_step_did(cls: type[Variant]) -> None:
    x, target = rows_and_targets()
    made = member(cls, x, target, dead=False)
    out = made.variant.step(made.batch((x, target)), {"l1": 0.0})
    sae = made.fold()
    assert sae.W_skip is not None
    error = (sae(x) - target).square().sum()
    torch.testing.assert_close(error, out.counters["squared_error"], rtol=1e-9, atol=0)


def test_a_skip_path_alone_learns_what_is_linear() -> None:
    x = toy_rows(4096)
    target = x @ torch.randn(32, 8, generator=torch.Generator().manual_seed(3)) + 2
    options: dict[str, Any] = {"d_sae": 64, "k": 2, "pre_bias": False, "lr": 1e-2, "tokens": 256 * 300, "aux": 0.0}
    fvu = {}
    for skip in (False, True):
        sae = saeforge.train(x, target=target, batch_size=256, training={"skip": skip}, progress=False, **options)
        fvu[skip] = float((sae(x) - target).square().sum() / (target - target.mean(0)).square().sum())
    assert fvu[True] < 0.02
    assert fvu[False] > 10 * fvu[True]


def test_a_bf16_product_has_the_gradient_of_fp32_but_for_rounding() -> None:
    x, target = rows_and_targets()
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        made = member(L1ReLU, x, target, dead=False).float()
        made.variant.bind(RunSettings(100, 50, dtype))
        out = made.variant.step(made.batch((x.float(), target.float())), {"l1": 0.0})
        torch.stack(list(out.terms.values())).sum().backward()
        assert made.skip is not None
        assert made.skip.W_skip.grad is not None
        assert made.skip.W_skip.grad.dtype == torch.float32
        gradients.append(made.skip.W_skip.grad)
    exact, rounded = gradients
    assert not torch.equal(exact, rounded)
    assert (rounded - exact).norm() < 0.02 * exact.norm()  # five roundings to 8 bits, 2^-9 each


def test_an_sae_that_reconstructs_its_input_has_no_skip_path(tmp_path: Path) -> None:
    options: dict[str, Any] = {"run": tmp_path / "run", "d_sae": 64, "k": 4, "progress": False}
    with pytest.raises(ConfigError, match=r"model\.skip = true, but the target is the input.*data\.target"):
        saeforge.train(toy_rows(2048), training={"skip": True}, **options)
    assert not (tmp_path / "run").exists()  # it is refused before folders are made and loggers start


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    x = toy_rows(2048)
    target = x[:, :8] * 2 + 1

    def fit(run: Path, *, stop_at: int | None = None, resume: Path | None = None, skip: bool = True) -> SAEModule:
        seed_everything(0, verbose=False)
        data = ActivationData.of(TensorSource(x, target), batch_size=256, tokens=256 * 20, seed=0)

        def build(d_in: int, d_out: int) -> Variant:
            return TopK(d_in, d_out, d_sae=64, k=4, pre_bias=False)

        module = SAEModule(build, data.d_in, data.d_out, skip=skip, seed=0)
        trainer = SAETrainer(
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            default_root_dir=str(run),
            logger=False,
            callbacks=[] if stop_at is None else [StopAt(stop_at)],
        )
        trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
        return module

    whole = fit(tmp_path / "whole")
    fit(tmp_path / "part", stop_at=9)
    checkpoint = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed = fit(tmp_path / "rest", resume=checkpoint)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    skip = whole.members[0].skip
    assert skip is not None
    assert skip.W_skip.abs().max() > 0
    with pytest.raises(CheckpointError, match="skip: True -> False"):
        fit(tmp_path / "other", resume=checkpoint, skip=False)


@pytest.mark.parametrize("training", [{}, {"ema_half_life_steps": 5.0}, {"whitening": "zca"}], ids=str)
def test_a_run_that_starts_from_a_skip_transcoder_starts_where_it_ended(training: dict[str, Any]) -> None:
    x = toy_rows(2048)
    target = x[:, :8] * 2 + 1
    options: dict[str, Any] = {"d_sae": 64, "k": 4, "pre_bias": False, "batch_size": 256, "progress": False}
    first = saeforge.train(x, target=target, tokens=256 * 40, training={"skip": True, **training}, lr=1e-2, **options)
    assert first.W_skip is not None
    assert first.W_skip.abs().max() > 0.05
    start = {"skip": True, "init_from": first, **training}
    second = saeforge.train(x, target=target, tokens=256, training=start, lr=1e-12, **options)
    torch.testing.assert_close(second.W_skip, first.W_skip, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(second(x), first(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="has no skip connection"):
        saeforge.train(x, target=target, tokens=256, training={"init_from": first}, **options)


def test_the_average_of_the_weights_holds_the_skip_path_too() -> None:
    x = toy_rows(2048)
    target = x[:, :8] * 2 + 1
    options: dict[str, Any] = {"d_sae": 64, "k": 4, "pre_bias": False, "tokens": 256 * 20, "lr": 1e-2}
    ends = [
        saeforge.train(x, target=target, batch_size=256, progress=False, training={"skip": True, **more}, **options)
        for more in ({}, {"ema_half_life_steps": 20.0})
    ]
    last, mean = (sae.W_skip for sae in ends)
    assert last is not None
    assert mean is not None
    assert mean.norm() < 0.9 * last.norm()  # from 0 the path has grown all the way

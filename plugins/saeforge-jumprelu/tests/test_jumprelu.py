"""JumpReLU: terms and gradients of three papers, pseudo-gradients that are those of the expected loss, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saeforge_jumprelu import JumpReLU
from torch import Tensor

import saeforge
from saeforge.data.moments import Moments
from saeforge.errors import ConfigError
from saeforge.ops import Group
from saeforge.ops.marks import without_pseudo_gradients
from saeforge.variants import Batch, DataStatistics, RunSettings

F64 = torch.float64
D, D_SAE, ROWS = 6, 24, 40
SPARSITY = 0.7

CASES: dict[str, dict[str, Any]] = {
    "step": {"loss": "step"},
    "step, linear": {"loss": "step", "threshold_parameter": "linear", "pre_bias": False},
    "step, log_direct, triangle": {"loss": "step", "threshold_parameter": "log_direct", "kernel": "triangle"},
    "step, to the input": {"loss": "step", "input_gradient": True},
    "step, positive window, frequency": {"loss": "step", "window": "positive", "frequency_scale": 0.1},
    "quadratic, rows": {"loss": "quadratic", "l0_target": 4.0, "frequency_scale": 0.2},
    "quadratic, batch": {"loss": "quadratic", "l0_target": 4.0, "l0_over": "batch"},
    "tanh": {"loss": "tanh", "preact": 0.3},
    "tanh, thresholds only, pre_bias": {"loss": "tanh", "preact": 0.3, "input_gradient": False, "pre_bias": True},
    "tanh, dead": {"loss": "tanh", "preact": 0.3, "preact_over": "dead"},
    "step, AuxK": {"loss": "step", "aux": 0.5, "k_aux": 3},
}


def rows(n: int = ROWS, d: int = D, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=F64, generator=generator) * torch.linspace(0.5, 2, d, dtype=F64) + 0.5


def build(dtype: torch.dtype = F64, **options: Any) -> JumpReLU:
    """A bound variant with random weights, thresholds of about 1, and a window that holds many entries."""
    variant = JumpReLU(D, D, d_sae=D_SAE, **{"bandwidth": 1.5, **options}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in variant.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=generator) * 0.5)
            if name == "threshold" and variant.threshold_parameter == "linear":
                parameter.add_(0.4)  # some are below 0, where theta is 0
    variant.to(dtype).bind(RunSettings(100, 50, dtype))
    variant.tokens_since_fired[: D_SAE // 3] = 50
    variant.list_dead()
    return variant


class Step(torch.autograd.Function):
    """1[z > theta] with the papers' pseudo-derivatives, dense: arguments z, theta, who learns (B, n or n), numbers."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, handle: Tensor, density: Tensor, to_input: bool) -> Tensor:
        ctx.save_for_backward(density)
        ctx.to_input = to_input
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (density,) = ctx.saved_tensors
        g = grads[0] * density
        return g if ctx.to_input else None, None, -g.sum(0), None, None


def oracle(variant: JumpReLU, batch: Batch) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Terms, latents and gradients by dense autograd in float64, from the papers' formulas."""
    v = variant
    p = {name: value.detach().double().clone().requires_grad_() for name, value in v.named_parameters()}
    x, target = batch.x.double() * v.scale.double(), batch.target.double() * v.target_scale.double()
    w = torch.ones(len(x), dtype=F64) if batch.weight is None else batch.weight.double()

    def mean(per_row: Tensor) -> Tensor:
        return (w * per_row).sum() / w.sum()

    t = p["threshold"]
    theta = t.clamp_min(0) if v.threshold_parameter == "linear" else t.exp()
    handle = theta if v.threshold_parameter == "log" else t
    z = (x - p["b_dec"] if v.pre_bias else x) @ p["W_enc"].T + p["b_enc"]
    u = ((z - theta) / v.bandwidth).detach()
    kernel = ((u > -0.5) & (u < 0.5)).double() if v.kernel == "rectangle" else (1 - u.abs()).clamp_min(0)
    if v.window == "positive":
        kernel = kernel * (z > 0)
    density = (kernel / v.bandwidth).detach()
    active = Step.apply(z, theta, handle, density, v.input_gradient)
    # d f / d theta = theta * d active / d theta, and d f / d z = active + theta * density where the input learns too
    jump = Step.apply(z, theta, handle, density * theta.detach(), v.input_gradient)
    f = z * active.detach() + jump - jump.detach()
    error = target - (f @ p["W_dec"] + p["b_dec"])
    norms = p["W_dec"].norm(dim=1)
    terms = {"mse": mean(error.square().sum(1))}
    if v.loss == "step":
        penalty = mean(active.sum(1))
    elif v.loss == "tanh":
        penalty = mean(torch.tanh(v.tanh_scale * f * norms).sum(1))
    elif v.l0_over == "row":
        penalty = mean((active.sum(1) - v.l0_target).square()) * 2 / v.l0_target
    else:
        penalty = (mean(active.sum(1)) - v.l0_target).square() * 2 / v.l0_target
    terms["sparsity"] = SPARSITY * penalty
    if v.frequency_scale is not None:
        share = (w[:, None] * active).sum(0) / w.sum()
        terms["frequency"] = SPARSITY * share.square().sum() / v.frequency_scale
    dead = v.dead()
    if v.loss == "tanh":
        chosen = dead if v.preact_over == "dead" else torch.ones_like(dead)
        terms["preact"] = v.preact * mean(((theta - z).relu() * norms)[:, chosen].sum(1))
    if v.auxk.coefficient > 0:
        left = error.detach()
        best = z[:, dead].topk(v.auxk.k, dim=1).indices
        values = torch.zeros_like(z[:, dead]).scatter(1, best, z[:, dead].gather(1, best).relu())
        centre = (w[:, None] * left).sum(0) / w.sum()
        variance = mean((left - centre).square().sum(1))
        terms["aux"] = v.auxk.coefficient * mean((left - values @ p["W_dec"][dead]).square().sum(1)) / variance
    torch.stack(list(terms.values())).sum().backward()
    return terms, f.detach(), {name: value.grad for name, value in p.items() if value.grad is not None}


@pytest.mark.parametrize("mode", ["auto", "reference", "stock", "native"])
@pytest.mark.parametrize("case", CASES)
def test_terms_and_every_gradient_equal_the_dense_oracle(case: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_OPS", mode)
    x = rows()
    weight = torch.rand(ROWS, dtype=F64)
    weight[2] = 0
    for batch in (Batch(x, x), Batch(x, x, weight)):
        for dtype, rtol in ((F64, 1e-10), (torch.float32, 1e-5)):
            variant = build(dtype, **CASES[case])
            terms, latents, gradients = oracle(variant, batch)
            out = variant.step(batch, {"sparsity": SPARSITY})
            assert out.terms.keys() == terms.keys()
            found = out.code.to_dense().double().detach()
            assert 0.05 < float((found != 0).double().mean()) < 0.7
            torch.testing.assert_close(found, latents, rtol=rtol, atol=rtol)
            for name, value in terms.items():
                torch.testing.assert_close(out.terms[name].detach().double(), value.detach(), rtol=rtol, atol=rtol)
            torch.stack(list(out.terms.values())).sum().backward()
            for name, parameter in variant.named_parameters():
                assert parameter.grad is not None
                bound = rtol * max(1.0, gradients[name].abs().max().item())
                torch.testing.assert_close(
                    parameter.grad.double(), gradients[name], rtol=0, atol=bound, msg=f"gradient of {name}"
                )


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "step"},
        {"loss": "step", "kernel": "triangle"},
        {"loss": "quadratic", "l0_target": 2.0},
        {"loss": "quadratic", "l0_target": 2.0, "l0_over": "batch", "frequency_scale": 0.1},
        {"loss": "tanh", "preact": 0.2, "tanh_scale": 0.5},
    ],
)
def test_the_gradient_by_thresholds_is_that_of_the_expected_loss(options: dict[str, Any]) -> None:
    """Over 200,000 rows, within 5% of the largest, against differences of the loss itself."""
    generator = torch.Generator().manual_seed(3)
    variant = JumpReLU(4, 4, d_sae=8, bandwidth=0.1, **options).double()
    x = torch.randn(200_000, 4, dtype=F64, generator=generator)
    with torch.no_grad():
        directions = torch.nn.functional.normalize(torch.randn(8, 4, dtype=F64, generator=generator), dim=1)
        variant.W_enc.copy_(directions)
        variant.W_dec.copy_(directions)
        variant.set_thresholds_(torch.linspace(0.5, 1.2, 8, dtype=F64))
    variant.bind(RunSettings(compute_dtype=F64))
    batch = Batch(x, x)

    def loss() -> Tensor:
        return torch.stack(list(variant.step(batch, {"sparsity": 0.3}).terms.values())).sum()

    loss().backward()
    assert variant.threshold.grad is not None
    found, start = variant.threshold.grad.clone(), variant.threshold.detach().clone()
    quotients = []
    with torch.no_grad():
        for latent in range(8):
            sides = []
            for sign in (1, -1):
                variant.threshold.copy_(start)
                variant.threshold[latent] += sign * 0.05
                sides.append(loss().item())
            quotients.append((sides[0] - sides[1]) / 0.1)
    expected = torch.tensor(quotients, dtype=F64)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_without_pseudo_gradients_thresholds_of_the_step_loss_learn_nothing() -> None:
    variant, x = build(loss="step"), rows()
    with without_pseudo_gradients():
        torch.stack(list(variant.step(Batch(x, x), {"sparsity": 1.0}).terms.values())).sum().backward()
    assert variant.threshold.grad is None or not variant.threshold.grad.any()
    assert variant.W_enc.grad is not None
    assert variant.W_enc.grad.any()


class Halves(Group):
    """Two ranks played one after the other: each round hears what the other said in the round before."""

    def __init__(self) -> None:
        super().__init__(size=2)
        self.before: list[list[Tensor]] = [[], []]
        self.said: list[list[Tensor]] = [[], []]
        self.turn = 0

    def next_round(self) -> None:
        self.before, self.said = self.said, [[], []]

    def sum(self, tensor: Tensor) -> Tensor:
        said, other = self.said[self.turn], self.before[1 - self.turn]
        said.append(tensor.detach().clone())
        return said[-1] + other[len(said) - 1] if other else said[-1]


@pytest.mark.parametrize("case", ["step, positive window, frequency", "quadratic, rows", "quadratic, batch", "tanh"])
@pytest.mark.parametrize("weighted", [False, True])
def test_two_ranks_that_average_their_gradients_equal_one(case: str, weighted: bool) -> None:
    x = rows()
    weight = torch.linspace(0.2, 2, ROWS, dtype=F64) if weighted else None
    whole = build(**CASES[case])
    torch.stack(list(whole.step(Batch(x, x, weight), {"sparsity": SPARSITY}).terms.values())).sum().backward()
    group = Halves()
    for _ in range(3):  # weights, then shares under them, then gradients under those
        group.next_round()
        variant = build(**CASES[case])
        variant.bind(RunSettings(100, 50, F64, group))
        for group.turn in (0, 1):
            part = slice(group.turn * ROWS // 2, (group.turn + 1) * ROWS // 2)
            own = Batch(x[part], x[part], None if weight is None else weight[part])
            terms = variant.step(own, {"sparsity": SPARSITY}).terms
            (torch.stack(list(terms.values())).sum() / 2).backward()  # averaged, as data parallelism does
    for (name, one), two in zip(whole.named_parameters(), variant.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-9, atol=1e-9, msg=name)


# Starting, schedules, folding -----------------------------------------------------------------------------------------


def initialised(x: Tensor, **options: Any) -> JumpReLU:
    variant = JumpReLU(x.shape[1], x.shape[1], **options)
    statistics = Moments.of(x.double().numpy()).statistics()
    variant.initialise(DataStatistics(statistics, statistics), x, x, torch.Generator().manual_seed(0))
    return variant


@pytest.mark.parametrize("case", CASES)
def test_the_fold_computes_the_same_on_raw_rows_and_unfolds_again(case: str) -> None:
    variant, x = build(**CASES[case]), rows() * 7
    statistics = Moments.of(x.numpy()).statistics()
    variant.set_scale(DataStatistics(statistics, statistics))
    sae = variant.fold()
    out = variant.step(Batch(x, x), {"sparsity": 0.0})
    code = sae.encode(x)
    assert torch.equal(code.to_dense() != 0, out.code.to_dense() != 0)
    torch.testing.assert_close((sae.decode(code) - x).square().sum(), out.counters["squared_error"], rtol=1e-6, atol=0)
    if bool((variant.thresholds() > 0).all()):
        other = build(**CASES[case])
        other.set_scale(DataStatistics(statistics, statistics))
        other.unfold_(sae)
        torch.testing.assert_close(other.fold().encode(x).to_dense(), code.to_dense(), rtol=1e-5, atol=1e-5)


def test_papers_starts() -> None:
    x = rows(8192, 16).float()
    step = initialised(x, d_sae=64)
    assert torch.equal(step.W_enc, step.W_dec)
    torch.testing.assert_close(step.thresholds().detach(), torch.full((64,), 1e-3))
    torch.testing.assert_close(step.W_dec.norm(dim=1).detach(), torch.ones(64))
    tanh = initialised(x, d_sae=64, loss="tanh", init_l0=8)
    torch.testing.assert_close(tanh.W_enc, tanh.W_dec * (16 / 64))
    tanh.bind(RunSettings())
    rates = tanh.fold().encode(x).active_counts() / len(x)
    assert (rates - 8 / 64).abs().max() < 0.03
    assert initialised(x, d_sae=64, b_dec_init="mean").b_dec.abs().max() > 0.05


def test_schedules_and_recipes_are_the_papers() -> None:
    losses: tuple[Any, ...] = ("step", "quadratic", "tanh")
    made = {loss: JumpReLU(4, 4, d_sae=8, loss=loss, l0_target={"quadratic": 2.0}.get(loss)) for loss in losses}
    warm = {loss: variant.schedules(1_000_000)["sparsity"] for loss, variant in made.items()}
    assert [warm["step"](at) for at in (0, 5000, 10_000)] == pytest.approx([0, 5e-4, 1e-3])
    assert warm["quadratic"](25_000) == pytest.approx(1.25e-4)
    assert [warm["tanh"](at) for at in (0, 500_000)] == pytest.approx([0, 5])
    assert made["step"].schedules(1000)["sparsity"](100) == pytest.approx(1e-3)  # a tenth of a short run
    assert [variant.sparsity_schedule for variant in made.values()] == ["sparsity", None, "sparsity"]
    first, last = made["step"].recipe(10**6), made["tanh"].recipe(10**6)
    assert (first.lr, first.betas, first.warmup_steps, first.warmup_shape) == (7e-5, (0.0, 0.999), 1000, "cosine")
    assert first.max_grad_norm == 1.0  # ours
    assert (last.lr, last.betas, last.decay_steps, last.max_grad_norm) == (2e-4, (0.9, 0.999), 200_000, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l0"}, "expected one of step, quadratic, tanh"),
        ({"kernel": "gaussian"}, "expected one of rectangle, triangle"),
        ({"loss": "quadratic"}, "expected one between 0 and d_sae"),
        ({"l0_target": 3.0}, "none with the others"),
        ({"bandwidth": 0.0}, "bandwidth = 0.0: expected a positive number"),
        ({"sparsity_warmup_share": 2.0}, "a share between 0 and 1"),
        ({"frequency_scale": -1.0}, "frequency_scale = -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JumpReLU(4, 4, d_sae=8, **options)


def test_a_logarithm_of_no_threshold_is_refused_and_linear_takes_it() -> None:
    sae = build(loss="step").fold()
    sae.threshold = torch.zeros_like(sae.threshold)
    with pytest.raises(ConfigError, match="set threshold_parameter to linear"):
        build(loss="step").unfold_(sae)
    other = build(loss="step", threshold_parameter="linear")
    other.unfold_(sae)
    assert not other.thresholds().any()


def test_bf16_products_give_nearly_the_fp32_step() -> None:
    x = rows(256).float()
    pair = []
    for dtype in (torch.float32, torch.bfloat16):
        variant = build(torch.float32, loss="step")
        variant.bind(RunSettings(compute_dtype=dtype))
        out = variant.step(Batch(x, x), {"sparsity": SPARSITY})
        torch.stack(list(out.terms.values())).sum().backward()
        pair.append((out.terms["mse"].item(), variant.threshold.grad))
    assert pair[1][0] == pytest.approx(pair[0][0], rel=0.02)
    assert (pair[1][1] - pair[0][1]).norm() < 0.1 * pair[0][1].norm()


# Learning -------------------------------------------------------------------------------------------------------------


RUN: dict[str, Any] = {"tokens": 250_000, "batch_size": 256, "lr": 3e-3}


def dictionary(n: int = 8192) -> tuple[Tensor, Tensor]:
    """(n, 48) sparse combinations of 64 directions, 3.2 active in the mean; and the directions."""
    generator = torch.Generator().manual_seed(42)
    directions = torch.nn.functional.normalize(torch.randn(64, 48, generator=generator), dim=1)
    active = torch.rand(n, 64, generator=generator) < 0.05
    return (0.5 + torch.rand(n, 64, generator=generator)) * active @ directions, directions


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "step", "sparsity": 0.04},
        {"loss": "quadratic", "l0_target": 3.2, "sparsity": 0.03},
        {"loss": "tanh", "sparsity": 1.7, "bandwidth": 0.5, "init_l0": 16},
    ],
    ids=["step", "quadratic", "tanh"],
)
def test_it_finds_the_directions_that_the_data_is_made_of(options: dict[str, Any]) -> None:
    x, directions = dictionary()
    short = {"threshold_parameter": "linear", "b_dec_init": "mean", "bandwidth": 0.1, "d_sae": 64}
    sae = saeforge.train(x, variant=JumpReLU, progress=False, **RUN, **{**short, **options})
    found = (directions @ sae.W_dec.T).abs().max(1).values  # cosine of each with the decoder row nearest to it
    l0 = sae.encode(x).l0().double().mean().item()
    residual = ((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert found.mean() > 0.9
    assert residual < 0.2
    assert l0 == pytest.approx(3.2, rel=0.25)

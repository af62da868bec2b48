"""Options of a run for any variant: the L0 controller, averaged weights, starting from an SAE, whitened activations."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import saeforge
from saeforge.data.batch import Batch
from saeforge.data.tensor_source import TensorSource
from saeforge.errors import CheckpointError, ConfigError
from saeforge.ops import Group
from saeforge.sae import SAE
from saeforge.schedules import warmup_then_decay
from saeforge.training.data import ActivationData
from saeforge.training.ema import WeightAverage
from saeforge.training.identity import identity_of
from saeforge.training.member import Member
from saeforge.training.module import SAEModule
from saeforge.training.settings import Settings
from saeforge.training.target_l0 import TargetL0
from saeforge.training.trainer import SAETrainer
from saeforge.training.whitening import Whitening
from saeforge.variants import DataStatistics, Gated, L1ReLU, RunSettings, TopK, Variant
from tests.test_own_encoder import Signed
from tests.toy import D_IN, toy_rows

VARIANTS: dict[str, tuple[type[Variant], dict[str, Any]]] = {
    "topk": (TopK, {"k": 4}),
    "l1_relu": (L1ReLU, {"l1": 1.0}),
    "gated": (Gated, {}),
}
EVERYTHING = {"ema_half_life_steps": 5.0, "whitening": "zca"}


class After(Callback):
    """Calls a function with the module after every step, and stops after step `stop`."""

    def __init__(self, look: Any = None, stop: int | None = None) -> None:
        self.look, self.stop = look, stop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step."""
        assert isinstance(pl_module, SAEModule)
        if self.look is not None and trainer.global_step == 0:
            self.look(0, pl_module.members[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After what follows the optimizer's step."""
        assert isinstance(pl_module, SAEModule)
        if self.look is not None:
            self.look(trainer.global_step, pl_module.members[0])
        trainer.should_stop = self.stop is not None and trainer.global_step >= self.stop


def run(
    variant: str,
    *,
    steps: int = 40,
    look: Any = None,
    stop: int | None = None,
    folder: Path | None = None,
    ckpt_path: str | None = None,
    target: torch.Tensor | None = None,
    options: dict[str, Any] | None = None,
    batch_size: int = 256,
    accumulate: int = 1,
    **settings: Any,
) -> SAEModule:
    """Trains on the toy rows."""
    cls, defaults = VARIANTS[variant]
    given = {"d_sae": 128, **defaults, **(options or {})}
    data = ActivationData.of(TensorSource(toy_rows(8192), target), batch_size=batch_size)
    module = SAEModule(lambda i, o: cls(i, o, **given), data.d_in, data.d_out, **{"lr": 1e-3, **settings})
    trainer = SAETrainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=None if folder is None else str(folder),
    )
    trainer.callbacks.insert(0, After(look, stop))  # type: ignore[attr-defined]  # before RunFolder, which saves
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


def state(module: SAEModule) -> dict[str, torch.Tensor]:
    """Every tensor of the run and of the SAE that it leaves."""
    folded = module.folded()[0].state_dict()
    return {**module.state_dict(), **{f"folded/{name}": value for name, value in folded.items()}}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def l0_of(sae: SAE) -> float:
    return sae.encode(toy_rows(4096, seed=7)).l0().double().mean().item()


# All of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["topk", "l1_relu", "gated"])
def test_a_stopped_run_goes_on_to_the_same_bits(variant: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**EVERYTHING, "resample_steps": [20], "dead_after_tokens": 512}
    if variant != "topk":
        settings["target_l0"] = 6.0
    whole = state(run(variant, **settings))
    for stop in (13, 20):
        folder = tmp_path / str(stop)
        run(variant, stop=stop, folder=folder, **settings)
        assert_equal(whole, state(run(variant, folder=folder, ckpt_path="last", **settings)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_l0": 7.0}, "target_l0: 6.0 -> 7.0"),
        ({"target_l0": None}, "target_l0: 6.0 -> None"),
        ({"ema_half_life_steps": 9.0}, "ema_half_life_steps: 5.0 -> 9.0"),
        ({"whitening": "pca"}, "whitening: zca -> pca"),
        ({"whitening_shrinkage": 0.5}, "whitening_shrinkage: 0.01 -> 0.5"),
    ],
)
def test_a_run_with_other_options_does_not_take_the_checkpoint(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**EVERYTHING, "target_l0": 6.0}
    run("gated", steps=2, folder=tmp_path, **settings)
    with pytest.raises(CheckpointError, match=words):
        run("gated", steps=4, folder=tmp_path, ckpt_path="last", **{**settings, **change})


def test_the_command_line_and_train_give_the_same_sae(tmp_path: Path) -> None:
    from saeforge.cli.main import main
    from tests.toy import toy_dataset

    dataset = toy_dataset(tmp_path / "acts")
    start = saeforge.train(dataset, variant="gated", d_sae=64, tokens=256 * 20, batch_size=256, progress=False)
    start.save(tmp_path / "start")
    options = {
        "target_l0": 6.0,
        "ema_half_life_steps": 5.0,
        "init_from": str(tmp_path / "start"),
        "whitening": "pca",
        "whitening_shrinkage": 0.1,
        "lr_decay_shape": "cosine",
        "lr_decay_share": 0.5,
    }
    by_call = saeforge.train(
        dataset,
        variant="gated",
        d_sae=64,
        tokens=256 * 20,
        batch_size=256,
        progress=False,
        trainer={"log_every_n_steps": 10, "accelerator": "cpu"},
        training=options,
    )
    arguments = [f"--model.{name}={value}" for name, value in options.items()]
    assert (
        main(
            [
                "fit",
                "--model.variant=gated",
                "--model.variant.d_sae=64",
                f"--data.path={dataset}",
                "--data.batch_size=256",
                f"--data.tokens={256 * 20}",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
                "--trainer.log_every_n_steps=10",
                f"--run={tmp_path / 'run'}",
                *arguments,
            ]
        )
        == 0
    )
    assert_equal(by_call.state_dict(), saeforge.load(tmp_path / "run").state_dict())


def test_the_page_names_every_option() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `")]
    for name in inspect.signature(SAEModule).parameters:
        if name not in ("variant", "d_in", "d_out"):
            assert any(f"`{name}`" in row.split(" | ")[0] for row in table), name


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'target_L0'; expected .*target_l0"):
        saeforge.train(toy_rows(1024), training={"target_L0": 3})


# target_l0 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "coefficient", "lr"),
    [("l1_relu", 0.05, 1e-2), ("l1_relu", 0.8, 1e-2), ("gated", 0.004, 3e-3), ("gated", 0.4, 3e-3)],
)
def test_l0_reaches_its_target_from_any_coefficient(variant: str, coefficient: float, lr: float) -> None:
    errors: list[float] = []

    def look(step: int, member: Member) -> None:
        assert member.target_l0 is not None
        errors.append(member.target_l0.smoothed.item())

    module = run(variant, steps=400, options={"l1": coefficient}, target_l0=6.0, lr=lr, lr_decay_share=0.2, look=look)
    assert l0_of(module.folded()[0]) == pytest.approx(6.0, rel=0.03)
    assert torch.tensor(errors[280:]).abs().max() < 0.1  # it has settled, and does not ring
    controller = module.members[0].target_l0
    assert controller is not None
    assert abs(controller.integral.item()) > 0.2  # the coefficient was indeed another one


def loop(lag: float, elasticity: float, steps: int = 2000) -> torch.Tensor:
    """L0 / target over time, from 8: log L0 follows -elasticity * log coefficient with a first-order lag."""
    controller = TargetL0(L1ReLU(8, 8, d_sae=1024), 64.0)
    controller.bind({"l1": lambda step: 1.0}, steps)
    log_l0, seen = torch.tensor(512.0, dtype=torch.float64).log(), []
    for _ in range(steps):
        wanted = torch.tensor(512.0, dtype=torch.float64).log() - elasticity * controller.scaled(1.0).double().log()
        log_l0 = log_l0 + (wanted - log_l0) / lag
        controller.observe(log_l0.exp() * 1024, 1024)
        controller.update(1.0, 1.0)
        seen.append(log_l0.exp().item())
    return torch.tensor(seen) / 64.0


@pytest.mark.parametrize(("lag", "elasticity"), [(1.0, 1.0), (10.0, 1.0), (40.0, 1.0), (40.0, 0.6), (20.0, 2.0)])
def test_the_loop_is_damped_as_documented(lag: float, elasticity: float) -> None:
    """(1 + g P)^2 >= 4 T g I / total_steps holds for each of these."""
    ratio = loop(lag, elasticity)
    assert ratio[1000:].sub(1).abs().max() < 0.01
    assert ratio.min() > 0.93  # barely below the target on the way down: no ringing


def test_accumulated_batches_and_ranks_are_one_step() -> None:
    a, b = (TargetL0(L1ReLU(8, 8, d_sae=4), 2.0) for _ in range(2))
    for controller in (a, b):
        controller.bind({"l1": lambda step: 1.0}, 10)
    counts = torch.tensor([5, 3, 0, 1])
    a.observe(counts, 8)
    a.observe(counts * 2, 8)
    b.observe(counts * 3, 16)  # counts are summed over ranks by `Variant.observe`
    for controller in (a, b):
        controller.update(1.0, 1.0)
    assert_equal(a.state_dict(), b.state_dict())
    assert a.integral.item() == pytest.approx(4.0 * torch.tensor(27 / 16 / 2).log().item())


def test_it_rests_where_weights_do_not_move_or_the_coefficient_is_still_small() -> None:
    controller = TargetL0(L1ReLU(8, 8, d_sae=64), 2.0)
    controller.bind({"l1": lambda step: min(1.0, step / 10)}, 100)
    for value, lr_factor in ((1.0, 0.0), (0.0, 1.0)):
        controller.observe(torch.full((64,), 8), 8)
        controller.update(value, lr_factor)
        assert controller.integral.item() == 0.0


def test_no_latent_active_is_an_error_of_one_not_nan() -> None:
    controller = TargetL0(L1ReLU(8, 8, d_sae=64), 2.0)
    controller.bind({"l1": lambda step: 1.0}, 100)
    controller.observe(torch.zeros(64, dtype=torch.int64), 8)
    controller.update(1.0, 1.0)
    assert controller.integral.item() == pytest.approx(-0.2)
    assert 0 < controller.scaled(1.0).item() < 1


@pytest.mark.parametrize(
    ("variant", "options", "words"),
    [
        ("topk", {}, "TopK names no sparsity coefficient to scale; its L0 is variant.k = 4"),
        ("gated", {"target_l0": 128}, "expected more than 0 and less than d_sae"),
        ("gated", {"target_l0": -1.0}, "expected more than 0"),
        ("gated", {"options": {"l1": 0.0}}, "which is 0"),
    ],
)
def test_a_target_that_cannot_be_is_refused(variant: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(variant, steps=2, **{"target_l0": 8.0, **options})


# Averaged weights ----------------------------------------------------------------------------------------------


def test_the_average_is_the_formula_and_is_what_the_sae_has() -> None:
    weights: list[torch.Tensor] = []
    module = run(
        "l1_relu",
        steps=12,
        ema_half_life_steps=3.0,
        look=lambda step, member: weights.append(member.variant.W_enc.detach().double().clone()) if step else None,
    )
    decay = 2.0 ** (-1 / 3)
    factors = [decay ** (12 - t) for t in range(1, 13)]
    expected = sum(f * w for f, w in zip(factors, weights, strict=True)) / sum(factors)
    member = module.members[0]
    assert member.average is not None
    torch.testing.assert_close(member.average.shadow_0.double(), expected, rtol=1e-5, atol=1e-7)
    by_hand = copy.deepcopy(member.variant)
    with torch.no_grad():
        for parameter, shadow in zip(by_hand.parameters(), member.average.shadows(), strict=True):
            parameter.copy_(shadow)
    assert_equal(module.folded()[0].state_dict(), by_hand.fold().state_dict())
    assert not torch.equal(module.folded()[0].W_enc, member.variant.fold().W_enc)


def test_training_itself_does_not_notice_the_average() -> None:
    plain, averaged = run("topk"), run("topk", ema_half_life_steps=7.0)
    assert_equal(plain.members[0].variant.state_dict(), averaged.members[0].variant.state_dict())


def test_averaged_decoder_rows_have_norm_one() -> None:
    sae = run("topk", ema_half_life_steps=20.0, lr=1e-2).folded()[0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(128))


def test_an_accumulation_counts_once() -> None:
    """The average of two half batches a step is that of whole ones: up to rounding, the same steps."""
    whole = run("l1_relu", steps=10, ema_half_life_steps=3.0)
    halves = run("l1_relu", steps=10, ema_half_life_steps=3.0, batch_size=128, accumulate=2)
    assert whole.members[0].average is not None
    assert halves.members[0].average is not None
    for a, b in zip(whole.members[0].average.shadows(), halves.members[0].average.shadows(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_resampled_rows_start_their_average_anew() -> None:
    variant = Gated(D_IN, D_IN, d_sae=8)
    average = WeightAverage(variant, 100.0)
    average.update(variant, 0)
    with torch.no_grad():
        variant.W_gate.add_(1.0)
        variant.W_dec.add_(1.0)
    average.update(variant, 1)
    average.forget_(variant, [variant.W_gate], torch.tensor([2]))
    own = dict(zip([name for name, _ in variant.named_parameters()], average.shadows(), strict=True))
    assert torch.equal(own["W_gate"][2], variant.W_gate[2])
    assert not torch.equal(own["W_gate"][1], variant.W_gate[1])
    assert not torch.equal(own["W_dec"][2], variant.W_dec[2])


def test_a_half_life_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="ema_half_life_steps = 0"):
        run("topk", ema_half_life_steps=0.0)


def test_a_foreign_optimizers_constraint_is_in_the_checkpoint(tmp_path: Path) -> None:
    """It is restored before the state is saved, so that a resumed run starts where the stopped one was."""
    settings: dict[str, Any] = {"lr": None, "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)}
    whole = run("topk", **settings)
    run("topk", stop=13, folder=tmp_path, **settings)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(saved["_members.0.variant.W_dec"].norm(dim=1), torch.ones(128))
    assert_equal(state(whole), state(run("topk", folder=tmp_path, ckpt_path="last", **settings)))


# init_from -----------------------------------------------------------------------------------------------------


def bound(variant: str, target: torch.Tensor | None = None, **options: Any) -> Member:
    """A variant initialised on the toy rows, before its first step."""
    settings = {name: options.pop(name) for name in ("init_from", "whitening") if name in options}
    cls, defaults = VARIANTS[variant]
    source = TensorSource(toy_rows(8192), target)
    pair = source.pairs[0]
    member = Member(cls(*pair.widths(source), **{"d_sae": 128, **defaults, **options}), Settings(**settings))
    member.prepare(pair, source.statistics, RunSettings(100, group=Group()))
    member.initialise(source.sample(32_768))
    return member


def assert_same_function(a: SAE, b: SAE) -> None:
    x = toy_rows(2048, seed=3)
    code_a, code_b = a.encode(x), b.encode(x)
    dense_a, dense_b = code_a.to_dense(), code_b.to_dense()
    # A pre-activation within rounding of its threshold may fall on either side.
    assert ((dense_a != 0) != (dense_b != 0)).double().mean() < 1e-4
    both = (dense_a != 0) == (dense_b != 0)
    torch.testing.assert_close(dense_a[both], dense_b[both], rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(a(x)[both.all(1)], b(x)[both.all(1)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("whitening", [None, "zca"])
@pytest.mark.parametrize(
    ("trained", "started", "scale"),
    [
        ("topk", "topk", "sqrt_d"),
        ("l1_relu", "l1_relu", "rms"),
        ("gated", "gated", "none"),
        ("l1_relu", "gated", "rms"),
    ],
)
def test_what_starts_from_an_sae_folds_to_it(trained: str, started: str, scale: str, whitening: Any) -> None:
    sae = run(trained, whitening=whitening).folded()[0]
    assert l0_of(sae) > 1
    member = bound(started, init_from=sae, input_scale=scale, whitening=whitening)
    assert_same_function(sae, member.fold())


@pytest.mark.parametrize("pre_bias", [True, False])
def test_thresholds_above_zero_are_kept(pre_bias: bool) -> None:
    sae = run("gated").folded()[0]
    sae.threshold = torch.rand(128) * 0.1
    target = None if pre_bias else toy_rows(8192) @ torch.randn(D_IN, D_IN)
    member = bound("gated", target, init_from=sae, pre_bias=pre_bias)
    folded = member.fold()
    torch.testing.assert_close(folded.threshold, sae.threshold, rtol=1e-4, atol=1e-5)
    assert_same_function(sae, folded)


def test_a_run_starts_from_a_run(tmp_path: Path) -> None:
    first = run("l1_relu", steps=200, folder=tmp_path / "first", lr=3e-3)
    sae = first.folded()[0]
    x = toy_rows(2048, seed=5)

    def error(module: SAEModule) -> float:
        return (module.members[0].fold()(x) - x).square().sum().item()

    options: dict[str, Any] = {"options": {"l1": 1.0, "l1_warmup_share": 0.0}, "lr": 1e-4}
    started = run("l1_relu", steps=10, init_from=str(tmp_path / "first"), **options)
    assert error(started) == pytest.approx((sae(x) - x).square().sum().item(), rel=0.05)
    assert error(started) < 0.5 * error(run("l1_relu", steps=10, **options))
    assert started.identity()["members"][0]["extras"] == {"init_from": str(tmp_path / "first")}


def test_the_rate_warms_up_after_it() -> None:
    sae = run("topk").folded()[0]
    member = bound("topk", init_from=sae)
    assert [member.schedule_values(step)["lr_factor"] for step in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]
    assert bound("topk").schedule_values(0)["lr_factor"] == 1.0


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_k_may_change_but_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    sae = run("topk").folded()[0]
    with caplog.at_level(logging.WARNING, logger="saeforge.variants"):
        bound("topk", init_from=sae)
        assert not warnings_of(caplog)
        bound("topk", init_from=sae, k=8)
    assert "the SAE has k = 4, this run k = 8" in caplog.text


def test_top_k_rows_of_several_norms_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    sae = run("topk").folded()[0]
    sae.W_dec *= torch.linspace(1, 2, 128)[:, None]
    with caplog.at_level(logging.WARNING, logger="saeforge.variants"):
        folded = bound("topk", init_from=sae).fold()
    assert "norms from 1 to 2" in caplog.text
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(128))


@pytest.mark.parametrize(
    ("trained", "started", "options", "words"),
    [
        ("topk", "l1_relu", {}, "L1ReLU starts from SAEs with thresholds of 0, this one has top-k"),
        ("topk", "gated", {}, "this one has top-k; train variant topk"),
        ("gated", "gated", {"d_sae": 64}, "the SAE has d_sae = 128, this run 64; set variant.d_sae to 128"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused(trained: str, started: str, options: dict[str, Any], words: str) -> None:
    sae = run(trained, steps=2).folded()[0]
    with pytest.raises(ConfigError, match=words):
        bound(started, init_from=sae, **options)


def test_a_gated_threshold_does_not_fit_a_relu() -> None:
    sae = run("gated", steps=2).folded()[0]
    sae.threshold = torch.full((128,), 0.1)
    with pytest.raises(ConfigError, match="train variant gated instead"):
        bound("l1_relu", init_from=sae)


def test_a_variant_that_cannot_is_named_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="Signed cannot start from an SAE"):
        Member(Signed(8, 8), Settings(init_from="nowhere"))


def test_an_sae_in_memory_is_remembered_by_its_weights() -> None:
    a, b = (run("topk", steps=steps).folded()[0] for steps in (1, 2))
    first, again, other = (identity_of(bound("topk", init_from=sae))["extras"]["init_from"] for sae in (a, a, b))
    assert first == again != other
    assert first.startswith("SAE ")


# Whitening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["topk", "l1_relu", "gated"])
@pytest.mark.parametrize("kind", ["zca", "pca"])
def test_the_folded_sae_computes_what_was_trained(variant: str, kind: Any) -> None:
    member = run(variant, whitening=kind).members[0]
    assert member.whitening is not None
    x = toy_rows(512, seed=2)
    inside = member.variant.fold()  # on whitened activations
    white = member.whitening(Batch(x, x))
    sae = member.fold()
    assert white.target is white.x
    torch.testing.assert_close(member.whitening(Batch(sae(x), x)).x, inside(white.x), rtol=1e-3, atol=1e-3)
    same = (sae.encode(x).to_dense() != 0) == (inside.encode(white.x).to_dense() != 0)
    assert same.double().mean() > 0.9999
    if variant != "topk":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(128))


def fitted(
    x: torch.Tensor, kind: Any = "zca", shrinkage: float = 0.01, target: torch.Tensor | None = None
) -> Whitening:
    source = TensorSource(x, target, validation_share=0.0)
    variant = TopK(
        x.shape[1], x.shape[1] if target is None else target.shape[1], d_sae=64, k=4, pre_bias=target is None
    )
    whitening = Whitening(variant, kind, shrinkage)
    whitening.fit(DataStatistics(source.statistics[0], source.statistics[-1]), x, x if target is None else target)
    return whitening


def test_whitened_rows_have_the_covariance_that_the_shrinkage_leaves() -> None:
    x = toy_rows(8192)
    centred = (x - x.mean(0)).double()
    covariance = centred.T @ centred / len(x)
    values = torch.linalg.eigvalsh(covariance)
    for kind, shrinkage in (("zca", 1e-6), ("zca", 0.2), ("pca", 0.2)):
        white = fitted(x, kind, shrinkage)(Batch(x, x)).x.double()
        assert white.mean(0).abs().max() < 1e-4
        expected = values / ((1 - shrinkage) * values + shrinkage * values.mean())
        found = torch.linalg.eigvalsh(white.T @ white / len(x))
        torch.testing.assert_close(found, expected.sort().values, rtol=1e-3, atol=1e-4)
    off = white.T @ white / len(x)
    assert (off - off.diagonal().diag()).abs().max() < 1e-3  # pca: along the components
    matrix = fitted(x).matrix
    torch.testing.assert_close(matrix, matrix.T)  # zca: symmetric


def test_both_kinds_give_the_same_loss() -> None:
    x, y = toy_rows(256), toy_rows(256, seed=1)
    zca, pca = (fitted(toy_rows(8192), kind) for kind in ("zca", "pca"))
    losses = [(w(Batch(x, x)).x - w(Batch(y, y)).x).square().sum(1) for w in (zca, pca)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_a_transcoders_target_stays_raw() -> None:
    x = toy_rows(8192)
    target = x[:, :16] * 3
    whitening = fitted(x, target=target)
    batch = whitening(Batch(x, target))
    assert batch.target is target
    member = bound("topk", target, whitening="zca", pre_bias=False)
    rows = toy_rows(256, seed=9)
    inside = member.variant.fold()
    assert member.whitening is not None
    white = member.whitening(Batch(rows, rows)).x
    torch.testing.assert_close(member.fold()(rows), inside(white), rtol=1e-3, atol=1e-3)


def test_fvu_while_training_is_of_what_is_trained_and_validation_is_raw() -> None:
    member = run("topk", steps=200, whitening="zca", lr=3e-3).members[0]
    assert member.total_variance == pytest.approx(D_IN, rel=0.2)
    x = toy_rows(2048, seed=1)
    fvu = ((member.fold()(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert member.latest["val_fvu"] == pytest.approx(fvu, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"whitening": "lda"}, "expected zca, pca or null"),
        ({"whitening": "zca", "whitening_shrinkage": 0.0}, "expected a share in"),
        ({"whitening_shrinkage": 0.1}, "says nothing without model.whitening"),
    ],
)
def test_wrong_settings_of_whitening_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Member(TopK(8, 8, d_sae=16, k=2), Settings(**settings))
    with pytest.raises(ConfigError, match="Signed does not fold"):
        Member(Signed(8, 8), Settings(whitening="zca"))


def test_rows_that_do_not_vary_cannot_be_whitened() -> None:
    with pytest.raises(ConfigError, match="do not vary"):
        fitted(torch.ones(512, 8))


# Schedules and resampling ----------------------------------------------------------------------------------------


def test_cosine_warm_up_and_decay() -> None:
    def values(**options: Any) -> list[float]:
        return [warmup_then_decay(step, 100, warmup_steps=10, decay_steps=20, **options) for step in range(100)]

    linear, cosine = values(), values(warmup_shape="cosine", decay_shape="cosine")
    assert linear[0] == pytest.approx(0.1)
    assert cosine[4] == pytest.approx(0.55)
    assert cosine[9] == linear[9] == cosine[80] == 1.0
    assert cosine[90] == pytest.approx(0.5)
    assert cosine[99] == pytest.approx(0.00616, rel=1e-2)
    assert cosine[:10] == sorted(cosine[:10])
    assert cosine[80:] == sorted(cosine[80:], reverse=True)


@pytest.mark.parametrize("variant", ["topk", "l1_relu", "gated"])
def test_every_built_in_resamples(variant: str) -> None:
    """Latents that were silenced fire again after the step that resamples."""
    dead = torch.tensor([3, 50, 99])
    seen: dict[int, torch.Tensor] = {}

    def silence(step: int, member: Member) -> None:
        if step < 10:
            encoder = member.variant.get_parameter("b_gate" if variant == "gated" else "b_enc")
            with torch.no_grad():
                encoder[dead] = -1e4
        seen[step] = member.variant.tokens_since_fired[dead].clone()

    run(variant, steps=30, look=silence, resample_steps=[10], dead_after_tokens=10**9)
    assert (seen[10] >= 9 * 256).all()
    assert (seen[30] < 20 * 256).all()  # restarted at 10; at least one of them fired since
    assert seen[30].min() < 10 * 256

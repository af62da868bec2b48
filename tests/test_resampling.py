"""Neuron resampling: who is chosen, what is set and forgotten, and that it survives a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from saeforge.data.tensor_source import TensorSource
from saeforge.errors import ConfigError
from saeforge.sae import SAE
from saeforge.schedules import rewarm
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.resampling import draw_by_loss
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Gated
from tests.test_own_encoder import Signed
from tests.toy import D_IN, toy_rows

DEAD = torch.tensor([3, 50, 99])


class Silence(Callback):
    """Closes the gates of a few latents before the first step of a fresh run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gates this low never open."""
        if trainer.global_step == 0:
            with torch.no_grad():
                pl_module.get_submodule("_members.0.variant").get_parameter("b_gate")[DEAD] = -1e3


class Look(Callback):
    """Copies the variant's tensors and Adam's second moments right after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, dict[str, torch.Tensor]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After Resampling, which comes first."""
        if trainer.global_step == self.step:
            assert isinstance(pl_module, SAEModule)
            self.seen = {
                name: value.detach().clone() for name, value in pl_module.members[0].variant.named_parameters()
            }
            optimizer = trainer.optimizers[0]
            for name, parameter in pl_module.members[0].variant.named_parameters():
                self.seen[f"v/{name}"] = optimizer.state[parameter]["exp_avg_sq"].clone()


def train(look: Look, *, stop: int | None = None, run: Path | None = None, ckpt_path: str | None = None) -> SAEModule:
    """20 steps of a gated SAE that resamples after step 8."""
    data = ActivationData.of(TensorSource(toy_rows(8192)), batch_size=256)
    module = SAEModule(lambda i, o: Gated(i, o, d_sae=128), data.d_in, data.d_out, lr=1e-3, resample_steps=[8])
    trainer = SAETrainer(
        accelerator="cpu",
        max_steps=20,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=None if run is None else str(run),
        callbacks=[Silence()],
    )
    trainer.callbacks.append(look)  # type: ignore[attr-defined]
    if stop is not None:
        trainer.callbacks.append(Stop(stop))  # type: ignore[attr-defined]
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


class Stop(Callback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """As Ctrl-C does."""
        trainer.should_stop = trainer.global_step >= self.step


def test_dead_latents_start_again_and_the_optimizer_forgets_them() -> None:
    before, after = Look(7), Look(8)
    train(before)
    train(after)
    alive = (after.seen["v/W_gate"] != 0).any(1)  # a few more may have died by themselves
    assert not alive[DEAD].any()
    assert alive.sum() > 64
    assert (before.seen["b_gate"][DEAD] < -900).all()
    for name in ("b_gate", "r_mag", "b_mag"):
        assert (after.seen[name][DEAD] == 0).all()
    for name in ("b_gate", "r_mag", "b_mag", "W_dec", "W_gate"):
        assert (after.seen[f"v/{name}"][DEAD] == 0).all()
        assert (after.seen[f"v/{name}"][alive] != 0).any()
    norms = after.seen["W_gate"].norm(dim=1)
    assert torch.allclose(after.seen["W_dec"][DEAD].norm(dim=1), torch.ones(3))
    assert torch.allclose(norms[DEAD], 0.2 * norms[alive].mean().expand(3), rtol=1e-5)
    # Rows of data: the directions of decoder and gate agree, and are those of some training row.
    rows = torch.nn.functional.normalize(toy_rows(8192), dim=1)
    assert ((after.seen["W_dec"][DEAD] @ rows.T).max(1).values > 0.9999).all()


def test_resumed_around_the_resampling_the_bits_are_the_same(tmp_path: Path) -> None:
    whole = train(Look(0)).members[0].variant.state_dict()
    for stop in (7, 8, 9):
        run = tmp_path / str(stop)
        train(Look(0), stop=stop, run=run)
        parts = train(Look(0), run=run, ckpt_path="last").members[0].variant.state_dict()
        for name, value in whole.items():
            assert torch.equal(value, parts[name]), (stop, name)


def test_rows_are_drawn_by_squared_loss_without_replacement() -> None:
    x = 0.01 * torch.randn(4096, D_IN)
    x[::400] *= 1000.0  # a few rows that a constant reconstruction misses by far
    zero = SAE(torch.zeros(4, D_IN), torch.zeros(4), torch.zeros(4, D_IN), torch.zeros(D_IN), rule="topk", k=1)
    source = TensorSource(x, validation_share=0.0)
    drawn = draw_by_loss(zero, source, source.pairs[0], 11, torch.Generator().manual_seed(0)).x
    assert (drawn.norm(dim=1) > 1).all()
    assert len(torch.unique(drawn, dim=0)) == 11
    again = draw_by_loss(zero, source, source.pairs[0], 11, torch.Generator().manual_seed(0)).x
    assert torch.equal(drawn, again)


def test_a_variant_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="reset_latents_"):
        SAEModule(lambda i, o: Signed(i, o, d_sae=64), 8, 8, resample_steps=[5])


def test_the_rate_warms_up_again_along_a_cosine() -> None:
    values = [rewarm(step, [100], steps=10) for step in range(99, 111)]
    assert values[0] == 1.0
    assert values[1] == pytest.approx(0.1)
    assert values[6] == pytest.approx(0.55)
    assert values[11] == 1.0
    assert values[1:12] == sorted(values[1:12])

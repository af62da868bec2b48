"""Neuron resampling: at given steps, dead latents start again from rows that the SAE reconstructs badly.

Bricken et al. 2023, "Towards Monosemanticity", as the gated SAE paper uses it: a latent that was silent for the last
12,500 steps gets a row drawn with probability proportional to its squared loss, its optimizer state is forgotten, and
the learning rate warms up again (`schedules.rewarm`).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.data.source import BlockSource, Pair
from saeforge.ops import latents_over
from saeforge.sae import SAE
from saeforge.training.data import ActivationData
from saeforge.training.member import Member
from saeforge.training.module import SAEModule
from saeforge.variants import Resampled

SILENT_STEPS = 12_500
ROWS = 819_200  # over which the loss is measured


class Resampling(Callback):
    """Resamples after the steps that `Member.resample_steps` names.

    All ranks draw the same rows; where they share out the latents, each takes those of its own.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Once at each of the steps."""
        assert isinstance(pl_module, SAEModule)
        step = trainer.global_step
        if not pl_module.stepped or step >= trainer.max_steps:
            return
        for member in pl_module.members:
            if step in member.resample_steps:
                self._resample(member, pl_module.data, step)

    def _resample(self, member: Member, data: ActivationData, step: int) -> None:
        variant = member.variant
        assert isinstance(variant, Resampled)
        assert member.optimizer is not None
        window = min(SILENT_STEPS, step) * data.rows_per_step
        dead = (variant.tokens_since_fired >= window).nonzero(as_tuple=True)[0]
        with latents_over(variant.shard):
            by_rank = variant.latent_group.gather(torch.tensor([len(dead)], device=dead.device)).flatten().tolist()
            rank_zero_info(f"step {step:,}: resampling {sum(by_rank):,} of {variant.d_sae:,} latents")
            if sum(by_rank) == 0:
                return
            generator = torch.Generator().manual_seed(step)
            rows = draw_by_loss(member.fold(), data.source, member.pair, sum(by_rank), generator)
            # One row for each dead latent of all ranks, in the order of latents. A tiny dataset may have fewer rows.
            own = slice(before := sum(by_rank[: variant.latent_group.rank]), before + len(dead))
            x = rows.x[own].to(dead.device)
            dead = dead[: len(x)]
            batch = Batch(x, x if member.pair.targets == member.pair.inputs else rows.target[own].to(dead.device))
            with torch.no_grad():
                x, target = variant.scaled(member.seen(batch))
            # On every rank, also one without dead latents: lengths are means over all of them.
            changed = variant.reset_latents_(dead, x, target)
        if member.average is not None:
            member.average.forget_(variant, changed, dead)
        for parameter in changed:
            for value in member.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[dead] = 0.0
        variant.tokens_since_fired[dead] = 0


@torch.no_grad()
def draw_by_loss(sae: SAE, source: BlockSource, pair: Pair, n: int, generator: torch.Generator) -> Batch:
    """n training rows without replacement, with probability proportional to their squared loss.

    One pass over up to `ROWS` rows in bounded memory: the n largest log-weights plus Gumbel noise are such a draw
    (Efraimidis and Spirakis 2006). Where ranks share out the latents, all must call it, inside `ops.latents_over`, with
    their parts of the SAE; they draw the same rows.
    """
    kept_keys = torch.empty(0, dtype=torch.float64)
    kept_x, kept_target = torch.empty(0, sae.d_in), torch.empty(0, sae.d_out)
    blocks = min(source.n_blocks("train"), -(-ROWS // source.block_rows("train")))
    stride = source.n_blocks("train") / blocks
    for index in range(blocks):
        batch = pair.batch(source.read_block("train", int(index * stride)))
        x, target = batch.x.float(), batch.target.float()
        on_device = x.to(sae.device)
        error = sae.decode(sae.encode(on_device), on_device).cpu() - target
        loss = error.double().square().sum(1)
        uniform = torch.rand(len(loss), dtype=torch.float64, generator=generator)
        keys = 2 * loss.clamp_min(1e-300).log() - (-uniform.clamp_min(1e-300).log()).log()
        kept_keys, kept_x = torch.cat([kept_keys, keys]), torch.cat([kept_x, x])
        kept_target = torch.cat([kept_target, target])
        best = kept_keys.topk(min(n, len(kept_keys))).indices
        kept_keys, kept_x, kept_target = kept_keys[best], kept_x[best], kept_target[best]
    return Batch(kept_x, kept_target)

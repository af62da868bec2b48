"""What SAELens 6.54's `run_evals` computes, written out with saeforge's own parts: a definition that differs from
docs/metrics.md is one that gives SAELens's number here.

Its choices, where they are not ours: a batch's mean and ratio are taken batch by batch; L1 has no decoder norms; zero
ablation zeroes special tokens too; CE is scored at every token but special ones and a context's last, KL at the last as
well; a context is one sequence, whatever texts are in it; with special tokens asked for they are judged as all others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saeforge.evaluation.held_out import ScoredBatch
from saeforge.evaluation.passes import SplicedModel, compare
from saeforge.lm.capture import Capture, TokenBatch
from saeforge.lm.load import LoadedModel
from saeforge.metrics import ReconstructionMetrics
from saeforge.sae import SAE

CE, KL = "model_performance_preservation.", "model_behavior_preservation."
QUALITY, SHRINKAGE, SPARSITY = "reconstruction_quality.", "shrinkage.", "sparsity."


def defined(
    base: LoadedModel, spliced: SplicedModel, sae: SAE, batches: list[Tensor], scored: int, special: set[int]
) -> dict[str, float]:
    """Every scalar of `run_evals`, by group and name, and how many tokens and predictions it is of.

    Args:
        base: the model up to the site.
        spliced: the model with its head.
        sae: on the CPU.
        batches: (contexts, length) token ids each.
        scored: of how many of them the loss is taken.
        special: tokens that are left out; empty: none.
    """
    masks = [~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype)) for ids in batches]
    found = activations(base, sae, batches, masks) | weights(sae)
    return found | effect(spliced, sae, batches[:scored], masks[:scored])


def activations(base: LoadedModel, sae: SAE, batches: list[Tensor], masks: list[Tensor]) -> dict[str, float]:
    """`get_sparsity_and_variance_metrics`."""
    ones = torch.ones(sae.d_sae)  # its L1 has no norms
    total = ReconstructionMetrics(sae.d_out, sae.d_sae, decoder_norms=ones)
    legacy = bias = 0.0
    norms = torch.zeros(2, dtype=torch.float64)
    with torch.inference_mode(), Capture(base.model, base.sites) as capture:
        for ids, mask in zip(batches, masks, strict=True):
            x = capture(TokenBatch(ids))[base.sites[0].id].float()[mask]
            code = sae.encode(x)
            x_hat = sae.decode(code, x)
            # The mean of the batch where we take the train split's; ratios of the batch where we take those of sums.
            alone = ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=x.double().mean(0))
            for sums in (total, alone):
                sums.update(x, x_hat, code)
            batch = alone.compute()
            legacy += batch.ev_legacy * len(x)
            bias += batch.reconstruction_bias
            norms += torch.stack([x.norm(dim=1), x_hat.norm(dim=1)]).double().sum(1)
    figures = total.compute()
    norm_in, norm_out = (norms / figures.tokens).tolist()
    return {
        "tokens": figures.tokens,
        "positions": sum(ids.numel() for ids in batches),
        SPARSITY + "l0": figures.l0_mean,
        SPARSITY + "l1": figures.l1,
        QUALITY + "explained_variance": 1 - figures.fvu,
        QUALITY + "explained_variance_legacy": legacy / figures.tokens,
        QUALITY + "mse": figures.mse,
        QUALITY + "cossim": figures.cosine,
        SHRINKAGE + "l2_norm_in": norm_in,
        SHRINKAGE + "l2_norm_out": norm_out,
        SHRINKAGE + "l2_ratio": figures.l2_ratio,
        SHRINKAGE + "relative_reconstruction_bias": bias / len(batches),
        "feature_density == 0": figures.dead,
    }


def weights(sae: SAE) -> dict[str, float]:
    """Means over latents of `get_featurewise_weight_based_metrics`; encoder weights are rows here, columns there."""
    return {
        "encoder_norm": float(sae.W_enc.norm(dim=1).double().mean()),
        "encoder_decoder_cosine_sim": float(torch.cosine_similarity(sae.W_enc, sae.W_dec).double().mean()),
        "encoder_bias": float(sae.b_enc.double().mean()),
    }


def effect(spliced: SplicedModel, sae: SAE, batches: list[Tensor], masks: list[Tensor]) -> dict[str, float]:
    """`get_downstream_reconstruction_metrics`."""
    sums = torch.zeros(6, dtype=torch.float64)  # CE of the model, with the SAE, with zeros; predictions; KL of both
    tokens = 0
    for ids, mask in zip(batches, masks, strict=True):
        everything, kept = torch.arange(ids.numel()), mask.flatten().nonzero()[:, 0]
        targets = ids.roll(-1, 1).flatten()[kept]  # of the last position: any, its CE is not taken

        def batch(replaced: Tensor, ids: Tensor = ids, kept: Tensor = kept, targets: Tensor = targets) -> ScoredBatch:
            return ScoredBatch(TokenBatch(ids), replaced, kept, targets, np.zeros(len(kept), dtype=np.int64))

        original = spliced.logits(batch(kept), None)
        with_sae = compare(original, spliced.logits(batch(kept), sae), targets)
        with_zeros = compare(original, spliced.logits(batch(everything), torch.zeros_like), targets)
        followed = kept % ids.shape[1] != ids.shape[1] - 1
        columns = [with_sae[:, 0], with_sae[:, 1], with_zeros[:, 1], torch.ones(len(kept), dtype=torch.float64)]
        sums[:4] += torch.stack(columns)[:, followed].sum(1)
        sums[4:] += torch.stack([with_sae[:, 2], with_zeros[:, 2]]).sum(1)
        tokens += len(kept)
    ce, ce_sae, ce_zero = (sums[:3] / sums[3]).tolist()
    kl, kl_zero = (sums[4:] / tokens).tolist()
    return {
        "predictions": int(sums[3]),
        CE + "ce_loss_without_sae": ce,
        CE + "ce_loss_with_sae": ce_sae,
        CE + "ce_loss_with_ablation": ce_zero,
        CE + "ce_loss_score": (ce_zero - ce_sae) / (ce_zero - ce),
        KL + "kl_div_with_sae": kl,
        KL + "kl_div_with_ablation": kl_zero,
        KL + "kl_div_score": (kl_zero - kl) / kl_zero,
    }

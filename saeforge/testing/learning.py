"""It learns: on rows that are sparse sums of known directions, with an optimizer and data as in any run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saeforge.testing.case import RAW_SCALE, Case
from saeforge.testing.outcome import CheckFailed

D, TRUE = 32, 64
TOKENS, ROWS, BATCH = 300_000, 8192, 512
LR = 3e-3
#: Where a penalty's coefficient decides, it is steered to about as many latents as make up a row.
L0 = 4.0
#: What a short run with small batches needs where a variant has these options: a window of the papers' 0.001 holds few
#: entries of such a batch, and the logarithm of a threshold moves by `LR` a step, 1.8 in all.
SHORT_RUN = {"bandwidth": 0.05, "threshold_init": 0.1}
#: Fraction of variance unexplained after training, and the mean cosine of each true direction with the nearest decoder
#: row; 64 random rows in 32 dimensions have 0.45.
FVU, COSINE = 0.5, 0.6


def learning(case: Case) -> None:
    """585 steps on a toy dictionary: most variance is explained, and decoder rows turn to the true directions."""
    from saeforge.training.train import train

    generator = torch.Generator().manual_seed(42)  # not 0, with which the weights start
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=generator), dim=1)
    x, held_out = _rows(directions, ROWS, generator), _rows(directions, 2048, generator)
    widths = (D // 2, D - D // 2)
    given: Tensor | tuple[Tensor, ...] = tuple(x.split(widths, dim=1)) if case.sources else x
    run: dict[str, Any] = {"progress": False, "tokens": TOKENS, "batch_size": BATCH, "lr": LR, "group_rows": 2}
    if case.variant().sparsity_schedule is not None:
        run["training"] = {"target_l0": L0}
    short = {name: value for name, value in SHORT_RUN.items() if name in case.variant().arguments}
    sae = train(given, variant=case.cls, **run, **{**short, **case.options})
    fvu = float((sae(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum())
    rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
    cosine = float((directions @ rows.T).abs().amax(1).mean())
    if not (fvu <= FVU and cosine >= COSINE):
        raise CheckFailed(
            f"after {TOKENS // BATCH} steps at lr {LR} the FVU is {fvu:.2f} (expected at most {FVU}) and the mean "
            f"cosine with the true directions {cosine:.2f} (at least {COSINE}); try a weaker penalty or more latents "
            "per token in the options, then look at the start (dead latents) and the loss"
        )


def _rows(directions: Tensor, n: int, generator: torch.Generator) -> Tensor:
    active = torch.rand(n, TRUE, generator=generator) < 0.05
    return RAW_SCALE * ((torch.rand(n, TRUE, generator=generator) * active) @ directions)

"""The fold computes what was trained; units, weights and rounding change nothing that they should not."""

from __future__ import annotations

import torch

from saeforge.data.batch import Batch
from saeforge.optim import RowAdam
from saeforge.testing.case import Case, close, distance
from saeforge.testing.outcome import CheckFailed, LeftOut
from saeforge.variants import OwnEncoder

FOLD = 1e-8  # float64; scale, bias and norms are taken out in some other order than they were put in
#: Entries at the very threshold that took the place of a selection over the batch, and of the share that may differ.
AT_THRESHOLD = 0.01
SCALE = 1e-4  # fp32, several steps of Adam
#: bf16 has 8 bits: 0.4% on each product, and a few latents at the edge of the selection change.
BF16_LOSS, BF16_COSINE = 0.02, 0.9


def fold(case: Case) -> None:
    """On raw rows the folded SAE has the latents and the reconstruction of the step, in float64.

    Latents may have another length (decoder rows get norm 1), the same for all rows. A selection over the batch
    becomes a threshold; entries that stand at it may differ, 1% at most.
    """
    variant, batch = case.variant(), case.batch(256, seed=8)
    for _ in range(3):  # a threshold that follows the steps arrives
        case.stepped(variant, batch)
    step = case.evaluated(variant, batch)
    sae = variant.fold()
    folded = sae.encode(batch.x).to_dense()
    own, there = step.latents != 0, folded != 0
    differing, active = int((own != there).sum()), max(1, int(own.sum()))
    if differing > (AT_THRESHOLD * active if case.selects_over_the_batch else 0):
        raise CheckFailed(
            f"the folded SAE has other active latents than the step in {differing} of {active} entries; hand fold the "
            "pre-encoder bias (shift=), the threshold in scaled units, or k"
        )
    both = own & there
    ratio = torch.where(both, folded / torch.where(both, step.latents, 1.0), torch.nan)
    length = ratio.nanmedian(0).values
    if bool(((ratio - length).abs() > FOLD * length.abs()).any()):
        raise CheckFailed(
            "a latent of the folded SAE is no fixed multiple of the step's; fold another encoder bias or scale"
        )
    if bool((length <= 0).any()):
        raise CheckFailed("a latent of the folded SAE has the other sign than the step's; keep signs in fold")
    error = (batch.target - sae.decode(sae.encode(batch.x), batch.x)).square().sum()
    allowed = FOLD + 4 * differing / active
    if not abs(float(error - step.squared_error)) <= allowed * float(step.squared_error):
        raise CheckFailed(
            f"the folded SAE's squared error on raw rows is {float(error):.6g}, the step's squared_error counter says "
            f"{float(step.squared_error):.6g}; fold decoder and bias by self.folded (or, kept, divided by "
            "target_scale), and give self.output the error in scaled units"
        )
    if isinstance(variant, OwnEncoder) and not torch.equal(variant.encode(batch.x).to_dense(), folded):
        raise CheckFailed("the SAE that fold keeps encodes otherwise than the variant; return self.kept(...)")


def scale(case: Case) -> None:
    """Data times 4 (exact in binary) gives the same latents times 4, at the start and after some steps."""
    if case.initialised().input_scale == "none":
        raise LeftOut("input_scale none leaves the units of the data to the loss on purpose")
    factor = 4.0
    trained = []
    for unit in (1.0, factor):
        variant = case.initialised(scale=unit)
        optimizer = RowAdam(variant.param_groups(), lr=1e-3)
        for step in range(4):
            optimizer.zero_grad()
            out = case.stepped(variant, case.batch(64, seed=20 + step, dtype=torch.float32, scale=unit))
            torch.stack(list(out.terms.values())).sum().backward()
            optimizer.step()
        sae, batch = variant.fold(), case.batch(64, seed=9, dtype=torch.float32, scale=unit)
        trained.append((sae.encode(batch.x).to_dense() / unit, sae(batch.x) / unit))
    advice = "work on self.scaled(batch) only, call self.set_scale first, and let self.folded take the scale out"
    for what, (one, other) in zip(("latents", "reconstruction"), zip(*trained, strict=True), strict=True):
        if not close(one, other, SCALE):
            raise CheckFailed(
                f"with all activations times {factor:g} the {what} are not {factor:g} times as large: they differ by "
                f"{distance(one, other):.2g} of their size; {advice}"
            )


def row_weights(case: Case) -> None:
    """Rows of weight 0 influence no term and no gradient; weights of 2 are weights of 1."""
    if case.selects_over_the_batch:
        raise LeftOut("it selects over the batch, where rows of weight 0 compete too")
    variant, batch = case.variant(), case.batch(32)
    other = batch.x.clone()
    other[24:] = 3 * case.rows(8, seed=30).to(other)
    silent = torch.ones(32, dtype=torch.float64)
    silent[24:] = 0.0
    plain = case.evaluated(variant, batch._replace(weight=silent))
    _equal(plain, case.evaluated(variant, Batch(other, other, silent, batch.group)), "rows of weight 0 change {}")
    doubled = case.evaluated(variant, batch._replace(weight=torch.full((32,), 2.0, dtype=torch.float64)))
    _equal(case.evaluated(variant, batch), doubled, "weights of 2 on all rows change {}")


def _equal(a: object, b: object, what: str) -> None:
    from saeforge.testing.case import Evaluation

    assert isinstance(a, Evaluation)
    assert isinstance(b, Evaluation)
    for kind, one, other in (("term", a.terms, b.terms), ("the gradient of", a.gradients, b.gradients)):
        for name in one:
            if not close(one[name], other[name], 1e-9) and float((one[name] - other[name]).abs().max()) > 1e-12:
                raise CheckFailed(
                    f"{what.format(f'{kind} {name}')}; take means with self.mean_rows(per_row, batch.weight) or "
                    "self.mean_entries(per_entry, code, batch.weight)"
                )


def bf16(case: Case) -> None:
    """With bfloat16 products the loss changes by 2% at most, terms stay fp32, and gradients point the same way."""
    batch = case.batch(256, seed=10, dtype=torch.float32)
    exact = case.evaluated(case.variant(torch.float32), batch, pseudo=False)
    rounded = case.evaluated(case.variant(torch.float32, compute=torch.bfloat16), batch, pseudo=False)
    for name, term in rounded.terms.items():
        if term.dtype != torch.float32:
            raise CheckFailed(f"term {name!r} is {term.dtype} with bfloat16 products; only the products may be")
    change = abs(float(rounded.loss / exact.loss) - 1)
    if not change <= BF16_LOSS:
        raise CheckFailed(
            f"bfloat16 products change the loss by {change:.1%}, more than {BF16_LOSS:.0%}; keep everything but "
            "the products in fp32: pass dtype=self.run.compute_dtype to encode and decode, and cast nothing"
        )
    a, b = (torch.cat([gradient.flatten() for gradient in each.gradients.values()]) for each in (exact, rounded))
    cosine = float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
    if not cosine >= BF16_COSINE:
        raise CheckFailed(
            f"bfloat16 products turn the gradient (cosine {cosine:.3f} with that of fp32); something small is "
            "computed from a difference of rounded products"
        )

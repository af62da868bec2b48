"""Pseudo-gradients of thresholds are estimates of the derivative of the expected loss: here they are held to that."""

from __future__ import annotations

import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.testing.case import Case
from saeforge.testing.outcome import CheckFailed, LeftOut
from saeforge.variants import Variant

#: The attribute with the width of the window, in scaled units, which `step` reads.
WINDOW = "bandwidth"
ROWS = 8192
#: Of the sum of the terms' changes. Half of the entries in the window are active, but for the luck of some hundred.
TOLERANCE = 0.05
#: Windows are made as narrow as this, of a typical latent: the estimate is exact in the limit only.
NARROW = 0.02


def pseudo_gradients(case: Case) -> None:
    """Along all thresholds, each term's gradient is its difference quotient over one window, within 5%.

    The mean over rows of a loss with a jump at theta changes with theta as often as a pre-activation lies near it
    (Rajamanoharan et al. 2024, arXiv 2407.14435, section 4). Half a window up and down, the difference over the same
    rows is what the pseudo-gradient estimates. The window is the attribute `bandwidth` in scaled units, which the check
    narrows.
    """
    variant = case.variant()
    batch = case.batch(ROWS, seed=6)
    thresholds = _thresholds(case, variant, batch)
    if not thresholds:
        raise LeftOut("it has no pseudo-gradients")
    bandwidth = getattr(variant, WINDOW, None)
    if not isinstance(bandwidth, float | int) or bandwidth <= 0:
        raise CheckFailed("it has pseudo-gradients but no attribute `bandwidth`, the width of their window; set it")
    for name in thresholds:
        typical = _raise(case, variant, batch, name)
        bandwidth = min(float(bandwidth), NARROW * typical)
        setattr(variant, WINDOW, bandwidth)
        rate = _rate(variant, batch, case, name)
        step = torch.where(rate > 0, bandwidth / 2 / rate, 0.0)
        _compare(case, variant, batch, name, step)


def _thresholds(case: Case, variant: Variant, batch: Batch) -> list[str]:
    """Parameters (d_sae,) that move the folded SAE's thresholds and get a pseudo-gradient."""
    small = Batch(batch.x[:512], batch.x[:512], group=torch.arange(512) // 2)
    true, whole = (case.evaluated(variant, small, pseudo=pseudo) for pseudo in (False, True))
    reached = [name for name in whole.gradients if not torch.equal(true.gradients[name], whole.gradients[name])]
    if not reached:
        # The window may hold no pre-activation at all: more rows tell.
        true, whole = (case.evaluated(variant, batch, pseudo=pseudo) for pseudo in (False, True))
        reached = [name for name in whole.gradients if not torch.equal(true.gradients[name], whole.gradients[name])]
    vectors = [name for name in reached if variant.get_parameter(name).shape == (variant.d_sae,)]
    return [name for name in vectors if _moves_threshold(variant, name)]


def _moves_threshold(variant: Variant, name: str) -> bool:
    parameter = variant.get_parameter(name)
    before = variant.fold()
    with torch.no_grad():
        parameter.add_(1e-3)
        after = variant.fold()
        parameter.sub_(1e-3)
    if before.threshold is None or after.threshold is None:
        return False
    return not torch.equal(before.threshold, after.threshold) and torch.equal(before.b_enc, after.b_enc)


def _unit(case: Case, variant: Variant, batch: Batch) -> Tensor:
    """(d_sae,) raw length of one unit of each latent: the fold's values over the step's."""
    small = Batch(batch.x[:512], batch.x[:512], group=torch.arange(512) // 2)
    own, folded = case.evaluated(variant, small).latents, variant.fold().encode(small.x).to_dense()
    both = (own != 0) & (folded != 0)
    ratio = torch.where(both, folded / own, torch.nan).nanmedian(0).values
    return torch.where(ratio.isnan(), ratio.nanmedian(), ratio)


def _theta(case: Case, variant: Variant, batch: Batch) -> Tensor:
    """(d_sae,) thresholds in scaled units."""
    threshold = variant.fold().threshold
    assert threshold is not None
    return threshold / _unit(case, variant, batch)


def _raise(case: Case, variant: Variant, batch: Batch, name: str) -> float:
    """Moves all thresholds by one number until they stand amid the latents; returns the median of those before."""
    active = case.evaluated(variant, Batch(batch.x[:512], batch.x[:512], group=torch.arange(512) // 2)).latents
    typical = float(active[active > 0].median())
    wanted = 0.5 * typical
    parameter = variant.get_parameter(name)
    start, low, high = parameter.detach().clone(), -20.0, 20.0
    unit = _unit(case, variant, batch)
    for _ in range(40):
        middle = (low + high) / 2
        with torch.no_grad():
            parameter.copy_(start + middle)
        threshold = variant.fold().threshold
        assert threshold is not None
        if float((threshold / unit).median()) < wanted:
            low = middle
        else:
            high = middle
    return typical


def _rate(variant: Variant, batch: Batch, case: Case, name: str) -> Tensor:
    """(d_sae,) how fast each threshold moves with its parameter."""
    parameter, h = variant.get_parameter(name), 1e-6
    unit = _unit(case, variant, batch)
    with torch.no_grad():
        parameter.add_(h)
        up = variant.fold().threshold
        parameter.sub_(2 * h)
        down = variant.fold().threshold
        parameter.add_(h)
    assert up is not None
    assert down is not None
    return (up - down) / (2 * h) / unit


def _compare(case: Case, variant: Variant, batch: Batch, name: str, step: Tensor) -> None:
    at = variant.get_parameter(name).detach().clone()
    ends = [case.evaluated(variant, batch, changed={name: at + sign * step}) for sign in (1.0, -1.0)]
    quotient = {term: float(ends[0].terms[term] - ends[1].terms[term]) / 2 for term in ends[0].terms}
    claimed = float((case.evaluated(variant, batch).gradients[name] * step).sum())
    found, size = sum(quotient.values()), sum(abs(value) for value in quotient.values())
    if not abs(claimed - found) <= TOLERANCE * max(size, 1e-12):
        raise CheckFailed(
            f"half a window along {name} the loss changes by {found:.5g}, the pseudo-gradient says {claimed:.5g}; it "
            "should be that of the expected loss: -theta K((z - theta) / bandwidth) / bandwidth for z 1[z > theta], "
            "without theta for the step"
        )

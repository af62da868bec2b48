"""No step of a constant-k variant makes the host wait for the device.

On a GPU, CUDA's own check; without one the proxy of the conformance kit (`saeforge.testing.NoWaiting`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from saeforge.data.batch import Batch
from saeforge.optim import RowAdam
from saeforge.testing import NoWaiting
from saeforge.training.readout import ReadOut
from saeforge.variants import RunSettings, TopK, Variant
from saeforge.variants.base import DEAD_LIST_STEPS


def prepared(variant: Variant, device: str = "cpu") -> tuple[Variant, Callable[[], None]]:
    """A variant with dead latents and what `fit` does in a step, up to the optimizer."""
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.normal_()
    variant.to(device).bind(RunSettings(100, 10_000, torch.bfloat16))
    variant.tokens_since_fired[:20] = 10_000
    variant.list_dead()
    variant.dead_latents()
    rows = torch.randn(16, variant.d_in, device=device, dtype=torch.bfloat16)
    readout = ReadOut()

    def step() -> None:
        out = variant.step(Batch(rows, rows), {"l1": 0.1})
        loss = torch.stack([term.float() for term in out.terms.values()]).sum()
        variant.observe(out.code)
        readout.add(loss, out)
        loss.backward()

    variant.observed()
    return variant, step


@pytest.mark.parametrize("pre_bias", [True, False])
def test_a_topk_step_with_auxk_reads_nothing_from_the_device(pre_bias: bool) -> None:
    variant, step = prepared(TopK(24, 24, d_sae=256, k=4, k_aux=8, aux=0.5, pre_bias=pre_bias))
    with NoWaiting():
        for _ in range(DEAD_LIST_STEPS - 2):  # between two listings
            step()
    assert variant.get_parameter("W_enc").grad is not None


def test_what_is_listed_as_dead_survives_a_resume_and_is_renewed_on_time() -> None:
    torch.manual_seed(0)
    variant, step = prepared(TopK(24, 24, d_sae=256, k=4))
    for _ in range(5):
        step()
    listed = variant.dead_latents()
    other = TopK(24, 24, d_sae=256, k=4)
    other.load_state_dict(variant.state_dict())
    other.bind(variant.run)
    assert torch.equal(other.dead_latents(), listed)
    assert other.observed() == variant.observed() == 5
    for _ in range(DEAD_LIST_STEPS - 5):
        assert torch.equal(variant.dead_latents(), listed)
        step()
    assert torch.equal(variant.dead_latents(), variant.dead().nonzero()[:, 0])
    assert not torch.equal(variant.dead_latents(), listed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_no_wait_in_a_topk_step() -> None:
    variant, step = prepared(TopK(64, 64, d_sae=1024), "cuda")
    optimizer = RowAdam(variant.param_groups())

    def whole() -> None:
        step()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        whole()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            whole()
    finally:
        torch.cuda.set_sync_debug_mode("default")

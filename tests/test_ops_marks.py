"""Nested decodes at the cost of one, and marks that tell departures from the true derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saeforge.ops import Above, SparseCode, TopK, decode, encode, pseudo_gradient, stop_gradient
from saeforge.ops.marks import recorded_stops, replayed_stops, without_pseudo_gradients


@pytest.mark.parametrize("select", [TopK(5), Above(0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefixes_and_their_gradients_equal_those_of_dense_prefixes(select: TopK | Above, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6, dtype=dtype)
    weights = [torch.randn(20, 6, dtype=dtype, requires_grad=True) for _ in range(2)]
    bounds = torch.tensor([3, 4, 11, 20])
    pull = torch.randn(7, 4, 6, dtype=dtype)

    code = encode(x, weights[0], None, select)
    parts = decode(code.split(bounds), weights[1]).view(7, 4, 6)
    fast = torch.autograd.grad((parts.cumsum(1) * pull).sum(), weights)

    dense = encode(x, weights[0], None, select).to_dense()
    prefixes = torch.stack([dense[:, :end] @ weights[1][:end] for end in bounds.tolist()], dim=1)
    slow = torch.autograd.grad((prefixes * pull).sum(), weights)
    torch.testing.assert_close(parts.cumsum(1), prefixes)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_split_code_keeps_its_entries_and_their_order_by_latent() -> None:
    dense = torch.tensor([[0.0, 1, 0, 2, 3], [0, 0, 0, 0, 0], [4, 0, 0, 0, 5]])
    code = SparseCode.from_dense(dense).split(torch.tensor([2, 3, 5]))
    assert code.offsets.tolist() == [0, 1, 1, 3, 3, 3, 3, 4, 4, 5]
    order, rows, offsets = code.by_latent()
    again = SparseCode(code.values, code.indices, code.offsets, 5).by_latent()
    for kept, made in zip((order, rows, offsets), again, strict=True):
        assert torch.equal(kept, made)


def test_a_replay_holds_stopped_tensors_where_they_were() -> None:
    def loss(w: Tensor) -> Tensor:
        return (w * stop_gradient(w) + stop_gradient(3 * w)).sum()

    w = torch.tensor([2.0, 5.0], dtype=torch.float64, requires_grad=True)
    with recorded_stops() as recording:
        (grad,) = torch.autograd.grad(loss(w), w)
    assert grad.tolist() == [2.0, 5.0]
    with replayed_stops(recording):
        moved = loss(w.detach() + 1)
    assert float(moved - loss(w.detach())) == pytest.approx(float(grad.sum()))
    assert float(loss(w.detach() + 1) - loss(w.detach())) != pytest.approx(float(grad.sum()))


def test_a_frozen_decode_is_a_stop_gradient() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    code = encode(x, weight, None, TopK(2))
    with recorded_stops() as recording:
        before = decode(code, weight, weight[0], frozen=True)
    with replayed_stops(recording):
        assert torch.equal(decode(code, weight + 1, weight[0] + 1, frozen=True), before)


def test_a_pseudo_gradient_is_zero_with_a_gradient_that_can_be_left_out() -> None:
    w = torch.tensor(1e30, requires_grad=True)
    out = 2 * w + pseudo_gradient(5 * w)
    assert float(out.detach()) == float(2 * w.detach())
    assert float(torch.autograd.grad(out, w)[0]) == 7
    with without_pseudo_gradients():
        assert float(torch.autograd.grad(2 * w + pseudo_gradient(5 * w), w)[0]) == 2

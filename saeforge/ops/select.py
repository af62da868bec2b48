"""Which latents are active: selections over pre-activations.

Ties at the k-th value go to the lowest latent index, in every implementation: with bf16 pre-activations half of all
rows tie at the boundary, and an order left to the library would differ between devices and layouts. A NaN is larger
than every number: it is selected, and shows in the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import across, gpu, native, screen, shards, stock
from saeforge.ops.code import SparseCode
from saeforge.ops.group import Group

#: How much of the most entries that a row took is remembered from one step to the next: half of it after 70.
_FORGET = 0.99

#: values (nnz,), indices (nnz,) ascending inside a row, counts (b,) of entries per row.
Selected = tuple[Tensor, Tensor, Tensor]


class Selection(ABC):
    """Chooses the entries of a code from pre-activations, a chunk of rows at a time."""

    #: Entries of every row, when that number is constant.
    k: int | None = None

    @abstractmethod
    def rows(self, pre: Tensor) -> Selected:
        """Selects inside a chunk.

        Args:
            pre: (b, d_sae) pre-activations.

        Returns:
            values (nnz,), indices (nnz,) ascending inside a row, counts (b,) of entries per row.
        """

    def screened(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Selected | None:
        """The same of `x @ weight.T + bias` without computing all of it in fp32 (see `screen`), where that is offered.

        Args:
            x: (b, d_in) fp32. weight: (d_sae, d_in) fp32. bias: (d_sae,) or None.

        Returns:
            As `rows`; None (the default) asks for the whole product.
        """
        return None

    def finish(self, code: SparseCode) -> SparseCode | None:
        """A last choice over the whole batch (batch top-k) or all latents; the default keeps every candidate.

        Where latents are shared out over ranks (`ops.shards`), `rows` sees those of one rank, and whatever compares
        latents must do so here. Thresholds compare none.

        Args:
            code: what was selected inside the chunks.

        Returns:
            The code; None if the chunks must be selected from again, since this selection now wants more of them.
        """
        return code


class TopK(Selection):
    """The k largest pre-activations of each row; ties go to the lowest index."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ConfigError(f"k = {k}: top-k needs k of at least 1; set k to the number of active latents per token")
        self.k: int = k

    def rows(self, pre: Tensor) -> Selected:
        """See `Selection.rows`; every row has exactly k entries."""
        return self._flat(*top_k(pre, self._here(pre.shape[1])))

    def screened(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Selected | None:
        """See `Selection.screened`."""
        return self._flat(*screen.top_k(x, weight, bias, self._here(len(weight))))

    def finish(self, code: SparseCode) -> SparseCode | None:
        """See `Selection.finish`: the k largest over all ranks that share out the latents; rows are ragged then."""
        shard = shards.current()
        if shard is None:
            return code
        table = code.values[: code.nnz].view(code.n_rows, -1)
        among = shard.own_of_largest(table, self.k, lambda pre, k: top_k(pre, k)[1])
        return code.only(among.flatten())

    def _here(self, n: int) -> int:
        """How many of n latents are candidates."""
        shard = shards.current()
        _check_k(self.k, n if shard is None else shard.d_sae)
        return min(self.k, n)

    def _flat(self, values: Tensor, indices: Tensor) -> Selected:
        counts = torch.full((len(values),), values.shape[1], dtype=torch.int64, device=values.device)
        return values.flatten(), indices.flatten(), counts


class Above(Selection):
    """Every pre-activation strictly greater than a threshold (a number, or one per latent)."""

    def __init__(self, threshold: float | Tensor = 0.0) -> None:
        self.threshold = threshold

    def rows(self, pre: Tensor) -> Selected:
        """See `Selection.rows`; rows are ragged."""
        threshold = self._threshold(pre)
        if native.takes(pre, threshold):
            return native.above(pre, threshold)
        if gpu.takes(pre, threshold):
            found: Selected = gpu.kernels().above(pre, threshold)
            return found
        return stock.above(pre, threshold)

    def screened(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Selected | None:
        """See `Selection.screened`."""
        return screen.above(x, weight, bias, self._threshold(x))

    def _threshold(self, like: Tensor) -> Tensor:
        """(1,) or (d_sae,), fp32 or wider."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.as_tensor(self.threshold, dtype=wide, device=like.device).detach().reshape(-1)


class BatchTopK(Selection):
    """The `k * B` largest pre-activations of a whole batch of B rows (Bussmann et al. 2024, arXiv 2412.06410).

    Ties go to the lowest latent, then to the first row. Exact: each row offers its largest few; if one of them had all
    its offers taken, all rows offer twice as many. Sorting B * d_sae values instead takes seconds on a CPU [speed 3].
    One object serves many steps and offers about what rows have lately needed: early in a run some take half of all
    latents, and a thousand steps later a tenth of that.

    Args:
        k: mean number of entries of a row; `k * B` is rounded.

    Attributes:
        group: the ranks whose rows compete; set it where they share a batch.
    """

    def __init__(self, k: float) -> None:
        self.group = Group()
        if k <= 0:
            raise ConfigError(f"k = {k}: batch top-k needs a positive mean number of active latents per token")
        self.mean = k
        self._offers = self._least = max(1, round(4 * k))
        self._most = 0.0

    def rows(self, pre: Tensor) -> Selected:
        """The offers of each row; see `Selection.rows`."""
        return TopK(min(self._offers, pre.shape[1])).rows(pre)

    def screened(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Selected | None:
        """See `Selection.screened`."""
        return TopK(min(self._offers, len(weight))).screened(x, weight, bias)

    def finish(self, code: SparseCode) -> SparseCode | None:
        """The choice among all offers; None if a row might have had more to offer.

        Raises:
            ConfigError: more entries than there are.
        """
        shard, offers = shards.current(), min(self._offers, code.d_sae)
        d_sae = code.d_sae if shard is None else shard.d_sae
        group = self.group if shard is None else shard.group.times(self.group)
        total = round(self.mean * code.n_rows)
        if total > code.n_rows * d_sae:
            raise ConfigError(f"k = {self.mean} is larger than the {d_sae} latents to choose from; lower k")
        if group.size > 1:
            values, indices = code.values[: code.nnz], code.indices[: code.nnz] + code.first
            taken = across.largest(values, indices, d_sae, total * self.group.size, group)
        else:
            order, _, _ = code.by_latent()
            _, best = top_k(code.values[order][None], total) if total else (None, order.new_empty(1, 0))
            taken = torch.zeros(code.nnz, dtype=torch.bool, device=order.device)
            taken[order[best[0]]] = True
        counts = taken.view(code.n_rows, offers).sum(1)
        most = counts.max() if code.n_rows else counts.sum()
        cut_off = (most == offers) & (offers < code.d_sae)
        # One reading for all ranks, which must offer alike.
        highest, any_cut_off = (-group.minimum(-torch.stack([most, cut_off.to(most)]))).tolist()
        if any_cut_off:
            self._offers *= 2
            return None
        self._most = max(highest, self._most * _FORGET)
        if 4 * self._most < self._offers:
            self._offers = max(self._least, self._offers // 2)
        offsets = torch.zeros(code.n_rows + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        chosen = taken.nonzero(as_tuple=True)[0]
        return SparseCode(code.values[chosen], code.indices[chosen], offsets, code.d_sae, first=code.first)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties at the boundary to the lowest index, sorted by index.

    Args:
        pre: (B, n).
        k: at most n.

    Returns:
        values (B, k), fp32 or of the type of `pre`; indices (B, k) int64 ascending.

    Raises:
        ConfigError: if k > n.
    """
    n_rows, n = pre.shape
    _check_k(k, n)
    if k == n:
        return pre, torch.arange(n, device=pre.device).expand(n_rows, n)
    if native.takes(pre):
        return native.top_k(pre, k)
    if gpu.takes(pre) and k <= gpu.kernels().LARGEST_K:
        found: tuple[Tensor, Tensor] = gpu.kernels().top_k(pre, k)
        return found
    return stock.top_k(pre, k)


def _check_k(k: int, n: int) -> None:
    if k > n:
        raise ConfigError(f"k = {k} is larger than the {n} latents to choose from; lower k or raise d_sae")

"""`SparseCode`: which latents are active in which row, and how strongly (always CSR)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saeforge.ops import native, shards


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Latents of a batch in compressed sparse rows.

    Row `b` holds the entries `offsets[b]:offsets[b + 1]`. The buffers `values` and `indices` may be longer than
    `offsets[-1]`; their tail means nothing. An entry may hold value 0 (a selected latent that its nonlinearity
    silenced): *active* means value != 0.

    Attributes:
        values: (>= nnz,) floating point.
        indices: (>= nnz,) int64, latents in 0..d_sae-1, ascending inside a row.
        offsets: (B + 1,) int64, on the same device.
        d_sae: number of latents; of this rank's, where they are shared out (`ops.shards`).
        k: entries in every row if that number is constant, else None. With k, no host needs to read `offsets`.
        first: which latent of the whole dictionary index 0 is.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    d_sae: int
    k: int | None = None
    _cache: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    first: int = 0

    @property
    def n_rows(self) -> int:
        """B, the number of rows."""
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of entries. Reads one integer from the device when the rows are ragged."""
        if self.k is not None:
            return self.n_rows * self.k
        if "nnz" not in self._cache:
            self._cache["nnz"] = (self.offsets[-1].cpu(),)
        return int(self._cache["nnz"][0])

    def trimmed(self) -> SparseCode:
        """The same code with buffers of exactly nnz entries."""
        if self.values.numel() == self.nnz:
            return self
        return replace(self, values=self.values[: self.nnz], indices=self.indices[: self.nnz])

    def with_values(self, values: Tensor) -> SparseCode:
        """The same pattern with other values; whatever was computed of the pattern is shared."""
        return replace(self, values=values)

    def rows(self) -> Tensor:
        """(nnz,) int64: the row of each entry."""
        if "rows" not in self._cache and self.k is not None:
            entries = torch.arange(self.nnz, device=self.offsets.device)
            self._cache["rows"] = (torch.div(entries, self.k, rounding_mode="floor"),)
        elif "rows" not in self._cache:
            counts = self.offsets.diff()
            ids = torch.arange(self.n_rows, device=self.offsets.device)
            self._cache["rows"] = (torch.repeat_interleave(ids, counts, output_size=self.nnz),)
        return self._cache["rows"][0]

    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transposed pattern: order (nnz,), rows in that order (nnz,), offsets per latent (d_sae + 1,).

        One stable sort serves every weight gradient of a step and makes their sums deterministic.
        """
        if "by_latent" not in self._cache:
            indices = self.indices[: self.nnz]
            if indices.device.type == "cpu" and native.wanted():
                self._cache["by_latent"] = native.by_latent(indices, self.offsets, self.d_sae)
            else:
                # Half the passes of a radix sort. With a constant k nothing here waits for the device.
                order = torch.argsort(indices.to(torch.int32), stable=True)
                offsets = torch.zeros(self.d_sae + 1, dtype=torch.int64, device=indices.device)
                torch.cumsum(self._sum_by_latent(torch.ones_like(indices)), 0, out=offsets[1:])
                self._cache["by_latent"] = (order, self.rows()[order], offsets)
        order, rows, offsets = self._cache["by_latent"]
        return order, rows, offsets

    def split(self, bounds: Tensor) -> SparseCode:
        """Each row cut into groups of latents: row `b * n_groups + g` holds row b's entries of group g.

        Decoded, it gives every group's share of a reconstruction at the cost of one decode, and the sums over nested
        prefixes of a Matryoshka SAE are cumulative sums over groups. Order by latent is that of the uncut code.

        Args:
            bounds: (n_groups,) int64 on the device, ascending: the end of each group in the whole dictionary; the
                last one is the number of all latents.

        Returns:
            A code of n_rows * n_groups rows with the same entries.
        """
        indices, groups = self.indices[: self.nnz], len(bounds)
        row = self.rows() * groups + torch.searchsorted(
            bounds, indices + self.first if self.first else indices, right=True
        )
        counts = torch.zeros(self.n_rows * groups, dtype=torch.int64, device=row.device)
        counts.index_add_(0, row, torch.ones_like(row))
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        order, _, by_latent = self.by_latent()
        cache = {"rows": (row,), "by_latent": (order, row[order], by_latent)}
        if self.k is not None:  # known without reading it from the device
            cache["nnz"] = (torch.tensor(self.nnz),)
        elif "nnz" in self._cache:
            cache["nnz"] = self._cache["nnz"]
        return SparseCode(self.values[: self.nnz], indices, offsets, self.d_sae, None, cache, self.first)

    def largest(self, k: int) -> tuple[SparseCode, SparseCode]:
        """The k largest entries of each row, and the row cut into these and the others; for codes of constant k.

        Args:
            k: fewer than this code's own. Ties go to the lowest latent.

        Returns:
            A code of k entries a row. A code of 2B rows: row `2 b` holds the k largest of row b, `2 b + 1` the others;
            decoded, it gives both shares of a reconstruction, and a weight one gradient. Both are differentiable in
            `values`.
        """
        shard = shards.current()
        if shard is not None:
            return self._largest_over(shard, k)
        assert self.k is not None
        assert k < self.k
        table = (self.n_rows, self.k)
        values, indices = self.values[: self.nnz].view(table), self.indices[: self.nnz].view(table)
        rank = values.detach().argsort(dim=1, descending=True, stable=True)
        among = torch.zeros(table, dtype=torch.bool, device=rank.device).scatter_(1, rank[:, :k], True)
        order = (~among).to(torch.int8).argsort(dim=1, stable=True)  # the k largest first, either part by latent
        values, indices = values.gather(1, order), indices.gather(1, order)
        starts = self.k * torch.arange(self.n_rows, device=rank.device)
        ends = torch.full((1,), self.nnz, device=rank.device)
        offsets = torch.cat([torch.stack([starts, starts + k], dim=1).flatten(), ends])
        cache: dict[str, tuple[Tensor, ...]] = {"nnz": (torch.tensor(self.nnz),)}
        cut = SparseCode(values.flatten(), indices.flatten(), offsets, self.d_sae, None, cache)
        few = k * torch.arange(self.n_rows + 1, device=rank.device)
        return SparseCode(values[:, :k].flatten(), indices[:, :k].flatten(), few, self.d_sae, k), cut

    def _largest_over(self, shard: shards.Shard, k: int) -> tuple[SparseCode, SparseCode]:
        """`largest` of the rows that the ranks of a latent group hold together; reads two numbers from the device."""
        rows, here = self.rows(), min(k, self.d_sae)
        place = torch.arange(self.nnz, device=rows.device) - self.offsets[rows]
        width = max(here, int(self.offsets.diff().max()))
        values, indices = self.values[: self.nnz], self.indices[: self.nnz]
        table = values.new_full((self.n_rows, width), -torch.inf)
        table[rows, place] = values.detach()
        best = _largest_places(table, here).sort(dim=1).values
        chosen = shard.own_of_largest(table.gather(1, best), k, _largest_places)
        among = torch.zeros_like(table, dtype=torch.bool).scatter_(1, best, chosen)[rows, place]
        half = 2 * rows + (~among).to(rows.dtype)
        order = half.argsort(stable=True)
        offsets = _offsets(half, 2 * self.n_rows)
        cut = SparseCode(values[order], indices[order], offsets, self.d_sae, None, first=self.first)
        return self.only(among), cut

    def only(self, among: Tensor) -> SparseCode:
        """The entries that (nnz,) bool says, differentiable in `values`."""
        chosen = among.nonzero(as_tuple=True)[0]
        offsets = _offsets(self.rows()[chosen], self.n_rows)
        return SparseCode(self.values[chosen], self.indices[chosen], offsets, self.d_sae, first=self.first)

    def active_counts(self) -> Tensor:
        """(d_sae,) int64: in how many rows each latent is active (value != 0)."""
        return self._sum_by_latent((self.values[: self.nnz] != 0).to(torch.int64))

    def _sum_by_latent(self, entries: Tensor) -> Tensor:
        # Not bincount: on a GPU it reads the largest index back to the host.
        sums = torch.zeros(self.d_sae, dtype=entries.dtype, device=entries.device)
        return sums.index_add_(0, self.indices[: self.nnz], entries)

    def l0(self) -> Tensor:
        """(B,) int64: number of active latents of each row."""
        active = self.values[: self.nnz] != 0
        return torch.zeros(self.n_rows, dtype=torch.int64, device=active.device).index_add_(
            0, self.rows(), active.to(torch.int64)
        )

    def to_dense(self) -> Tensor:
        """(B, d_sae): differentiable in `values`. For small batches: this is what the sparse code avoids."""
        values = self.values[: self.nnz]
        dense = values.new_zeros(self.n_rows, self.d_sae)
        return dense.index_put((self.rows(), self.indices[: self.nnz]), values)

    @staticmethod
    def from_dense(dense: Tensor) -> SparseCode:
        """The code of a (B, d_sae) tensor: its non-zeros."""
        rows, indices = dense.nonzero(as_tuple=True)
        offsets = torch.zeros(dense.shape[0] + 1, dtype=torch.int64, device=dense.device)
        torch.cumsum(torch.bincount(rows, minlength=dense.shape[0]), 0, out=offsets[1:])
        return SparseCode(dense[rows, indices], indices, offsets, dense.shape[1])


def _largest_places(table: Tensor, k: int) -> Tensor:
    """(B, k): where the k largest of each row of (B, n) are, ties to the lowest place."""
    return table.argsort(dim=1, descending=True, stable=True)[:, :k]


def _offsets(rows: Tensor, n_rows: int) -> Tensor:
    """(n_rows + 1,): where each row begins, from the row of each entry."""
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
    counts = torch.zeros(n_rows, dtype=torch.int64, device=rows.device).index_add_(0, rows, torch.ones_like(rows))
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets

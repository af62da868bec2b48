"""From which share of active latents on do dense products win? Measures both ways at several shares, on the CPU.

    python scripts/bench_break_even.py

`saeforge.ops.dispatch.BREAK_EVEN` holds the answer: prints a table, for each compute type, of the time of the three
products of a step (decode, gradients of values, gradient of a weight) by gathers over that by dense matrices.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from saeforge.ops import SparseCode, dense, dispatch
from saeforge.ops.native import products as native_products


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Median time of a call in ms, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def code_of_share(share: float, n_rows: int, d_sae: int) -> SparseCode:
    """Random places, the same number in every row."""
    k = max(1, round(share * d_sae))
    indices = torch.rand(n_rows, d_sae).topk(k, dim=1).indices.sort(dim=1).values.flatten()
    return SparseCode(torch.rand(n_rows * k), indices, torch.arange(0, n_rows * k + 1, k), d_sae, k)


def products(ops: ModuleType, code: SparseCode, rows: Tensor, table: Tensor) -> None:
    """What a step computes with one code."""
    fresh = SparseCode(code.values, code.indices, code.offsets, code.d_sae, code.k)  # nothing sorted beforehand
    ops.gather_sum(fresh, fresh.values, table)
    ops.row_dots(fresh, rows, table)
    ops.scatter_outer(fresh, fresh.values, rows.to(table.dtype) if ops.low_rows else rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_in", type=int, default=768)
    parser.add_argument("--d_sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows, table = torch.randn(given.batch, given.d_in), torch.randn(given.d_sae, given.d_in)
    print("| compute type | share | gathers, ms | dense, ms | ratio | chosen |\n|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for one_in in (64, 32, 20, 14, 10, 7, 5, 4):
            code = code_of_share(1 / one_in, given.batch, given.d_sae)
            times = [
                median_ms(lambda ops=ops: products(ops, code, rows, table.to(dtype)), given.rounds)  # noqa: B023
                for ops in (native_products, dense)
            ]
            chosen = dispatch.choose(code, dtype, code.values, rows).name
            print(
                f"| {dtype} | 1/{one_in} | {times[0]:.0f} | {times[1]:.0f} | {times[0] / times[1]:.2f} | {chosen} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

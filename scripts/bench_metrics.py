"""What does `ReconstructionMetrics.update` cost beside a training step? Interleaved in one process; and the weights'.

    python scripts/bench_metrics.py [--threads 1] [--rounds 15] [--d_in 768 --d_sae 12288 --k 32 --batch 2048]

A round is one step of `saeforge fit` (as in bench_step_worker.py, fp32) and one update with such a batch. Prints
medians, and the median of the rounds' ratios. Then seconds for `weight_figures` and, with --agreement, `match_rows`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_step_worker import build

from saeforge.metrics import ReconstructionMetrics, match_rows, weight_figures


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, number in (("threads", 1), ("rounds", 15), ("d_in", 768), ("d_sae", 12_288), ("k", 32), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--agreement", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = torch.randn(8 * options.batch, options.d_in, generator=torch.Generator().manual_seed(0)) + 0.5
    sizes = {"d_in": options.d_in, "d_sae": options.d_sae, "k": options.k}
    member = build({"variant": "topk", "precision": "fp32", "l0": 0, "seed": 0, **sizes}, rows)
    optimizer = member.make_optimizer()
    sae = member.fold()
    x = rows[: options.batch]
    code = sae.encode(x)
    x_hat = sae.decode(code)
    sums = ReconstructionMetrics(
        sae.d_out, sae.d_sae, pivot=rows.mean(0), decoder_norms=sae.W_dec.norm(dim=1), device=sae.device
    )

    def step(number: int) -> None:
        loss = member.step((x,), number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    times = [
        (seconds(lambda number=number: step(number)), seconds(lambda: sums.update(x, x_hat, code)))  # type: ignore[misc]
        for number in range(options.rounds + 3)
    ][3:]
    steps, updates = zip(*times, strict=True)
    share = statistics.median(update / step for step, update in times)
    print(f"step {1e3 * statistics.median(steps):.1f} ms, update {1e3 * statistics.median(updates):.1f} ms", end=", ")
    print(f"update / step {100 * share:.1f}% (median of {options.rounds} ratios, {options.threads} threads)")
    print(f"weight_figures {seconds(lambda: weight_figures(sae.W_dec, sae.W_enc, sae.b_enc)):.1f} s")
    if options.agreement:
        other = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(1))
        print(f"match_rows, mutual: {seconds(lambda: match_rows(sae.W_dec, other, method='mutual')):.1f} s")
        few, them = sae.W_dec[:8192], other[:8192]
        print(
            f"match_rows, hungarian, {len(few):,}: {seconds(lambda: match_rows(few, them, method='hungarian')):.1f} s"
        )


if __name__ == "__main__":
    main()

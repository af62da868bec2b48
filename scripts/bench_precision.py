"""What bf16 costs in quality: every variant trained in fp32 and in bf16-mixed, from the same start, on the same rows.

    saeforge harvest --config configs/quickstart/harvest.yaml
    python scripts/bench_precision.py --data data/quickstart --out docs/benchmarks/DATE-precision-cpu

Goal: the mean of |FVU(bf16) - FVU(fp32)| / FVU(fp32) over three seeds is at most 1% for each variant. FVU is that of
held-out documents, by the folded SAE in fp32. Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_quality_judge import judge, machine, machine_line

from saeforge.data.shard_source import ShardSource
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Gated, L1ReLU, TopK, Variant

GOAL = 0.01
#: Options with which each variant ends at a moderate L0 within a short run.
VARIANTS: dict[str, tuple[type[Variant], dict[str, Any]]] = {
    "topk": (TopK, {"k": 32}),
    "l1_relu": (L1ReLU, {"l1": 2.0}),
    "gated": (Gated, {"l1": 0.15}),
}


def run(source: ShardSource, name: str, precision: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Trains one SAE and judges it."""
    cls, options = VARIANTS[name]
    tokens = given.steps * given.batch
    data = ActivationData.of(source, batch_size=given.batch, tokens=tokens, seed=seed)
    module = SAEModule(
        lambda d_in, d_out: cls(d_in, d_out, d_sae=given.d_sae, **options),
        source.widths[0],
        source.widths[0],
        lr=1e-3,
        lr_warmup_steps=given.steps // 10,
        lr_decay_share=0.2,
        seed=seed,
    )
    trainer = SAETrainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        default_root_dir=None,
    )
    trainer.fit(module, data)
    return {"variant": name, "precision": precision, "seed": seed, **asdict(judge(module.folded()[0], source))}


def table(runs: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Rows of the report, and whether every variant meets the goal."""
    lines, met = (
        ["| variant | FVU fp32 | FVU bf16 | mean of abs(ΔFVU) / FVU | each seed | L0 fp32, bf16 | goal |"],
        True,
    )
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(run["variant"] for run in runs):
        by = {(r["precision"], r["seed"]): r for r in runs if r["variant"] == name}
        seeds = sorted({seed for _, seed in by})
        pairs = [(by["32-true", seed], by["bf16-mixed", seed]) for seed in seeds]
        changes = [(low["fvu"] - full["fvu"]) / full["fvu"] for full, low in pairs]
        mean = statistics.mean(map(abs, changes))
        met &= mean <= GOAL
        figures = [statistics.mean(pair[i][key] for pair in pairs) for key in ("fvu", "l0_mean") for i in (0, 1)]
        lines.append(
            f"| {name} | {figures[0]:.4f} | {figures[1]:.4f} | {mean:.2%} | "
            f"{', '.join(f'{change:+.2%}' for change in changes)} | {figures[2]:.1f}, {figures[3]:.1f} | "
            f"{'met' if mean <= GOAL else 'missed'} |"
        )
    return lines, met


def main() -> None:
    """Parses, runs, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset of `saeforge harvest`")
    parser.add_argument("--d_sae", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    source = ShardSource(given.data)
    runs = []
    for name in given.variants:
        for seed in range(given.seeds):
            for precision in ("32-true", "bf16-mixed"):
                runs.append(run(source, name, precision, seed, given))
                print({key: runs[-1][key] for key in ("variant", "precision", "seed", "fvu", "l0_mean")}, flush=True)
    lines, met = table(runs)
    what = machine()
    text = [
        "# Quality in bf16 against fp32",
        "",
        f"`python {shlex.join(sys.argv)}`",
        "",
        f"{given.steps:,} steps of {given.batch:,} rows (d {source.widths[0]}), {given.d_sae:,} latents, lr 1e-3; both",
        "precisions from the same weights on the same rows; FVU of held-out documents.",
        machine_line(),
        "",
        *lines,
        "",
        f"Goal: a mean change of FVU of at most {GOAL:.0%} for each variant: {'met' if met else 'missed'}.",
    ]
    print("\n".join(lines))
    given.out.with_suffix(".md").write_text("\n".join(text) + "\n")
    given.out.with_suffix(".json").write_text(json.dumps({"machine": what, "runs": runs}, indent=1) + "\n")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()

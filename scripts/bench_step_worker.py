"""saeforge's own contenders of the step benchmark, each a process of its own: see bench_gate.py for what it obeys.

bench_step.py starts it: python scripts/bench_step_worker.py JOB.json

  ours     what one step of `saeforge fit` does, without Lightning: `Member.step`, backward, RowAdam.
  dense    the dense twin (bench_step_dense.py): same start, same bookkeeping of dead latents, same RowAdam.
  product  the encoder product alone, F.linear of the same sizes, weights in the compute type.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_gate import Gate
from bench_step_dense import dense_forward, dense_step
from torch import Tensor, nn

from saeforge.data.tensor_source import TensorSource
from saeforge.ops import Group
from saeforge.registry import VARIANTS
from saeforge.training.member import Member
from saeforge.training.settings import Settings
from saeforge.variants import RunSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Rows that a variant starts from, as in SAEModule.
INITIAL_ROWS = 32_768
#: Rows that the bias of each latent is set from, where L0 is given.
BIAS_ROWS = 8192
#: Keeps L0 where it was set. Adam costs the same at any rate.
STILL_LR = 1e-7


def build(job: dict[str, Any], rows: Tensor) -> Member:
    """The SAE in training that a job asks for, started from data.

    Args:
        job: `variant`, `precision`, `d_sae`, `k` (topk) or `l0` (the others; their k, if they have one), `seed`;
            `still`: hardly let it learn, the default where L0 is given.
        rows: (n, d_in) raw.
    """
    k = {"topk": job["k"], **dict.fromkeys(("batchtopk", "matryoshka"), job["l0"])}.get(job["variant"])
    options = {"d_sae": job["d_sae"], **({} if k is None else {"k": k})}
    source = TensorSource(rows, validation_share=0.0)
    variant = VARIANTS.load(job["variant"])(job["d_in"], job["d_in"], **options)
    settings = Settings(seed=job["seed"], lr=STILL_LR if job.get("still", job["variant"] != "topk") else None)
    member = Member(variant, settings)
    run = RunSettings(100_000, 10_000_000, DTYPES[job["precision"]], Group())
    member.prepare(source.pairs[0], source.statistics, run)
    member.initialise((rows,))
    if k is None:
        bias = {"l1_relu": "b_enc", "gated": "b_gate", "jumprelu": "b_enc"}[job["variant"]]
        weight = {"l1_relu": "W_enc", "gated": "W_gate", "jumprelu": "W_enc"}[job["variant"]]
        x = rows[:BIAS_ROWS].float() * variant.scale
        if job["variant"] != "l1_relu":
            x = x - variant.get_parameter("b_dec")
        set_rate_(variant.get_parameter(weight), variant.get_parameter(bias), x, job["l0"] / job["d_sae"])
        if job["variant"] == "jumprelu":
            variant.get_parameter(bias).data += variant.get_parameter("threshold").detach().exp()
    return member


@torch.no_grad()
def set_rate_(weight: Tensor, bias: nn.Parameter, x: Tensor, rate: float) -> None:
    """Sets each latent's bias so that it fires on this share of the rows. weight: (d_sae, d_in), bias: (d_sae,)."""
    rank = max(1, round(rate * len(x)))
    for rows, part in zip(weight.split(1024), bias.split(1024), strict=True):
        highest = F.linear(rows, x).topk(min(rank + 1, len(x)), dim=1).values
        # Between two rows: on a row, rounding would decide whether it fires.
        part.copy_(-highest[:, -2:].mean(dim=1))


def ours(gate: Gate, member: Member) -> None:
    """The step of `saeforge fit`, in the order in which Lightning calls its parts."""
    optimizer = member.make_optimizer()

    def figures() -> dict[str, Any]:
        read = member.readout.read(Group())
        return {"l0": read["active"] / read["rows"], "dead": int(member.variant.dead().sum())}

    gate.figures = figures
    for step, rows in enumerate(gate.batches()):
        loss = member.step((rows,), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gate.losses.append(loss.detach())


def dense(gate: Gate, member: Member) -> None:
    """The dense twin under the same optimizer."""
    optimizer, sae = member.make_optimizer(), member.variant
    rates = [group["lr"] for group in optimizer.param_groups]
    sample = gate.rows(0, gate.job["batch"])

    @torch.no_grad()
    def figures() -> dict[str, Any]:
        latents = dense_forward(sae, sample, member.schedule_values(0))[1]
        return {"l0": float((latents > 0).sum()) / len(latents), "dead": int(sae.dead().sum())}

    gate.figures = figures
    for step, rows in enumerate(gate.batches()):
        values = member.schedule_values(step)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * values["lr_factor"]
        loss = dense_step(sae, rows, values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gate.losses.append(loss.detach())


@torch.no_grad()
def product(gate: Gate) -> None:
    """F.linear alone."""
    job, dtype = gate.job, DTYPES[gate.job["precision"]]
    generator = torch.Generator().manual_seed(job["seed"])
    weight = torch.randn(job["d_sae"], job["d_in"], generator=generator).to(dtype)
    bias = torch.zeros(job["d_sae"], dtype=dtype)
    for rows in gate.batches():
        F.linear(rows.to(dtype), weight, bias)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    gate = Gate(job)
    gate.imported()
    if job["contender"] == "product":
        product(gate)
        return
    rows = gate.rows(0, min(INITIAL_ROWS, job["batch"] * job["n_batches"]))
    member = build(job, rows)
    del rows
    {"ours": ours, "dense": dense}[job["contender"]](gate, member)


if __name__ == "__main__":
    main()

"""How much of a step is logging? Time inside read-outs, figures, histograms and loggers over one run of `saeforge fit`.

    python scripts/bench_logging.py --steps 1000 --out docs/benchmarks/DATE-logging-cpu

One run from bf16 shards with a validation split, a RUN folder, the CSV logger and an offline wandb run side by side, as
often as by default: a reading every 50 steps, ten histograms and ten validations a run. `perf_counter` stands around
every function that only logging needs; what they call is inside. A step is the mean of the whole run, without
validation passes and checkpoints. Not in the sum: the count of who fired, which dead latents need, and wandb's own
process, whose CPU time is told beside it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_fit import PRECISIONS, Clock, Spent, timed
from bench_quality_judge import machine
from bench_step import Setting, busy_seconds, write_data
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from saeforge.data.shard_source import ShardSource
from saeforge.data.writer import write_dataset
from saeforge.errors import SaeforgeError
from saeforge.registry import VARIANTS
from saeforge.training.callbacks import ProgressLines
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.outputs import RunOutputs
from saeforge.training.readout import ReadOut
from saeforge.training.telemetry import Telemetry
from saeforge.training.trainer import SAETrainer
from saeforge.training.validation import Validation

GOAL = 0.02
VALIDATION_ROWS = 8192
#: What is logging, by what the report calls it. None of them calls another.
LOGGING = {
    "sums of a step (ReadOut.add)": (ReadOut, "add"),
    "readings: sums read, figures, histograms, loggers (Telemetry)": (Telemetry, "on_train_batch_end"),
    "the floor of a step, once (Telemetry)": (Telemetry, "on_train_start"),
    "metrics of validations, and loggers (Validation)": (Validation, "on_validation_epoch_end"),
    "lines on the screen (ProgressLines)": (ProgressLines, "on_train_batch_end"),
}
#: Before the first step and after the last one.
AROUND = {"the wandb run's input": (RunOutputs, "on_fit_start"), "the SAE as an artifact": (RunOutputs, "on_fit_end")}


def bench(setting: Setting, steps: int, precision: str, command: str) -> dict[str, Any]:
    """One run: seconds of each part of `LOGGING` and `AROUND`, and of a step."""
    torch.set_num_threads(setting.threads)
    os.environ["WANDB_MODE"] = "offline"
    spent: dict[str, Spent] = {}
    for label, (owner, name) in {**LOGGING, **AROUND}.items():
        timed(owner, name, spent.setdefault(label, {}))
    apart: Spent = {}
    timed(SAETrainer, "save_checkpoint", apart)
    timed(SAEModule, "validation_step", apart)
    timed(SAEModule, "on_validation_epoch_start", apart)
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="saeforge-bench-") as name:
        folder = Path(name)
        rows_file = folder / "rows.bin"
        write_data(rows_file, setting.batch * setting.n_batches + VALIDATION_ROWS, setting.d_in, setting.seed)
        rows = torch.frombuffer(bytearray(rows_file.read_bytes()), dtype=torch.bfloat16).view(-1, setting.d_in)
        splits = {"train": rows[:-VALIDATION_ROWS], "validation": rows[-VALIDATION_ROWS:]}
        write_dataset(folder / "shards", splits, shuffle=False)
        source = ShardSource(str(folder / "shards"))
        data = ActivationData.of(source, batch_size=setting.batch, tokens=setting.batch * steps, seed=setting.seed)
        build = functools.partial(VARIANTS.load("topk"), d_sae=setting.d_sae, k=setting.k)
        module = SAEModule(build, data.d_in, data.d_out, dead_after_tokens=10_000_000, seed=setting.seed)
        run = folder / "run"
        run.mkdir()
        loggers = [CSVLogger(run, name="csv"), WandbLogger(name="bench", save_dir=run, offline=True)]
        trainer = SAETrainer(
            accelerator="cpu",
            devices=1,
            precision=PRECISIONS[precision],
            default_root_dir=run,
            logger=loggers,
        )
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]  # of Lightning, a list
        start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        trainer.fit(module, data)
        loggers[1].experiment.finish()
        wall = time.perf_counter() - start
        import wandb

        own = time.process_time() - own
        wandb.teardown()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        service = children.ru_utime + children.ru_stime
        others = (busy_seconds() - busy - own - service) / (wall * (os.cpu_count() or 1))
    seconds = {label: [took for calls in part.values() for _, took in calls] for label, part in spent.items()}
    waited = sum(took for calls in apart.values() for _, took in calls)
    first = spent["sums of a step (ReadOut.add)"]["add"][0][0]
    return {
        "setting": {name: getattr(setting, name) for name in ("d_in", "d_sae", "k", "batch", "threads")},
        "steps": steps,
        "precision": precision,
        "seconds": {label: sum(took) for label, took in seconds.items()},
        "calls": {label: len(took) for label, took in seconds.items()},
        "step": (clock.ends[-1] - first - waited) / (steps - 1),
        "apart": {name: sum(took for _, took in calls) for name, calls in apart.items()},
        "service": service,
        "others": min(1.0, max(0.0, others)),
        "machine": machine(),
        "command": command,
    }


def report(result: dict[str, Any]) -> str:
    """The table and the promise."""
    setting, host, steps = result["setting"], result["machine"], result["steps"]
    step, seconds = result["step"], result["seconds"]
    total = sum(seconds[label] for label in LOGGING)
    share = total / steps / step
    verdict = "met" if share <= GOAL else f"missed by {share / GOAL - 1:.0%}"
    lines = [
        f"# What logging costs on CPU, {datetime.date.today():%Y-%m-%d}",
        "",
        f"`{result['command']}`",
        "",
        f"TopK, d {setting['d_in']:,}, d_sae {setting['d_sae']:,}, k {setting['k']}, batch {setting['batch']:,}, "
        f"{result['precision']}, {setting['threads']} threads; one run of {steps:,} steps",
        "from bf16 shards, with CSV and an offline wandb run: a reading every 50 steps, ten histograms, validations.",
        f"A step took {1e3 * step:.1f} ms. Other processes used {result['others']:.0%} of the machine's cores.",
        f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in host['versions'].items())}.",
        "",
        "| part | calls | ms a call | ms a step | of a step |",
        "|---|---|---|---|---|",
    ]
    for label in LOGGING:
        calls = result["calls"][label]
        each = 1e3 * seconds[label] / max(1, calls)
        one = 1e3 * seconds[label] / steps
        lines.append(f"| {label} | {calls:,} | {each:.3f} | {one:.4f} | {one / 1e3 / step:.3%} |")
    lines += [
        f"| **all** | | | {1e3 * total / steps:.4f} | **{share:.2%}**; goal at most {GOAL:.0%}: {verdict} |",
        "",
        *(f"* Once a run, outside the steps: {label}, {1e3 * seconds[label]:.0f} ms." for label in AROUND),
        f"* wandb's own process used {result['service']:.1f} s of CPU over the whole run, "
        f"{result['service'] / steps / step:.2%} of the steps' time on one core.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("d_in", "d_sae", "k", "batch", "n_batches", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setting(), name))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    parser.add_argument("--out", type=Path, help="report without its suffix; default: print only")
    given = parser.parse_args()
    options = {name: getattr(given, name) for name in ("d_in", "d_sae", "k", "batch", "n_batches", "threads", "seed")}
    command = shlex.join(["python", "scripts/bench_logging.py", *sys.argv[1:]])
    result = bench(Setting(**options), given.steps, given.precision, command)
    text = report(result)
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".md").write_text(text)
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SaeforgeError as error:
        sys.exit(f"bench_logging.py: {error}")

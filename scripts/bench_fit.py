"""What does the framework cost? `saeforge fit` from shards beside the bare step of bench_step.py, in tokens/s.

    python scripts/bench_fit.py --out docs/benchmarks/DATE-fit-cpu

Writes a dataset of shards of the rows that bench_step.py uses. Then in rounds, one whole run of each after the other,
in alternating order, each in a process of its own: `--run_steps` steps of the bare step, and of a fit: SAETrainer over
ActivationData with a RUN folder, CSV logger, telemetry and checkpoints as they are by default. The first `--skip` steps
of a run are not counted. No validation split is written, and the ten checkpoints of a run are told apart: a run as
short as this would validate and save out of all proportion.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bench_quality_judge import machine
from bench_step import Contender, Setting, Worker, busy_seconds, write_data
from bench_step_report import milliseconds
from lightning.pytorch import Callback

from saeforge.data.shard_source import ShardSource
from saeforge.data.writer import write_dataset
from saeforge.errors import SaeforgeError
from saeforge.registry import VARIANTS
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.telemetry import Telemetry
from saeforge.training.trainer import SAETrainer

SCRIPTS = Path(__file__).parent
GOAL = 0.9
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


@dataclass
class Clock(Callback):
    """When each step of a run ended; the last callback of all, so that the others' work is inside."""

    ends: list[float] = field(default_factory=list)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())


#: By method: when each call ended, and how long it took.
Spent = dict[str, list[tuple[float, float]]]


def timed(owner: type, name: str, spent: Spent) -> None:
    """Notes in `spent` every call of a method from now on."""
    calls = spent.setdefault(name, [])
    method = getattr(owner, name)

    @functools.wraps(method)
    def inner(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            calls.append((time.perf_counter(), time.perf_counter() - start))

    setattr(owner, name, inner)


def fit(job: dict[str, Any]) -> dict[str, Any]:
    """One run of `saeforge fit`.

    Returns:
        Seconds a counted step: `seconds` without what checkpoints took, `with_checkpoints`, `logging` of them; the
        `median_step`; seconds of one `checkpoint`.
    """
    torch.set_num_threads(job["threads"])
    spent: Spent = {}
    timed(Telemetry, "on_train_batch_end", spent)  # reads out, computes figures, hands them to the loggers
    timed(SAETrainer, "save_checkpoint", spent)
    source = ShardSource(job["shards"])
    data = ActivationData.of(source, batch_size=job["batch"], tokens=job["batch"] * job["run_steps"], seed=job["seed"])
    options = {"d_sae": job["d_sae"], "k": job["k"]}
    build = functools.partial(VARIANTS.load("topk"), **options)
    module = SAEModule(build, data.d_in, data.d_out, dead_after_tokens=10_000_000, seed=job["seed"])
    clock = Clock()
    trainer = SAETrainer(
        accelerator="cpu",
        devices=1,
        precision=PRECISIONS[job["precision"]],
        default_root_dir=job["run"],
    )
    trainer.callbacks.append(clock)
    trainer.fit(module, data)
    counted = clock.ends[job["skip"] :]
    steps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]

    def inside(name: str) -> list[float]:
        return [took for end, took in spent[name] if counted[0] < end <= counted[-1]]

    saving, number, whole = inside("save_checkpoint"), len(counted) - 1, counted[-1] - counted[0]
    return {
        "seconds": (whole - sum(saving)) / number,
        "with_checkpoints": whole / number,
        "median_step": statistics.median(steps[job["skip"] :]),
        "logging": sum(inside("on_train_batch_end")) / number,
        "checkpoint": statistics.fmean(saving) if saving else 0.0,
    }


def run_fit(job: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """`fit` in a process of its own."""
    path = folder / "fit.json"
    path.write_text(json.dumps(job))
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(SCRIPTS / "bench_fit.py"), "--job", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise SaeforgeError(f"fit ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads((folder / "fit.json.out").read_text())
    return answer


def run_bare(setting: Setting, precision: str, steps: int, skip: int, folder: Path, data: Path) -> float:
    """Mean seconds of the bare step in a process of its own."""
    own = (sys.executable, str(SCRIPTS / "bench_step_worker.py"))
    worker = Worker(Contender("ours", own, {"contender": "ours", "precision": precision}), setting, folder, data)
    try:
        worker.ready()
        return statistics.fmean(worker.run(steps)["seconds"][skip:])
    finally:
        worker.close()


def others_share(measure: Callable[[], None]) -> float:
    """Share of all cores that other processes used while our child processes ran inside `measure`."""

    def own() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    start, busy, cpu = time.perf_counter(), busy_seconds(), own()
    measure()
    free = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return min(1.0, max(0.0, busy_seconds() - busy - (own() - cpu)) / free)


def bench(setting: Setting, run_steps: int, skip: int, precisions: list[str], command: str) -> dict[str, Any]:
    """All rounds: for each precision, `fit` (the answers of `fit`) and `bare` (seconds a step)."""
    found: dict[str, Any] = {name: {"fit": [], "bare": []} for name in precisions}
    others: list[float] = []
    with tempfile.TemporaryDirectory(prefix="saeforge-bench-") as name:
        folder = Path(name)
        data = folder / "rows.bin"
        write_data(data, setting.batch * setting.n_batches, setting.d_in, setting.seed)
        rows = torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.bfloat16).view(-1, setting.d_in)
        write_dataset(folder / "shards", {"train": rows}, shuffle=False)
        del rows
        for number in range(setting.rounds):
            for precision, entry in found.items():
                job = {**asdict(setting), "precision": precision, "run_steps": run_steps, "skip": skip}
                job |= {"shards": str(folder / "shards"), "run": str(folder / f"run-{precision}-{number}")}

                def one_fit(entry: dict[str, Any] = entry, job: dict[str, Any] = job) -> None:
                    entry["fit"].append(run_fit(job, folder, setting.threads))

                def one_bare(entry: dict[str, Any] = entry, precision: str = precision) -> None:
                    entry["bare"].append(run_bare(setting, precision, run_steps, skip, folder, data))

                for one in (one_fit, one_bare) if number % 2 else (one_bare, one_fit):
                    others.append(others_share(one))
            print(f"round {number + 1} of {setting.rounds}", file=sys.stderr, flush=True)
    return {
        "setting": asdict(setting),
        "run_steps": run_steps,
        "skip": skip,
        "machine": machine(),
        "command": command,
        "precisions": found,
        "others": [statistics.median(others), max(others)],
    }


def report(result: dict[str, Any]) -> str:
    """The table and the promise."""
    setting, host = result["setting"], result["machine"]
    lines = [
        f"# `saeforge fit` beside the bare step on CPU, {datetime.date.today():%Y-%m-%d}",
        "",
        f"`{result['command']}`",
        "",
        f"TopK, d {setting['d_in']:,}, d_sae {setting['d_sae']:,}, k {setting['k']}, batch {setting['batch']:,}, "
        f"{setting['threads']} threads;",
        f"{setting['rounds']} rounds of one run of {result['run_steps']} steps each, the first {result['skip']} not "
        "counted; fit reads bf16 shards,",
        "logs to CSV every 50 steps and writes ten checkpoints, as by default; their time is not in the table, since",
        "a run of any length has ten; no validation. While we measured, other processes used "
        f"{result['others'][0]:.0%} of the machine's",
        f"cores (median; at most {result['others'][1]:.0%}).",
        f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in host['versions'].items())}.",
        "",
        "| precision | bare, ms a step | fit, ms a step | bare, tokens/s | fit, tokens/s | fit of bare | range | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for precision, entry in result["precisions"].items():
        fits = [answer["seconds"] for answer in entry["fit"]]
        ratios = [bare / own for bare, own in zip(entry["bare"], fits, strict=True)]
        share, bare, own = statistics.median(ratios), statistics.median(entry["bare"]), statistics.median(fits)
        verdict = "met" if share >= GOAL else f"missed by {1 - share / GOAL:.0%}"
        lines.append(
            f"| {precision} | {milliseconds(bare)} | {milliseconds(own)} | {setting['batch'] / bare:,.0f} | "
            f"{setting['batch'] / own:,.0f} | {share:.3f} | {min(ratios):.3f} to {max(ratios):.3f} | "
            f"goal at least {GOAL:g}: {verdict} |"
        )
        logging = statistics.median(answer["logging"] for answer in entry["fit"])
        middle = statistics.median(answer["median_step"] for answer in entry["fit"])
        notes.append(
            f"* {precision}: reading out and logging takes {1000 * logging:.3f} ms a step, {logging / own:.2%} of it; "
            f"the median step of fit is {milliseconds(middle)} ms;"
        )
        saved = statistics.median(answer["checkpoint"] for answer in entry["fit"])
        whole = statistics.median(answer["with_checkpoints"] for answer in entry["fit"])
        notes.append(f"  a checkpoint takes {saved:.2f} s: with those of this run a step is {milliseconds(whole)} ms.")
    return "\n".join([*lines, "", *notes, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("d_in", "d_sae", "k", "batch", "n_batches", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setting(), name))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run_steps", type=int, default=160)
    parser.add_argument("--skip", type=int, default=10, help="first steps of a run that are not counted")
    parser.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--out", type=Path, help="report without its suffix; default: print only")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # of the process of a fit
    given = parser.parse_args()
    if given.job is not None:
        Path(f"{given.job}.out").write_text(json.dumps(fit(json.loads(given.job.read_text()))))
        return 0
    setting = Setting()
    setting = replace(setting, **{name: getattr(given, name) for name in asdict(setting) if hasattr(given, name)})
    command = shlex.join(["python", "scripts/bench_fit.py", *sys.argv[1:]])
    result = bench(setting, given.run_steps, given.skip, given.precision, command)
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
        sys.exit(f"bench_fit.py: {error}")

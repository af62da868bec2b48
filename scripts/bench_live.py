"""Live training beside its parts: the model's forward alone, the SAE's step alone, both at once, and sparsify.

    python scripts/bench_live.py --out docs/benchmarks/DATE-live-demo-cpu --peer-python PEER/bin/python

PEER is an environment with eai-sparsify==1.3.3 (left out: no comparison). Torch computes with one thread in each of the
two threads that compute, the model's and the trainer's, as if they were two devices; sparsify, which does one after the
other, gets both. In rounds, one of each after the other, the model both before and after live training: a machine that
is busy for a while is busy for both. A round begins when other work leaves the machine alone, or after `--patience`
seconds; the report says how many cores other work used all the same. The first round warms up; medians and ranges over
the others. About 30 s a round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality_judge import machine
from lightning.pytorch import Callback

from saeforge.data.tensor_source import TensorSource
from saeforge.demo import model_path
from saeforge.harvest import HarvestConfig
from saeforge.harvest.live import LiveSource
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.trainer import SAETrainer
from saeforge.variants import TopK

LAYER, BATCH, LANES, CONTEXT = 3, 2048, 8, 256
#: Share of the slower of both parts that live training has to reach.
GOAL = 0.9
QUIET = 0.1


class Clock(Callback):
    """The time after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Looks at the clock."""
        self.times.append(time.perf_counter())


class Others:
    """How many cores other processes use, from the kernel's counters; 0 where there are none."""

    def __init__(self) -> None:
        self.start = self._look()

    def cores(self) -> float:
        """Since the start, on average."""
        busy, own, now = (after - before for after, before in zip(self._look(), self.start, strict=True))
        return max(0.0, busy - own) / now

    @staticmethod
    def _look() -> tuple[float, float, float]:
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            fields = [0] * 8
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait
        return busy, sum(os.times()[:4]), time.perf_counter()


def wait_for_quiet(patience: float) -> None:
    """Waits until others use less than a tenth of a core, or as long as one may wait."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        others = Others()
        time.sleep(2)
        if others.cores() < QUIET:
            return


def fit(source: Any, steps: int, skip: int, d_sae: int, k: int, window_blocks: int) -> float:
    """Tokens/s of the steps after the first `skip`."""
    data = ActivationData.of(source, batch_size=BATCH, window_blocks=window_blocks, lanes=LANES)
    module = SAEModule(lambda i, o: TopK(i, o, d_sae=d_sae, k=k), data.d_in, data.d_out)
    clock = Clock()
    trainer = SAETrainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[clock],
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        default_root_dir=None,
    )
    trainer.fit(module, data)
    return (steps - skip) * BATCH / (clock.times[-1] - clock.times[skip - 1])


def open_source(folder: Path, given: argparse.Namespace) -> LiveSource:
    """The demo model over its text."""
    return LiveSource(
        HarvestConfig.build(
            None,
            {
                "model": "demo",
                "sites": [f"resid_post.{LAYER}"],
                "text": given.text,
                "out": str(folder),
                "n_tokens": given.tokens,
                "context_length": CONTEXT,
                "batch_contexts": 8,
                "bucket_rows": given.block_rows,
                "model_dtype": "float32",
                "device": "cpu",
            },
        ),
        validation_rows=1,
    )


def forward(source: LiveSource, blocks: range) -> float:
    """Seconds of the model alone for some blocks."""
    into = source.read_block("train", 0)
    start = time.perf_counter()
    for index in blocks:
        source.read_block("train", index, into)
    return time.perf_counter() - start


def peer(given: argparse.Namespace, folder: Path, tokens: Path, steps: int) -> dict[str, Any]:
    """sparsify on the same model, text and sizes."""
    job = {
        "model": str(model_path()),
        "tokens": str(tokens),
        "layer": LAYER,
        "d_sae": given.d_sae,
        "k": given.k,
        "batch": BATCH // CONTEXT,
        "steps": steps,
        "skip": 2,
        "threads": 2,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    command = [given.peer_python, str(Path(__file__).with_name("peer_sparsify.py")), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"sparsify failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="report without its suffix; default: print only")
    parser.add_argument("--peer-python", help="Python of an environment with eai-sparsify")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--tokens", type=int, default=300_000, help="of the text")
    parser.add_argument("--block-rows", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8, help="timed of each training, after two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60, help="longest wait for a quiet machine before a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    window_steps = LANES * given.block_rows // BATCH
    with tempfile.TemporaryDirectory(prefix="saeforge-bench-") as name:
        folder = Path(name)
        source = open_source(folder / "live", given)
        close, source.close = source.close, lambda: None  # type: ignore[method-assign]  # trainers close what they get
        windows = min(2 + given.windows, source.n_blocks("train") // LANES)
        steps, skip = windows * window_steps, 2 * window_steps  # the first window is made before the first step
        rows = TensorSource(torch.cat([source.read_block("train", i)[0] for i in range(16)]), validation_share=0.0)
        flat = np.load(folder / "live" / "tokens" / "train.tokens.npy")
        np.save(folder / "tokens.npy", flat[: len(flat) // CONTEXT * CONTEXT].reshape(-1, CONTEXT).astype(np.int64))
        rates: dict[str, list[float]] = {"model": [], "step": [], "live": [], "live2": [], "sparsify": []}
        version, busy = None, []
        for number in range(given.rounds + 1):
            wait_for_quiet(given.patience)
            others = Others()
            found = {"step": fit(rows, steps, skip, given.d_sae, given.k, window_blocks=4)}
            seconds = forward(source, range(1, 17))
            found["live"] = fit(source, steps, skip, given.d_sae, given.k, window_blocks=1)
            seconds += forward(source, range(17, 33))
            found["model"] = 32 * source.block_rows("train") / seconds
            torch.set_num_threads(2)
            found["live2"] = fit(source, steps, skip, given.d_sae, given.k, window_blocks=1)
            torch.set_num_threads(1)
            if given.peer_python:
                theirs = peer(given, folder, folder / "tokens.npy", steps=20)
                found["sparsify"], version = theirs["tokens_per_second"], theirs["version"]
            if number:  # the first round warms up
                for key, rate in found.items():
                    rates[key].append(rate)
                busy.append(others.cores())
            figures = ", ".join(f"{key} {rate:,.0f}" for key, rate in found.items())
            print(f"round {number} of {given.rounds}: {figures}; others {others.cores():.2f} cores", file=sys.stderr)
        close()
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "peer_python")}
    result = {"rates": rates, "machine": machine(), "sparsify": version, "settings": settings, "others": busy}
    words = ["PEER/bin/python" if word == given.peer_python else word for word in sys.argv[1:]]
    text = report(result, shlex.join(["python", "scripts/bench_live.py", *words]))
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".md").write_text(text)
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    return 0


def report(result: dict[str, Any], command: str) -> str:
    """The table, and live training against the slower of its parts, round by round."""
    rates, settings = result["rates"], result["settings"]
    names = {
        "model": "model alone (forward to the site, rows shuffled into blocks), one thread",
        "step": "SAE alone (`fit` from memory), one thread",
        "live": "live: both at once, one thread each",
        "live2": "live: both at once, two threads each, as it comes",
        "sparsify": f"sparsify {result['sparsify']}, Trainer on the CPU, two threads",
    }
    shares = [
        live / min(model, step) for live, model, step in zip(rates["live"], rates["model"], rates["step"], strict=True)
    ]
    share = statistics.median(shares)
    host = result["machine"]
    lines = [
        f"# Live training, {datetime.date.today():%Y-%m-%d}",
        "",
        f"`{command}`",
        "",
        f"The demo model (6.8M parameters, fp32, to layer {LAYER} of 6), top-k SAE {settings['d_sae']:,} latents, k "
        f"{settings['k']}, batches of {BATCH:,} tokens,",
        f"blocks of {settings['block_rows']:,} rows, contexts of {CONTEXT}. {len(rates['live'])} rounds.",
        f"Machine: {', '.join(host['cpu'])}, {host['cores']} cores, Python {host['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in host['versions'].items())}.",
        f"Other work used {statistics.median(result['others']):.2f} cores meanwhile ({min(result['others']):.2f} to "
        f"{max(result['others']):.2f} in a round).",
        "",
        "| what | tokens/s, median | range |",
        "|---|---|---|",
        *(
            f"| {names[key]} | {statistics.median(v):,.0f} | {min(v):,.0f} to {max(v):,.0f} |"
            for key, v in rates.items()
            if v
        ),
        "",
        f"* Live training runs at {share:.0%} of the slower of its parts (median over rounds; {min(shares):.0%} to "
        f"{max(shares):.0%}), {'met' if share >= GOAL else f'missed (goal {GOAL:.0%})'}.",
    ]
    if rates["sparsify"]:
        ratios = [a / b for a, b in zip(rates["live2"], rates["sparsify"], strict=True)]
        lines.append(
            f"* As it comes, {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}) sparsify's "
            "tokens/s on the same two cores (which runs all six layers)."
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

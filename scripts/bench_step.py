"""How long does one training step take? Ours beside its encoder product, its dense twin, and the peers' TopK.

    python scripts/bench_step.py --out docs/benchmarks/DATE-step-cpu \
        --peers-python sparsify=PEER1/bin/python saelens=PEER2/bin/python dictionary_learning=PEER3/bin/python
    python scripts/bench_step.py --variant l1_relu --out docs/benchmarks/DATE-step-l1-relu-cpu    (or gated; or
        jumprelu, batchtopk, matryoshka, with their plugins installed)
    python scripts/bench_step.py --sweep d_sae --out docs/benchmarks/DATE-step-by-d_sae-cpu       (or k, batch, threads)

Each peer lives in an environment of its own (torch 2.13.0 first, the CPU's build):
    python -m venv PEER1 && PEER1/bin/pip install torch==2.13.0 && PEER1/bin/pip install eai-sparsify==1.3.3
    python -m venv PEER2 && PEER2/bin/pip install torch==2.13.0 && PEER2/bin/pip install sae-lens==6.54.12
    python -m venv PEER3 && PEER3/bin/pip install torch==2.13.0 numpy safetensors einops tqdm nnsight
    PEER3/bin/pip install --no-deps dictionary-learning==0.1.0

Every contender is a process of its own (bench_step_worker.py, bench_step_peer.py) and sleeps on its stdin while another
is measured. All read the same file of random activations: variance that falls off like 1/i over random directions,
around a mean. Writes OUT.md and OUT.json; ends with 1 if our first losses are not those of dense autograd.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_quality_judge import machine
from bench_step_report import LOSS_TOLERANCE, PROMISES, loss_difference, report

from saeforge.errors import ConfigError, SaeforgeError

SCRIPTS = Path(__file__).parent
PEERS = ("sparsify", "saelens", "dictionary_learning")
#: A pause before each measurement, in which the contender before it comes to rest.
PAUSE = 0.1


@dataclass(frozen=True)
class Setting:
    """Sizes of a step and rhythm of the benchmark. `l0` is what all variants but topk are held at."""

    variant: str = "topk"
    d_in: int = 768
    d_sae: int = 12_288
    k: int = 32
    l0: float = 64.0
    batch: int = 2048
    n_batches: int = 64
    threads: int = 2
    rounds: int = 7
    steps: int = 3
    warmup: int = 3
    losses: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Contender:
    """What is measured: a name, the command of its worker, and what its job says besides the setting."""

    name: str
    command: tuple[str, ...]
    job: dict[str, Any]


def write_data(path: Path, rows: int, d: int, seed: int) -> None:
    """A raw file of (rows, d) bf16: Gaussian with eigenvalues 1/i in random directions, plus a mean of the same size.

    Coordinates have a mean square of about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scales = torch.arange(1, d + 1).float().rsqrt()
    mix = basis * (scales / scales.square().mean().sqrt())[:, None] / 2**0.5
    mean = torch.randn(d, generator=generator) / 2**0.5
    with path.open("wb") as file:
        for start in range(0, rows, 8192):
            part = torch.randn(min(8192, rows - start), d, generator=generator) @ mix + mean
            file.write(part.bfloat16().view(torch.int16).numpy().tobytes())


def contenders(setting: Setting, peers: dict[str, str], only: str = "") -> list[Contender]:
    """Everybody, or those whose name matches the expression `only`.

    Args:
        setting: peers run for topk alone.
        peers: interpreter of each peer.
        only: regular expression.
    """
    own = (sys.executable, str(SCRIPTS / "bench_step_worker.py"))
    found = [
        Contender(f"{title}, {precision}", own, {"contender": kind, "precision": precision})
        for kind, title in (("ours", "ours"), ("product", "encoder product"), ("dense", "dense twin"))
        for precision in ("fp32", "bf16")
    ]
    for peer, python in peers.items():
        for fused in (False, True):
            for precision in ("fp32", "bf16"):
                name = f"{peer}, {'fused Adam' if fused else 'as shipped'}, {precision}"
                job = {"contender": peer, "precision": precision, "fused": fused}
                found.append(Contender(name, (python, str(SCRIPTS / "bench_step_peer.py")), job))
    return [contender for contender in found if re.search(only, contender.name)]


class Worker:
    """A contender's process.

    Raises:
        SaeforgeError: with the end of what it said, if it ends early.
    """

    def __init__(self, contender: Contender, setting: Setting, folder: Path, data: Path) -> None:
        self.name = contender.name
        stem = re.sub(r"\W+", "-", contender.name)
        self._log = folder / f"{stem}.log"
        job = folder / f"{stem}.json"
        job.write_text(json.dumps({**asdict(setting), "data": str(data), **contender.job}))
        threads = str(setting.threads)
        # A thread that spins at a barrier takes the time of whoever is measured next.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": threads}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*contender.command, str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=environment,
            )
        self.said: dict[str, Any] = {}

    def ready(self) -> None:
        """Waits until it is built."""
        self.said = self._answer()

    def run(self, steps: int) -> dict[str, Any]:
        """Takes steps and returns its answer: `seconds` of each, `losses`, `peak_mib`, figures of its own."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"run {steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            end = self._log.read_text().strip()[-2000:]
            raise SaeforgeError(f"{self.name}: its process ended with code {code}; the end of what it said:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def measure(setting: Setting, chosen: list[Contender], folder: Path, data: Path) -> dict[str, Any]:
    """Runs all contenders in rounds.

    Returns:
        `contenders`: by name, `seconds` (mean per step, one a round), `peak_mib`, `versions`, and what else each says.
        `others`: the share of all cores that was not ours while we measured, median and largest.

    Raises:
        SaeforgeError: a process that fails, or an L0 that has left the range in which it should be.
    """
    workers: list[Worker] = []
    try:
        for contender in chosen:  # the next one starts while this one builds; all at once would take memory for nothing
            workers.append(Worker(contender, setting, folder, data))
            if len(workers) > 1:
                workers[-2].ready()
        workers[-1].ready()
        for worker in workers:
            worker.run(setting.warmup)
        answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
        others: list[float] = []
        for number in range(setting.rounds):
            turn = number % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                time.sleep(PAUSE)
                start, busy = time.perf_counter(), busy_seconds()
                answer = worker.run(setting.steps)
                free = (time.perf_counter() - start) * (os.cpu_count() or 1)
                others.append(min(1.0, max(0.0, busy_seconds() - busy - answer["cpu"]) / free))
                answers[worker.name].append(answer)
            print(f"round {number + 1} of {setting.rounds}", file=sys.stderr, flush=True)
        found = {worker.name: _summary(worker, answers[worker.name]) for worker in workers}
    finally:
        for worker in workers:
            worker.close()
    for name, entry in found.items():
        if setting.variant != "topk" and "l0" in entry and not 0.75 <= entry["l0"] / setting.l0 <= 1.5:
            raise SaeforgeError(f"{name}: mean L0 {entry['l0']:.1f} has left {setting.l0:g}; raise n_batches?")
    return {"contenders": found, "others": [statistics.median(others), max(others)]}


def first_losses(setting: Setting, chosen: list[Contender], folder: Path, data: Path) -> dict[str, list[float]]:
    """The first losses of ours and of the dense twin in fp32, and of ours in bf16, as far as they are chosen.

    All from the same start over the same batches, at the recipe's learning rate.
    """
    losses = {}
    for contender in chosen:
        if contender.name in ("ours, fp32", "dense twin, fp32", "ours, bf16") and setting.losses:
            worker = Worker(replace(contender, job={**contender.job, "still": False}), setting, folder, data)
            try:
                worker.ready()
                losses[contender.name] = worker.run(setting.losses)["losses"]
            finally:
                worker.close()
    return losses


def _summary(worker: Worker, answers: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {
        "seconds": [statistics.fmean(answer["seconds"]) for answer in answers],
        "peak_mib": max(answer["peak_mib"] for answer in answers),
        "versions": worker.said["versions"],
    }
    if answers[0]["losses"]:
        summary["last_loss"] = answers[-1]["losses"][-1]
    if "l0" in answers[0]:
        summary["l0"] = statistics.fmean(answer["l0"] for answer in answers)
        summary["dead"] = answers[-1]["dead"]
    return summary


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used, and that its host has taken away."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # idle, waiting for a disk


def bench(setting: Setting, peers: dict[str, str], only: str, command: str) -> dict[str, Any]:
    """One table's worth of figures: see `measure`; with the setting, the machine and the command."""
    with tempfile.TemporaryDirectory(prefix="saeforge-bench-") as name:
        folder = Path(name)
        data = folder / "rows.bin"
        write_data(data, setting.batch * setting.n_batches, setting.d_in, setting.seed)
        chosen = contenders(setting, peers, only)
        losses = first_losses(setting, chosen, folder, data)
        found = {"losses": losses, **measure(setting, chosen, folder, data)}
    return {"setting": asdict(setting), "machine": machine(), "command": command, **found}


def parse_peers(given: list[str]) -> dict[str, str]:
    """`name=path` of each peer's interpreter.

    Raises:
        ConfigError: an unknown name, or no interpreter there.
    """
    peers = {}
    for entry in given:
        name, _, path = entry.partition("=")
        if name not in PEERS:
            raise ConfigError(f"--peers-python {entry}: expected NAME=PATH with a name of {', '.join(PEERS)}")
        if not Path(path).is_file():
            raise ConfigError(f"--peers-python {entry}: no interpreter there; make the environment as --help says")
        peers[name] = str(Path(path).absolute())  # not resolved: a venv's python is a link
    return peers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(PROMISES), default=Setting.variant)
    for name, value in asdict(Setting()).items():
        if name != "variant":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--peers-python", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", default="", metavar="REGEX", help="contenders whose name matches")
    parser.add_argument("--sweep", choices=("d_sae", "k", "batch", "threads"))
    parser.add_argument("--out", type=Path, help="report without its suffix; default: print only")
    given = parser.parse_args()
    setting = Setting(**{name: getattr(given, name) for name in asdict(Setting())})
    command = shlex.join(["python", "scripts/bench_step.py", *sys.argv[1:]])
    if given.sweep is not None:
        from bench_step_sweep import sweep  # matplotlib, which only a sweep needs

        return sweep(setting, given.sweep, given.only, command, given.out)
    peers = parse_peers(given.peers_python) if setting.variant == "topk" else {}
    shown = re.sub(r"=\S*/bin/python", "=PEER/bin/python", command)  # where environments lie is nobody's business
    result = bench(setting, peers, given.only, shown)
    text = report(result)
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".md").write_text(text)
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    losses = result["losses"]
    names = ("ours, fp32", "dense twin, fp32")
    equal = not all(name in losses for name in names) or (
        loss_difference(*(losses[name] for name in names)) <= LOSS_TOLERANCE
    )
    return 0 if equal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SaeforgeError as error:
        sys.exit(f"bench_step.py: {error}")

"""Our variants beside SAELens's same architectures, on the same rows of synthetic activations with known features.

SAELens lives in an environment of its own:
    python -m venv peer && peer/bin/pip install 'sae-lens==6.54.12' 'transformer-lens<4' torch==2.13.0
The small protocol (2,048 features in 256 dimensions, 512 latents, 20 million rows; the rows take 10 GB):
    pip install -e '.[synthetic]'
    python scripts/bench_synthetic.py --data synthetic-rows --peer-python peer/bin/python --out synthetic.json \
        --report docs/benchmarks/synthetic.md

Ours and theirs alternate run by run. Runs are saved one by one; the same command goes on after an interruption. Both
get the same number of rows, batch size, constant learning rate and threads; all else is SAELens's default or
recommended recipe (PEERS below), and what makes ours the same architecture in the same units (OURS). L0 is that of the
saved SAE on held-out rows; where it is tuned by a penalty, measures are interpolated linearly between two runs next to
the wanted L0. With `--match l1_relu=4` SAELens trains once a seed, at this value of its own penalty, and it is ours
that is brought to the L0 it got there: a third of the hours. Both are judged by saeforge's measures; SAELens's own ones
of its SAEs are kept beside them, and must agree.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_synthetic_report import write_report

from saeforge.benchmark.cells import Cells
from saeforge.benchmark.protocol import L0, PROTOCOLS, Protocol, judge, knob_of, train_one
from saeforge.benchmark.run import following
from saeforge.benchmark.search import Knob
from saeforge.data.synthetic import PRESETS, SyntheticFiles, SyntheticSource, write_rows
from saeforge.errors import SaeforgeError
from saeforge.formats import read
from saeforge.optim import RowAdam

PEER_SCRIPT = Path(__file__).with_name("bench_synthetic_peer.py")


@dataclass(frozen=True)
class Peer:
    """SAELens's architecture beside a variant of ours: its name, what sets its L0, and its recommended options."""

    architecture: str
    knob: Knob
    options: dict[str, Any]
    warm_up: str = ""  # option that takes the steps over which the penalty rises: 5% of the run, as in its tutorial


PEERS: dict[str, Peer] = {
    "topk": Peer("topk", Knob("k", exact=True, rising=True), {}),
    "batchtopk": Peer("batchtopk", Knob("k", exact=True, rising=True), {}),
    "matryoshka": Peer("matryoshka_batchtopk", Knob("k", exact=True, rising=True), {}),
    "l1_relu": Peer("standard", Knob("l1_coefficient", 2.0), {}, "l1_warm_up_steps"),
    "gated": Peer("gated", Knob("l1_coefficient", 12.0), {}, "l1_warm_up_steps"),
    # Its documentation's recipe for a wanted L0; the target is what is tuned, since L0 of the saved SAE is what counts.
    "jumprelu": Peer(
        "jumprelu",
        Knob("target_l0", 8.0, rising=True),
        {
            "jumprelu_sparsity_loss_mode": "quadratic",
            "l0_coefficient": 5.0,
            "jumprelu_bandwidth": 0.01,
            "jumprelu_init_threshold": 0.01,
        },
        "l0_warm_up_steps",
    ),
}
#: Options of ours that make the architecture the same; matryoshka's widths are those of `matryoshka_widths`. SAELens
#: trains on rows as they come (norm 15 here); most of ours scale them to norm 1, where the same learning rate moves
#: biases 15 times as fast relative to activations. Here both have the same units. Its AuxK weighs `dead / k_aux` times
#: the error's own size, 0.17 of the variance here; ours divides by that.
RAW: dict[str, Any] = {"input_scale": "none"}
FREE: dict[str, Any] = {**RAW, "decoder_norm": "free", "aux": 1 / 8}
OURS: dict[str, dict[str, Any]] = {
    "topk": {**RAW, "encoder_init": "tied"},
    "batchtopk": FREE,
    "matryoshka": FREE,
    "l1_relu": {**RAW, "pre_bias": True},
    "gated": RAW,
    "jumprelu": {
        **RAW,
        "loss": "quadratic",
        "sparsity": 5.0,
        "sparsity_warmup_share": 0.05,
        "bandwidth": 0.01,
        "threshold_init": 0.01,
        "threshold_parameter": "linear",
    },
}
#: Trained as SAELens trains all of its own: Adam(0.9, 0.999) without warm-up, every gradient clipped to norm 1, as
#: RowAdam does unless told otherwise. DeepMind's recipe has Adam(0, 0.999) and a warm-up.
AS_THEIRS = {"jumprelu"}
#: Where ours starts: at SAELens's own values, since the units are the same.
KNOBS = {"jumprelu": "l0_target:8:rising", "l1_relu": "l1:3", "gated": "l1:6"}


def matryoshka_widths(d_sae: int) -> list[int]:
    """The published prefixes 128, 512, 2048 of 4096, in the same proportion."""
    return [d_sae // 32, d_sae // 8, d_sae // 2]


def train_peer(
    python: str, data: Path, protocol: Protocol, peer: Peer, value: float, seed: int, threads: int
) -> dict[str, Any]:
    """Trains one SAE of SAELens in a process of its own; returns our measures of it, its own, and its wall time.

    Raises:
        SaeforgeError: the process fails, or its SAE as we read it does not measure as it says.
    """
    source = SyntheticFiles(data, rows=protocol.samples)
    options = {**peer.options, peer.knob.option: int(value) if peer.architecture == "topk" else value}
    if peer.warm_up:
        options[peer.warm_up] = protocol.samples // protocol.batch_size // 20
    if peer.architecture.startswith("matryoshka"):
        options["matryoshka_widths"] = matryoshka_widths(protocol.d_sae)
    with tempfile.TemporaryDirectory() as name:
        job = {
            "data": str(data),
            "out": name,
            "architecture": peer.architecture,
            "options": options,
            "d_in": source.widths[0],
            "d_sae": protocol.d_sae,
            "samples": protocol.samples,
            "batch_size": protocol.batch_size,
            "lr": protocol.lr,
            "seed": seed,
            "threads": threads,
        }
        run_peer(python, job)
        result = json.loads((Path(name) / "result.json").read_text())
        measures = judge(read(name, "saelens"), source)
    for key in ("l0", "mcc", "f1", "explained_variance"):
        # Where a value is near a threshold, two products of the same numbers differ in their last bits.
        if abs(measures[key] - result["own"][key]) > 2e-3 * max(1.0, abs(measures[key])):
            raise SaeforgeError(
                f"SAELens's {peer.architecture}: {key} is {result['own'][key]}, we find {measures[key]}"
            )
    return {
        **measures,
        **{key: result[key] for key in ("seconds", "cpu_seconds", "version", "torch", "own")},
        "options": options,
    }


def run_peer(python: str, job: dict[str, Any]) -> None:
    """Runs the peer's script.

    Raises:
        SaeforgeError: it fails.
    """
    path = Path(job["out"]) / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run([python, str(PEER_SCRIPT), str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        sys.stderr.write(done.stderr.decode()[-4000:])
        raise SaeforgeError(f"the peer's process failed with code {done.returncode}; its message stands above")


def train_ours(data: Path, protocol: Protocol, variant: str, knob: Knob, value: float, seed: int) -> dict[str, Any]:
    """Trains and judges one of ours."""
    source = SyntheticFiles(data, rows=protocol.samples)
    options = {**OURS.get(variant, {}), knob.option: int(value) if knob.exact else value}
    if variant == "matryoshka":
        ends = [0, *matryoshka_widths(protocol.d_sae), protocol.d_sae]
        options["groups"] = [end - start for start, end in itertools.pairwise(ends)]
    before = time.process_time()
    training = {}
    if variant in AS_THEIRS:
        assert protocol.lr is not None
        training = {"lr": None, "optimizer": functools.partial(RowAdam, lr=protocol.lr), "lr_warmup_steps": 0}
    sae, seconds = train_one(source, protocol, variant, options, seed, training=training)
    times = {"seconds": seconds, "cpu_seconds": time.process_time() - before}
    return {**judge(sae, source), **times, "options": options, "version": None, "torch": torch.__version__}


def peer_l0(cells: Cells, variant: str, seed: int) -> float | None:
    """L0 of the peer's only run of a seed, which ours is matched to; None: not trained yet."""
    runs = cells.of(variant=variant, side="theirs", seed=seed)
    return float(runs[0]["l0"]) if runs else None


def next_run(
    arguments: argparse.Namespace, cells: Cells, variant: str, side: str, knob: Knob, target: float, seed: int
) -> float | None:
    """The setting to train next for one side; None: nothing is missing."""
    match = arguments.match.get(variant)
    if match is None:
        return following(cells, variant, side, knob, target, seed)
    reached = peer_l0(cells, variant, seed)
    if side == "theirs":
        return match if reached is None else None
    return None if reached is None else following(cells, variant, side, knob, reached, seed)


def benchmark(arguments: argparse.Namespace, protocol: Protocol, cells: Cells) -> None:
    """All runs that are not saved yet: seed by seed and variant by variant, ours and theirs in turn."""
    for seed in range(arguments.seeds):
        for target in arguments.l0:
            for variant in arguments.variants:
                knobs = {"theirs": PEERS[variant].knob, "ours": knob_of(variant, KNOBS, OURS.get(variant, {}), target)}
                if arguments.peer_python is None:
                    del knobs["theirs"]
                going = True
                while going:
                    going = False
                    for side, knob in knobs.items():
                        value = next_run(arguments, cells, variant, side, knob, target, seed)
                        if value is None:
                            continue
                        going = True
                        about = {"variant": variant, "side": side, "seed": seed, "target": target, "value": value}
                        cells.add({**about, "exact": knob.exact, **run_one(arguments, protocol, variant, knob, about)})
                        say(cells.content["cells"][-1], knob)


def run_one(
    arguments: argparse.Namespace, protocol: Protocol, variant: str, knob: Knob, about: dict[str, Any]
) -> dict[str, Any]:
    """Trains and judges the SAE that `about` names."""
    if about["side"] == "ours":
        return train_ours(arguments.data, protocol, variant, knob, about["value"], about["seed"])
    python, threads = arguments.peer_python, arguments.threads
    return train_peer(python, arguments.data, protocol, PEERS[variant], about["value"], about["seed"], threads)


def say(record: dict[str, Any], knob: Knob) -> None:
    """A line about a run that is done."""
    print(
        f"{record['variant']:10} {record['side']:6} seed {record['seed']}  {knob.option} {record['value']:.5g}  "
        f"L0 {record['l0']:.2f}  F1 {record['f1']:.4f}  MCC {record['mcc']:.4f}  "
        f"EV {record['explained_variance']:.4f}  dead {record['dead']}  {record['seconds']:.0f} s",
        flush=True,
    )


def parse_matches(given: list[str]) -> dict[str, float]:
    """`VARIANT=VALUE` of the variants whose L0 is tuned.

    Raises:
        SaeforgeError: anything else.
    """
    matches = {}
    for text in given:
        variant, _, value = text.partition("=")
        if variant not in PEERS or PEERS[variant].knob.exact:
            tuned = ", ".join(name for name, peer in PEERS.items() if not peer.knob.exact)
            raise SaeforgeError(f"--match {text}: expected one of {tuned}, then = and the value of SAELens's option")
        try:
            matches[variant] = float(value)
        except ValueError as error:
            raise SaeforgeError(f"--match {text}: {value!r} is no number") from error
    return matches


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the rows; they are written if missing")
    parser.add_argument("--peer-python", help="interpreter with sae-lens; leave out to run ours only")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--variants", nargs="+", default=["topk", "l1_relu", "gated"], choices=sorted(PEERS))
    parser.add_argument("--l0", nargs="+", type=float, help="wanted L0; default: the preset's first")
    parser.add_argument(
        "--match",
        nargs="*",
        default=[],
        metavar="VARIANT=VALUE",
        help="one run of SAELens a seed; ours at the L0 it got",
    )
    parser.add_argument("--samples", type=int, help="rows of a run; default: the preset's")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON with every run")
    parser.add_argument("--report", type=Path, help="Markdown")
    arguments = parser.parse_args()
    arguments.match = parse_matches(arguments.match)
    torch.set_num_threads(arguments.threads)
    base = PROTOCOLS[arguments.preset]
    given = {"samples": arguments.samples, "batch_size": arguments.batch_size}
    protocol = Protocol(**{**base.to_json(), **{key: value for key, value in given.items() if value is not None}})
    arguments.l0 = arguments.l0 or [L0[arguments.preset][0]]
    if not (arguments.data / "synthetic.json").exists():
        print(f"writing {protocol.samples:,} rows to {arguments.data}", flush=True)
        source = SyntheticSource(PRESETS[arguments.preset], rows=protocol.samples, dtype=torch.bfloat16)
        write_rows(source, arguments.data, threads=arguments.threads)
    rows = SyntheticFiles(arguments.data, rows=protocol.samples)
    header = {"protocol": protocol.to_json(), "data": rows.fingerprint, "threads": arguments.threads}
    cells = Cells(arguments.out, header)
    benchmark(arguments, protocol, cells)
    if arguments.report is not None:
        write_report(cells, arguments.variants, arguments.l0, arguments.match, arguments.report)


if __name__ == "__main__":
    main()

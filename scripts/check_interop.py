"""Our exports loaded by the tools they are for, and theirs loaded here, on real activations.

    python scripts/check_interop.py --data data/quickstart --peer-python saelens=PY --peer-python sparsify=PY \
        --peer-python dictionary_learning=PY

PY is the interpreter of an environment with sae-lens==6.54.12, eai-sparsify==1.3.3 or dictionary-learning==0.1.0 (each
its own). Every installed variant, and three transcoders, are trained for 60 steps on the dataset, exported to every
format that takes them, loaded there and compared with themselves on 4,096 rows; then the tool makes SAEs of its own,
random ones and (SAELens) trained ones, which are imported. Passed: the same active latents in 99.9% of the rows, and
||out - out'|| / ||out'|| at most 1e-5 over these.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import saeforge
from saeforge import formats
from saeforge.data.shard_source import ShardSource
from saeforge.errors import SaeforgeError
from saeforge.registry import VARIANTS

HERE = Path(__file__).parent
ROWS, TRAIN_ROWS, D_SAE, K = 4096, 16_384, 512, 16
STEPS, BATCH = 60, 1024
SAME_ROWS, LARGEST_ERROR = 0.999, 1e-5
TOOLS = ("saelens", "sparsify", "dictionary_learning")


def main() -> int:
    """Prints a table; 1 if a row of it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a dataset of saeforge")
    parser.add_argument("--peer-python", action="append", required=True, metavar="TOOL=PYTHON")
    parser.add_argument("--variants", nargs="*", help="default: every installed one")
    given = parser.parse_args()
    peers = dict(pair.split("=", 1) for pair in given.peer_python)
    if unknown := sorted(peers.keys() - set(TOOLS)):
        parser.error(f"--peer-python {unknown[0]}: expected one of {', '.join(TOOLS)}")
    x, held_out = read_rows(given.data)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_file({"x": held_out}, work / "rows.safetensors")
        exported = export_all(work, x, given.variants or VARIANTS.names(), list(peers))
        failed = 0
        print(f"\n{'format':<20} {'SAE':<32} {'direction':<10} {'L0':>6} {'same rows':>9} {'rel. error':>10}")
        for tool, python in peers.items():
            ours = [place for place in exported if place.name.startswith(f"{tool}-")]
            call(python, "load", tool, *ours)
            theirs = make_theirs(work, tool, python)
            for place in ours:
                failed += compare(tool, place.name.partition("-")[2], "export", place)
            for place in theirs:
                failed += compare(tool, place.name, "import", place)
    print(f"\n{failed} failed" if failed else "\nall passed")
    return int(failed > 0)


def read_rows(data: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on, and 4,096 held-out ones."""
    source = ShardSource(data)
    found = []
    for split, wanted in (("train", TRAIN_ROWS), ("validation", ROWS)):
        blocks: list[torch.Tensor] = []
        for block in range(source.n_blocks(split)):
            blocks.append(source.read_block(split, block)[0].float())
            if sum(map(len, blocks)) >= wanted:
                break
        found.append(torch.cat(blocks)[:wanted].contiguous())
    return found[0], found[1]


def export_all(work: Path, x: torch.Tensor, variants: list[str], tools: list[str]) -> list[Path]:
    """Trains and exports; what a format refuses is printed with its reason."""
    cases: list[tuple[str, str, dict[str, Any]]] = [(variant, variant, {}) for variant in variants]
    cases.append(("transcoder", "l1_relu", {"target": x[:, : x.shape[1] // 2].contiguous()}))
    cases.append(("skip_transcoder", "topk", {"target": x.roll(1, 1), "training": {"skip": True}, "pre_bias": False}))
    cases.append(("skip_threshold", "l1_relu", {"target": x.roll(1, 1), "training": {"skip": True}}))
    places = []
    for name, variant, more in cases:
        options = {"d_sae": D_SAE} | ({"k": K} if "topk" in variant or variant == "matryoshka" else {}) | more
        try:
            sae = saeforge.train(x, variant=variant, tokens=STEPS * BATCH, batch_size=BATCH, seed=0, **options)
        except SaeforgeError as error:
            print(f"{'':<20} {name:<32} not trained on one source: {error}")
            continue
        sae.save(work / "own" / name)
        for tool in tools:
            place = work / f"{tool}-{name}"
            try:
                formats.write(sae, place, tool)
                places.append(place)
            except SaeforgeError as error:
                print(f"{tool:<20} {name:<32} refused: {error}")
    return places


def make_theirs(work: Path, tool: str, python: str) -> list[Path]:
    """SAEs of the tool's own making."""
    theirs = work / f"theirs-{tool}"
    arguments = [f"--out={theirs}", f"--rows={work / 'rows.safetensors'}", "--d_in=256", f"--d_sae={D_SAE}", f"--k={K}"]
    arguments[2] = f"--d_in={load_file(work / 'rows.safetensors')['x'].shape[1]}"
    subprocess.run(
        [python, str(HERE / "make_format_golden.py"), tool, *arguments], check=True, stdout=subprocess.DEVNULL
    )
    found = sorted((theirs / tool).iterdir())
    if tool == "saelens":
        call(python, "train", tool, work / "trained")
        found += sorted((work / "trained").glob("trained_*"))
    return found


def call(python: str, what: str, tool: str, *places: Path) -> None:
    """Runs the other half in the tool's environment."""
    command = [python, str(HERE / "check_interop_peer.py"), what, tool, *map(str, places)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def compare(tool: str, name: str, direction: str, place: Path) -> bool:
    """One row of the table; True if it fails. Exports are compared with the SAE that was exported."""
    expected = load_file(place / "expected.safetensors")
    x = load_file(
        next(p for p in (place.parent, *place.parents) if (p / "rows.safetensors").exists()) / "rows.safetensors"
    )["x"]
    sae = saeforge.load(place.parent / "own" / name) if direction == "export" else formats.read(place, tool)
    code = sae.encode(x).to_dense()
    # Where a pre-activation is a rounding away from its threshold, the latent jumps: such a row counts as not the same,
    # and the error is that of the rows that are.
    agree = ((code != 0) == (expected["acts"] != 0)).all(1)
    same = float(agree.float().mean())
    error = float((sae(x) - expected["out"])[agree].norm() / expected["out"][agree].norm())
    fails = not (same >= SAME_ROWS and error <= LARGEST_ERROR)
    l0 = float((expected["acts"] != 0).sum(1).float().mean())
    print(f"{tool:<20} {name:<32} {direction:<10} {l0:6.1f} {same:9.5f} {error:10.1e}{'  FAILS' if fails else ''}")
    return fails


if __name__ == "__main__":
    sys.exit(main())

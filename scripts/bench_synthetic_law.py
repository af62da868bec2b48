"""Does our synthetic data fall by the same law as SAELens's own generator? Firing rates, magnitudes, norms, cosines.

    python scripts/bench_synthetic_law.py --data synthetic-rows --peer-python peer/bin/python --out law.md

The folder holds rows of `saeforge.data.synthetic.write_rows`, whose configuration both sides draw anew from: ours from
`SyntheticSource`, theirs from `sae_lens.synthetic` (scripts/bench_synthetic_peer.py). Directions and correlations are
drawn by different generators, so sums over a level of the hierarchy are compared, not single features.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_synthetic import run_peer

from saeforge.benchmark.report import markdown
from saeforge.data.synthetic import SyntheticConfig, SyntheticSource


def ours(config: SyntheticConfig, samples: int) -> dict[str, Any]:
    """How our rows fall; the same fields as the peer's law.json."""
    source = SyntheticSource(config, rows=samples, validation_rows=0)
    n = config.features
    counts, sums = np.zeros(n), np.zeros(n)
    norms, active = [], []
    for block in range(source.n_blocks("train")):
        activity = source.activity("train", block)
        counts += np.bincount(activity.features, minlength=n)
        sums += np.bincount(activity.features, weights=activity.values, minlength=n)
        active.append(np.diff(activity.offsets))
        norms.append(activity.activations(source.truth).norm(dim=1).numpy())
    norm, count = np.concatenate(norms), np.concatenate(active)
    cosines = (source.truth.directions @ source.truth.directions.T).abs().fill_diagonal_(0)
    return {
        "rows": len(norm),
        "rates": (counts / len(norm)).tolist(),
        "magnitudes": (sums / np.maximum(counts, 1)).tolist(),
        "l0": [float(count.mean()), float(count.std())],
        "norm": [float(norm.mean()), float(norm.std())],
        "mean_max_cosine": float(cosines.max(1).values.mean()),
    }


def table(config: SyntheticConfig, laws: dict[str, dict[str, Any]]) -> list[list[str]]:
    """What is compared, line by line."""
    bounds = [0, *np.cumsum(config.level_sizes).tolist(), config.features]
    names = [f"level {level}" for level in range(len(bounds) - 2)] + ["free"]
    rows = [["", *laws]]

    def add(name: str, of: Any) -> None:
        rows.append([name, *(of(law) for law in laws.values())])

    add("L0, mean ± sd over rows", lambda law: "{:.3f} ± {:.3f}".format(*law["l0"]))
    add("norm, mean ± sd over rows", lambda law: "{:.3f} ± {:.3f}".format(*law["norm"]))
    add("mean over features of the largest cosine", lambda law: f"{law['mean_max_cosine']:.4f}")
    for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
        part = slice(start, stop)
        add(f"{name}, active features of a row", lambda law, part=part: f"{sum(law['rates'][part]):.4f}")

        def magnitude(law: dict[str, Any], part: slice = part) -> str:
            rates, sizes = (np.array(law[key][part]) for key in ("rates", "magnitudes"))
            return f"{(rates * sizes).sum() / rates.sum():.4f}"

        add(f"{name}, mean magnitude", magnitude)
    return rows


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="interpreter with sae-lens")
    parser.add_argument("--samples", type=int, default=409_600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = SyntheticConfig.from_json(json.loads((arguments.data / "synthetic.json").read_text())["config"])
    job = {"mode": "law", "data": str(arguments.data), "samples": arguments.samples, "seed": 0}
    with tempfile.TemporaryDirectory() as name:
        run_peer(arguments.peer_python, {**job, "out": name, "threads": arguments.threads})
        theirs = json.loads((Path(name) / "law.json").read_text())
    laws = {"saeforge": ours(config, arguments.samples), "SAELens": theirs}
    text = markdown(table(config, laws))
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()

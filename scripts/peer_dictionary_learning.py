"""Trains dictionary_learning's TopKTrainer on batches that bench_quality.py wrote; runs in an environment of its own.

bench_quality.py starts it. By hand (the environment is described at the head of bench_quality.py):
    PEER/bin/python scripts/peer_dictionary_learning.py JOB.json

JOB.json names everything: `batches` (.npy, (steps, rows, d); int16 holds the bits of bfloat16), `check` (.npy, raw rows
to reconstruct at the end, so that the caller can prove that it understood the weights), `scale`, `d_sae`, `k`, `lr`,
`warmup_steps`, `decay_start`, `dead_after_tokens`, `seed`, `threads`, `out` (.safetensors; figures go to the same
name with .json). Imports nothing of saeforge.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from safetensors.torch import save_file


def rows_of(array: np.ndarray, scale: float) -> torch.Tensor:
    """Rows as the trainer gets them: fp32, scaled to a mean squared norm of 1, as `normalize_activations` does."""
    rows = torch.from_numpy(np.array(array))
    if rows.dtype == torch.int16:
        rows = rows.view(torch.bfloat16)
    return rows.float() * scale


def main() -> None:
    """Trains, saves the weights one latent per row, and writes what was seen."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    batches = np.load(job["batches"], mmap_mode="r")
    steps, _, d = batches.shape
    trainer = TopKTrainer(
        steps=steps,
        activation_dim=d,
        dict_size=job["d_sae"],
        k=job["k"],
        layer=0,  # only stored in its config
        lm_name="saved activations",
        lr=job["lr"],
        warmup_steps=job["warmup_steps"],
        decay_start=job["decay_start"],
        seed=job["seed"],
        device="cpu",
    )
    # A plain attribute of 10 million in its constructor: longer than this whole run, so AuxK would never act.
    trainer.dead_feature_threshold = job["dead_after_tokens"]
    start = time.perf_counter()
    dead_most = 0
    for step in range(steps):
        trainer.update(step, rows_of(batches[step], job["scale"]))
        dead_most = max(dead_most, int(trainer.dead_features))
        if step % 100 == 0:
            print(f"peer step {step} of {steps}", flush=True)
    seconds = time.perf_counter() - start
    ae = trainer.ae
    with torch.no_grad():
        check = ae(rows_of(np.load(job["check"]), job["scale"]))
    weights = {
        "W_enc": ae.encoder.weight,
        "b_enc": ae.encoder.bias,
        "W_dec": ae.decoder.weight.T,
        "b_dec": ae.b_dec,
        "check": check,
    }
    out = Path(job["out"])
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, str(out))
    figures = {
        "seconds": seconds,
        "dead_at_most": dead_most,
        "dead_at_end": int(trainer.dead_features),
        "k_aux": trainer.top_k_aux,
        "versions": {name: metadata.version(name) for name in ("dictionary-learning", "torch", "numpy", "nnsight")},
    }
    out.with_suffix(".json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()

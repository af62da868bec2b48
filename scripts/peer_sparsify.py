"""Trains a sparsify SAE on a language model, as its README does; runs in an environment of its own.

bench_live.py starts it. By hand:
    PEER/bin/python scripts/peer_sparsify.py JOB.json

JOB.json: `model` (folder), `tokens` (.npy, (contexts, length)), `layer`, `d_sae`, `k`, `batch` (contexts a step),
`steps`, `skip` (first steps that are not timed), `threads`. Prints one line of JSON: tokens/s of the timed steps. The
`sparsify` command itself asks for CUDA; this is its Trainer, which it calls, on the CPU. Imports nothing of saeforge.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sparsify import SaeConfig, TrainConfig, Trainer
from transformers import AutoModel


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    tokens = np.load(job["tokens"])[: job["batch"] * job["steps"]]
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    config = TrainConfig(
        SaeConfig(num_latents=job["d_sae"], k=job["k"]),
        batch_size=job["batch"],
        layers=[job["layer"]],
        log_to_wandb=False,
        save_every=10**9,
    )
    trainer = Trainer(config, dataset, AutoModel.from_pretrained(job["model"], dtype=torch.float32))
    trainer.save = lambda: None  # at the end; not what is timed
    optimizer = trainer.optimizers[0]
    step, times = optimizer.step, []

    def timed(*args, **kwargs):
        result = step(*args, **kwargs)
        times.append(time.perf_counter())
        return result

    optimizer.step = timed
    trainer.fit()
    steps = len(times) - 1 - job["skip"]
    rate = steps * job["batch"] * tokens.shape[1] / (times[-1] - times[job["skip"]])
    print(json.dumps({"tokens_per_second": rate, "version": metadata.version("eai-sparsify")}))


if __name__ == "__main__":
    main()

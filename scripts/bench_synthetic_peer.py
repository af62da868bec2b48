"""One SAE of SAELens on rows that saeforge wrote; run by scripts/bench_synthetic.py inside SAELens's environment.

    PEER_PYTHON scripts/bench_synthetic_peer.py job.json

The job names a folder of `saeforge.data.synthetic.write_rows`, the architecture with its options, samples, batch size,
learning rate, seed and threads. Written to its `out`: the SAE as SAELens saves it for inference, and result.json with
the wall time of training and SAELens's own measures of that saved SAE on the held-out rows. With `"mode": "law"`
nothing is trained: SAELens's own generator makes rows of the same configuration, and law.json tells how they fall.

It imports nothing of saeforge.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file


def batches(path: Path, rows: int, first: int) -> Iterator[torch.Tensor]:
    """Float32 batches in file order from batch `first` on, round and round."""
    array = np.load(path, mmap_mode="r")
    here = len(array) // rows
    step = first % here
    while True:
        yield to_rows(array[step * rows : (step + 1) * rows])
        step = (step + 1) % here


def to_rows(array: np.ndarray) -> torch.Tensor:
    """(rows, d) float32 from an array of float32, or of uint16 = the bits of bfloat16."""
    copied = torch.from_numpy(np.array(array.view(np.int16) if array.dtype == np.uint16 else array))
    return copied.view(torch.bfloat16).float() if array.dtype == np.uint16 else copied


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Trains as `SyntheticSAERunner` does, from a file instead of the generator; saves for inference."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    rows, steps = job["batch_size"], job["samples"] // job["batch_size"]
    torch.manual_seed(job["seed"])
    sae_class, config_class = get_sae_training_class(job["architecture"])
    sae = sae_class(config_class(d_in=job["d_in"], d_sae=job["d_sae"], **job["options"]))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * rows,
        device="cpu",
        autocast=False,
        lr=job["lr"],
        lr_end=job["lr"] / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=rows,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=100,
    )
    data = batches(Path(job["data"]) / "train.npy", rows, job["seed"] * 7919)
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=data)
    start, cpu_start = time.perf_counter(), time.process_time()
    trained = trainer.fit()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    trained.save_inference_model(job["out"])
    return times


@torch.no_grad()
def judge(job: dict[str, Any]) -> dict[str, Any]:
    """SAELens's measures of the saved SAE on the held-out rows."""
    from sae_lens import SAE
    from sae_lens.evals import ExplainedVarianceCalculator
    from sae_lens.synthetic import evals

    folder = Path(job["data"])
    directions = load_file(folder / "truth.safetensors")["directions"]
    truth = load_file(folder / "validation_truth.safetensors")
    array = np.load(folder / "validation.npy", mmap_mode="r")
    sae = SAE.load_from_disk(job["out"])
    sae.eval()
    l0, dead, shrinkage = evals.L0Calculator(), evals.DeadLatentsCalculator(len(sae.W_dec)), evals.ShrinkageCalculator()
    variance, detection = ExplainedVarianceCalculator(), evals.ClassificationMetricsCalculator(sae.W_dec, directions)
    offsets = truth["offsets"]
    for start in range(0, len(array), 4096):
        x = to_rows(array[start : start + 4096])
        code = sae.encode(x)
        rebuilt = sae.decode(code)
        features = torch.zeros(len(x), len(directions))
        first, last = int(offsets[start]), int(offsets[start + len(x)])
        row = torch.repeat_interleave(torch.arange(len(x)), offsets[start : start + len(x) + 1].diff())
        features[row, truth["features"][first:last]] = truth["values"][first:last]
        l0.add_batch(code)
        dead.add_batch(code)
        shrinkage.add_batch(rebuilt, x)
        variance.add_batch(rebuilt, x)
        detection.add_batch(code, features)
    found = detection.compute()
    return {
        "l0": l0.compute(),
        "dead": dead.compute(),
        "shrinkage": shrinkage.compute(),
        "explained_variance": float(variance.compute()),
        "mcc": evals.mean_correlation_coefficient(sae.W_dec, directions),
        "uniqueness": evals.feature_uniqueness(sae.W_dec, directions),
        "precision": found.precision,
        "recall": found.recall,
        "f1": found.f1_score,
        "accuracy": found.accuracy,
    }


def law(job: dict[str, Any]) -> dict[str, Any]:
    """How rows of SAELens's own generator fall under the configuration in the data's synthetic.json."""
    from sae_lens.synthetic import firing_magnitudes, synthetic_model
    from sae_lens.synthetic.firing_probabilities import ZipfianFiringProbabilityConfig
    from sae_lens.synthetic.hierarchy import HierarchyConfig

    c = json.loads((Path(job["data"]) / "synthetic.json").read_text())["config"]
    torch.manual_seed(job["seed"])
    model = synthetic_model.SyntheticModel(
        synthetic_model.SyntheticModelConfig(
            num_features=c["features"],
            hidden_dim=c["d_in"],
            firing_probability=ZipfianFiringProbabilityConfig(c["zipf"], c["max_rate"], c["min_rate"]),
            hierarchy=HierarchyConfig(
                total_root_nodes=c["roots"],
                branching_factor=c["branching"],
                max_depth=c["depth"],
                mutually_exclusive_portion=float(c["exclusive"]),
                compensate_probabilities=True,
                scale_children_by_parent=c["scale_by_parent"],
            ),
            orthogonalization=synthetic_model.OrthogonalizationConfig(c["orthogonal_steps"], c["orthogonal_lr"]),
            correlation=synthetic_model.LowRankCorrelationConfig(c["correlation_rank"], c["correlation_scale"]),
            std_firing_magnitudes=firing_magnitudes.FoldedNormalMagnitudeConfig(*c["magnitude_spread"]),
            mean_firing_magnitudes=firing_magnitudes.LinearMagnitudeConfig(c["first_magnitude"], c["last_magnitude"]),
            bias=c["bias_norm"],
            seed=c["seed"],
        )
    )
    rates, magnitudes = (torch.zeros(c["features"], dtype=torch.float64) for _ in range(2))
    norms, counts = [], []
    for _ in range(0, job["samples"], 2048):
        x, features = model.sample_with_features(2048)
        rates += (features > 0).sum(0)
        magnitudes += features.sum(0).double()
        norms.append(x.norm(dim=1))
        counts.append((features > 0).sum(1).double())
    norm, count = torch.cat(norms).double(), torch.cat(counts)
    directions = model.feature_dict.feature_vectors.detach()
    cosines = (directions @ directions.T).abs().fill_diagonal_(0)
    return {
        "rows": len(norm),
        "rates": (rates / len(norm)).tolist(),
        "magnitudes": (magnitudes / rates.clamp_min(1)).tolist(),
        "l0": [float(count.mean()), float(count.std())],
        "norm": [float(norm.mean()), float(norm.std())],
        "mean_max_cosine": float(cosines.max(1).values.mean()),
    }


def main() -> None:
    """See the head of this file."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    import sae_lens

    if job.get("mode") == "law":
        (out / "law.json").write_text(json.dumps(law(job)))
        return
    result = {**train(job), "version": sae_lens.__version__, "torch": torch.__version__}
    (out / "result.json").write_text(json.dumps({**result, "own": judge(job)}, indent=1))


if __name__ == "__main__":
    main()

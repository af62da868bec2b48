"""`evaluate`: what can be said of an SAE from held-out activations alone, without the language model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from saeforge import __version__
from saeforge.data.loader import ValidationLoader
from saeforge.data.source import ShardSource
from saeforge.errors import ConfigError, DatasetError, SaeforgeError
from saeforge.lm.device import resolve_device
from saeforge.metrics import Reconstruction, ReconstructionMetrics
from saeforge.sae import SAE, load

#: What each number means, kept beside the numbers: the field's definitions differ under the same names.
CONVENTIONS = {
    "l0": "latents != 0 of a token; mean and 5th, 50th, 95th percentile (nearest rank)",
    "fvu": "sum |x - x_hat|^2 / sum |x - mu|^2, mu the mean over all evaluated tokens",
    "mse": "mean over tokens of |x - x_hat|^2, summed over dimensions, raw units",
    "cosine": "mean over tokens of cos(x, x_hat)",
    "l2_ratio": "mean over tokens of |x_hat| / |x|",
    "reconstruction_bias": "sum |x_hat|^2 / sum x.x_hat (Rajamanoharan et al. 2024, eq. 10); below 1 is shrinkage",
    "dead": "latents that fired on no evaluated token; such a latent's rate is below 3 / tokens with 95% confidence",
    "dense_1pct, dense_10pct": "latents that fired on more than 1% and 10% of the evaluated tokens",
    "tokens": "held-out documents only; special tokens and padding are not in the dataset",
}


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        metrics: the numbers.
        d_sae: latents of the SAE.
        about: SAE, dataset, site, split and versions, as plain JSON values.
        path: where the JSON was written, or None.
    """

    metrics: Reconstruction
    d_sae: int
    about: dict[str, Any]
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: metrics, conventions, what was evaluated."""
        return {"metrics": asdict(self.metrics), "conventions": CONVENTIONS, **self.about}

    def rows(self) -> list[tuple[str, str, str]]:
        """The table for people: name, value, remark."""
        m = self.metrics
        share = 100 / self.d_sae
        return [
            ("tokens", f"{m.tokens:,}", "held-out documents"),
            ("L0", f"{m.l0_mean:.2f}", f"p5 {m.l0_p5}, p50 {m.l0_p50}, p95 {m.l0_p95}"),
            ("FVU", f"{m.fvu:.4f}", "share of variance not explained; 0 is perfect, 1 predicts the mean"),
            ("cosine", f"{m.cosine:.4f}", ""),
            ("reconstruction bias", f"{m.reconstruction_bias:.4f}", "below 1 is shrinkage"),
            ("dead latents", f"{m.dead:,}", f"{m.dead * share:.1f}% never fired in {m.tokens:,} tokens"),
            ("dense latents", f"{m.dense_10pct:,}", f"fired on over 10% of tokens; {m.dense_1pct:,} on over 1%"),
        ]


def evaluate(
    run: str | Path | SAE,
    *,
    data: str | Path | None = None,
    split: str = "validation",
    max_tokens: int | None = None,
    batch_size: int = 4096,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Judges an SAE on the activations of documents that it was not trained on.

    Args:
        run: RUN folder, `sae/` folder, or an SAE. With a RUN folder the result is written to RUN/evaluation.json.
        data: dataset; default: the one it was trained on.
        split: "validation" or "train".
        max_tokens: read at most so many tokens (whole blocks, at least one); default: all.
        batch_size: rows at a time; the result does not depend on it.
        device: "auto", "cpu", "cuda", ...
        on_progress: called with (batches done, batches in all).

    Raises:
        SaeforgeError: no SAE, no dataset, activations of another width, or a device that is not there.
    """
    sae = run if isinstance(run, SAE) else load(run)
    path = data or sae.meta.get("dataset_path")
    if path is None:
        raise ConfigError("this SAE does not say which dataset it was trained on; give one with --data")
    site, target = sae.meta.get("site") or {}, sae.meta.get("target") or {}
    source = ShardSource(str(path), input=site.get("id"), target=target.get("id"))
    if (source.d_in, source.d_out) != (sae.d_in, sae.d_out):
        raise DatasetError(
            f"{path} holds activations {source.d_in} wide, this SAE reads {sae.d_in}; give its own dataset with --data"
        )
    if split not in ("train", "validation"):
        raise ConfigError(f"split {split!r}: expected 'validation' or 'train'")
    if source.n_blocks(split) == 0:
        raise DatasetError(
            f"{path} has no {split} split; harvest with a validation_share above 0, or use --split train"
        )
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ConfigError(f"batch_size = {batch_size}, max_tokens = {max_tokens}: expected positive numbers")
    place = resolve_device(device)
    sae = sae.to(place)
    mean = torch.tensor(source.statistics[1].mean)
    metrics = ReconstructionMetrics(sae.d_out, sae.d_sae, pivot=mean, device=place)
    loader = ValidationLoader(source, batch_size, max_rows=max_tokens, split=split)
    for done, batch in enumerate(loader, start=1):
        x = batch.x.to(place).float()
        code = sae.encode(x)
        metrics.update(batch.target.to(place), sae.decode(code, x), code)
        if on_progress is not None:
            on_progress(done, len(loader))
    about = {
        "sae": {"d_in": sae.d_in, "d_sae": sae.d_sae, "rule": sae.rule, "variant": sae.meta.get("variant")},
        "site": site.get("id"),
        "dataset": source.fingerprint,
        "trained_on_this_dataset": source.fingerprint == sae.meta.get("dataset"),
        "split": split,
        "saeforge": __version__,
    }
    result = Evaluation(metrics.compute(), sae.d_sae, about)
    if isinstance(run, SAE) or not (Path(run) / "sae").is_dir():
        return result
    return Evaluation(result.metrics, result.d_sae, about, _write(Path(run) / "evaluation.json", result.to_json()))


def _write(path: Path, content: dict[str, Any]) -> Path:
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise SaeforgeError(f"could not write {path}: {error}; free space and evaluate again") from error
    finally:
        part.unlink(missing_ok=True)
    return path

"""The names of everything that a run logs, and what each means: the table of docs/logging.md, held against both.

`<term>` and `<name>` stand for what a variant brings along. Where several SAEs train, the names of what belongs to one
begin with its own, `k16/train/l0`; in wandb each has a run of its own instead.
"""

from __future__ import annotations

import functools
import re

from saeforge.metrics.conventions import RECONSTRUCTION, names

#: What every other figure is plotted against.
X_AXIS = "train/tokens"

#: Scalars by name. A step is an optimizer step; "since the last reading" is `trainer.log_every_n_steps` of them.
SCALARS = {
    X_AXIS: "tokens seen since the start of the run, over all devices: the x axis",
    "train/loss": "mean over the steps since the last reading of the loss, which is the sum of the terms",
    "train/<term>": "the same of each of the variant's terms, coefficient applied (`mse`, `aux`, `l1` ...)",
    "train/l0": "mean active latents of a token since the last reading",
    "train/fvu": "squared error / total variance of the training rows since the last reading; of whitened ones under "
    "`whitening`",
    "train/dead": "latents silent for `dead_after_tokens`",
    "schedule/lr": "learning rate of the last step",
    "schedule/<name>": "the variant's scheduled values (`l1` ...), as `target_l0` scales them",
    "speed/tokens_per_second": "of all devices together, by the clock, validation left out (checkpoints are not)",
    "speed/step_ms": "milliseconds a step, by the same clock",
    "speed/of_floor": "share of a step that the encoder's products alone take on this device (measured at the start); "
    "above 1 where fp32 is screened in bf16",
    "speed/logging_ms": "milliseconds a step spent in reading figures out and in loggers",
    "data/wait_ms": "milliseconds a batch that training stood still for data; `data/` and `memory/` are rank 0's",
    "data/windows_ready": "windows of blocks that are read ahead, of one for each lane",
    "data/gb_per_second": "bytes read, by the clock",
    "data/read_gb_per_second": "bytes read by one reading thread in a second of its reading",
    "data/retries": "reads of a storage that were tried again, since the start",
    "data/cache_gb": "read from the cache of a remote dataset, since the start",
    "data/blocks_made": "live: blocks that the model made, since the start",
    "data/rows_repeated": "live: rows in the place of outliers, since the start",
    "memory/host_gb": "most memory that rank 0's process has held",
    "memory/device_gb": "most memory allocated on rank 0's GPU",
    **{f"val/{name}": f"`{name}` of docs/metrics.md, on held-out documents" for name in sorted(names(RECONSTRUCTION))},
    "model/delta_ce": "`model/ce_sae` - `model/ce_original`",
    "model/ce_original": "mean cross-entropy of the language model on held-out contexts, nats per token",
    "model/ce_sae": "the same with the reconstruction in the place of the activations",
    "model/ce_zero": "with zeros",
    "model/ce_mean": "with the mean activation",
    "model/ce_score_zero": "(`ce_zero` - `ce_sae`) / (`ce_zero` - `ce_original`)",
    "model/ce_score_mean": "(`ce_mean` - `ce_sae`) / (`ce_mean` - `ce_original`)",
    "model/kl_sae": "mean KL(original || spliced), nats per token",
    "model/top1_sae": "share of predictions whose likeliest token stays the same",
    "model/tokens": "predictions scored",
}

#: Histograms over latents, ten times a run; wandb and TensorBoard only.
HISTOGRAMS = {
    "latents/log10_density": "log10(share of training tokens on which one fires) since the last histogram; silent "
    "latents are in none of the bins",
    "latents/decoder_norm": "norm of the decoder's row in the SAE as it would be saved",
    "latents/encoder_norm": "norm of the encoder's row",
    "latents/threshold": "threshold, for SAEs of that rule",
}

#: Tables at the end of a run; wandb and TensorBoard only.
TABLES = {
    "latents/top": "the latents that add most to reconstructions of held-out documents, with the contexts where each "
    "is strongest",
}

FIGURES = {**SCALARS, **HISTOGRAMS, **TABLES}

#: What does not belong to one SAE.
SHARED = {X_AXIS, *(name for name in SCALARS if name.startswith(("speed/", "data/", "memory/")))}


def documented(name: str) -> str | None:
    """The entry of `FIGURES` for a logged name (without the SAE's), or None."""
    if name in FIGURES:
        return name
    return next((entry for entry, pattern in _patterns().items() if pattern.fullmatch(name)), None)


@functools.cache
def _patterns() -> dict[str, re.Pattern[str]]:
    found = {}
    for entry in FIGURES:
        if "<" in entry:
            namespace, _, _ = entry.partition("<")
            found[entry] = re.compile(re.escape(namespace) + r"[A-Za-z0-9_.-]+")
    return found


def table() -> str:
    """The table of docs/logging.md."""
    lines = ["| name | what it is |", "|---|---|"]
    metrics = sorted(names(RECONSTRUCTION))
    for name, says in FIGURES.items():
        if name == f"val/{metrics[0]}":
            listed = ", ".join(f"`val/{metric}`" for metric in metrics)
            lines.append(f"| {listed} | the metrics of [metrics.md](metrics.md), on held-out documents |")
        elif not name.startswith("val/"):
            lines.append(f"| `{name}` | {says.replace('||', '‖')} |")
    return "\n".join(lines)

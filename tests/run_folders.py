"""RUN folders as `saeforge` leaves them, written by hand: for tests of pages, which read files and load no model."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from saeforge.features.schema import FORMAT, FORMAT_VERSION, Label, create, pack_window, write_labels

LABELS = {"french": 0.12, "python": 0.17}


def spread(middle: float) -> dict[str, float]:
    """Mean and percentiles of something."""
    return {"mean": middle, "p5": middle * 0.5, "p50": middle, "p95": middle * 1.5}


def effect(delta: float) -> dict[str, Any]:
    """Figures of the effect on a model with a loss of 2.4."""
    metrics: dict[str, Any] = {"tokens": 4000, "documents": 40, "delta_ce": delta}
    metrics |= {"ce_original": 2.4, "ce_sae": 2.4 + delta, "ce_zero": 10.0, "ce_mean": 18.0}
    metrics |= {"ce_score_zero": 1 - delta / 7.6, "ce_score_mean": 1 - delta / 15.6}
    metrics |= {"kl_sae": delta, "kl_zero": 7.0, "kl_mean": 15.0, "top1_sae": 0.8, "top1_zero": 0.01, "top1_mean": 0.02}
    return {**metrics, "intervals": {"delta_ce": [delta - 0.01, delta + 0.01], "ce_sae": [2.3, 2.7]}}


def evaluation(*, l0: int, fvu: float, delta: float | None, d_sae: int = 512, dead: int = 3) -> dict[str, Any]:
    """`evaluation.json`; without its effect if `delta` is None."""
    metrics: dict[str, Any] = {"tokens": 8192, "l0_mean": l0 + 0.25, "l0_p5": l0 - 2, "l0_p50": l0, "l0_p95": l0 + 2}
    metrics |= {"fvu": fvu, "mse": fvu * 90, "mse_per_dim": fvu, "l1": 700.0, "cosine": 0.97, "l2_ratio": 0.95}
    metrics |= {"reconstruction_bias": 0.99, "ev_legacy": 0.9, "ev_centered": 1 - fvu, "nmse_raw": 0.05}
    metrics |= {"nmse_global": 0.08, "dead": dead, "rare_1e_5": 4, "rare_1e_6": 3, "dense_1pct": 200, "dense_10pct": 20}
    metrics |= {"firing_share_1pct": 0.8, "firing_share_10pct": 0.3}
    counts = [0] * 20 + [1, 4, 30, 120, 260, 80, 14, 0]
    firing: dict[str, Any] = {"tokens": 8192, "documents": 60, "dead": dead, "dead_bound": 0.05, "latents": counts}
    firing |= {"log10_edges": [quarter / 4 for quarter in range(-28, 1)]}
    firing |= {"l0_edges": list(range(l0 - 3, l0 + 4)), "l0_tokens": [100, 900, 2500, 3000, 1400, 292]}
    weights: dict[str, Any] = {"latents": d_sae, "sampled": d_sae, "decoder_twins": 0.01}
    weights |= {name: spread(0.4) for name in ("decoder_norm", "encoder_norm", "decoder_nearest", "encoder_nearest")}
    measured: dict[str, Any] = {"effect": None, "effect_reason": "no model here"}
    if delta is not None:
        by_label = {name: effect(value) for name, value in LABELS.items()}
        measured = {
            "effect": {"overall": effect(delta), "by_label": by_label, "conventions": {"delta_ce": "the headline"}}
        }
    return {
        "metrics": metrics,
        "conventions": {"fvu": "sum |r|^2 / sum |x - mu|^2"},
        "firing": {**firing, "conventions": {"dead_bound": "rule of three"}},
        "weights": {**weights, "conventions": {"decoder_norm": "of a row"}},
        **measured,
        "sae": {"d_in": 64, "d_sae": d_sae, "rule": "topk"},
        "split": "validation",
        "trained_on_this_dataset": True,
    }


def card(variant: str, *, k: int | None, d_sae: int = 512, digest: str = "aa", **options: Any) -> dict[str, Any]:
    """`sae.json`."""
    given = {"d_in": 64, "d_out": 64, "d_sae": d_sae, **({"k": k} if k else {}), **options}
    return {
        "format": "saeforge-sae",
        "version": 1,
        "rule": "topk" if k else "threshold",
        "k": k,
        "d_in": 64,
        "d_out": 64,
        "d_sae": d_sae,
        "vectors_sha256": digest,
        "model": {"name": "demo", "revision": None},
        "site": {"id": "layers.3:out", "dtype": "bfloat16"},
        "target": None,
        "dataset": "0123456789abcdef",
        "dataset_path": "data/quickstart",
        "variant": {"name": variant, "distribution": "saeforge", "version": "0.1.0", "options": given},
        "training": {"steps": 400, "tokens": 409_600, "precision": "32-true", "saeforge": "0.1.0", "torch": "2.13.0"},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_log(
    folder: Path, members: Sequence[str] = ("",), *, steps: int = 400, version: int = 0, first: int = 10
) -> None:
    """`csv/version_N/metrics.csv`: a line every ten steps, validation every fifty."""
    rows: list[dict[str, float]] = []
    for step in range(first, steps + 1, 10):
        for i, member in enumerate(members):
            prefix = f"{member}/" if member else ""
            fvu = 0.1 + 0.1 * i + 0.4 * math.exp(-step / 80)
            own = {
                "train/loss": 3 * fvu,
                "train/mse": 2 * fvu,
                "train/fvu": fvu,
                "train/l0": 32.0 + i,
                "train/dead": 2.0,
            }
            rows.append({"step": step, "train/tokens": step * 1024.0, "speed/tokens_per_second": 9000.0})
            rows[-1] |= {f"{prefix}{name}": value for name, value in own.items()} | {f"{prefix}schedule/lr": 1e-3}
            if step % 50 == 0:
                rows.append(
                    {
                        "step": step,
                        f"{prefix}val/fvu": fvu + 0.01,
                        f"{prefix}val/l0_mean": 32.5 + i,
                        f"{prefix}model/delta_ce": fvu / 2,
                    }
                )
    names = sorted({name for row in rows for name in row})
    path = folder / "csv" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_features(
    run: Path, *, tokens: Sequence[str] = ("The ", "Golden", " Gate", " Bridge", "\n"), d_sae: int = 40
) -> None:
    """`features.sqlite` of the SAE with the digest "aa": latent 0 is dead, 7 has a label, all fire on `tokens`."""
    connection = create(run / "features.sqlite")
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "d_sae": d_sae,
        "examples": 20,
        "ranges": 5,
        "tokens": 9000,
    }
    meta["sae_digest"] = "aa"
    with connection:
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in meta.items()]
        )
        connection.execute("INSERT INTO documents VALUES (1, 'sample/english/0001', 'english', 'train')")
        for latent in range(d_sae):
            count = 0 if latent == 0 else 100 + latent
            row = (
                latent,
                count,
                count / 9000,
                2.0,
                8.0,
                7.0,
                min(count, 60),
                json.dumps({"0": count // 2, "2": count - count // 2} if count else {}),
            )
            connection.execute("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            values: list[float | None] = [None, 8.0, *([0.0, 3.0] * len(tokens))][: len(tokens)]
            for rank in range(3 if count else 0):
                example = (latent, "top", -1, rank, 8.0 - rank, 1, 5 + rank, pack_window(list(tokens), values, 1))
                connection.execute("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?)", example)
        write_labels(connection, "concepts", [Label(7, "golden_gate_bridge", 0.93)])
    connection.close()


def concept(label: str, latent: int, auroc: float) -> dict[str, Any]:
    """A row of `concepts.json`."""

    def score(value: float) -> dict[str, Any]:
        estimate = {"value": value, "low": value - 0.01, "high": value + 0.01}
        return {"token_auroc": estimate, "document_auroc": estimate, "active_on_label": 0.7}

    failures = [{"claim": "difference_of_means", "found": auroc, "needed": 0.9}] if auroc < 0.9 else []
    others = {"random": score(0.6), "difference_of_means": score(0.95), "probe": score(0.97), "control": None}
    return {
        "label": label,
        "latent": latent,
        "top": [{"latent": latent, "score": score(auroc)}],
        **others,
        "failures": failures,
    }


def write_run(run: Path, *, features: bool = True) -> Path:
    """A RUN with everything that a report can show."""
    write_json(run / "sae" / "sae.json", card("topk", k=32))
    write_json(run / "evaluation.json", evaluation(l0=32, fvu=0.12, delta=0.15))
    write_json(
        run / "concepts.json",
        {
            "concepts": [concept("french", 7, 0.98), concept("python", 8, 0.66)],
            "notes": ["a note"],
            "conventions": {"f1": "at the threshold"},
        },
    )
    config = {
        "seed_everything": 0,
        "model": {"variant": {"class_path": "topk"}, "lr": 1e-3},
        "data": {"batch_size": 1024},
    }
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "run": str(run)}))
    write_log(run)
    if features:
        write_features(run)
    return run


def write_sweep(run: Path) -> Path:
    """A RUN of eight SAEs of three variants; the last has no evaluation."""
    entries: dict[str, dict[str, Any]] = {f"topk-{k}": {"k": k} for k in (16, 32, 64, 128)}
    entries |= {
        f"{variant}-{l0}": {"variant": variant, "target_l0": l0} for variant in ("gated", "l1_relu") for l0 in (32, 64)
    }
    for i, (name, entry) in enumerate(entries.items()):
        l0 = int(name.rsplit("-", 1)[1])
        variant = entry.get("variant", "topk")
        write_json(run / name / "sae" / "sae.json", card(variant, k=entry.get("k"), digest="aa" if i == 0 else str(i)))
        if i < len(entries) - 1:
            worse = 1.0 if variant == "topk" else 1.3
            figures = evaluation(l0=l0, fvu=0.9 / l0**0.5 * worse, delta=3.0 / l0 * worse, dead=i)
            write_json(run / name / "evaluation.json", figures)
    write_features(run / "topk-16")
    model = {
        "variant": {"class_path": "topk", "init_args": {"d_sae": 512}},
        "lr": 1e-3,
        "target_l0": None,
        "sweep": entries,
    }
    (run / "config.yaml").write_text(
        yaml.safe_dump({"seed_everything": 0, "model": model, "data": {"batch_size": 1024}}, sort_keys=False)
    )
    write_log(run, list(entries))
    return run

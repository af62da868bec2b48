"""The frontier of L0, FVU and ΔCE of all variants on the demo model, three controls, and how well two seeds agree.

    pip install -e '.[synthetic]'
    pip install --no-deps plugins/saeforge-batchtopk plugins/saeforge-matryoshka plugins/saeforge-jumprelu \
        plugins/saeforge-panneal
    saeforge harvest --config configs/quickstart/harvest.yaml
    saeforge fit --config configs/sweeps/frontier.yaml
    python scripts/frontier.py --run runs/frontier --data data/quickstart --out docs/benchmarks/DATE-frontier-demo

Controls: PCA of rank L0; topk with its decoder frozen at random directions; topk on the demo model with fresh weights
(another model, so its ΔCE says nothing of this one and is left out). What is judged is kept in OUT.json, and the same
command goes on after an interruption. Writes OUT.json, OUT.md and OUT.svg.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from bench_quality_judge import machine_line

import saeforge
from saeforge.controls import pca, train_topk
from saeforge.data.shard_source import ShardSource
from saeforge.lm.fresh import save_fresh_model
from saeforge.sae import SAE

RANKS = (16, 32, 64, 128)
VARIANTS = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "l1_relu", "panneal")
CONTROLS = ("PCA", "frozen random decoder", "model with fresh weights")
EFFECT_TOKENS = 20_000


def trained(source: ShardSource, k: int, settings: dict[str, Any], *, frozen: bool) -> SAE:
    """topk as in the sweep; with its decoder left at random directions, if wanted."""
    training = {"lr_warmup_steps": settings["warmup"], "lr_decay_share": settings["decay"]}
    own = {"d_sae": settings["d_sae"], "tokens": settings["tokens"], "batch_size": settings["batch"]}
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    return train_topk(source, k=k, frozen=frozen, lr=settings["lr"], training=training, trainer=trainer, **own)


def fresh_activations(folder: Path, like: str) -> Path:
    """The demo model with fresh weights on the same text: folder of its activations."""
    if not (folder / "acts" / "dataset.json").exists():
        fresh = save_fresh_model("demo", folder / "model")
        saeforge.harvest(
            model=str(fresh), sites=[like], text="demo", out=str(folder / "acts"), n_tokens=450_000, seed=0
        )
    return folder / "acts"


def judged(sae: SAE | str, data: Path, *, effect: bool) -> dict[str, Any]:
    """Figures of held-out documents."""
    found = saeforge.evaluate(sae, data=data, effect=effect, effect_tokens=EFFECT_TOKENS, probe=False)
    keep = {"l0": found.metrics.l0_mean, "fvu": found.metrics.fvu}
    return keep if found.effect is None else {**keep, "delta_ce": found.effect.overall.delta_ce}


def agreement(first: Path, second: Path) -> dict[str, float]:
    """Decoder rows of two seeds, paired one to one: mean cosine of the pairs, share of pairs above 0.7."""
    found = saeforge.agreement(first, second, method="hungarian")
    assert found.cosine is not None
    return {"cosine": found.cosine.mean, "same": found.shared}


class Results:
    """OUT.json, written after every figure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: dict[str, dict[str, Any]] = json.loads(path.read_text())["points"] if path.exists() else {}

    def add(self, name: str, **point: Any) -> None:
        """Keeps a point."""
        self.points[name] = point
        self.path.write_text(json.dumps({"machine": machine_line(), "points": self.points}, indent=1))
        print(name, {key: round(value, 4) for key, value in point.items() if isinstance(value, float)}, flush=True)


def judge_all(run: Path, data: Path, results: Results) -> None:
    """Everything that is not judged yet."""
    source = ShardSource(str(data))
    for variant in VARIANTS:
        for k in RANKS:
            first, second = (run / f"{variant}-{k}-seed{seed}" for seed in (0, 1))
            if f"{variant}-{k}" not in results.points:
                figures = judged(str(first / "sae"), data, effect=True)
                results.add(f"{variant}-{k}", group=variant, **figures, **agreement(first, second))
    settings = sweep_settings(run)
    for k in RANKS:
        if f"PCA-{k}" not in results.points:
            results.add(f"PCA-{k}", group="PCA", **judged(pca(source, k), data, effect=True))
        if f"frozen-{k}" not in results.points:
            sae = trained(source, k, settings, frozen=True)
            results.add(f"frozen-{k}", group="frozen random decoder", **judged(sae, data, effect=True))
        if f"fresh-{k}" not in results.points:
            acts = fresh_activations(run / "fresh", "resid_post.3")
            sae = trained(ShardSource(str(acts)), k, settings, frozen=False)
            results.add(f"fresh-{k}", group="model with fresh weights", **judged(sae, acts, effect=False))


def sweep_settings(run: Path) -> dict[str, Any]:
    """What the sweep trained with, for the controls."""
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    model, data = config["model"], config["data"]
    return {
        "d_sae": model["variant"]["init_args"]["d_sae"],
        "lr": model["lr"],
        "warmup": model["lr_warmup_steps"],
        "decay": model["lr_decay_share"],
        "batch": data["batch_size"],
        "tokens": data["tokens"],
        "precision": config["trainer"]["precision"],
    }


def plot(results: Results, path: Path) -> None:
    """FVU, ΔCE and the agreement of seeds over L0."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    panels = (("fvu", "FVU of held-out rows"), ("delta_ce", "ΔCE, nats a token"), ("cosine", "matched cosine of seeds"))
    for number, group in enumerate((*VARIANTS, *CONTROLS)):
        points = sorted((p for p in results.points.values() if p["group"] == group), key=lambda p: p["l0"])
        for axis, (key, label) in zip(axes, panels, strict=True):
            shown = [p for p in points if key in p]
            if shown:
                style = {"ls": ":", "marker": "x"} if group in CONTROLS else {"ls": "-", "marker": "o"}
                axis.plot([p["l0"] for p in shown], [p[key] for p in shown], color=f"C{number}", label=group, **style)
            axis.set(xscale="log", xlabel="L0", ylabel=label, xticks=RANKS, xticklabels=[str(k) for k in RANKS])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path)
    plt.close(figure)


def report(results: Results, run: Path, path: Path) -> None:
    """The table."""
    settings = sweep_settings(run)
    lines = [
        "# All variants on the demo model: L0, FVU, ΔCE",
        "",
        f"![frontier]({path.with_suffix('.svg').name})",
        "",
        f"{machine_line()} Command: `{shlex.join(['python', *sys.argv])}`.",
        "",
        f"Residual stream after the fourth of six layers (256 wide), {settings['d_sae']:,} latents, "
        f"{settings['tokens']:,} tokens in batches of {settings['batch']:,}, lr {settings['lr']}, "
        f"{settings['precision']} (the controls' own training: fp32): one `saeforge fit` of all SAEs "
        "(`configs/sweeps/frontier.yaml`). L0 and FVU of held-out documents; ΔCE on "
        f"{EFFECT_TOKENS:,} of their tokens. `cosine` is the mean over latents of two seeds, matched one to one by "
        "decoder cosine (Hungarian); "
        "`same` the share of pairs above 0.7. One seed each for L0, FVU and ΔCE.",
        "",
        "| SAE | L0 | FVU | ΔCE | cosine | same |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    forms = {"l0": "{:.1f}", "fvu": "{:.3f}", "delta_ce": "{:.3f}", "cosine": "{:.2f}", "same": "{:.0%}"}
    for name, point in results.points.items():
        cells = [form.format(point[key]) if key in point else "" for key, form in forms.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    given = parser.parse_args()
    results = Results(given.out.with_suffix(".json"))
    judge_all(given.run, given.data, results)
    plot(results, given.out.with_suffix(".svg"))
    report(results, given.run, given.out.with_suffix(".md"))


if __name__ == "__main__":
    main()

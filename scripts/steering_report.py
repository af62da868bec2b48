"""The report of bench_steering.py: Markdown for people, every number as JSON beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import saeforge
from saeforge.sae import SAE

LEAST_SHARE, LEAST_DISTINCT, MOST_LOSS = 0.6, 0.8, 1.0


def report(path: Path, sae: SAE, target: str, setting: Any, results: dict[str, Any]) -> None:
    """Writes the report and its JSON."""
    chosen, latent, plain = results["chosen"], results["latent"], results["plain"]
    goals = {
        f"at least {LEAST_SHARE:.0%} of continuations in {target}": latent.share.mean >= LEAST_SHARE,
        f"distinct-2 at least {LEAST_DISTINCT} of the plain model's": latent.distinct >= LEAST_DISTINCT,
        f"at most {MOST_LOSS:g} nat a token above the plain model's own {target}": latent.excess_loss <= MOST_LOSS,
    }
    lines = [
        f"# Steering with the latent for {target}",
        "",
        f"{sae!r}, variant {(sae.meta.get('variant') or {}).get('name')}, of the model "
        f"{(sae.meta.get('model') or {}).get('name')}; saeforge {saeforge.__version__}, {results['machine']}. Written "
        "by `scripts/bench_steering.py`, whose head has the commands.",
        "",
        f"{setting.prompts} English prompts of {setting.prompt_tokens} tokens for choosing (training passages) and as "
        f"many for this report (held-out passages), {setting.seeds} seeds each, {setting.new_tokens} new tokens at "
        f"temperature {setting.temperature}, top-p {setting.top_p}. A classifier of character n-grams (training "
        f"passages; right on {results['classifier_accuracy']:.1%} of held-out pieces) names the language. Brackets: "
        "95% bootstrap over prompts.",
        "",
        "## Amplified",
        "",
        f"Chosen: latent {chosen['latent']} clamped to {chosen['factor']} times its maximum ({chosen['value']:.3g}) at "
        f"every token. Mean KL from the plain model on held-out English passages: {chosen['kl']:.3f} nats a token.",
        "",
        *[f"- {'met' if met else '**missed**'}: {goal}" for goal, met in goals.items()],
        "",
        f"| what is done | in {target} | distinct-2, relative | loss above own {target} |",
        "|---|--:|--:|--:|",
        f"| nothing | {share(plain)} | 1.00 | {plain.excess_loss:+.2f} |",
        f"| the latent, clamped | {share(latent)} | {latent.distinct:.2f} | {latent.excess_loss:+.2f} |",
    ]
    for name, outcomes in results["controls"].items():
        if len(outcomes) == 1:
            lines.append(
                f"| {name} | {share(outcomes[0])} | {outcomes[0].distinct:.2f} | {outcomes[0].excess_loss:+.2f} |"
            )
            continue
        shares = [outcome.share.mean for outcome in outcomes]
        lines.append(
            f"| {name} ({len(outcomes)}) | mean {sum(shares) / len(shares):.1%}, highest {max(shares):.1%} "
            f"| {mean([o.distinct for o in outcomes]):.2f} | {mean([o.excess_loss for o in outcomes]):+.2f} |"
        )
    matched = [one.kl for outcomes in results["controls"].values() for one in outcomes if one.kl is not None]
    missed = sum(abs(kl - chosen["kl"]) > 0.05 * chosen["kl"] for kl in matched)
    lines += [
        "",
        f"Same KL: reached within 5% by {len(matched) - missed} of {len(matched)} controls; the JSON has each one's. "
        f"Distinct-2 is pooled over a prompt's {setting.seeds} continuations. Loss: nats a token of the continuations "
        f"under the plain model given their prompts, less that of the plain model's own continuations of {target} "
        "prompts.",
        "",
        "## Dose and response, on the prompts for choosing",
        "",
        f"| latent | clamped to | in {target} | distinct-2, relative | loss above own {target} |",
        "|--:|--:|--:|--:|--:|",
        *[
            f"| {entry['latent']} | {entry['factor']}max | {share(entry['outcome'])} | {entry['outcome'].distinct:.2f} "
            f"| {entry['outcome'].excess_loss:+.2f} |"
            for entry in results["tried"]
        ],
        "",
        "## Silenced",
        "",
        f"Change of the loss on held-out passages, nats a token; the difference is what {target} loses more than "
        "English. An interval around 0 is no effect.",
        "",
        f"| what is done | {target} | English | difference | |",
        "|---|--:|--:|--:|---|",
    ]
    for way, found in results["suppression"].items():
        low, high = found["difference"].low, found["difference"].high
        verdict = f"takes {target} away" if low > 0 else "no effect" if high >= 0 else "takes English away"
        lines.append(f"| {way} | {found['target']} | {found['english']} | {found['difference']} | {verdict} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    everything = {"setting": asdict(setting), **results}
    path.with_suffix(".json").write_text(
        json.dumps(everything, indent=1, default=plain_values) + "\n", encoding="utf-8"
    )


def share(outcome: Any) -> str:
    """A share with its interval, in percent."""
    own = outcome.share
    return f"{own.mean:.1%} [{own.low:.1%}, {own.high:.1%}]"


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def plain_values(value: Any) -> Any:
    """Dataclasses for json."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")

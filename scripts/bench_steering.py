"""Does clamping the "French" latent make a model write French, and does silencing it take French away? With controls.

    saeforge features build runs/demo && saeforge features concepts runs/demo --texts demo
    python scripts/bench_steering.py --run runs/demo --report docs/benchmarks/DATE-steering.md

Latent and strength are chosen on prompts from the training passages and reported on prompts from the held-out ones.
At the chosen strength's mean KL on plain English text stand the difference of means, random directions, and latents
that fire as often. Writes the report and, beside it, every number as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steering_measures import (
    Interval,
    accuracy,
    bootstrap,
    distinct_2,
    log_probabilities,
    match,
    mean_kl,
    negative_log_likelihood,
    train_classifier,
)
from steering_report import LEAST_DISTINCT, MOST_LOSS, report
from torch import Tensor

import saeforge
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.features.store import FeatureStore
from saeforge.lm.capture import Capture
from saeforge.lm.causal import CausalLM
from saeforge.lm.generate import generate
from saeforge.lm.origin import origin_of
from saeforge.lm.read import cut_documents, read_activations
from saeforge.lm.text import read_passages
from saeforge.lm.tokens import find_specials
from saeforge.sae import SAE
from saeforge.steering import Add, Clamp, Edit, steer

LANGUAGES = ("english", "french", "german", "italian", "portuguese", "spanish")
ENGLISH = ("english", "astronomy", "cooking", "golden_gate_bridge", "law", "sycophantic_praise")
GRID = (0.5, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0)  # times the latent's maximum


@dataclass(frozen=True)
class Setting:
    """How much is drawn."""

    prompts: int = 60
    seeds: int = 4
    prompt_tokens: int = 12
    new_tokens: int = 40
    candidates: int = 5
    random_directions: int = 20
    matched_latents: int = 5
    temperature: float = 0.8
    top_p: float = 0.95


@dataclass(frozen=True)
class Outcome:
    """What one way of steering did to the continuations of one half of the prompts."""

    share: Interval  # named French, over prompts
    distinct: float  # distinct-2 relative to the plain model's
    excess_loss: float  # nats per token under the plain model, above that of its own French
    kl: float | None = None  # reached on plain English text, where it was matched

    def holds(self, margin: float = 0.0) -> bool:
        """Whether the text stays varied and likely, with this share of either allowance to spare."""
        return (
            self.distinct >= LEAST_DISTINCT + margin * (1 - LEAST_DISTINCT)
            and self.excess_loss <= (1 - margin) * MOST_LOSS
        )


class Bench:
    """Model, SAE, text and what plain continuations look like."""

    def __init__(self, run: Path, target: str, setting: Setting) -> None:
        self.sae, self.setting, self.target, self.run = saeforge.load(run), setting, target, run
        self.lm: CausalLM = origin_of(self.sae).load_causal()
        texts = {split: passages(split) for split in ("train", "test")}
        self.classifier = train_classifier(by_language(texts["train"]))
        self.accuracy = accuracy(self.classifier, by_language(texts["test"]))
        self.texts = texts
        english = {split: [text for label in ENGLISH for text in texts[split][label]] for split in texts}
        self.prompts = {split: self._prompts(own) for split, own in english.items()}
        self.neutral = self._sequences(english["test"][:: max(1, len(english["test"]) // setting.prompts)])
        self.plain_log_p = log_probabilities(self.lm.model, self.neutral)
        own = [prompt for split in texts for prompt in self._prompts(texts[split][target])]
        written = self._continue(own)
        self.own_loss = float(np.mean(self._loss(written)))  # the plain model's French, after French prompts
        self.plain = {split: self._continue(prompts) for split, prompts in self.prompts.items()}
        self.plain_distinct = {split: distinct_2(self._groups(rows)) for split, rows in self.plain.items()}

    def _prompts(self, texts: Sequence[str]) -> list[str]:
        """The first tokens of each text, as text; evenly over the texts."""
        chosen = texts[:: max(1, len(texts) // self.setting.prompts)][: self.setting.prompts]
        ids = self.lm.tokenizer(chosen, add_special_tokens=False)["input_ids"]
        return [self.lm.tokenizer.decode(part[: self.setting.prompt_tokens]) for part in ids]

    def _sequences(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the special tokens that the tokenizer puts before a text."""
        prefix = find_specials(self.lm.tokenizer).prefix
        ids = self.lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*prefix, *part][: self.lm.context_limit] for part in ids]

    def _continue(self, prompts: Sequence[str]) -> list[Any]:
        """Continuations, one prompt's seeds side by side."""
        repeated = [prompt for prompt in prompts for _ in range(self.setting.seeds)]  # noise differs from row to row
        how = self.setting
        return generate(
            self.lm,
            repeated,
            max_new_tokens=how.new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            batch_size=256,
        )

    def _groups(self, rows: Sequence[Any]) -> list[list[tuple[int, ...]]]:
        seeds = self.setting.seeds
        return [[row.tokens for row in rows[at : at + seeds]] for at in range(0, len(rows), seeds)]

    def _loss(self, rows: Sequence[Any]) -> list[float]:
        """Nats per token of continuations after their prompts, under the plain model."""
        kept = [row for row in rows if row.tokens]
        sequences = [[*row.prompt, *row.tokens] for row in kept]
        return negative_log_likelihood(self.lm.model, sequences, [len(row.prompt) for row in kept])

    def outcome(self, sae: SAE, edits: Mapping[int, Edit], split: str) -> Outcome:
        """Steers the continuations of one half of the prompts."""
        with steer(self.lm.model, sae, edits, tokenizer=self.lm.tokenizer):
            rows = self._continue(self.prompts[split])
        return self.judge(rows, split)

    def judge(self, rows: Sequence[Any], split: str) -> Outcome:
        """Measures continuations."""
        named = self.classifier.predict([row.text for row in rows]) == self.target
        share = bootstrap(named.reshape(-1, self.setting.seeds).mean(1))
        distinct = distinct_2(self._groups(rows)) / self.plain_distinct[split]
        return Outcome(share, distinct, float(np.mean(self._loss(rows))) - self.own_loss)

    def kl(self, sae: SAE, edits: Mapping[int, Edit]) -> tuple[float, float]:
        """Mean KL(plain || steered) on held-out English text, and the norm of the one edit's mean change there.

        That is the mean norm where all changes have one sign, as those of a clamp to the maximum or more.
        """
        with steer(self.lm.model, sae, edits, tokenizer=self.lm.tokenizer) as steering:
            steered = log_probabilities(self.lm.model, self.neutral)
        audit = steering.audit().latents
        norms = [abs(one.after - one.before) * float(sae.W_dec[latent].norm()) for latent, one in audit.items()]
        return mean_kl(self.plain_log_p, steered), norms[0]

    def difference_of_means(self) -> Tensor:
        """Mean activation of the target's training passages minus that of the other languages', a unit vector."""
        sums = {True: torch.zeros(self.sae.d_in), False: torch.zeros(self.sae.d_in)}
        counts = {True: 0, False: 0}
        loaded = origin_of(self.sae).load_base()
        with Capture(loaded.model, loaded.sites) as capture:
            for language, texts in by_language(self.texts["train"]).items():
                specials = find_specials(self.lm.tokenizer)
                segments = cut_documents(texts, self.lm.tokenizer, specials, self.lm.context_limit or 512)
                for part in read_activations(capture, segments, pad=specials.pad):
                    sums[language == self.target] += part.x.float().sum(0)
                    counts[language == self.target] += len(part.x)
        direction = sums[True] / counts[True] - sums[False] / counts[False]
        return direction / direction.norm()


def passages(split: str) -> dict[str, list[str]]:
    """The demo passages of one split by label."""
    result: dict[str, list[str]] = {}
    for document in read_passages():
        if document.split == split:
            result.setdefault(str(document.label), []).append(document.text)
    return result


def by_language(texts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Passages in natural languages; the English themes are English."""
    return {
        language: [text for label in (ENGLISH if language == "english" else (language,)) for text in texts[label]]
        for language in LANGUAGES
    }


def direction_sae(sae: SAE, direction: Tensor) -> SAE:
    """An SAE of one latent that never fires and writes this direction, so that `Add` steers with it."""
    zero = torch.zeros(1)
    return SAE(
        torch.zeros(1, sae.d_in),
        zero,
        direction[None],
        torch.zeros(sae.d_out),
        rule="threshold",
        threshold=zero,
        meta=sae.meta,
    )


def candidates(run: Path, target: str, n: int) -> list[int]:
    """The target's best latents on the training passages, from the concept table.

    Raises:
        ConfigError: there is no table.
    """
    path = run / "concepts.json"
    if not path.is_file():
        raise ConfigError(f"no {path}: run `saeforge features concepts {run} --texts demo` first")
    for concept in json.loads(path.read_text())["concepts"]:
        if concept["label"] == target:
            return [int(entry["latent"]) for entry in concept["top"]][:n]
    raise ConfigError(f"{path} has no label {target}: run `saeforge features concepts {run} --texts demo`")


def choose(
    bench: Bench, latents: Sequence[int], maxima: Mapping[int, float]
) -> tuple[int, float, list[dict[str, Any]]]:
    """The latent and the clamp that write most of the target while the text holds, on the training half."""
    tried = []
    for latent in latents:
        for factor in GRID:
            outcome = bench.outcome(bench.sae, {latent: Clamp(factor * maxima[latent])}, "train")
            tried.append({"latent": latent, "factor": factor, "outcome": outcome})
            say(
                f"latent {latent} clamped to {factor}max: {outcome.share.mean:.0%}, distinct-2 {outcome.distinct:.2f}, "
                f"loss {outcome.excess_loss:+.2f}"
            )
    # What is chosen at the very edge falls over it on the other half. If nothing holds at all, the report shows it.
    with_room = [entry for entry in tried if entry["outcome"].holds(margin=0.1)]
    fitting = with_room or [entry for entry in tried if entry["outcome"].holds()] or tried
    best = max(fitting, key=lambda entry: entry["outcome"].share.mean)
    return best["latent"], best["factor"], tried


def controls(
    bench: Bench, latents: Sequence[int], kl: float, norm: float, density: Mapping[int, float]
) -> dict[str, list[Outcome]]:
    """Other ways to push the model as far, by mean KL on plain text.

    The first of `latents` is the one that was chosen; the others are the target's too, and so no controls.
    """
    latent = latents[0]
    generator = torch.Generator().manual_seed(0)
    others = sorted(
        (other for other in density if other not in latents), key=lambda other: abs(density[other] - density[latent])
    )
    matched = others[: bench.setting.matched_latents]
    ways: dict[str, list[tuple[SAE, int]]] = {
        "the latent's decoder row, added": [(direction_sae(bench.sae, unit(bench.sae.W_dec[latent])), 0)],
        "difference of means": [(direction_sae(bench.sae, bench.difference_of_means()), 0)],
        "random directions": [
            (direction_sae(bench.sae, unit(torch.randn(bench.sae.d_out, generator=generator))), 0)
            for _ in range(bench.setting.random_directions)
        ],
        "latents of the same density": [(bench.sae, other) for other in matched],
    }
    found: dict[str, list[Outcome]] = {}
    for name, members in ways.items():
        outcomes = []
        for sae, number in members:
            edit = Clamp if sae is bench.sae else Add
            strength, reached = match(lambda s, sae=sae, n=number, e=edit: bench.kl(sae, {n: e(s)})[0], kl, start=norm)
            outcomes.append(replace(bench.outcome(sae, {number: edit(strength)}, "test"), kl=reached))
            say(f"{name} {len(outcomes)} of {len(members)}: {outcomes[-1].share.mean:.0%} at KL {reached:.3f}")
        found[f"{name}, same KL"] = outcomes
    return found


def suppression(bench: Bench, latents: Sequence[int], maxima: Mapping[int, float]) -> dict[str, Any]:
    """Change of the loss on held-out target passages minus that on English ones, nats per token."""
    first = latents[0]
    ways: dict[str, dict[int, Edit]] = {
        "clamp 0": {first: Clamp(0)},
        "clamp -1max where active": {first: Clamp(-maxima[first], when_active=True)},
        "clamp -1max": {first: Clamp(-maxima[first])},
        f"{len(latents)} latents clamped to 0": {latent: Clamp(0) for latent in latents},
        f"{len(latents)} latents clamped to -1max where active": {
            latent: Clamp(-maxima[latent], when_active=True) for latent in latents
        },
    }
    texts = by_language(bench.texts["test"])
    sequences = {name: bench._sequences(texts[name]) for name in (bench.target, "english")}
    skip = {name: [1] * len(rows) for name, rows in sequences.items()}
    plain = {name: negative_log_likelihood(bench.lm.model, rows, skip[name]) for name, rows in sequences.items()}
    result = {}
    for way, edits in ways.items():
        with steer(bench.lm.model, bench.sae, edits, tokenizer=bench.lm.tokenizer):
            steered = {
                name: negative_log_likelihood(bench.lm.model, rows, skip[name]) for name, rows in sequences.items()
            }
        change = {name: np.array(steered[name]) - np.array(plain[name]) for name in sequences}
        rng = np.random.default_rng(0)
        drawn = [
            rng.choice(change[bench.target], len(change[bench.target])).mean()
            - rng.choice(change["english"], len(change["english"])).mean()
            for _ in range(1000)
        ]
        low, high = np.quantile(drawn, [0.025, 0.975])
        difference = float(change[bench.target].mean() - change["english"].mean())
        result[way] = {
            "target": bootstrap(change[bench.target]),
            "english": bootstrap(change["english"]),
            "difference": Interval(difference, float(low), float(high)),
        }
    return result


def unit(direction: Tensor) -> Tensor:
    """Scaled to norm 1."""
    return direction / direction.norm()


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--target", default="french", choices=[name for name in LANGUAGES if name != "english"])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=Setting.prompts)
    parser.add_argument("--seeds", type=int, default=Setting.seeds)
    given = parser.parse_args(argv)
    try:
        setting = Setting(prompts=given.prompts, seeds=given.seeds)
        say("plain continuations")
        bench = Bench(given.run, given.target, setting)
        latents = candidates(given.run, given.target, setting.candidates)
        with FeatureStore.open(given.run) as store:
            maxima, density = (dict(enumerate(store.column(name).tolist())) for name in ("max", "density"))
        latent, factor, tried = choose(bench, latents, maxima)
        latents = [latent, *(other for other in latents if other != latent)]
        value = factor * maxima[latent]
        kl, norm = bench.kl(bench.sae, {latent: Clamp(value)})
        results = {
            "chosen": {"latent": latent, "factor": factor, "value": value, "kl": kl, "norm": norm},
            "tried": tried,
            "plain": bench.judge(bench.plain["test"], "test"),
            "latent": bench.outcome(bench.sae, {latent: Clamp(value)}, "test"),
            "controls": controls(bench, latents, kl, norm, density),
            "suppression": suppression(bench, latents, maxima),
            "classifier_accuracy": bench.accuracy,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        }
    except SaeforgeError as error:
        print(f"bench_steering.py: error: {error}", file=sys.stderr)
        return 2
    report(given.report, bench.sae, given.target, setting, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

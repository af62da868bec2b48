"""Judges the demo language model on text that it never saw, and writes the report.

    python scripts/judge_demo_lm.py --text corpus collected --model demo-model --report docs/demo-model.md

Give the same `--text` as in training: the model's training.json tells whether it is. Three measures for each label:
1. Bits per byte of the held-out documents, beside a 5-gram Kneser-Ney model of the same tokens and training text.
2. A classifier of character n-grams, trained on one half of the held-out documents (or on --classifier-text) and
   measured on the other half, names the labels of 100 continuations of 50 tokens. Prompts are beginnings of held-out
   documents that the classifier did not see; it gets the continuation alone. A piece of an HTML page may begin in the
   middle of a listing, from which nobody could tell that it is HTML: what counts are prompts whose own label the
   classifier can name; the figure for all prompts stands beside it.
3. A few of these continuations to read.
Ends with code 1 if a goal is missed: bits at least 10% below Kneser-Ney's on every label, a classifier that is right on
at least 98% of held-out documents, at least 80% of each label's continuations named right.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_lm_kneser_ney import KneserNey
from demo_lm_model import BOS, bits_per_byte, document_bits, encode
from demo_lm_sampling import PIECE, Sampling, continuations, pieces, train_classifier
from demo_lm_text import Document, fingerprint, labels, read_documents
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from saeforge.errors import ConfigError, SaeforgeError

LEAST_GAIN, LEAST_ACCURACY, LEAST_NAMED = 0.10, 0.98, 0.80
PER_LABEL = 100  # continuations: of 20, a share of 85% comes out below 80% every sixth time


@dataclass
class Sample:
    """One continuation."""

    label: str
    prompt: str
    continuation: str
    named: str = ""


@dataclass
class Verdict:
    """Everything that the report says."""

    model_bits: dict[str, float]
    baseline_bits: dict[str, float]
    own_baseline_bits: dict[str, float]  # a Kneser-Ney model of each label alone
    accuracy: float  # of the classifier, on held-out documents
    piece_accuracy: float  # on pieces of them as short as a continuation
    n_documents: int
    samples: list[Sample]  # after prompts that tell their label
    any_prompt: dict[str, float]  # share named right after any prompt

    def named(self, label: str) -> float:
        """Share of a label's continuations that the classifier names right."""
        own = [sample.named == label for sample in self.samples if sample.label == label]
        return sum(own) / len(own)

    def misses(self) -> list[str]:
        """The goals that are missed, in words."""
        found = [
            f"{label}: {bits:.3f} bits per byte, Kneser-Ney has {self.baseline_bits[label]:.3f}, expected "
            f"{LEAST_GAIN:.0%} less"
            for label, bits in self.model_bits.items()
            if bits > (1 - LEAST_GAIN) * self.baseline_bits[label]
        ]
        if self.accuracy < LEAST_ACCURACY:
            found.append(f"the classifier is right on {self.accuracy:.1%}, expected {LEAST_ACCURACY:.0%}")
        for label in self.model_bits:
            if self.named(label) < LEAST_NAMED:
                found.append(
                    f"{label}: {self.named(label):.0%} of continuations named right, expected {LEAST_NAMED:.0%}"
                )
        return found


def judge(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    classifier_text: Sequence[Document] | None,
    how: Sampling,
    per_label: int = PER_LABEL,
) -> Verdict:
    """Measures a model on the held-out ones of `documents`.

    Args:
        model: In float32.
        tokenizer: Its tokenizer.
        documents: The text that it was trained on and its held-out documents.
        classifier_text: What the classifier learns from; every second held-out document if None.
        how: How continuations are drawn.
        per_label: How many of each label.
    """
    held = [document for document in documents if document.held_out]
    trained = [document for document in documents if not document.held_out]
    held_ids, trained_ids = (encode(tokenizer, [document.text for document in part]) for part in (held, trained))
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    say("bits per byte of the model")
    model_bits = bits_per_byte(held, document_bits(model, held_ids, context))
    say("Kneser-Ney")

    def kneser_ney(names: Sequence[str]) -> dict[str, float]:
        known = [ids for ids, document in zip(trained_ids, trained, strict=True) if document.label in names]
        asked = [i for i, document in enumerate(held) if document.label in names]
        baseline = KneserNey(known, vocab, bos=BOS, n_predicted=vocab - 3)  # all but BOS, EOS and PAD
        return bits_per_byte([held[i] for i in asked], baseline.document_bits([held_ids[i] for i in asked]))

    baseline_bits = kneser_ney(labels(held))
    own_bits = {label: kneser_ney([label])[label] for label in labels(held)}

    say("classifier")
    by_label = {label: [document for document in held if document.label == label] for label in labels(held)}
    learned = [document for own in by_label.values() for document in own[::2]]
    asked = [document for own in by_label.values() for document in own[1::2]]
    if classifier_text is not None:
        learned, asked = list(classifier_text), held
    classifier = train_classifier(learned)
    texts, names = pieces(asked)
    piece_accuracy = float(np.mean(classifier.predict(texts) == np.array(names)))
    right = classifier.predict([document.text for document in asked]) == np.array([doc.label for doc in asked])
    accuracy = float(np.mean(right))

    say("continuations")
    unseen = set(asked)
    starts = {
        label: [
            ids[: how.prompt_tokens]
            for ids, doc in zip(held_ids, held, strict=True)
            if doc in unseen and doc.label == label and len(ids) >= how.prompt_tokens
        ]
        for label in by_label
    }
    telling = {
        label: [ids for ids in own if classifier.predict([tokenizer.decode(ids)])[0] == label]
        for label, own in starts.items()
    }

    def draw(prompts: dict[str, list[list[int]]]) -> list[Sample]:
        for label, own in prompts.items():
            if not own:
                raise ConfigError(f"label '{label}' has no held-out document to prompt with: add text")
        asked = [(label, own[i % len(own)]) for label, own in prompts.items() for i in range(per_label)]
        drawn = continuations(model, [ids for _, ids in asked], how)
        texts = [tokenizer.decode(new) for new in drawn]
        names = classifier.predict(texts)
        return [
            Sample(label, tokenizer.decode(ids), text, str(name))
            for (label, ids), text, name in zip(asked, texts, names, strict=True)
        ]

    samples = draw(telling)
    after_any = {label: [s.named == label for s in draw({label: own})] for label, own in starts.items()}
    any_prompt = {label: float(np.mean(right)) for label, right in after_any.items()}
    return Verdict(model_bits, baseline_bits, own_bits, accuracy, piece_accuracy, len(asked), samples, any_prompt)


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def report(verdict: Verdict, facts: dict[str, Any], documents: Sequence[Document], how: Sampling) -> str:
    """The report in Markdown."""
    per_label = len(verdict.samples) // len(verdict.model_bits)
    shape = facts["recipe"]["shape"]
    held = {label: [d for d in documents if d.held_out and d.label == label] for label in labels(documents)}
    misses = verdict.misses()
    lines = [
        "# The demo language model",
        "",
        f"A Llama of {shape['n_layers']} layers (d_model {shape['d_model']}, {shape['n_heads']} heads, intermediate "
        f"{shape['intermediate']}, context {shape['context']}, tied embeddings) over a byte-level BPE of "
        f"{shape['vocab_size']:,} tokens, trained for {facts['step']:,} steps ({facts['tokens'] / 1e6:.1f}M tokens) on "
        f"{facts['device']}. Written by `scripts/judge_demo_lm.py`; `scripts/train_demo_lm.py` makes the model.",
        "",
        "All goals are met." if not misses else "Goals that are missed:",
        *([""] + [f"- {miss}" for miss in misses] if misses else []),
        "",
        "## How well it predicts",
        "",
        "Bits per byte of held-out documents: the model's, a 5-gram model's with modified Kneser-Ney smoothing over "
        "the same tokens and the same training text, and, to compare, such a 5-gram model of the label's text alone. "
        f'Goal: at least {LEAST_GAIN:.0%} less than the first of these. "Named": see below.',
        "",
        "| label | training tokens | times read | held-out kB | model | 5-gram | less | label's own 5-gram | named "
        "| any prompt |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for label, bits in verdict.model_bits.items():
        own, size = facts["labels"][label], sum(len(document.text.encode()) for document in held[label])
        lines.append(
            f"| {label} | {own['tokens']:,} | {own['epochs']:.1f} | {size / 1e3:.0f} | {bits:.3f} "
            f"| {verdict.baseline_bits[label]:.3f} | {1 - bits / verdict.baseline_bits[label]:.1%} "
            f"| {verdict.own_baseline_bits[label]:.3f} | {verdict.named(label):.0%} "
            f"| {verdict.any_prompt[label]:.0%} |"
        )
    lines += [
        "",
        "## What it writes",
        "",
        f"A classifier of character n-grams that learned from other text names {verdict.accuracy:.1%} of "
        f"{verdict.n_documents:,} held-out documents right (goal {LEAST_ACCURACY:.0%}), and "
        f"{verdict.piece_accuracy:.1%} of pieces of {PIECE} characters, about as long as a continuation. It then names "
        f"{per_label} continuations of {how.new_tokens} tokens for each label, without their prompts "
        f"({how.prompt_tokens} tokens of held-out documents; temperature {how.temperature}, top-p {how.top_p}, seed "
        f'{how.seed}) from which it can name the label itself: column "named" above (goal {LEAST_NAMED:.0%}). Beside '
        "it the same after any prompt: some pieces of HTML begin in a log or a listing, which tells nobody what it is.",
        "",
        "The first two of each label, the prompt before the bar:",
        "",
    ]
    for label in verdict.model_bits:
        lines += [f"**{label}**", "", "~~~~text"]
        for sample in [sample for sample in verdict.samples if sample.label == label][:2]:
            lines += [f"{sample.prompt} | {sample.continuation}", "----"]
        lines[-1:] = ["~~~~", ""]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--model", type=Path, required=True, help="folder that train_demo_lm.py wrote")
    parser.add_argument("--classifier-text", type=Path, nargs="+", metavar="FOLDER", help="same form as --text")
    parser.add_argument("--report", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--per-label", type=int, default=PER_LABEL, help="continuations of each label")
    for name, value in asdict(Sampling()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(argv)
    try:
        path = given.model / "training.json"
        if not path.is_file():
            raise ConfigError(f"no {path}: --model takes a folder that train_demo_lm.py wrote")
        facts = json.loads(path.read_text(encoding="utf-8"))
        documents = read_documents(given.text, facts["recipe"]["held_out"])
        if fingerprint(documents) != facts["text_sha256"]:
            raise ConfigError(f"{given.model} was trained on other text than --text: give the same folders, in order")
        other = None if given.classifier_text is None else read_documents(given.classifier_text)
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(given.model).backend_tokenizer
        how = Sampling(**{name: getattr(given, name) for name in asdict(Sampling())})
        verdict = judge(model, tokenizer, documents, other, how, given.per_label)
    except SaeforgeError as error:
        print(f"judge_demo_lm.py: error: {error}", file=sys.stderr)
        return 2
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.write_text(report(verdict, facts, documents, how), encoding="utf-8")
    for miss in verdict.misses():
        print(f"missed: {miss}")
    return 1 if verdict.misses() else 0


if __name__ == "__main__":
    sys.exit(main())

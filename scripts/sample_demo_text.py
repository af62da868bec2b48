"""Draws the demo text: documents of every label, sampled from the demo language model, for `--text demo` of a harvest.

    python scripts/sample_demo_text.py

Writes `saeforge/demo/text.jsonl.gz` (an object with name, label and text per line) and `text.json` (what it was made
of, and what was left out). The same command on the same machine writes the same bytes; make it anew whenever the model
changes. Prompts are a few tokens from the beginning of a sentence or a line of a train passage, and are not kept. A
sample is kept if a classifier of character n-grams, trained on the train passages, names its label for both its halves,
and if it shares no 13 words and no 13 tokens in a row with any passage. Labels without passages are left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_lm_model import encode
from demo_lm_sampling import Sampling, continuations, train_classifier
from demo_lm_text import Document
from rich.console import Console
from rich.progress import Progress
from sklearn.pipeline import Pipeline
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from saeforge.demo import model_path, passages_path, text_path
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.lm.text import Document as Passage
from saeforge.lm.text import read_passages, runs, words

THEMES_ARE = "english"
SMALLEST_BATCH = 24  # takes hardly longer than a single sample
LATIN = 0x24F  # the last letter of the Latin blocks; the classifier knows no other script
DEFAULTS = Sampling(prompt_tokens=12, new_tokens=243, temperature=0.9, top_p=0.95, seed=0)
START = re.compile(r"^[ \t]*(?=\S)|(?<=[.!?:;] )(?=\w)", re.MULTILINE)  # of a line, or of a sentence


@dataclass
class Kept:
    """What was drawn for one label."""

    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    drawn: int = 0
    named: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def facts(self, label: str) -> dict[str, Any]:
        """For text.json."""
        return {
            "documents": len(self.texts),
            "tokens": self.tokens,
            "drawn": self.drawn,
            "named_right": round(self.named[label] / max(1, self.drawn), 4),
            "named": dict(self.named.most_common()),
            "refused": dict(sorted(self.refused.items())),
        }


class Writer:
    """Draws documents of one label after another."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer,
        passages: Sequence[Passage],
        classifier: Pipeline | None,
        how: Sampling,
        batch: int,
    ) -> None:
        context = model.config.max_position_embeddings
        if 1 + how.prompt_tokens + how.new_tokens > context:
            raise ConfigError(
                f"BOS, {how.prompt_tokens} prompt tokens and {how.new_tokens} new ones do not fit into the model's "
                f"context of {context}: lower --new-tokens"
            )
        self.model, self.tokenizer, self.classifier, self.how, self.batch = model, tokenizer, classifier, how, batch
        self.passages = passages
        self.known: set[tuple[Hashable, ...]] = set()
        for passage in passages:
            self.known |= self._runs(passage.text)

    def write(self, label: str, tokens: int, most: int, progress: Progress) -> Kept:
        """Draws until there are `tokens` tokens.

        Raises:
            ConfigError: `most` samples did not bring them.
        """
        kept, prompts = Kept(), self._prompts(label)
        task = progress.add_task(label, total=tokens)
        while kept.tokens < tokens:
            if kept.drawn >= most:
                raise ConfigError(
                    f"label '{label}': {kept.tokens:,} of {tokens:,} tokens after {kept.drawn:,} samples, of which the "
                    f"classifier named {dict(kept.named.most_common(3))}, refused {dict(kept.refused)}; train the "
                    "model longer, or give --most-tries or --unfiltered"
                )
            good = max(0.2, (len(kept.texts) + 1) / (kept.drawn + 1))
            needed = 1.1 * (tokens - kept.tokens) / self.how.new_tokens / good
            size = min(self.batch, most - kept.drawn, max(SMALLEST_BATCH, math.ceil(needed)))
            chosen = [next(prompts) for _ in range(size)]
            seed = hashlib.sha256(f"{self.how.seed} {label} {kept.drawn}".encode()).digest()
            how = replace(self.how, seed=int.from_bytes(seed[:8], "big"))
            begun, step = time.monotonic(), size * 0.8  # of a sample's tokens, about what is kept
            drawn = continuations(
                self.model, chosen, how, on_token=lambda task=task, step=step: progress.advance(task, step)
            )
            speed = size * how.new_tokens / (time.monotonic() - begun)
            self._keep(label, [self.tokenizer.decode(ids) for ids in drawn], tokens, kept)
            progress.update(task, completed=min(kept.tokens, tokens))
            progress.console.print(
                f"{label:<12} {kept.tokens:7,} of {tokens:,} tokens, kept {len(kept.texts)} of {kept.drawn} samples, "
                f"{speed:,.0f} tokens/s"
            )
        return kept

    def _prompts(self, label: str) -> Iterator[list[int]]:
        """Beginnings of sentences and lines of the label's train passages, in random order, again and again."""
        found = []
        for passage in self.passages:
            if passage.label == label and passage.split == "train":
                rests = [passage.text[match.end() :] for match in START.finditer(passage.text)]
                found += [ids for ids in encode(self.tokenizer, rests) if len(ids) >= self.how.prompt_tokens]
        if not found:
            raise ConfigError(f"label '{label}' has no train passage of {self.how.prompt_tokens} tokens")
        seed = hashlib.sha256(f"{self.how.seed} {label} prompts".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        while True:
            for i in rng.permutation(len(found)):
                yield found[i][: self.how.prompt_tokens]

    def _keep(self, label: str, drawn: Sequence[str], tokens: int, kept: Kept) -> None:
        """Adds those of the samples that are good for something, until there are enough tokens."""
        texts = [whole_words(text) for text in drawn]
        named = [self._name(label, text) for text in texts]
        sizes = [len(ids) for ids in encode(self.tokenizer, texts)]
        for text, name, size in zip(texts, named, sizes, strict=True):
            if kept.tokens >= tokens:
                return
            kept.drawn += 1
            kept.named[name] += 1
            if "\ufffd" in text or size < self.how.new_tokens // 2:
                kept.refused["broken"] += 1
            elif text in kept.texts:
                kept.refused["repeated"] += 1
            elif not self.known.isdisjoint(self._runs(text)):
                kept.refused["like a passage"] += 1
            elif name != label:
                kept.refused["named otherwise"] += 1
            else:
                kept.texts.append(text)
                kept.tokens += size

    def _name(self, label: str, text: str) -> str:
        """The label that a text looks like; `label` only if both halves do, as a small model may change its mind."""
        if self.classifier is None:
            return label
        if sum(char.isalpha() and ord(char) > LATIN for char in text) > 0.02 * len(text):
            return "another script"
        names = self.classifier.predict([text[: len(text) // 2], text[len(text) // 2 :]])
        return str(next((name for name in names if name != label), label))

    def _runs(self, text: str) -> set[tuple[Hashable, ...]]:
        return runs(words(text)) | runs(encode(self.tokenizer, [text])[0])


def whole_words(text: str) -> str:
    """The text without its first and its last word: a prompt may end, and a sample does end, inside a word."""
    match = re.match(r"\S*\s+(.*\S)\s+\S*$", text, re.DOTALL)
    return match[1] if match else ""


def train_on(passages: Sequence[Passage], labels: Sequence[str]) -> Pipeline:
    """The classifier of the train passages; English themes count as English."""
    known = [
        Document(passage.label if passage.label in labels else THEMES_ARE, passage.text, False)
        for passage in passages
        if passage.split == "train" and passage.label is not None
    ]
    return train_classifier(known)


def store(out: Path, texts: dict[str, list[str]], facts: dict[str, Any]) -> None:
    """Writes both files, each of them whole or not at all; the archive tells neither time nor name."""
    lines = [
        json.dumps({"name": f"sample/{label}/{number:04d}", "label": label, "text": text}, ensure_ascii=False) + "\n"
        for label, own in sorted(texts.items())
        for number, text in enumerate(own)
    ]
    data = gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)
    facts = {**facts, "text_sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    sidecar = out.with_name(out.name.removesuffix(".jsonl.gz") + ".json")
    for path, content in ((out, data), (sidecar, (json.dumps(facts, indent=2) + "\n").encode())):
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=model_path(), help="folder that train_demo_lm.py wrote")
    parser.add_argument("--out", type=Path, default=text_path(), help="file to write, .jsonl.gz")
    parser.add_argument("--tokens", type=int, default=32_000, help="of each label, at least")
    parser.add_argument("--labels", nargs="+", help="only these")
    parser.add_argument("--batch", type=int, default=96, help="samples drawn together")
    parser.add_argument("--most-tries", type=float, default=4.0, help="give up after this many times the tokens")
    parser.add_argument("--unfiltered", action="store_true", help="keep a sample whatever its label looks like")
    parser.add_argument("--threads", type=int, default=1, help="another number may give other text")
    for name, value in asdict(DEFAULTS).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(argv)
    try:
        _run(given)
    except SaeforgeError as error:
        print(f"sample_demo_text.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    if not given.out.name.endswith(".jsonl.gz"):
        raise ConfigError(f"--out {given.out}: expected a name that ends in .jsonl.gz")
    path = given.model / "training.json"
    if not path.is_file():
        raise ConfigError(f"no {path}: --model takes a folder that train_demo_lm.py wrote")
    trained = list(json.loads(path.read_text(encoding="utf-8"))["labels"])
    passages = read_passages()
    with_passages = {passage.label for passage in passages}
    left_out = [label for label in trained if label not in with_passages]
    known = labels = [label for label in trained if label in with_passages]
    if given.labels is not None:
        unknown = sorted(set(given.labels) - set(labels))
        if unknown:
            raise ConfigError(f"--labels {' '.join(unknown)}: expected some of {' '.join(labels)}")
        labels = [label for label in labels if label in given.labels]
    how = Sampling(**{name: getattr(given, name) for name in asdict(DEFAULTS)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model).backend_tokenizer
    classifier = None if given.unfiltered else train_on(passages, known)
    writer = Writer(model, tokenizer, passages, classifier, how, given.batch)
    most = int(given.most_tries * given.tokens / how.new_tokens) + 1
    with Progress(console=Console(stderr=True)) as progress:
        kept = {label: writer.write(label, given.tokens, most, progress) for label in labels}
    facts = {
        "made_by": "scripts/sample_demo_text.py",
        "model": {name: sha256(given.model / name) for name in ("model.safetensors", "tokenizer.json")},
        "passages_sha256": {file.name: sha256(file) for file in sorted(passages_path().glob("*.jsonl"))},
        "settings": {**asdict(how), "batch": given.batch, "filtered": not given.unfiltered},
        "labels": {label: part.facts(label) for label, part in kept.items()},
        "left_out": {"labels": left_out, "why": "no passages"},
    }
    store(given.out, {label: part.texts for label, part in kept.items()}, facts)
    total = sum(part.tokens for part in kept.values())
    print(f"{total:,} tokens of {len(kept)} labels in {given.out}; left out for want of passages: {left_out}")


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())

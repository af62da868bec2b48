"""Latents in their contexts: which are shown, and how a page shows one of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from saeforge.features.store import Example, Feature, FeatureStore
from saeforge.pages.charts import spark
from saeforge.pages.markup import Markup, join, number, percent, tag, text
from saeforge.pages.scales import tick

#: Strengths of the highlight (`mark.h1` to `mark.h8` in page.css).
LEVELS = 8
#: Tokens shown before and after the one that an example is about.
BEFORE, AFTER = 18, 9
#: A peaked latent fires in so many documents at least, and on less than this share of tokens.
FEW_DOCUMENTS, DENSE = 10, 0.1


@dataclass(frozen=True)
class Group:
    """Latents that were chosen by one rule.

    Attributes:
        title: what they are.
        rule: how they were chosen, in words.
        latents: their numbers, in order.
    """

    title: str
    rule: str
    latents: tuple[int, ...]


def choose(store: FeatureStore, most: int, *, seed: int = 0) -> list[Group]:
    """Up to `most` latents: labelled ones, peaked ones, and some drawn at random, which show what is usual.

    Labelled: those with the best score of each label, up to half. Peaked: greatest ratio of the 99th percentile of a
    latent's activations to their mean, so that what it is strongest on stands out. A quarter is drawn at random from
    all that fired.
    """
    taken: set[int] = set()

    def take(latents: Sequence[int], limit: int) -> tuple[int, ...]:
        chosen = [latent for latent in latents if latent not in taken][: max(limit, 0)]
        taken.update(chosen)
        return tuple(chosen)

    count, density, documents = (store.column(name) for name in ("count", "density", "documents"))
    mean, p99 = store.column("mean"), store.column("p99")
    fired = [int(latent) for latent in count.nonzero()[0]]
    labelled = take([latent for latent, _ in store.labelled()], most // 2)
    drawn = take(random.Random(seed).sample(fired, len(fired)), most // 4)
    clear = [latent for latent in fired if documents[latent] >= FEW_DOCUMENTS and density[latent] < DENSE]
    order = sorted(clear or fired, key=lambda latent: -p99[latent] / mean[latent] if mean[latent] else math.inf)
    peaked = take(order, most - len(labelled) - len(drawn))
    groups = [
        Group("Labelled", "The best latent of each label on held-out documents, by token AUROC, best first.", labelled),
        Group(
            "Peaked",
            f"Of latents that fire in {FEW_DOCUMENTS} documents or more and on less than {percent(DENSE)} of tokens: "
            "those whose strong activations (99th percentile) stand out most from their mean.",
            peaked,
        ),
        Group(
            "Drawn at random", f"From all that fired, with seed {seed}: what a latent of this SAE usually is.", drawn
        ),
    ]
    return [group for group in groups if group.latents]


def cards(store: FeatureStore, group: Group, *, contexts: int, prefix: str = "") -> Markup:
    """The latents of a group.

    Args:
        store: the features.
        group: which.
        contexts: strongest contexts to show of each.
        prefix: of the anchors, where a page shows several SAEs.
    """
    shown = [card(store.latent(n), store.top(n, contexts), prefix=prefix) for n in group.latents]
    return tag("div", shown, class_="latents")


def card(feature: Feature, examples: Sequence[Example], *, prefix: str = "") -> Markup:
    """One latent: number, labels, statistics, distribution, strongest contexts."""
    chips = [
        tag("span", label["label"] + ("" if label["score"] is None else f" {label['score']:.3f}"), class_="chip")
        for label in feature.labels
    ]
    title = tag("h4", f"#{feature.latent} ", join(chips))
    if feature.count == 0:
        body: object = tag("p", "never fired in the tokens read")
    else:
        low, high = min(feature.histogram), max(feature.histogram)
        counts = [feature.histogram.get(octave, 0) for octave in range(low, high + 1)]
        told = f"activations by octave, {tick(2.0**low)} to {tick(2.0 ** (high + 1))}"
        title = join([title, spark(counts, told)])
        body = join(
            [
                tag(
                    "p",
                    f"fires on {percent(feature.density)} of tokens, in {number(feature.documents)} documents; "
                    f"max {number(feature.max, 3)}, mean {number(feature.mean, 3)}",
                ),
                tag("ol", [context(example, feature.max) for example in examples], class_="contexts"),
            ]
        )
    return tag("article", tag("header", title), body, class_="latent", id=f"{prefix}latent-{feature.latent}")


def context(example: Example, largest: float) -> Markup:
    """One context, each token marked by how strongly the latent fires on it."""
    first, last = max(example.centre - BEFORE, 0), min(example.centre + AFTER + 1, len(example.tokens))
    parts: list[Markup] = []
    silent = ""
    for i in range(first, last):
        token, value = example.tokens[i], example.values[i]
        if value == 0:
            silent += token
            continue
        parts.append(text(silent))
        silent = ""
        if value is None:  # nothing is known of this token
            parts.append(tag("span", token, class_="unknown"))
            continue
        level = max(1, min(LEVELS, math.ceil(LEVELS * abs(value) / largest))) if largest else 1
        classes = f"h{level} centre" if i == example.centre else f"h{level}"
        word = token.lstrip(" ") or token  # the space before a word would hang at the end of a line, coloured
        parts.append(text(token[: len(token) - len(word)]))
        parts.append(tag("mark", word, class_=classes, title=number(value, 3)))
    parts.append(text(silent))
    where = [example.document, example.label, f"token {example.position:,}"]
    return tag(
        "li",
        tag("span", number(example.value, 3), class_="act", title="activation of the underlined token"),
        tag(
            "div",
            tag("div", join(parts), class_="words", dir="auto"),
            tag("cite", " · ".join(part for part in where if part)),
        ),
    )


def colour_scale() -> Markup:
    """The highlight's strengths, in a row."""
    return tag("span", [tag("span", class_=f"h{i}") for i in range(1, LEVELS + 1)], class_="scale", aria_hidden="true")

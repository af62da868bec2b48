"""Features in the terminal: firing tokens coloured by strength, or marked where there is no colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from saeforge.features.store import Example, Feature

BARS = "▁▂▃▄▅▆▇█"
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})
_COLD, _HOT = (38, 50, 56), (255, 138, 0)  # readable on dark and on light terminals: the foreground is set too


def histogram_bars(histogram: dict[int, int]) -> str:
    """Return one bar for each octave, from the lowest that occurs to the highest, linear in the count."""
    if not histogram:
        return ""
    largest = max(histogram.values())
    counts = [histogram.get(octave, 0) for octave in range(min(histogram), max(histogram) + 1)]
    return "".join(" " if count == 0 else BARS[(count * (len(BARS) - 1) + largest - 1) // largest] for count in counts)


def header(feature: Feature, d_sae: int) -> list[str]:
    """Return the lines above a latent's contexts."""
    if feature.count == 0:
        return [f"latent {feature.latent} of {d_sae:,}: never fired in the tokens read", *_labels(feature)]
    low, high = min(feature.histogram), max(feature.histogram) + 1
    return [
        f"latent {feature.latent} of {d_sae:,}: fired on {feature.count:,} tokens ({_percent(feature.density)}) in "
        f"{feature.documents:,} documents",
        f"max {feature.max:.4g}, p99 {feature.p99:.4g}, mean of non-zeros {feature.mean:.4g}",
        f"activations by octave, {2.0**low:.4g} to {2.0**high:.4g}: {histogram_bars(feature.histogram)}",
        *_labels(feature),
    ]


def _labels(feature: Feature) -> list[str]:
    return [
        f"{label['source']}: {label['label']}" + ("" if label["score"] is None else f" ({label['score']:.3f})")
        for label in feature.labels
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def render(example: Example, largest: float, *, colour: bool, around: int) -> Text:
    """Return one example as a line.

    Args:
        example: with its window.
        largest: activation of full strength.
        colour: False marks firing tokens with ⟦ ⟧ instead.
        around: tokens to show on both sides.
    """
    first, last = max(example.centre - around, 0), min(example.centre + around + 1, len(example.tokens))
    tokens = [token.translate(_VISIBLE) for token in example.tokens[first:last]]
    values = example.values[first:last]
    text = Text(f"{example.value:8.4g}  ")
    if colour:
        for number, (token, value) in enumerate(zip(tokens, values, strict=True), start=first):
            text.append(token, style=_style(value, largest, centre=number == example.centre))
    else:
        text.append(mark(tokens, values))
    place = f"  ({example.document}{f', {example.label}' if example.label else ''}, token {example.position})"
    return text.append(place, style="dim" if colour else "")


def mark(tokens: Sequence[str], values: Sequence[float | None]) -> str:
    """Return tokens as text with each run of firing ones between ⟦ and ⟧."""
    parts: list[str] = []
    inside = False
    for token, value in zip(tokens, values, strict=True):
        if bool(value) != inside:
            parts.append("⟧" if inside else "⟦")
            inside = not inside
        parts.append(token)
    return "".join(parts) + ("⟧" if inside else "")


def _style(value: float | None, largest: float, *, centre: bool) -> str:
    if value is None:
        return "dim italic"  # nothing is known of this token
    if value == 0:
        return ""
    share = min(value / largest, 1.0) if largest else 0.0
    red, green, blue = (round(cold + (hot - cold) * share) for cold, hot in zip(_COLD, _HOT, strict=True))
    foreground = "black" if share > 0.5 else "white"
    return f"{'bold underline ' if centre else ''}{foreground} on rgb({red},{green},{blue})"

"""The card of a dataset in lines for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saeforge.data.moments import BINS_PER_OCTAVE
from saeforge.errors import ConfigError

HISTOGRAM_LINES = 14
BAR_WIDTH = 40
EIGHTHS = " ▏▎▍▌▋▊▉█"
MAX_LABELS = 12
TEXT_WIDTH = 100

Decode = Callable[[Sequence[int]], list[str]]


def card_lines(facts: dict[str, Any], decode: Decode | None) -> Iterator[str]:
    """Yield the lines of a card.

    Args:
        facts: as `describe_dataset` returns them.
        decode: token ids to the text of each; None shows the ids.
    """
    yield f"dataset     {facts['path']} ({_status(facts)})"
    yield f"model       {_model(facts['model'])}"
    if "progress" in facts:
        yield from _unfinished(facts)
        return
    if text := _text(facts["text"]):
        yield f"text        {text}"
    if facts["packing"]:
        yield f"packing     {_packing(facts['packing'])}"
    yield f"order       {_order(facts['shuffle'])}"
    for name, split in facts["splits"].items():
        left_out = [f"{split['dropped_rows']:,} rows filled no block"] if split["dropped_rows"] else []
        left_out += [f"{split['outlier_rows']:,} left out for their norm"] if split["outlier_rows"] else []
        yield (
            f"{name:<11} {split['rows']:,} rows in {split['blocks']:,} blocks of {split['block_rows']:,}"
            + (f" ({', '.join(left_out)})" if left_out else "")
        )
    yield from _labels(facts["labels"])
    for site in facts["sites"]:
        yield from _site(site, facts["outliers"])
    if facts["samples"]:
        yield ""
        yield f"sample rows ({facts['sites'][0]['id']})"
        for sample in facts["samples"]:
            yield from _sample(sample, decode)
    total = sum(site["bytes"] for site in facts["sites"]) + facts["rows_bytes"]
    yield ""
    yield f"size        {size(total)}, of it {size(facts['rows_bytes'])} where each row comes from"
    yield f"fingerprint {facts['fingerprint']}"


def decoder(model: dict[str, Any], wanted: str, *, trust_remote_code: bool = False) -> Decode | None:
    """Return what turns token ids into text, or None if the model's tokenizer is not to be used.

    Args:
        model: record of the dataset.
        wanted: "true", "false", or "auto": if the model is on this machine, so that looking never downloads.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        ConfigError: wanted is "true" and there is no tokenizer.
    """
    name = str(model.get("name") or "")
    here = bool(name) and (name == "demo" or name.startswith("package:") or Path(name).is_dir())
    if wanted == "false" or (wanted == "auto" and not here):
        return None
    if not name:
        raise ConfigError("decode = true, but the dataset names no model, so there is no tokenizer; use --decode false")

    from saeforge.lm.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(name, model.get("revision"), trust_remote_code=trust_remote_code)
    except ConfigError:
        if wanted == "true":
            raise
        return None

    from saeforge.features.pieces import Pieces

    return Pieces(tokenizer)


def size(count: int) -> str:
    """Return bytes in binary units."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def histogram_lines(histogram: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield a line for each range of norms, with a bar; the thousandth at each end is one line.

    Args:
        histogram: pairs (bin, rows), bins as in `Statistics.norm_histogram`.
    """
    counts = {int(number): int(rows) for number, rows in histogram if rows}
    if not counts:
        return
    total, seen = sum(counts.values()), 0
    low, high = min(counts), max(counts)
    for number in sorted(counts):
        if seen <= total / 1000:
            low = number
        seen += counts[number]
        if seen < total - total / 1000:
            high = number + 1
    high = max(low, min(high, max(counts)))
    step = -(-(high - low + 1) // HISTOGRAM_LINES)
    ranges = [(start, min(start + step, high + 1)) for start in range(low, high + 1, step)]
    if min(counts) < low:
        ranges.insert(0, (min(counts), low))
    if max(counts) > high:
        ranges.append((high + 1, max(counts) + 1))
    rows = [sum(counts.get(number, 0) for number in range(*part)) for part in ranges]
    for (start, stop), count in zip(ranges, rows, strict=True):
        eighths = round(8 * BAR_WIDTH * count / max(rows))
        bar = EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        share = 100 * count / total
        yield f"  {_edge(start):>9} to {_edge(stop):<9} {share:>6.2f}%  {bar or (EIGHTHS[1] if count else '')}"


def _edge(number: int) -> str:
    return f"{2 ** (number / BINS_PER_OCTAVE):.4g}"


def _status(facts: dict[str, Any]) -> str:
    status = str(facts["status"])
    return f"{status}, format version {facts['format_version']}" if status == "finished" else f"not finished: {status}"


def _unfinished(facts: dict[str, Any]) -> Iterator[str]:
    progress = facts["progress"]
    for site in facts["sites"]:
        yield f"site        {site['id']}: width {site['d']}, {site['dtype']}"
    if not progress["rows_planned"]:
        yield "progress    nothing stored yet: the text is being prepared"
    for name, total in progress["rows_planned"].items():
        done = progress["rows_done"].get(name, 0)
        yield f"{name:<11} {done:,} of {total:,} rows ({100 * done / max(total, 1):.0f}%)"
    written = progress["last_written"]
    ago = f", the last of it {_ago(time.time() - written)} ago" if written else ""
    yield f"size        {size(facts['bytes'])} of shards so far{ago}"
    yield "to go on    run the same command again; what is stored is kept"


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}s"
    return f"{max(seconds, 0):.0f} seconds"


def _model(model: dict[str, Any]) -> str:
    if not model.get("name"):
        return "unknown"
    parts = [str(model[key]) for key in ("class", "dtype") if model.get(key)]
    if model.get("layers"):
        parts.append(f"{model.get('layers_loaded', model['layers'])} of {model['layers']} layers")
    if model.get("revision"):
        parts.append(f"revision {model['revision']}")
    return f"{model['name']} ({', '.join(parts)})" if parts else str(model["name"])


def _text(text: dict[str, Any]) -> str:
    sources = text.get("sources")
    if sources:
        names = ", ".join(str(source["file"]) for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
        skipped = text.get("skipped")
        without = f", {skipped['rows']:,} rows of tokens {skipped['token_ids']} left out" if skipped else ""
        return f"imported from {len(sources):,} file{'s' if len(sources) > 1 else ''} ({names}){without}"
    return str(text.get("source", ""))


def _packing(packing: dict[str, Any]) -> str:
    counts = packing.get("counts", {})
    kept = f"; {counts['kept_tokens']:,} tokens kept of {counts['text_tokens']:,}" if "kept_tokens" in counts else ""
    return f"{packing.get('rule', 'unknown')}, contexts of {packing.get('context_length', '?')} tokens{kept}"


def _order(shuffle: dict[str, Any]) -> str:
    if not shuffle:
        return "unknown"
    if shuffle.get("shuffled") is False:
        return "as in the sources (not shuffled)"
    group = shuffle.get("group_rows", 1)
    together = f", in groups of {group} neighbours" if group and group > 1 else ""
    return f"shuffled in buckets of {shuffle['bucket_rows']:,} rows{together}, seed {shuffle['seed']}"


def _labels(labels: list[dict[str, Any]]) -> Iterator[str]:
    if not labels:
        return
    documents, tokens = (sum(entry[key] for entry in labels) for key in ("documents", "tokens"))
    named = [entry for entry in labels if entry["label"] is not None]
    yield f"documents   {documents:,} with {tokens:,} kept tokens" + (f", {len(named):,} labels" if named else "")
    width = max((len(str(entry["label"])) for entry in named[:MAX_LABELS]), default=0)
    for entry in named[:MAX_LABELS]:
        held_out = entry["tokens_by_split"].get("validation", 0)
        yield (
            f"  {entry['label']!s:<{width}}  {entry['tokens']:>12,} tokens ({held_out:,} held out), "
            f"{entry['documents']:,} documents"
        )
    if len(named) > MAX_LABELS:
        rest = sum(entry["tokens"] for entry in named[MAX_LABELS:])
        yield f"  {len(named) - MAX_LABELS:,} more labels with {rest:,} tokens (all: --json)"


def _site(site: dict[str, Any], outliers: dict[str, Any]) -> Iterator[str]:
    s = site["statistics"]
    alias = f" ({site['alias']})" if site["alias"] else ""
    yield ""
    yield f"site        {site['id']}{alias}: width {site['d']:,}, {site['dtype']}, {size(site['bytes'])}"
    median = f"median {s['median_norm']:.4g}, " if s["median_norm"] is not None else ""
    yield (
        f"norm        {median}mean {s['mean_norm']:.4g}, rms {s['rms_norm']:.4g}, max {s['max_norm']:.4g}; "
        f"the mean row is {100 * s['mean_share']:.1f}% of the mean square"
    )
    limit = outliers.get("sites", {}).get(site["id"])
    if limit:
        yield (
            f"left out    {limit['rows']:,} rows with norms over {limit['threshold']:.4g}, {outliers['max_norm']:g} "
            f"times the median {limit['median']:.4g} of a pilot of {outliers['pilot_rows']:,} rows"
        )
    shares = [f"{100 * share:.1f}% in {n}" for n, share in s["variance_share"].items()]
    if shares:
        yield f"variance    {', '.join(shares)} of {site['d']:,} dimensions"
    if s["outlier_dimensions"]:
        shown = ", ".join(
            f"{o['dimension']} (mean {o['mean']:.3g}, std {o['std']:.3g}, {o['times_median']:.0f}x)"
            for o in s["outlier_dimensions"]
        )
        more = s["outlier_dimensions_count"] - len(s["outlier_dimensions"])
        yield f"outliers    dimensions {shown}" + (f" and {more} more" if more else "")
    else:
        yield "outliers    no dimension is more than 6 times as large as the median one"
    if s["norm_histogram"]:
        which = "all training rows" if s["norm_histogram_rows"] == s["rows"] else f"{s['norm_histogram_rows']:,} rows"
        yield f"norms of {which}"
        yield from histogram_lines(s["norm_histogram"])


def _sample(sample: dict[str, Any], decode: Decode | None) -> Iterator[str]:
    place = f" ({sample['name']})" if sample["name"] else ""
    yield (
        f"  {sample['split']} block {sample['block']}: norm {sample['norm']:.4g}, document {sample['document']}{place},"
        f" token {sample['position']}"
    )
    if sample["token"] is None:
        return
    if decode is None:
        ids = [*map(str, sample["before"]), f"[{sample['token']}]", *map(str, sample["after"])]
        yield f"    token ids {' '.join(ids)}"
        return
    at = len(sample["before"])
    pieces = decode([*sample["before"], sample["token"], *sample["after"]])
    text = f"{''.join(pieces[:at])}[{pieces[at]}]{''.join(pieces[at + 1 :])}"
    yield "    " + text.replace("\n", "⏎").replace("\t", "⇥")[: 2 * TEXT_WIDTH]

"""First half of a harvest: documents are chosen, split, tokenized once, cut, packed and stored in `tokens/`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeforge.data.manifest import SPLITS, write_json
from saeforge.errors import ConfigError, DatasetError
from saeforge.harvest.config import HarvestConfig
from saeforge.lm.isolation import Isolation
from saeforge.lm.pack import Contexts, hash_file, write_contexts
from saeforge.lm.read import TOKENIZE_AT_ONCE
from saeforge.lm.text import Document, TextSource, open_text
from saeforge.lm.tokens import Cutter, Segment, Specials


@dataclass(frozen=True)
class Prepared:
    """The stored tokens: contexts by split, and `record`, which `tokens/packing.json` holds."""

    contexts: dict[str, Contexts]
    record: dict[str, Any]


def open_prepared(folder: Path) -> Prepared | None:
    """Open tokens that an earlier run stored, or return None if it did not get so far.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    path = folder / "packing.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_bytes())
    for name, sha256 in record["files"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != sha256:
            raise DatasetError(f"{folder / name} is missing or damaged; start again with --overwrite or another --out")
    contexts = {
        split: Contexts(folder, split, packed=record["packed"], pad=record["special_tokens"]["pad"])
        for split in record["splits"]
    }
    return Prepared(contexts, record)


def prepare(
    folder: Path,
    config: HarvestConfig,
    context_length: int,
    tokenizer: Any,
    specials: Specials,
    probe: Callable[[list[Segment]], Isolation],
) -> Prepared:
    """Choose documents until the budget is full, and store their packed tokens.

    Args:
        folder: `tokens/`, existing.
        config: the harvest.
        context_length: longest segment, special tokens included.
        tokenizer: of the model.
        specials: of the tokenizer.
        probe: asks the model whether packed segments stay apart.

    Raises:
        ConfigError: `pack: true` and the model does not keep segments apart; wrong text.
        DatasetError: the text holds nothing to keep.
    """
    drop_first = not specials.prefix if config.drop_first == "auto" else config.drop_first
    cutter = Cutter(specials, context_length, drop_first=drop_first, group_rows=config.group_rows)
    source = open_text(config.text)
    segments, documents, counts = _collect(source, config, tokenizer, cutter)
    everything = [segment for split in SPLITS for segment in segments[split]]
    if not everything:
        raise DatasetError(f"text {config.text!r} holds no token to keep; give more text")
    packed, isolation = False, None
    if config.pack is not False:
        isolation = probe(everything)
        packed = isolation.isolated
        if config.pack is True and not packed:
            raise ConfigError(f"pack: true, but {isolation.reason}; use pack: auto, one segment per context")
    files: dict[str, str] = {}
    splits = [split for split in SPLITS if segments[split]]
    for split in splits:
        files |= write_contexts(
            folder, split, segments[split], capacity=context_length, packed=packed, seed=config.seed
        )
    table = folder / "documents.jsonl"
    with table.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        file.flush()
        os.fsync(file.fileno())
    record = {
        "packed": packed,
        "rule": "segments share contexts, positions restart" if packed else "one segment per context, padding masked",
        "isolation": isolation.reason if isolation else "not asked (pack: false)",
        "context_length": context_length,
        "drop_first": drop_first,
        "special_tokens": {
            "prefix": list(specials.prefix),
            "suffix": list(specials.suffix),
            "dropped": sorted(specials.dropped),
            "pad": specials.pad,
        },
        "splits": splits,
        "counts": counts,
        "files": {**files, table.name: hash_file(table)},
    }
    write_json(folder / "packing.json", record)
    prepared = open_prepared(folder)
    assert prepared is not None
    return prepared


def _collect(
    source: TextSource, config: HarvestConfig, tokenizer: Any, cutter: Cutter
) -> tuple[dict[str, list[Segment]], list[dict[str, Any]], dict[str, Any]]:
    """Take documents in seeded order until the budget of kept tokens is full."""
    key = np.frombuffer(hashlib.sha256(f"saeforge documents {config.seed}".encode()).digest()[:16], dtype="<u8")
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(source))
    segments: dict[str, list[Segment]] = {split: [] for split in SPLITS}
    documents: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    left = config.n_tokens
    counts = {
        "documents_in_text": len(source),
        "duplicates": 0,
        "empty": 0,
        "test": 0,
        "text_tokens": 0,
        "kept_tokens": 0,
        "ungrouped": 0,
    }
    for start in range(0, len(order), TOKENIZE_AT_ONCE):
        fresh: list[tuple[Document, bytes]] = []
        for index in order[start : start + TOKENIZE_AT_ONCE]:
            document = source[int(index)]
            digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
            if not document.text.strip():
                counts["empty"] += 1
            elif document.split == "test":  # kept for judging: no SAE may have been trained on it
                counts["test"] += 1
            elif digest in seen:  # or the same text could stand on both sides of the split
                counts["duplicates"] += 1
            else:
                seen.add(digest)
                fresh.append((document, digest))
        if not fresh:
            continue
        ids = tokenizer([document.text for document, _ in fresh], add_special_tokens=False, verbose=False)["input_ids"]
        for (document, digest), tokens in zip(fresh, ids, strict=True):
            limit = left if config.document_tokens is None else min(left, config.document_tokens)
            number = len(documents)
            pieces = cutter.cut(number, tokens, budget=limit)
            kept = sum(piece.kept for piece in pieces)
            counts["text_tokens"] += len(tokens)
            counts["kept_tokens"] += kept
            counts["ungrouped"] = cutter.ungrouped
            left -= kept
            split = _split_of(document.name, digest, config.validation_share)
            segments[split] += pieces
            documents.append(
                {
                    "id": number,
                    "name": document.name,
                    "label": document.label,
                    "split": split,
                    "sha256": digest.hex(),
                    "tokens": len(tokens),
                    "kept": kept,
                }
            )
            if left < config.group_rows:
                return segments, documents, counts
    return segments, documents, counts


def _split_of(name: str, text_digest: bytes, share: float) -> str:
    """Return a document's split: a hash of name and text, so that it does not depend on the other documents."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass") + b"\0" + text_digest).digest()
    return "validation" if int.from_bytes(digest[:8], "little") < share * 2**64 else "train"

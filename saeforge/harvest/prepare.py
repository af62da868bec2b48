"""First half of a harvest: documents are chosen, split, tokenized once, cut, packed and stored in `tokens/`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeforge.data.manifest import SPLITS, write_json
from saeforge.errors import ConfigError, DatasetError
from saeforge.harvest.config import HarvestConfig
from saeforge.lm.chat import ChatRenderer, Conversation, Messages
from saeforge.lm.isolation import Isolation
from saeforge.lm.pack import Contexts, ContextSource, hash_file, write_contexts
from saeforge.lm.read import TOKENIZE_AT_ONCE
from saeforge.lm.text import Document, TextSource, open_text
from saeforge.lm.tokens import Cutter, Segment, Specials


@dataclass(frozen=True)
class Prepared:
    """The stored tokens: contexts by split, and `record`, which `tokens/packing.json` holds."""

    contexts: Mapping[str, ContextSource]
    record: dict[str, Any]


def open_prepared(folder: Path) -> Prepared | None:
    """Open tokens that an earlier run stored, or return None if it did not get so far.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    record = read_record(folder)
    if record is None:
        return None
    contexts = {
        split: Contexts(folder, split, packed=record["packed"], pad=record["special_tokens"]["pad"])
        for split in record["splits"]
    }
    return Prepared(contexts, record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a folder `tokens/`, or None if there is none yet.

    Raises:
        DatasetError: a file that it names is missing or damaged.
    """
    path = folder / "packing.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_bytes())
    for name, sha256 in record["files"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != sha256:
            raise DatasetError(f"{folder / name} is missing or damaged; start again with --overwrite or another --out")
    return record


def write_record(
    folder: Path, record: dict[str, Any], documents: Iterable[dict[str, Any]], files: dict[str, str]
) -> None:
    """Write `documents.jsonl` and then `packing.json`, which names all files with their sha256."""
    table = folder / "documents.jsonl"
    with table.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / "packing.json", {**record, "files": {**files, table.name: hash_file(table)}})


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
    reader = Reader(config, context_length, tokenizer, specials)
    segments, documents, counts = _collect(open_text(config.text, conversations=True), config, reader)
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
    record = {
        "packed": packed,
        "rule": "segments share contexts, positions restart" if packed else "one segment per context, padding masked",
        "isolation": isolation.reason if isolation else "not asked (pack: false)",
        "context_length": context_length,
        "drop_first": reader.drop_first,
        "special_tokens": {
            "prefix": list(specials.prefix),
            "suffix": list(specials.suffix),
            "dropped": sorted(specials.dropped),
            "pad": specials.pad,
        },
        "splits": splits,
        "counts": counts,
        **({"chat": reader.chat.record} if reader.chat is not None else {}),
    }
    write_record(folder, record, documents, files)
    prepared = open_prepared(folder)
    assert prepared is not None
    return prepared


class Reader:
    """Makes segments of documents, texts and conversations.

    A text gets the special tokens that the tokenizer puts around one. A conversation has those of its template, and
    each of its later pieces begins with what the template begins the first one with.

    Args:
        config: the harvest.
        context_length: longest segment, special tokens included.
        tokenizer: of the model.
        specials: of the tokenizer.

    Attributes:
        drop_first: whether the first token of a text's segment is left out.
        chat: what renders conversations; None until there is one.
    """

    def __init__(self, config: HarvestConfig, context_length: int, tokenizer: Any, specials: Specials) -> None:
        self.config = config
        self.context_length = context_length
        self.tokenizer = tokenizer
        self.specials = specials
        self.drop_first = not specials.prefix if config.drop_first == "auto" else config.drop_first
        self.chat: ChatRenderer | None = None
        self._cutters: dict[tuple[bool, bool], Cutter] = {}

    @property
    def ungrouped(self) -> int:
        """Tokens that would be kept, but filled no group."""
        return sum(cutter.ungrouped for cutter in self._cutters.values())

    def tokenize(self, documents: Sequence[Document]) -> list[list[int] | Conversation]:
        """Return the token ids of texts, without special tokens, and rendered conversations."""
        texts = [document.text for document in documents if document.messages is None]
        ids = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        return [next(ids) if d.messages is None else self._render(d.messages, d.name) for d in documents]

    def cut(self, number: int, tokens: list[int] | Conversation, budget: int) -> list[Segment]:
        """Return the segments of a document that keep at most `budget` rows."""
        if isinstance(tokens, Conversation):
            cutter = self._cutter(prefix=tokens.begins_with_prefix, suffix=False)
            return cutter.cut(number, tokens.ids, budget=budget, wanted=tokens.keep)
        return self._cutter(prefix=True, suffix=True).cut(number, tokens, budget=budget)

    def _render(self, messages: Messages, name: str) -> Conversation:
        if self.chat is None:
            self.chat = ChatRenderer(self.tokenizer, self.specials, self.config.chat_keep)
        return self.chat(messages, name)

    def _cutter(self, *, prefix: bool, suffix: bool) -> Cutter:
        if (prefix, suffix) not in self._cutters:
            specials = dataclasses.replace(
                self.specials,
                prefix=self.specials.prefix if prefix else (),
                suffix=self.specials.suffix if suffix else (),
            )
            drop_first = not specials.prefix if self.config.drop_first == "auto" else self.config.drop_first
            self._cutters[prefix, suffix] = Cutter(
                specials, self.context_length, drop_first=drop_first, group_rows=self.config.group_rows
            )
        return self._cutters[prefix, suffix]


def _collect(
    source: TextSource, config: HarvestConfig, reader: Reader
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
            if document.is_empty:
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
        rendered = reader.tokenize([document for document, _ in fresh])
        for (document, digest), tokens in zip(fresh, rendered, strict=True):
            limit = left if config.document_tokens is None else min(left, config.document_tokens)
            number = len(documents)
            pieces = reader.cut(number, tokens, limit)
            kept = sum(piece.kept for piece in pieces)
            n_tokens = len(tokens.ids if isinstance(tokens, Conversation) else tokens)
            counts["text_tokens"] += n_tokens
            counts["kept_tokens"] += kept
            counts["ungrouped"] = reader.ungrouped
            left -= kept
            split = split_of(document.name, digest, config.validation_share)
            segments[split] += pieces
            documents.append(
                {
                    "id": number,
                    "name": document.name,
                    "label": document.label,
                    "split": split,
                    "sha256": digest.hex(),
                    "tokens": n_tokens,
                    "kept": kept,
                }
            )
            if left < config.group_rows:
                return segments, documents, counts
    return segments, documents, counts


def split_of(name: str, text_digest: bytes, share: float) -> str:
    """Return a document's split: a hash of name and text, so that it does not depend on the other documents."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass") + b"\0" + text_digest).digest()
    return "validation" if int.from_bytes(digest[:8], "little") < share * 2**64 else "train"

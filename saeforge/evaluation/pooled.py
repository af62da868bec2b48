"""Labelled documents as means over their tokens: of the activations, and of every latent.

Both are sums divided once. Decoders are linear, so means are also enough to know what the mean of a document's
activations becomes when latents are ablated in all of its tokens: mean(x) - sum over them of mean(f_i) d_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError
from saeforge.lm.labelled import LabelledTexts
from saeforge.lm.labelled_rows import Reader
from saeforge.lm.pack import open_stored
from saeforge.ops import SparseCode
from saeforge.sae import SAE

#: Of a label in each of the two sets of documents: with fewer, an interval over documents says nothing.
MIN_DOCUMENTS = 8
_PENDING = 1 << 22  # sums that wait, at least, before they are merged

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pooled:
    """Means over the tokens of labelled documents.

    Memory: 8 bytes for each document and dimension, 20 for each document and latent that is active in it.

    Attributes:
        labels: names, sorted.
        label: int (documents,), index into `labels`.
        train: bool (documents,), probes are fitted on these and judged on the others.
        tokens: int (documents,), how many were read of each.
        x: float64 (documents, d_in).
        target: float64 (documents, d_out), what the SAE reconstructs (`x` itself, for an SAE); None where only the
            input was read.
        row: int (nnz,), document of each mean of a latent that is not 0, ordered by latent, then document.
        value: float64 (nnz,).
        offsets: int (d_sae + 1,), where each latent's entries begin.
        about: where the documents are from, as plain JSON values.
    """

    labels: tuple[str, ...]
    label: np.ndarray
    train: np.ndarray
    tokens: np.ndarray
    x: np.ndarray
    target: np.ndarray | None
    row: np.ndarray
    value: np.ndarray
    offsets: np.ndarray
    about: dict[str, Any]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.offsets) - 1

    def columns(self, latents: Sequence[int]) -> np.ndarray:
        """float64 (documents, len(latents)): the means of some latents."""
        dense = np.zeros((len(self.label), len(latents)))
        for place, latent in enumerate(latents):
            entries = slice(self.offsets[latent], self.offsets[latent + 1])
            dense[self.row[entries], place] = self.value[entries]
        return dense

    def latent_differences(self, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
        """float64 (d_sae,): mean over some documents minus mean over others, of every latent.

        Args:
            positive: bool (documents,). negative: bool (documents,).
        """
        weight = positive / np.count_nonzero(positive) - negative / np.count_nonzero(negative)
        latent = np.repeat(np.arange(self.d_sae), np.diff(self.offsets))
        return np.asarray(np.bincount(latent, self.value * weight[self.row], minlength=self.d_sae))

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents of each label in each set."""
        return {
            name: {
                half: int(np.count_nonzero((self.label == number) & mask))
                for half, mask in (("train", self.train), ("test", ~self.train))
            }
            for number, name in enumerate(self.labels)
        }

    def judged(self) -> list[int]:
        """Numbers of the labels that have enough documents in both sets.

        Raises:
            ConfigError: fewer than two.
        """
        enough = [min(halves.values()) >= MIN_DOCUMENTS for halves in self.counts().values()]
        if sum(enough) < 2:
            raise ConfigError(
                f"{sum(enough)} of {len(enough)} labels have {MIN_DOCUMENTS} documents to fit on and {MIN_DOCUMENTS} "
                "to judge on, at least 2 are needed; give labelled texts with --probe_texts"
            )
        return np.flatnonzero(enough).tolist()


class Pool:
    """Sums over the tokens of documents, batch by batch; the result does not depend on the batches.

    Args:
        d_in: of the activations. d_out: of the targets; None: the targets are the activations.
        d_sae: latents.
    """

    def __init__(self, d_in: int, d_out: int | None, d_sae: int) -> None:
        self.d_sae = d_sae
        self._places: dict[int, int] = {}  # of documents, as they come
        self._tokens = np.zeros(0, np.int64)
        self._sums = [np.zeros((0, width)) for width in (d_in, d_out) if width is not None]
        self._merged = (np.zeros(0, np.int64), np.zeros(0))
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, document: np.ndarray, x: Tensor, target: Tensor, code: SparseCode) -> None:
        """Adds the tokens of a batch.

        Args:
            document: int (rows,), any numbers.
            x: (rows, d_in). target: (rows, d_out), not looked at if it is x. code: of these rows.
        """
        used, inside = np.unique(document, return_inverse=True)
        places = np.array([self._places.setdefault(number, len(self._places)) for number in used.tolist()])
        self._grow(len(self._places))
        self._tokens[places] += np.bincount(inside)
        where = torch.from_numpy(inside).to(x.device)
        for sums, rows in zip(self._sums, (x, target), strict=False):
            total = torch.zeros(len(used), rows.shape[1], dtype=torch.float64, device=rows.device)
            sums[places] += total.index_add_(0, where, rows.double()).cpu().numpy()
        code = code.trimmed()
        rows_of, latents = code.rows().cpu().numpy(), code.indices.cpu().numpy().astype(np.int64)
        keys = places[inside[rows_of]] * self.d_sae + latents
        self._parts.append(_sum_by_key(keys, code.values.double().cpu().numpy()))
        self._waiting += len(self._parts[-1][0])
        if self._waiting > max(_PENDING, len(self._merged[0])):
            self._merge()

    def pooled(self, labels: tuple[str, ...], label: np.ndarray, train: np.ndarray, about: dict[str, Any]) -> Pooled:
        """The means, in the order of the documents' numbers.

        Args:
            labels: names. label: int, the label of the document of each number. train: bool, likewise.
            about: where they are from.
        """
        self._merge()
        numbers = np.array(list(self._places), dtype=np.int64)
        order = np.argsort(numbers)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        keys, sums = self._merged
        place, latent = keys // self.d_sae, keys % self.d_sae
        mean = sums / self._tokens[place]
        used = np.flatnonzero(mean)
        used = used[np.lexsort((rank[place[used]], latent[used]))]
        numbers, tokens = numbers[order], self._tokens[order]
        x, *target = [part[order] / tokens[:, None] for part in self._sums]
        return Pooled(
            labels=labels,
            label=label[numbers],
            train=train[numbers],
            tokens=tokens,
            x=x,
            target=target[0] if target else x,
            row=rank[place[used]],
            value=mean[used],
            offsets=np.concatenate([[0], np.cumsum(np.bincount(latent[used], minlength=self.d_sae))]),
            about=about,
        )

    def _grow(self, documents: int) -> None:
        if documents > len(self._tokens):
            more = max(documents, 2 * len(self._tokens)) - len(self._tokens)
            self._tokens = np.pad(self._tokens, (0, more))
            self._sums = [np.pad(sums, ((0, more), (0, 0))) for sums in self._sums]

    def _merge(self) -> None:
        keys, sums = (np.concatenate(columns) for columns in zip(self._merged, *self._parts, strict=True))
        self._merged, self._parts, self._waiting = _sum_by_key(keys, sums), [], 0


@torch.no_grad()
def pool_dataset(
    sae: SAE,
    root: str,
    source: ShardSource,
    split: str,
    *,
    test_tokens: int | None,
    train_tokens: int,
    batch_size: int,
    on_progress: Progress | None = None,
) -> Pooled:
    """Pools the dataset's own documents: probes are fitted on the other split and judged on `split`. No model needed.

    Args:
        sae: on its device.
        root: of the dataset.
        source: the dataset, with the SAE's sites.
        split: whose documents are judged on.
        test_tokens: read at most so many of them (whole blocks, at least one); None: all.
        train_tokens: likewise, of the other split.
        batch_size: rows at a time; the result does not depend on it.
        on_progress: called with (blocks done, blocks in all).

    Raises:
        ConfigError: no texts, no labels, or only one split.
    """
    dataset = source.datasets[0]
    if not dataset.manifest.packing:
        raise ConfigError(f"{root} holds activations without their texts; give labelled ones with --probe_texts")
    other = "train" if split == "validation" else "validation"
    if source.n_blocks(other) == 0:
        raise ConfigError(f"{root} has no {other} split to fit probes on; give labelled texts with --probe_texts")
    documents = open_stored(root, dataset.manifest.packing, []).documents
    labels = tuple(sorted({record["label"] for record in documents if record["label"] is not None}))
    if len(labels) < 2:
        raise ConfigError(f"the documents of {root} have no labels; give labelled texts with --probe_texts")
    size = 1 + max(record["id"] for record in documents)
    label, train = np.full(size, -1, np.int32), np.zeros(size, bool)
    for record in documents:
        train[record["id"]] = record["split"] == other
        if record["label"] is not None:
            label[record["id"]] = labels.index(record["label"])
    pair = source.pairs[0]
    pool = Pool(sae.d_in, None if pair.inputs == pair.targets else sae.d_out, sae.d_sae)
    blocks = [
        (part, block)
        for part, most in ((other, train_tokens), (split, test_tokens))
        for block in range(_blocks(source, part, most))
    ]
    for done, (part, block) in enumerate(blocks, start=1):
        batch, number = pair.batch(source.read_block(part, block)), dataset.read_rows(part, block)[:, 0]
        known = np.flatnonzero(label[number] >= 0)
        for start in range(0, len(known), batch_size):
            rows = known[start : start + batch_size]
            where = torch.from_numpy(rows)
            x = batch.x[where].to(sae.device).float()
            pool.add(number[rows], x, batch.target[where].to(sae.device).float(), sae.encode(x))
        if on_progress is not None:
            on_progress(done, len(blocks))
    return pool.pooled(labels, label, train, {"texts": "the dataset", "fitted_on": other, "judged_on": split})


def _blocks(source: ShardSource, split: str, most: int | None) -> int:
    blocks = source.n_blocks(split)
    return blocks if most is None else min(blocks, max(1, most // source.block_rows(split)))


@torch.no_grad()
def pool_texts(
    sae: SAE,
    texts: LabelledTexts,
    *,
    model: str | None,
    trust_remote_code: bool,
    device: str,
    on_progress: Progress | None = None,
) -> Pooled:
    """Pools labelled texts, with the SAE's model; their own halves are what is fitted and judged on.

    Args:
        sae: on the device.
        texts: documents in two halves.
        model: where the model is now, if it moved.
        trust_remote_code: run Python code that comes with it.
        device: of both.
        on_progress: called with (contexts done, contexts in all).

    Raises:
        ConfigError: the SAE does not say its model, or the model is another now.
    """
    reader = Reader(sae, texts, model=model, trust_remote_code=trust_remote_code, device=device)
    pool = Pool(sae.d_in, None, sae.d_sae)

    def progress(_: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    for x, document in reader.batches("texts", progress):
        pool.add(document, x, x, sae.encode(x))
    about = {"texts": texts.source, "split_by": texts.split_by, "context_length": reader.context_length}
    pooled = pool.pooled(texts.labels, texts.label, texts.train, about)
    elsewhere = reader.origin.target != reader.origin.site  # a transcoder's output was not read
    return replace(pooled, target=None) if elsewhere else pooled


def _sum_by_key(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    used, place = np.unique(keys, return_inverse=True)
    return used, np.bincount(place, values, minlength=len(used))

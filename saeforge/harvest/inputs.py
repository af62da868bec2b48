"""Harvest any model: images, sound, proteins.

A function makes the model's inputs of item numbers; the rest is as for text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from saeforge.data.manifest import SPLITS, Manifest
from saeforge.data.storage import hash_file
from saeforge.errors import ConfigError
from saeforge.harvest.items import Items, Keep, MakeInputs, make_inputs, mask_of
from saeforge.harvest.prepare import Prepared, read_record, split_of, write_record
from saeforge.harvest.run import run_work
from saeforge.lm.capture import Capture, ItemBatch, input_place
from saeforge.lm.load import LoadedModel, load_model, wrap_module
from saeforge.lm.pack import save_array


@dataclass
class InputsConfig:
    """Options of a harvest of inputs, under the names that a harvest of text has for them."""

    name: str
    items: int
    sites: list[str]
    out: str
    model: str
    revision: str | None
    model_dtype: str
    device: str
    trust_remote_code: bool
    device_map: str | None
    batch_contexts: int
    store_dtype: str
    validation_share: float
    max_norm: float | None
    bucket_rows: int | None
    seed: int
    overwrite: bool
    keep: str
    names_sha256: str | None
    group_rows: int = 1

    def __post_init__(self) -> None:
        for option, value in (("items", self.items), ("batch_items", self.batch_contexts)):
            if value < 1:
                raise ConfigError(f"harvest_inputs option {option} = {value}: expected at least 1")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"harvest_inputs option validation_share = {self.validation_share}: expected 0 to less than 1"
            )
        if self.store_dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"harvest_inputs option store_dtype = {self.store_dtype!r}: expected bfloat16 or float32")
        if self.bucket_rows is not None and (self.bucket_rows < 1 or self.bucket_rows & (self.bucket_rows - 1)):
            raise ConfigError(f"harvest_inputs option bucket_rows = {self.bucket_rows}: expected a power of two")
        if self.max_norm is not None and self.max_norm <= 1:
            raise ConfigError(f"harvest_inputs option max_norm = {self.max_norm}: expected more than 1, or None")

    def identity(self) -> dict[str, Any]:
        """Return the options that decide which bytes are written."""
        return {key: value for key, value in vars(self).items() if key not in ("out", "overwrite")}


def harvest_inputs(
    model: nn.Module | str,
    inputs: MakeInputs,
    *,
    items: int,
    name: str,
    sites: Sequence[str],
    out: str | Path,
    keep: Keep = None,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | None = None,
    batch_items: int = 16,
    store_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    validation_share: float = 0.1,
    max_norm: float | None = 10.0,
    bucket_rows: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Run any model over any items and store its activations, as `harvest` does for text; continue an earlier call.

    Rows carry (item, position in the item, token id or 0xFFFFFFFF, item). Items are shuffled and split by a seed.

    Args:
        model: a module that is called with the inputs as keywords, or the name of a HuggingFace model, loaded only as
            deep as the sites. A module stays on its device.
        inputs: makes the model's keyword arguments of a list of item numbers, below `items`; always the same ones.
        items: how many items there are.
        name: what the inputs are: data, version, preprocessing. A continued harvest must give the same.
        sites: as for `harvest`; a module that is no HuggingFace model needs module paths.
        out: folder of the dataset.
        keep: the tokens to store. None: all, the same number for each item. A bool tensor (tokens,): these of each
            item. A function of the inputs that returns bool (items, tokens): for items of different lengths, padded on
            the right; it is asked once about all items, so making the inputs should be quick.
        names: of the items; items of one name come into the same split.
        labels: of the items.
        revision: of a HuggingFace model, as the next four.
        model_dtype: precision of the model; auto is that of its checkpoint.
        device: torch device; auto is cuda if there is one, else cpu.
        trust_remote_code: run Python code that comes with the model.
        device_map: spread the model over several devices with accelerate.
        batch_items: items per forward pass.
        store_dtype: precision of the stored activations.
        validation_share: share of the items held out for validation.
        max_norm: leave out rows whose norm is more than so many times the median of a sample; None keeps them.
        bucket_rows: rows shuffled together and committed at once (a power of two); None: as memory allows.
        seed: of the order of items and rows.
        overwrite: remove a different dataset in the same folder first.

    Returns:
        The manifest of the finished dataset.

    Raises:
        ConfigError: an option, the model, a site or the inputs are wrong.
        DatasetError: too few rows, NaN activations, inputs that changed, or another dataset is in the way.
    """
    if isinstance(sites, str) or not sites:
        raise ConfigError(f"harvest_inputs option sites = {sites!r}: expected a list, such as ['resid_post.6']")
    for given, values in (("names", names), ("labels", labels)):
        if values is not None and len(values) != items:
            raise ConfigError(f"harvest_inputs option {given} has {len(values)} entries for {items} items")
    if isinstance(model, nn.Module):
        device = str(input_place(model)[0])
    config = InputsConfig(
        name=name,
        items=items,
        sites=list(sites),
        out=str(out),
        model=model if isinstance(model, str) else type(model).__name__,
        revision=revision,
        model_dtype=model_dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        batch_contexts=batch_items,
        store_dtype=store_dtype,
        validation_share=validation_share,
        max_norm=max_norm,
        bucket_rows=bucket_rows,
        seed=seed,
        overwrite=overwrite,
        keep=_describe_keep(keep),
        names_sha256=None if names is None else hashlib.sha256("\0".join(map(str, names)).encode()).hexdigest(),
    )

    def load(device: str) -> InputsWork:
        if isinstance(model, nn.Module):
            loaded = wrap_module(model, config.sites)
        else:
            loaded = load_model(
                model,
                config.sites,
                revision=revision,
                dtype=model_dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                device_map=device_map,
            )
        return InputsWork(config, loaded, inputs, keep, names, labels)

    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    try:
        return run_work(config, load)
    finally:
        for part, training in modes:
            part.training = training


def _describe_keep(keep: Keep) -> str:
    """Return what identifies the choice of tokens; a function stands for itself by its counts, which are checked."""
    if keep is None:
        return "all"
    if callable(keep):
        return "function"
    if keep.dim() != 1 or keep.dtype != torch.bool or not bool(keep.any()):
        raise ConfigError("harvest_inputs option keep: expected a bool tensor (tokens,) that keeps some, or a function")
    return "".join("01"[kept] for kept in keep.tolist())


@dataclass(frozen=True)
class InputsWork:
    """A model and a function that makes its inputs."""

    config: InputsConfig
    loaded: LoadedModel
    inputs: MakeInputs
    keep: Keep
    names: Sequence[str] | None = None
    labels: Sequence[str] | None = None

    @property
    def tokenizer_card(self) -> dict[str, Any]:
        """None is known."""
        return {}

    def prepare(self, folder: Path, capture: Capture) -> Prepared:
        """Store the order of the items of each split, and how many rows each of them keeps."""
        if read_record(folder) is not None:
            return self.open(folder)
        tokens, counts = self._count(capture)
        order = np.random.Generator(np.random.Philox(key=_key(self.config.seed))).permutation(self.config.items)
        splits = [self._split(number) for number in range(self.config.items)]
        files: dict[str, str] = {}
        present = [split for split in SPLITS if split in splits]
        for split in present:
            mine = np.array([number for number in order if splits[number] == split], dtype=np.uint32)
            for kind, array in (("items", mine), ("counts", counts[mine])):
                path = folder / f"{split}.{kind}.npy"
                save_array(path, array)
                files[path.name] = hash_file(path)
        kept = int(counts.sum())
        record = {
            "packed": False,
            "rule": f"items of {self.config.name}, {tokens or 'various numbers of'} tokens each",
            "splits": present,
            "tokens_per_item": tokens,
            "counts": {
                "items": self.config.items,
                "text_tokens": kept if tokens is None else tokens * self.config.items,
                "kept_tokens": kept,
            },
        }
        write_record(folder, record, self._documents(splits, counts, tokens), files)
        return self.open(folder)

    def open(self, folder: Path) -> Prepared:
        """Open what is stored."""
        record = read_record(folder)
        assert record is not None, "the plan is recorded after the items"
        contexts = {}
        for split in record["splits"]:
            order, counts = (np.load(folder / f"{split}.{kind}.npy") for kind in ("items", "counts"))
            contexts[split] = Items(self.inputs, self.keep, order, counts, record["tokens_per_item"])
        return Prepared(contexts, record)

    def origin(self, prepared: Prepared) -> dict[str, Any]:
        """Return the name of the inputs; all of their rows were asked for."""
        kept = prepared.record["counts"]["kept_tokens"]
        return {"source": self.config.name, "items": self.config.items, "n_tokens": kept, "document_tokens": None}

    def _count(self, capture: Capture) -> tuple[int | None, np.ndarray]:
        """Return the tokens of an item, None if they differ, and how many each item keeps."""
        if callable(self.keep):
            parts = []
            for start in range(0, self.config.items, self.config.batch_contexts):
                numbers = list(range(start, min(start + self.config.batch_contexts, self.config.items)))
                parts.append(mask_of(self.keep, make_inputs(self.inputs, numbers), len(numbers)).sum(axis=1))
            return None, np.concatenate(parts).astype(np.uint32)
        found = capture(ItemBatch(make_inputs(self.inputs, [0]), 1))
        tokens = next(iter(found.values())).shape[1]
        if self.keep is not None and len(self.keep) != tokens:
            raise ConfigError(f"keep is for {len(self.keep)} tokens, the sites have {tokens} of each item")
        kept = tokens if self.keep is None else int(self.keep.sum())
        return tokens, np.full(self.config.items, kept, dtype=np.uint32)

    def _split(self, number: int) -> str:
        name = str(number) if self.names is None else str(self.names[number])
        return split_of(name, hashlib.sha256(self.config.name.encode()).digest(), self.config.validation_share)

    def _documents(self, splits: Sequence[str], counts: np.ndarray, tokens: int | None) -> Iterator[dict[str, Any]]:
        for number, split in enumerate(splits):
            kept = int(counts[number])
            yield {
                "id": number,
                "name": str(number) if self.names is None else str(self.names[number]),
                "label": None if self.labels is None else str(self.labels[number]),
                "split": split,
                "tokens": kept if tokens is None else tokens,
                "kept": kept,
            }


def _key(seed: int) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(f"saeforge items {seed}".encode()).digest()[:16], dtype="<u8")

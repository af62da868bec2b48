"""What an SAE is judged on: its dataset, its language model, and the texts behind the activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeforge.data.manifest import Manifest
from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError, DatasetError
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.evaluation.passes import SplicedModel, sees_the_future
from saeforge.lm.causal import CausalLM
from saeforge.lm.load import MODEL_DTYPES
from saeforge.lm.origin import Origin
from saeforge.sae import SAE


def open_dataset(sae: SAE, data: str | Path | None, split: str) -> tuple[str, ShardSource]:
    """Open the dataset to judge on, and see that it fits the SAE."""
    path = data or sae.meta.get("dataset_path")
    if path is None:
        raise ConfigError("this SAE does not say which dataset it was trained on; give one with --data")
    site, target = sae.meta.get("site") or {}, sae.meta.get("target") or {}
    if sae.meta.get("sources"):
        source = _open_sources(sae, data)
    else:
        source = ShardSource(str(path), input=site.get("id"), target=target.get("id"))
    pair = source.pairs[0]
    if pair.widths(source) != (sae.d_in, sae.d_out):
        raise DatasetError(
            f"{path} holds activations {pair.widths(source)[0]} wide, this SAE reads {sae.d_in}; give its own dataset "
            "with --data"
        )
    if split not in ("train", "validation"):
        raise ConfigError(f"split {split!r}: expected 'validation' or 'train'")
    if source.n_blocks(split) == 0:
        raise DatasetError(
            f"{path} has no {split} split; harvest with a validation_share above 0, or use --split train"
        )
    return str(path), source


def _open_sources(sae: SAE, data: str | Path | None) -> ShardSource:
    """The sites that an SAE reads side by side, where they were or, if all are of one dataset, in `data`.

    Raises:
        ConfigError: `data` for sites of several datasets, or sources in memory.
    """
    sides = [sae.meta["sources"], sae.meta.get("targets") or []]
    folders = {part.get("dataset_path") for side in sides for part in side}
    if None in folders:
        raise ConfigError("this SAE was trained on several tensors in memory; there is no dataset to evaluate it on")
    if data is not None and len(folders) > 1:
        raise ConfigError(f"--data {data}: this SAE reads {len(folders)} datasets side by side; leave --data out")
    names = [[f"{data or part['dataset_path']}#{part['site']['id']}" for part in side] for side in sides]
    return ShardSource(None, input=names[0], target=names[1] or None)


def open_effect(
    sae: SAE, origin: Origin, root: str, source: ShardSource, split: str, *, budget: int, device: str
) -> tuple[SplicedModel, HeldOutTexts]:
    """Load the SAE's causal language model, and open the texts behind the activations.

    Raises:
        ConfigError: no such model, no causal one, no texts, or texts in another model's tokens.
        DatasetError: damaged texts.
    """
    card = sae.meta["model"]
    texts = open_texts(card, root, source.manifest, split, budget=budget)
    return splice(load_judge(card, origin, device=device), origin, texts), texts


def open_texts(
    card: Mapping[str, Any], root: str | Path, manifest: Manifest, split: str, *, budget: int
) -> HeldOutTexts:
    """The texts of a dataset, which must be in the tokens of the SAE's model.

    Args:
        card: of the model, in the SAE's provenance.
        root: the dataset's folder or URL. manifest: its manifest.
        split: "validation" or "train". budget: predictions to score.

    Raises:
        ConfigError: no texts, or those of another model.
        DatasetError: damaged texts.
    """
    texts = HeldOutTexts(root, manifest, split, budget=budget)
    # The files tell where both name them: a name may be a path that moved, or one that other weights have now.
    known = [key for key in ("files_sha256", "name") if card.get(key) and manifest.model.get(key)]
    if not known or manifest.model[known[0]] != card[known[0]]:
        same_name = manifest.model.get("name") == card["name"]
        raise ConfigError(
            f"{root} was harvested from model {manifest.model.get('name')!r}, this SAE is of "
            f"{'other weights of that name' if same_name else repr(card['name'])}; give a dataset of its own model "
            "with --data"
        )
    return texts


def load_judge(card: Mapping[str, Any], origin: Origin, *, device: str) -> CausalLM:
    """The model with its head, in the dtype that the activations were made in.

    Raises:
        ConfigError: see `Origin.load_causal`.
    """
    # A checkpoint's own half precision is found by "auto".
    recorded = card.get("dtype")
    return origin.load_causal(device=device, dtype=recorded if recorded in MODEL_DTYPES else "auto")


def splice(loaded: CausalLM, origin: Origin, texts: HeldOutTexts) -> SplicedModel:
    """The model with a place for the SAE.

    Raises:
        ConfigError: predictions see the next token, or a site that does not run.
    """
    spliced = SplicedModel(loaded.model, origin.site, origin.target)
    if sees_the_future(spliced, next(texts.batches(1))):
        raise ConfigError(f"model {origin.model!r} is no causal language model: its predictions see the next token")
    return spliced

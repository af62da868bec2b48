"""Opens what an SAE's effect is judged with: its language model, and the texts behind a dataset's activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeforge.data.manifest import Manifest
from saeforge.errors import ConfigError
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.evaluation.passes import SplicedModel, sees_the_future
from saeforge.lm.causal import CausalLM
from saeforge.lm.load import MODEL_DTYPES
from saeforge.lm.origin import Origin


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

"""The same text through the same architecture with fresh weights, as a dataset of activations."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError, DatasetError
from saeforge.harvest import harvest
from saeforge.lm.fresh import save_fresh_model
from saeforge.lm.origin import check_one_site
from saeforge.lm.pack import open_stored
from saeforge.sae import SAE


def harvest_fresh(
    sae: SAE,
    source: ShardSource,
    folder: Path,
    *,
    n_tokens: int | None = None,
    seed: int = 0,
    model: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> Path:
    """Harvests what an SAE was trained on once more, from its model with fresh weights; goes on where it was stopped.

    Args:
        sae: says its model and site.
        source: its dataset, which says text and options.
        folder: gets `model-SEED/` and `acts-SEED/`.
        n_tokens: activations to keep, at most those of the dataset; None: as many.
        seed: of the weights.
        model: where the original is now, if it moved.
        trust_remote_code: run Python code that comes with it.
        device: torch device.

    Returns:
        The dataset's folder.

    Raises:
        ConfigError: several sites or datasets, or a dataset that `saeforge harvest` did not make here.
        DatasetError: the text is another one now.
    """
    check_one_site(sae)
    dataset = source.datasets[0]
    card = Path(dataset.location) / "dataset.json"
    manifest = dataset.manifest
    if not card.is_file() or not manifest.text:
        raise ConfigError(
            f"{dataset.location} does not say how it was made from text; the control reinit needs a local dataset made "
            "by `saeforge harvest`, leave it out"
        )
    options = json.loads(card.read_bytes())["config"]
    site, target = sae.meta["site"], sae.meta.get("target")
    sites = [f"{place['module_path']}:{place['where']}" for place in (site, target) if place]
    fresh = save_fresh_model(
        model or options["model"],
        folder / f"model-{seed}",
        seed=seed,
        revision=options["revision"],
        trust_remote_code=trust_remote_code,
    )
    budget = options["n_tokens"] if n_tokens is None else min(n_tokens, options["n_tokens"])
    out = folder / f"acts-{seed}"
    own = {
        "model": str(fresh),
        "revision": None,
        "sites": sites,
        "n_tokens": budget,
        "trust_remote_code": trust_remote_code,
        "device": device,
        "out": str(out),
        "overwrite": True,  # of other options; one of these goes on, or is there already
    }
    with contextlib.redirect_stdout(sys.stderr):  # its summary is not what the caller prints
        made = harvest(**{**options, **own})
    theirs, ours = (
        [(record["name"], record["sha256"]) for record in open_stored(root, packing, []).documents]
        for root, packing in ((dataset.location, manifest.packing), (out, made.packing))
    )
    if ours != theirs[: len(ours)]:  # documents come in one order, whatever the budget
        raise DatasetError(
            f"the text {options['text']!r} is not what {dataset.location} was made of; restore it, or leave the "
            "control reinit out"
        )
    return out

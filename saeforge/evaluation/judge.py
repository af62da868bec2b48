"""`evaluate`: one judgement of an SAE, from its stored activations and, where there is one, with its language model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from saeforge import __version__
from saeforge.data.source import ShardSource
from saeforge.errors import ConfigError, DatasetError, SaeforgeError
from saeforge.evaluation.comparison import agreement, check_comparable
from saeforge.evaluation.effect import Effect, measure_effect
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.evaluation.opening import load_judge, open_texts, splice
from saeforge.evaluation.passes import SplicedModel
from saeforge.evaluation.reconstruction import CONVENTIONS, measure_reconstruction
from saeforge.lm.device import resolve_device
from saeforge.lm.origin import Origin, origin_of
from saeforge.metrics import Agreement, Firing, Reconstruction, WeightFigures, weight_figures
from saeforge.metrics.conventions import AGREEMENT, FIRING, WEIGHTS
from saeforge.sae import SAE, load

EFFECT_TOKENS = 50_000


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        metrics: reconstruction and sparsity, from stored activations.
        firing: how often latents fired on them.
        weights: norms and cosines of the SAE's rows.
        effect: on the model's predictions, or None.
        effect_reason: why there is none, or None.
        d_sae: latents of the SAE.
        about: SAE, dataset, site, split and versions, as plain JSON values.
        against: agreement with another SAE's decoder, or None.
        path: where the JSON was written, or None.
    """

    metrics: Reconstruction
    firing: Firing
    weights: WeightFigures
    effect: Effect | None
    effect_reason: str | None
    d_sae: int
    about: dict[str, Any]
    against: Agreement | None = None
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: metrics, conventions, what was evaluated; what is undefined is null."""
        effect: dict[str, Any] = {"effect": None if self.effect is None else self.effect.to_json()}
        if self.effect_reason is not None:
            effect["effect_reason"] = self.effect_reason
        parts: dict[str, Any] = {
            "firing": {**_plain(self.firing), "conventions": FIRING},
            "weights": {**_plain(self.weights), "conventions": WEIGHTS},
        }
        if self.against is not None:
            parts["against"] = {**_plain(self.against), "conventions": AGREEMENT}
        return {"metrics": _plain(self.metrics), "conventions": CONVENTIONS, **parts, **effect, **self.about}


def evaluate(
    run: str | Path | SAE,
    *,
    data: str | Path | None = None,
    against: str | Path | SAE | None = None,
    split: str = "validation",
    max_tokens: int | None = None,
    batch_size: int = 4096,
    effect: str | bool = "auto",
    effect_tokens: int = EFFECT_TOKENS,
    batch_contexts: int | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: str = "auto",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Judges an SAE on documents that it was not trained on.

    Args:
        run: RUN folder, `sae/` folder, or an SAE. With a RUN folder the result is written to RUN/evaluation.json.
        data: dataset; default: the one it was trained on.
        against: another SAE of the same site, to compare decoders with (see `agreement`), among the latents of the
            first that fire.
        split: "validation" or "train".
        max_tokens: read at most so many stored activations (whole blocks, at least one); default: all.
        batch_size: rows at a time; the result does not depend on it.
        effect: also judge by the model's predictions: True; False; or "auto": if model and texts are there, else
            `effect_reason` says what is missing.
        effect_tokens: predictions to score (whole contexts, at least one).
        batch_contexts: contexts at a time; default: as many as fit. The result does not depend on it but for rounding.
        model: where the model is now, if it moved.
        trust_remote_code: run Python code that comes with the model.
        seed: of the bootstrap, of the latents sampled for cosines, and of the random directions beside `against`.
        device: "auto", "cpu", "cuda", ...
        on_progress: called with (what, done, in all).

    Raises:
        SaeforgeError: no SAE, no dataset, activations of another width, a device that is not there; with `effect` True:
            no causal language model or no texts.
    """
    effect = {"true": True, "false": False}.get(effect, effect) if isinstance(effect, str) else effect
    if effect not in (True, False, "auto"):
        raise ConfigError(f"effect {effect!r}: expected auto, true or false")
    numbers = {"batch_size": batch_size, "max_tokens": max_tokens}
    numbers |= {"effect_tokens": effect_tokens, "batch_contexts": batch_contexts}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} = {number}: expected a positive number")
    if seed < 0:
        raise ConfigError(f"seed = {seed}: expected at least 0")
    place = resolve_device(device)
    sae = (run if isinstance(run, SAE) else load(run)).to(place)
    other = against if against is None or isinstance(against, SAE) else load(against)
    if other is not None:
        check_comparable(sae, other)
    root, source = _open_dataset(sae, data, split)

    def progress(what: str) -> Callable[[int, int], None] | None:
        return None if on_progress is None else lambda done, total: on_progress(what, done, total)

    measured = measure_reconstruction(
        sae, source, split, max_tokens=max_tokens, batch_size=batch_size, on_progress=progress("activations")
    )
    encoder = (None, None) if sae.encoder is not None else (sae.W_enc, sae.b_enc)
    weights = weight_figures(sae.W_dec, *encoder, seed=seed)
    agreed = None if other is None else agreement(sae, other, alive_a=measured.alive, seed=seed)
    found: Effect | None = None
    reason: str | None = "not asked for (effect: false)"
    if effect is not False:
        try:
            origin = origin_of(sae, model=model, trust_remote_code=trust_remote_code)
            spliced, texts = _open_effect(sae, origin, root, source, split, budget=effect_tokens, device=place)
            found = measure_effect(
                spliced,
                sae,
                torch.tensor(source.pairs[0].statistics(source)[1].mean),
                texts,
                contexts_at_once=batch_contexts,
                seed=seed,
                about={"model": model or sae.meta["model"]["name"], "device": place, "effect_tokens": effect_tokens},
                on_progress=progress("model"),
            )
            reason = None
        except ConfigError as error:  # something is not there; what is there and damaged stays an error
            if effect is True:
                raise
            reason = str(error)
    sites = [part["site"] for part in sae.meta.get("sources") or ()] or [sae.meta.get("site")]
    about = {
        "sae": {"d_in": sae.d_in, "d_sae": sae.d_sae, "rule": sae.rule, "variant": sae.meta.get("variant")},
        "site": " + ".join(site["id"] for site in sites if site) or None,
        "dataset": source.fingerprint,
        "trained_on_this_dataset": source.fingerprint == sae.meta.get("dataset"),
        "split": split,
        "saeforge": __version__,
    }
    path = None if isinstance(run, SAE) or not (Path(run) / "sae").is_dir() else Path(run) / "evaluation.json"
    if against is not None:
        about["against_sae"] = None if isinstance(against, SAE) else str(against)
    result = Evaluation(measured.metrics, measured.firing, weights, found, reason, sae.d_sae, about, agreed, path)
    if path is not None:
        _write(path, result.to_json())
    return result


def _open_dataset(sae: SAE, data: str | Path | None, split: str) -> tuple[str, ShardSource]:
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


def _open_effect(
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


def _plain(result: Any) -> dict[str, Any]:
    """A dataclass of figures as JSON values: NaN, which JSON has no word for, is null."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(part) for key, part in value.items()}
        if isinstance(value, tuple):
            return [walk(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: walk(part) for key, part in asdict(result).items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise SaeforgeError(f"could not write {path}: {error}; free space and evaluate again") from error
    finally:
        part.unlink(missing_ok=True)

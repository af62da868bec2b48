"""`evaluate`: one judgement of an SAE, from its stored activations and, where there is one, with its language model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from saeforge import __version__
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.evaluation.comparison import agreement, check_comparable
from saeforge.evaluation.effect import Effect, measure_effect
from saeforge.evaluation.labelled import PROBE_TOKENS, Labelled, judge_labels
from saeforge.evaluation.opening import open_dataset, open_effect
from saeforge.evaluation.reconstruction import CONVENTIONS, measure_reconstruction
from saeforge.lm.device import resolve_device
from saeforge.lm.labelled import LabelledTexts, read_labelled
from saeforge.lm.origin import origin_of
from saeforge.metrics import Agreement, Firing, Reconstruction, WeightFigures, weight_figures
from saeforge.metrics.conventions import AGREEMENT, FIRING, WEIGHTS
from saeforge.metrics.logistic import check_probe
from saeforge.sae import SAE, load

EFFECT_TOKENS = 50_000
NOT_PROBED = Labelled(None, None)


@dataclass(frozen=True)
class Control:
    """What stands beside an SAE and is judged as it is; `saeforge.make_controls` makes the usual ones.

    Attributes:
        sae: in its place.
        definition: what it is, kept beside its figures.
        data: its own dataset; None: the SAE's.
        own_model: it reads another model, whose loss says nothing of the SAE's: its effect is left out.
    """

    sae: SAE
    definition: str
    data: str | Path | None = None
    own_model: bool = False


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
        labelled: k-sparse probing and targeted probe perturbation, or why there are none.
        path: where the JSON was written, or None.
        controls: the same of each control, by name, as `controls` of `evaluate` names them.
        definitions: of the controls, by name.
    """

    metrics: Reconstruction
    firing: Firing
    weights: WeightFigures
    effect: Effect | None
    effect_reason: str | None
    d_sae: int
    about: dict[str, Any]
    against: Agreement | None = None
    labelled: Labelled = NOT_PROBED
    path: Path | None = None
    controls: Mapping[str, Evaluation] = field(default_factory=dict)
    definitions: Mapping[str, str] = field(default_factory=dict)

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
        parts |= _walk(self.labelled.to_json())
        if self.controls:
            parts["controls"] = {
                name: {"definition": self.definitions[name], **_without(control.to_json(), "conventions")}
                for name, control in self.controls.items()
            }
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
    probe: str | bool = "auto",
    probe_texts: str | LabelledTexts | None = None,
    probe_tokens: int = PROBE_TOKENS,
    controls: Mapping[str, Control] | None = None,
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
        probe: also by labelled documents, with k-sparse probing and targeted probe perturbation (scikit-learn): True;
            False; or "auto": if there are labels, else `probing_reason` says what is missing.
        probe_texts: labelled texts for that, run through the model: "demo", a folder with a subfolder per label, or a
            `.jsonl` file; default: the dataset's own documents, where they have labels, without the model.
        probe_tokens: stored activations to fit probes on, at most (whole blocks).
        controls: to judge in the same way, by name (see `saeforge.make_controls`).
        model: where the model is now, if it moved.
        trust_remote_code: run Python code that comes with the model.
        seed: of the bootstrap, of the latents sampled for cosines, and of the random directions beside `against`.
        device: "auto", "cpu", "cuda", ...
        on_progress: called with (what, done, in all).

    Raises:
        SaeforgeError: no SAE, no dataset, activations of another width, a device that is not there; with `effect` True:
            no causal language model or no texts; with `probe` True: no labels or no scikit-learn.
    """
    effect, probe = one_of_three("effect", effect), one_of_three("probe", probe)
    numbers = {"batch_size": batch_size, "max_tokens": max_tokens}
    numbers |= {"effect_tokens": effect_tokens, "batch_contexts": batch_contexts, "probe_tokens": probe_tokens}
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
    root, source = open_dataset(sae, data, split)
    if probe is True:
        check_probe()  # what is missing is told now, not after the work
    if isinstance(probe_texts, str) and probe is not False:
        probe_texts = read_labelled(probe_texts, seed=seed)

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
            spliced, texts = open_effect(sae, origin, root, source, split, budget=effect_tokens, device=place)
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
    labelled = judge_labels(
        sae,
        root,
        source,
        split,
        probe=probe,
        texts=probe_texts if isinstance(probe_texts, LabelledTexts) else None,
        probe_tokens=probe_tokens,
        max_tokens=max_tokens,
        batch_size=batch_size,
        model=model,
        trust_remote_code=trust_remote_code,
        seed=seed,
        device=place,
        progress=progress,
    )
    beside = {}
    for name, control in (controls or {}).items():
        beside[name] = evaluate(
            control.sae,
            data=control.data or data,
            split=split,
            max_tokens=max_tokens,
            batch_size=batch_size,
            effect=False if control.own_model else effect,
            effect_tokens=effect_tokens,
            batch_contexts=batch_contexts,
            probe=probe,
            probe_texts=probe_texts,
            probe_tokens=probe_tokens,
            model=None if control.own_model else model,
            trust_remote_code=trust_remote_code,
            seed=seed,
            device=device,
            on_progress=_under(name, on_progress),
        )
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
    result = Evaluation(
        measured.metrics,
        measured.firing,
        weights,
        found,
        reason,
        sae.d_sae,
        about,
        agreed,
        labelled,
        path,
        beside,
        {name: control.definition for name, control in (controls or {}).items()},
    )
    if path is not None:
        _write(path, result.to_json())
    return result


def one_of_three(name: str, value: str | bool) -> str | bool:
    """True, False or "auto".

    Raises:
        ConfigError: another value.
    """
    choice = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if choice not in (True, False, "auto"):
        raise ConfigError(f"{name} {value!r}: expected auto, true or false")
    return choice


def _under(name: str, on_progress: Callable[[str, int, int], None] | None) -> Callable[[str, int, int], None] | None:
    """Progress of a control: what is done has its name before it."""
    if on_progress is None:
        return None
    return lambda what, done, total: on_progress(f"{name}: {what}", done, total)


def _without(value: Any, key: str) -> Any:
    """JSON values without a key, at any depth: the controls' conventions are the SAE's."""
    if isinstance(value, dict):
        return {name: _without(part, key) for name, part in value.items() if name != key}
    return value


def _plain(result: Any) -> dict[str, Any]:
    """A dataclass of figures as JSON values."""
    return {key: _walk(part) for key, part in asdict(result).items()}


def _walk(value: Any) -> Any:
    """JSON values: keys are texts, and NaN, which JSON has no word for, is null."""
    if isinstance(value, dict):
        return {str(key): _walk(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_walk(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise SaeforgeError(f"could not write {path}: {error}; free space and evaluate again") from error
    finally:
        part.unlink(missing_ok=True)

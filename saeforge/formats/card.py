"""The model card of SAEs that are shared: what each is, what it was trained on, how good it is, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from saeforge.sae import SAE

#: Stands in every card made here, so that a card which a person wrote is never replaced.
MARK = "<!-- made by saeforge; remove this line to keep your own changes when the SAE is pushed again -->"
#: Of `evaluation.json`, those that a card shows; the file itself goes along with all of them.
FIGURES = ("l0_mean", "fvu", "cosine", "l2_ratio", "reconstruction_bias", "dead", "dense_10pct")
EFFECT_FIGURES = ("delta_ce", "ce_original", "ce_sae", "ce_score_mean", "kl_sae", "top1_sae")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Shared:
    """One SAE of a card.

    Attributes:
        name: its folder below that of the card, "" if it lies beside the card.
        sae: the SAE.
        evaluation: content of its evaluation.json, or None.
    """

    name: str
    sae: SAE
    evaluation: Mapping[str, Any] | None


def model_card(
    members: Sequence[Shared],
    *,
    repo: str,
    folder: str = "",
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """The card of one SAE, or of several of one run: YAML front matter and Markdown.

    Args:
        members: at least one.
        repo: `USER/NAME`, for the lines of use.
        folder: where in the repository the card stands.
        revision: branch, for the lines of use; None: main.
        license: the identifier that the hub knows (`apache-2.0`); None says nothing.
    """
    lines = [*_front_matter(members, license), MARK, "", f"# {(folder or repo).rsplit('/', 1)[-1]}", ""]
    one = members[0] if len(members) == 1 else None
    if one is not None:
        by = "trained" if one.sae.meta.get("training") else "kept"
        lines += [f"{_what(one.sae)}, {by} with saeforge.", *_plugins(members), ""]
    else:
        lines += [f"{len(members)} sparse autoencoders of one run, trained with saeforge; each has a folder."]
        lines += [*_plugins(members), "", *_table_of(members), ""]
    lines += ["## Use", "", *_use(members[0], f"{repo}@{revision}" if revision else repo, folder), ""]
    for member in members:
        lines += [f"## {_code(member.name)}" if one is None else "## What it is", ""]
        lines += [*_rows(("", ""), _facts(member.sae)), ""]
        lines += ["## How good it is" if one is not None else "How good it is:", ""]
        lines += [*_figures(member.evaluation), ""]
    return "\n".join(lines)


def without_folders(value: Any) -> Any:
    """JSON values in which every absolute path is its last name: whose disk it was is nobody's business.

    The names of models on the hub and paths relative to a working folder stay.
    """
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if "\n" not in value and kind(value).is_absolute() and kind(value).name:
                return kind(value).name
    return value


def _front_matter(members: Sequence[Shared], license: str | None) -> list[str]:
    named = (str((member.sae.meta.get("variant") or {}).get("name") or "") for member in members)
    variants = sorted({name for name in named if re.fullmatch(r"[\w.-]+", name)})
    head: dict[str, Any] = {"library_name": "saeforge"}
    if license is not None:
        head["license"] = license
    if bases := sorted({name for member in members if (name := _hub_model(member.sae))}):
        head["base_model"] = bases[0] if len(bases) == 1 else bases
    kinds = {"transcoder" if _writes_elsewhere(member.sae) else "sparse-autoencoder" for member in members}
    head["tags"] = ["saeforge", "sae", *sorted(kinds), "mechanistic-interpretability", *variants]
    return ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _hub_model(sae: SAE) -> str | None:
    """The base model's name on the hub; None for one from a folder or a package."""
    card = sae.meta.get("model") or {}
    name = card.get("name")
    known = isinstance(name, str) and _HUB_NAME.fullmatch(name) and card.get("files_sha256") is None and name != "demo"
    return name if known else None


def _writes_elsewhere(sae: SAE) -> bool:
    site, target = sae.meta.get("site"), sae.meta.get("target")
    return bool(target and site and target.get("id") != site.get("id")) or sae.d_in != sae.d_out


def _what(sae: SAE) -> str:
    kind = "transcoder" if _writes_elsewhere(sae) else "sparse autoencoder"
    model, site = (sae.meta.get("model") or {}).get("name"), (sae.meta.get("site") or {}).get("id")
    where = f" of {_code(model)} at {_code(site)}" if model and site else ""
    return f"A {kind} with {sae.d_sae:,} latents{where}"


def _plugins(members: Sequence[Shared]) -> list[str]:
    """A warning where an SAE does not load without the package that made it."""
    found = {}
    for member in members:
        if member.sae.rule == "plugin":
            made = member.sae.meta.get("variant") or {}
            found[str(made.get("distribution") or "")] = made
    lines = []
    for owner, made in found.items():
        how = f"`pip install {_cell(owner)}` (made with {_cell(made.get('version'))})" if owner else "its module"
        lines += ["", f"> **Needs {how} to load**: variant {_code(made.get('name'))} encodes with code of its own."]
    return lines


def _use(first: Shared, repo: str, folder: str) -> list[str]:
    place = "/".join(part for part in (repo, folder, first.name) if part)
    sae = first.sae
    lines = ["```python", "import saeforge  # pip install 'saeforge[hub]'", ""]
    lines += [f'sae = saeforge.load("hf://{place}")']
    lines += [f"code = sae.encode(x)  # x: raw activations (rows, {sae.d_in}); latents: code.to_dense()"]
    given = "code, x" if sae.W_skip is not None else "code"
    lines += [f"x_hat = sae.decode({given})"]
    if not sae.meta.get("sources") and sae.meta.get("site"):
        lines += ["with saeforge.attached(model, sae):  # the model with the reconstruction in the activations' place"]
        lines += ["    logits = model(**inputs).logits"]
    return [*lines, "```"]


def _facts(sae: SAE) -> Iterator[tuple[str, str]]:
    """What an SAE says of itself, (name, text); what it does not say is left out."""
    meta = sae.meta
    model, training = meta.get("model") or {}, meta.get("training") or {}
    variant = meta.get("variant") or {}
    if model.get("name"):
        said = [
            f"{key.replace('_', ' ')} {_cell(model[key])}" for key in ("class", "revision", "dtype") if model.get(key)
        ]
        yield "model", f"{_code(model['name'])} ({', '.join(said)})" if said else _code(model["name"])
    else:
        yield "model", "not known: it was trained on rows that do not say where they come from"
    for name, key in (("reads", "site"), ("writes", "target")):
        if place := meta.get(key):
            yield name, f"{_code(place.get('id'))}, {place.get('d', sae.d_in):,} wide"
    for name, key in (("reads, side by side", "sources"), ("writes, side by side", "targets")):
        if parts := meta.get(key):
            yield name, ", ".join(_code((part.get("site") or {}).get("id") or "rows in memory") for part in parts)
    skip = ", a linear skip connection" if sae.W_skip is not None else ""
    yield "shapes", f"d_in {sae.d_in:,}, d_sae {sae.d_sae:,}, d_out {sae.d_out:,}{skip}"
    yield "rule", _rule(sae)
    if variant.get("name"):
        options = variant.get("options") or {}
        said = [f"{key} {value}" for key, value in options.items() if value is not None and not key.startswith("d_")]
        by = " ".join(str(variant.get(key) or "") for key in ("distribution", "version")).strip()
        yield "variant", _cell(f"{variant['name']} ({by or 'no distribution'}): {', '.join(said) or 'no options'}")
    if meta.get("dataset"):
        named = f"{_cell(meta['dataset_path'])}, " if meta.get("dataset_path") else ""
        yield "trained on", f"dataset {named}fingerprint {_code(meta['dataset'])}"
    if training:
        counts = [f"{training[key]:,} {key}" for key in ("tokens", "steps") if isinstance(training.get(key), int)]
        said = [f"{key} {training[key]}" for key in ("precision", "saeforge", "torch") if training.get(key)]
        yield "training", _cell(", ".join([*counts, *said]))
    if imported := meta.get("imported"):
        yield "read from", _cell(f"{imported.get('path')} ({imported.get('format')})")


def _rule(sae: SAE) -> str:
    if sae.rule == "topk":
        return f"top-k: the {sae.k} largest pre-activations of a token, those that are positive"
    if sae.rule == "threshold":
        plain = sae.threshold is not None and not bool(sae.threshold.any())
        return "ReLU" if plain else "a threshold for each latent: active where the pre-activation is above it"
    return "the variant's own code"


def _figures(evaluation: Mapping[str, Any] | None) -> list[str]:
    """The figures of an evaluation, each with the convention that stands beside it in the file."""
    if evaluation is None:
        return ["Not evaluated (`saeforge evaluate RUN`)."]
    rows = list(_measured(evaluation.get("metrics"), FIGURES, evaluation.get("conventions")))
    effect = evaluation.get("effect")
    if isinstance(effect, Mapping):
        rows += _measured(effect.get("overall"), EFFECT_FIGURES, effect.get("conventions"))
    data, split = _code(evaluation.get("dataset")), _cell(evaluation.get("split"))
    own = "the one it was trained on" if evaluation.get("trained_on_this_dataset") else "not the one it was trained on"
    tokens = (evaluation.get("metrics") or {}).get("tokens")
    counted = f"{tokens:,} tokens" if isinstance(tokens, int) else "tokens"
    lines = _rows(("metric", "value", "convention"), rows)
    lines += [
        "",
        f"Measured on {counted} of the {split} split of dataset {data} ({own}). All figures: evaluation.json.",
    ]
    if evaluation.get("effect_reason"):
        lines += [f"Effect on the model not measured: {_cell(evaluation['effect_reason'])}"]
    return lines


def _measured(values: Any, names: Sequence[str], conventions: Any) -> Iterator[tuple[str, str, str]]:
    meaning = {
        name.strip(): str(text)
        for key, text in (conventions.items() if isinstance(conventions, Mapping) else ())
        for name in key.split(",")
    }
    values = values if isinstance(values, Mapping) else {}
    intervals = values.get("intervals") or {}
    for name in names:
        if isinstance(value := values.get(name), int | float):
            between = intervals.get(name)
            more = f" [{between[0]:.4g}, {between[1]:.4g}]" if between else ""
            yield (
                name,
                (f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + more,
                _cell(meaning.get(name, "")),
            )


def _table_of(members: Sequence[Shared]) -> list[str]:
    rows = []
    for member in members:
        measured = (member.evaluation or {}).get("metrics") or {}
        effect = ((member.evaluation or {}).get("effect") or {}).get("overall") or {}
        known = (measured.get("l0_mean"), measured.get("fvu"), effect.get("delta_ce"))
        figures = [f"{value:.4g}" if isinstance(value, int | float) else "" for value in known]
        meta = member.sae.meta
        site, variant = (meta.get("site") or {}).get("id") or "", (meta.get("variant") or {}).get("name") or ""
        rows.append((_code(member.name), _cell(site), _cell(variant), f"{member.sae.d_sae:,}", *figures))
    return _rows(("folder", "site", "variant", "d_sae", "l0_mean", "fvu", "delta_ce"), rows)


def _rows(head: Sequence[str], rows: Any) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _cell(text: Any) -> str:
    """Text that cannot break out of a cell of a table."""
    plain = " ".join(str(text).split())
    return plain.replace("|", "\\|").replace("<", "&lt;")


def _code(text: Any) -> str:
    return f"`{' '.join(str(text).split()).replace('`', '').replace('|', '/')}`"


def as_json(value: Any) -> bytes:
    """The file of JSON values, as saeforge writes them, without the folders of this disk."""
    return (json.dumps(without_folders(value), indent=2) + "\n").encode()

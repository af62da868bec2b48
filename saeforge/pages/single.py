"""The page of one run: what was trained on what, how good it is, how it got there, and what its latents are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from saeforge.features.store import FeatureStore
from saeforge.pages import judgement, labels
from saeforge.pages.charts import Series, lines
from saeforge.pages.frame import Axes
from saeforge.pages.latents import Group, cards, choose, colour_scale
from saeforge.pages.markup import Markup, join, number, percent, tag
from saeforge.pages.page import Section, facts, header, missing, mono, tiles
from saeforge.pages.runs import Run

#: Keys of evaluation.json that have tables of their own, or say what was judged.
KNOWN = {"metrics", "conventions", "firing", "weights", "against", "effect", "probing", "tpp", "controls", "sae"}


def head(run: Run, kicker: str) -> Markup:
    """Name, one sentence, and the figures that count."""
    return header(kicker, run.name, sentence(run), tiles(headline(run)) if run.evaluation else None)


def sentence(run: Run) -> Markup:
    """What was trained on what."""
    site, model = site_of(run), (run.card.get("model") or {}).get("name")
    parts: list[object] = [f"{number(run.d_sae)} latents of ", tag("strong", run.variant)]
    k = run.card.get("k")
    parts.append(f" (k = {k})" if k else "")
    if site:
        parts += [", at ", mono(site)]
    if model:
        parts += [" of ", mono(model)]
    if run.card.get("d_in"):
        parts.append(f", {number(run.card['d_in'])} wide")
    tokens = (run.card.get("training") or {}).get("tokens")
    if tokens:
        parts.append(f", trained on {number(tokens)} tokens")
    return join([*parts, "."])


def site_of(run: Run) -> str | None:
    """Where the activations are from, transcoders and crosscoders included."""
    sources = [part["site"]["id"] for part in run.card.get("sources") or () if part.get("site")]
    site = (run.card.get("site") or {}).get("id")
    target = (run.card.get("target") or {}).get("id")
    start = " + ".join(sources) or site
    return f"{start} \N{RIGHTWARDS ARROW} {target}" if start and target and target != site else start


def headline(run: Run) -> list[tuple[str, str, object]]:
    """The four figures at the head."""
    found: list[tuple[str, str, object]] = []
    delta, bounds = run.effect("delta_ce"), run.effect_interval("delta_ce")
    if delta is not None:
        told = f"nats per token; the model alone has a loss of {number(run.effect('ce_original'))}"
        if bounds:
            told = f"[{number(bounds[0], 3)}, {number(bounds[1], 3)}] {told}"
        found.append(("ΔCE", number(delta, 3, sign=True), told))
    found.append(("FVU", number(run.metric("fvu"), 3), "of the variance is not explained; 1 would predict the mean"))
    spread = (
        f"p5 {number(run.metric('l0_p5'))}, median {number(run.metric('l0_p50'))}, p95 {number(run.metric('l0_p95'))}"
    )
    found.append(("L0", number(run.metric("l0_mean"), 3), f"latents active on a token; {spread}"))
    dead = run.metric("dead")
    share = None if dead is None or not run.d_sae else dead / run.d_sae
    found.append(
        (
            "Dead latents",
            number(dead),
            f"{percent(share)} never fired in {number(run.metric('tokens'))} held-out tokens",
        )
    )
    return found


def overview(run: Run) -> Section:
    """Facts of the SAE, its data and its training."""
    card, training = run.card, run.card.get("training") or {}
    model, data, config = card.get("model") or {}, run.config.get("data") or {}, run.config.get("model") or {}
    of_card = card.get("variant")
    variant: dict[str, Any] = of_card if isinstance(of_card, dict) else {}
    d_in, d_out, d_sae = card.get("d_in"), card.get("d_out"), run.d_sae
    of_package = " ".join(str(variant[key]) for key in ("distribution", "version") if variant.get(key))
    expansion = f" ({d_sae / d_in:g} \N{MULTIPLICATION SIGN} {d_in})" if d_sae and d_in else ""
    sae: list[tuple[str, object]] = [
        ("variant", mono(run.variant)),
        ("from", of_package or None),
        ("latents", number(d_sae) + expansion),
        ("active", {"topk": f"k = {card.get('k')} of each token", "threshold": "above a threshold of each latent"}.get(
            str(card.get("rule")), "by the variant's own encoder" if card.get("rule") else None
        )),
        ("parameters", number(2 * d_sae * d_in + d_sae + d_out) if d_sae and d_in and d_out == d_in else None),
    ]  # fmt: skip
    if d_in != d_out:
        sae.append(("width", f"{number(d_in)} in, {number(d_out)} out"))
    activations: list[tuple[str, object]] = [
        ("model", mono(model["name"]) if model.get("name") else None),
        ("revision", str(model["revision"])[:12] if model.get("revision") else None),
        ("site", mono(site_of(run)) if site_of(run) else None),
        ("stored as", (card.get("site") or {}).get("dtype")),
        (
            "dataset",
            mono(card.get("dataset_path") or data.get("path"))
            if card.get("dataset_path") or data.get("path")
            else None,
        ),
        ("fingerprint", mono(str(card["dataset"])[:12]) if card.get("dataset") else None),
    ]
    rate, seed = config.get("lr"), config.get("seed")
    seed = run.config.get("seed_everything") if seed is None else seed
    trained: list[tuple[str, object]] = [
        ("tokens", number(training["tokens"]) if training.get("tokens") else None),
        ("steps", number(training["steps"]) if training.get("steps") else None),
        ("batch", f"{number(data['batch_size'])} tokens" if data.get("batch_size") else None),
        ("learning rate", ("the variant's own" if rate is None else f"{rate:g}") if run.config else None),
        ("precision", training.get("precision")),
        ("seed", None if seed is None else str(seed)),
        ("speed", _speed(run)),
        (
            "saeforge, torch",
            ", ".join(str(training[key]) for key in ("saeforge", "torch") if training.get(key)) or None,
        ),
    ]
    body: list[object] = [facts([("Autoencoder", sae), ("Activations", activations), ("Training", trained)])]
    if not card:
        again = f"saeforge fit --config {run.path}/config.yaml --ckpt_path last"
        body.insert(0, missing("Training has not finished, so that there is no SAE yet. To go on:", again))
    return Section("what", "What was trained on what", body, short="What")


def _speed(run: Run) -> str | None:
    names = ("speed/tokens_per_second", "train/tokens_per_second")  # the second in logs of earlier versions
    curves = run.curves
    curve = next((found for name in names if curves and (found := curves.of(name))), None)
    if curve is None:
        return None
    ordered = sorted(value for value in curve[1] if math.isfinite(value))
    return f"{number(ordered[len(ordered) // 2], 3)} tokens/s (median)"


def judged(run: Run, groups: Sequence[Group] = ()) -> Section:
    """Effect on the model, reconstruction, labels. `groups`: the latents that the page shows."""
    if run.evaluation is None:
        note = missing("This SAE has not been judged on held-out documents. To do so:", f"saeforge evaluate {run.path}")
        return Section("judgement", "How good it is", note, short="Judgement")
    body: list[object] = [judgement.effect(run)]
    if run.evaluation.get("effect") is None:
        reason = run.evaluation.get("effect_reason") or "no reason is recorded"
        body.append(tag("p", f"The effect on the model was not measured: {reason}.", class_="missing"))
    if not run.evaluation.get("trained_on_this_dataset", True):
        body.append(tag("p", "This is not the dataset that the SAE was trained on.", class_="missing"))
    body.append(judgement.controls(run))
    charts = [chart for chart in (judgement.effect_by_label(run), *sparsity(run)) if chart is not None]
    body.append(tag("div", charts, class_="charts") if charts else None)
    if judgement.l0_histogram(run) is None:
        body.append(missing("This evaluation has no histogram of L0. To make one:", f"saeforge evaluate {run.path}"))
    body.append(tag("div", judgement.reconstruction(run), judgement.against(run), class_="after"))
    body += [labels.probing(run, shown_of(groups)), labels.perturbation(run), labels.further(run, KNOWN)]
    lede = "On documents that were held out from training. Every figure stands beside what it would be without the SAE."
    return Section("judgement", "How good it is", body, lede, short="Judgement")


def sparsity(run: Run) -> list[Markup | None]:
    """The histograms of L0 and density."""
    return [judgement.l0_histogram(run), judgement.density_histogram(run, colour=2)]


def training_curves(run: Run) -> Section:
    """What the run logged on the way."""
    curves = run.curves
    if curves is None:
        note = tag(
            "p",
            "This run has no CSV log (it was imported, trained without a logger, or its figures went to wandb alone).",
            class_="missing",
        )
        return Section("curves", "Training", note)
    axis = curves.x_label

    def chart(title: str, wanted: dict[str, str], unit: str, **options: Any) -> Markup | None:
        series = []
        for number_of, (name, told) in enumerate(wanted.items()):
            found = curves.of(name)
            if found is not None:
                series.append(Series(told, *found, colour=number_of, dashed=name.startswith(("val/", "model/"))))
        return lines(title, series, Axes(axis, unit, whole=unit == "latents"), **options) if series else None

    terms = sorted(
        name
        for name in curves.points
        if name.startswith("train/") and name not in _NOT_TERMS and any(curves.points[name][1])
    )
    loss = curves.of("train/loss")
    terms = [name for name in terms if loss is None or (found := curves.of(name)) is None or found[1] != loss[1]]
    terms = [name for name in terms if any((curves.of(name) or ([], []))[1])]
    first: list[Callable[[], Markup | None]] = [
        lambda: chart("FVU", {"train/fvu": "training", "val/fvu": "validation"}, "FVU", log=True),
        lambda: chart("ΔCE", {"model/delta_ce": "validation"}, "nats per token", log=True),
        lambda: chart("Loss", {"train/loss": "loss", **{t: t.removeprefix("train/") for t in terms}}, "loss", log=True),
        lambda: chart("L0", {"train/l0": "training", "val/l0_mean": "validation"}, "latents"),
        lambda: chart("Dead latents", {"train/dead": "training", "val/dead": "validation"}, "latents", zero=True),
        lambda: chart("Learning rate", {"schedule/lr": "learning rate"}, "lr", zero=True),
    ]
    drawn = [made for make in first if (made := make()) is not None]
    schedules = sorted(name for name in curves.points if name.startswith("schedule/") and name != "schedule/lr")
    for name in schedules:
        own = chart(name.removeprefix("schedule/"), {name: name}, "value", note="coefficient of the variant", zero=True)
        drawn += [own] if own is not None else []
    if not drawn:
        return Section("curves", "Training", tag("p", "The log has no figures of this SAE yet.", class_="missing"))
    body = tag("div", drawn, class_="charts")
    return Section(
        "curves", "Training", body, "Figures of the training stream, and of held-out rows where they are dashed."
    )


_NOT_TERMS = {"train/loss", "train/l0", "train/fvu", "train/dead", "train/tokens", "train/tokens_per_second"}


def concept_section(run: Run, groups: Sequence[Group] = ()) -> Section:
    """The concept table. `groups`: the latents that the page shows."""
    found = labels.concepts(run, shown_of(groups))
    if found is None:
        command = f"saeforge features concepts {run.path} --texts demo"
        found = missing("Which latent is which label of labelled texts, beside controls:", command)
        return Section("concepts", "Concepts", found)
    return Section("concepts", "Concepts", found, "Chosen on one half of labelled documents, judged on the other half.")


def chosen(run: Run, most: int) -> list[Group]:
    """The latents that the page shows; none before `saeforge features build`."""
    if most == 0 or not run.has_features:
        return []
    with FeatureStore.open(run.path) as store:
        return choose(store, most)


def shown_of(groups: Sequence[Group]) -> set[int]:
    """All latents of some groups."""
    return {latent for group in groups for latent in group.latents}


def latent_section(run: Run, groups: Sequence[Group], contexts: int) -> Section:
    """Latents in their contexts."""
    if not run.has_features:
        note = missing(
            "What fires the latents has not been looked at. To do so:", f"saeforge features build {run.path}"
        )
        return Section("latents", "Latents", note)
    with FeatureStore.open(run.path) as store:
        body: list[object] = []
        for group in groups:
            body.append(tag("h3", f"{group.title} ({len(group.latents)})"))
            body.append(tag("p", group.rule, class_="small"))
            body.append(cards(store, group, contexts=contexts))
        read = number(int(store.meta["tokens"]))
    told = (
        " to a latent's maximum; the underlined token has the figure at its left. Small bars: activations by octave, "
        "square-root scale."
    )
    lede = join([f"The strongest contexts in {read} tokens. Activation: ", colour_scale(), told])
    return Section("latents", "Latents", body, lede)


def settings(run: Run) -> Section | None:
    """The configuration, folded away."""
    if not run.config:
        return None
    written = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    command = f"saeforge fit --config {Path(run.path if not run.member else run.path.parent) / 'config.yaml'}"
    body = [
        tag("p", "The same run again: ", mono(f"{command} --run runs/NAME"), class_="small"),
        tag("details", tag("summary", "All settings, as resolved"), tag("pre", _lines(written))),
    ]
    return Section("settings", "Settings", body)


def _lines(written: str) -> Markup:
    """Text with its line breaks, which `text` would show as signs."""
    return Markup("\n".join(join([line]) for line in written.splitlines()))

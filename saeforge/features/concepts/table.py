"""The concept table: which latent is which concept, chosen on one half of labelled documents, judged on the other.

Four controls meet the same protocol beside it: the best of as many random latents that fire as often, the difference of
means, a logistic probe, and an SAE of a re-initialised model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from saeforge import __version__
from saeforge.data.manifest import write_json
from saeforge.errors import ConfigError
from saeforge.features.concepts.baselines import PROBE_C, LabelMeans
from saeforge.features.concepts.measure import (
    Baselines,
    Protocol,
    TokenSample,
    TopLatent,
    judge_baselines,
    read_latents,
)
from saeforge.features.concepts.score import RESAMPLES, Judge, Score, average_scores
from saeforge.features.schema import Label
from saeforge.features.store import STORE_FILE, FeatureStore
from saeforge.lm.device import resolve_device
from saeforge.lm.labelled import LabelledTexts, make_comparisons, read_labelled
from saeforge.lm.labelled_rows import Progress, Reader
from saeforge.lm.text import Document
from saeforge.metrics.logistic import check_probe
from saeforge.sae import SAE, load

FORMAT, VERSION = "saeforge-concepts", 1
TOP = 5
TOLERANCE = 0.05

#: What each number means, kept beside the numbers.
CONVENTIONS = {
    "choice": "the latent with the greatest AUROC on the label's train documents; all figures are of test documents",
    "token_auroc": "tokens of the label's test documents against tokens of the others'; silent tokens tie at 0",
    "document_auroc": "each document by the mean over its tokens, silent ones included: the main figure for documents",
    "document_auroc_max": "each document by the maximum over its tokens; grows with the document's length",
    "average_precision": "sum over thresholds of precision x recall gained; its chance level is the share of positives",
    "f1": "at the threshold with the best F1 on the train documents; silent tokens are never called positive",
    "low, high": "95% percentile interval, test documents resampled within each label, the same resamples for all",
    "random": "best of d_sae random unit directions of the centred activations; direction i has the threshold at which "
    "it fires on as many train tokens as latent i of the SAE; chosen as the SAE's latent is; mean over draws, interval "
    "from the least low to the greatest high",
    "difference_of_means": "x . (mean of the label's train tokens - mean of the others')",
    "probe": f"logistic regression on standardised train tokens, L2, C = {PROBE_C}, classes weighted equally",
    "control": "an SAE of a re-initialised model under the same protocol",
    "tokens": "special tokens and padding are left out, as in a harvest",
}


#: Claims about a label's latent, by token AUROC on test documents.
CLAIMS = {
    "random": "lower bound above the upper bound of the best random latents",
    "control": "lower bound above the upper bound of the control's best latent",
    "difference_of_means": f"at least the difference of means minus {TOLERANCE}",
}


@dataclass(frozen=True)
class Failure:
    """A claim that does not hold.

    Attributes:
        claim: key of `CLAIMS`.
        found: the latent's figure.
        needed: what it would have to exceed.
    """

    claim: str
    found: float
    needed: float


@dataclass(frozen=True)
class Concept:
    """A row of the table.

    Attributes:
        label: the concept.
        against: the labels that it is told from.
        top: the best latents on the train documents, best first; the first is the one that counts.
        random: best random latents, over draws.
        random_draws: each draw.
        difference_of_means: the direction between the means of raw activations.
        probe: logistic probe, or None if it was left out.
        control: best latent of the control SAE, or None.
        failures: claims that do not hold.
    """

    label: str
    against: tuple[str, ...]
    top: tuple[TopLatent, ...]
    random: Score
    random_draws: tuple[Score, ...]
    difference_of_means: Score
    probe: Score | None
    control: Score | None
    failures: tuple[Failure, ...]

    @property
    def latent(self) -> int:
        """The latent chosen for the label."""
        return self.top[0].latent

    @property
    def sae(self) -> Score:
        """Its figures."""
        return self.top[0].score


@dataclass(frozen=True)
class ConceptTable:
    """The result of `concept_table`.

    Attributes:
        concepts: one per label.
        about: SAE, model, texts, counts, seeds and versions, as plain JSON values.
        notes: what a reader has to know beside the figures.
        path: where the JSON was written, or None.
    """

    concepts: tuple[Concept, ...]
    about: dict[str, Any]
    notes: tuple[str, ...] = ()
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        concepts = [{"latent": concept.latent, **asdict(concept)} for concept in self.concepts]
        return {"concepts": concepts, "notes": list(self.notes), "conventions": CONVENTIONS, **self.about}

    def failures(self) -> list[str]:
        """Claims that do not hold, one line each with the labels."""
        lines = []
        for claim, words in CLAIMS.items():
            found = [
                (row.label, failure) for row in self.concepts for failure in row.failures if failure.claim == claim
            ]
            if found:
                figures = ", ".join(f"{label} {one.found:.3f} <= {one.needed:.3f}" for label, one in found)
                lines.append(f"not {words}: {figures}")
        return lines


def concept_table(
    run: str | Path | SAE,
    texts: str | Sequence[Document] = "demo",
    *,
    control: str | Path | SAE | None = None,
    labels: Sequence[str] | None = None,
    against: Sequence[str] = (),
    choose_by: Literal["token", "document"] = "token",
    probe: bool = True,
    random_draws: int = 3,
    resamples: int = RESAMPLES,
    seed: int = 0,
    shuffle_labels: int | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    context_length: int | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> ConceptTable:
    """Find the latent of each label and say how well it tells it, beside controls.

    Args:
        run: RUN folder, `sae/` folder, or an SAE. With a RUN folder the result is written to RUN/concepts.json.
        texts: "demo", a folder with a subfolder per label, a `.jsonl` file, or documents.
        control: an SAE trained on a re-initialised model; it runs on that model.
        labels: rows of the table; default: those that `against` names, or all.
        against: "french=spanish,italian": tell french from these only.
        choose_by: the AUROC on train documents by which latents are chosen.
        probe: fit the logistic probe (scikit-learn).
        random_draws: how many sets of d_sae random latents.
        resamples: of the bootstrap.
        seed: of splits, draws and resamples.
        shuffle_labels: shuffle the labels over the documents of each half with this seed; nothing is written then.
        model: where the model is now, if it moved.
        trust_remote_code: run Python code that comes with the model, and with the control's.
        context_length: longest context in tokens; default: what the model allows, at most 512.
        device: "auto", "cpu", "cuda", ...
        on_progress: called with (what, contexts done, contexts in all).

    Raises:
        SaeforgeError: no SAE or model, texts that cannot be used, scikit-learn missing, impossible numbers.
    """
    if random_draws < 1 or resamples < 1:
        raise ConfigError(f"random_draws = {random_draws}, resamples = {resamples}: expected positive numbers")
    for name, number in (("seed", seed), ("shuffle_labels", shuffle_labels)):
        if number is not None and number < 0:
            raise ConfigError(f"{name} = {number}: expected at least 0")
    if choose_by not in ("token", "document"):
        raise ConfigError(f"choose_by {choose_by!r}: expected 'token' or 'document'")
    if probe:
        check_probe()
    folder = None if isinstance(run, SAE) or shuffle_labels is not None else Path(run)
    if folder is not None and (folder / STORE_FILE).is_file():
        FeatureStore.open(folder).close()  # a store of another SAE is told now, not after the work
    place = resolve_device(device)
    sae = (run if isinstance(run, SAE) else load(run)).to(place)
    control_sae = control if control is None or isinstance(control, SAE) else load(control)
    found_texts = read_labelled(texts, seed=seed)
    comparisons = make_comparisons(found_texts.labels, wanted=labels, against=against)
    documents = found_texts.used_by(comparisons)
    if shuffle_labels is not None:
        documents = documents.shuffle(shuffle_labels)
    protocol = Protocol(documents, comparisons, choose_by, resamples, seed, on_progress)

    settings: dict[str, Any] = dict(trust_remote_code=trust_remote_code, device=place, context_length=context_length)
    reader = Reader(sae, documents, model=model, **settings)
    means, sample = _train_tokens(sae, reader, protocol)
    found = read_latents(sae, reader, protocol, "latents", means=means, sample=sample)
    judge = Judge(documents, reader.document, resamples=resamples, seed=seed)
    tops = found.top(judge, protocol, TOP)
    baselines = judge_baselines(
        reader, judge, protocol, found.density, means=means, sample=sample, random_draws=random_draws, probe=probe
    )
    controls = None if control_sae is None else _judge_control(control_sae.to(place), protocol, settings)
    concepts = []
    for i, comparison in enumerate(comparisons):
        row = Concept(
            label=documents.labels[comparison.label],
            against=tuple(documents.labels[j] for j in comparison.against),
            top=tops[i],
            random=average_scores(baselines.random[i]),
            random_draws=tuple(baselines.random[i]),
            difference_of_means=baselines.difference_of_means[i],
            probe=baselines.probe[i] if probe else None,
            control=controls[i] if controls is not None else None,
            failures=(),
        )
        concepts.append(replace(row, failures=tuple(_failures(row))))
    about = {
        "format": FORMAT,
        "version": VERSION,
        "sae": {"d_in": sae.d_in, "d_sae": sae.d_sae, "rule": sae.rule, "variant": sae.meta.get("variant")},
        "l0": float(found.density.sum()),
        "site": reader.origin.site.id,
        "model": reader.loaded.card,
        "control": None if control_sae is None else control_sae.meta.get("model"),
        "texts": documents.source,
        "split_by": documents.split_by,
        "documents": documents.counts(),
        "duplicates": documents.duplicates,
        "tokens": {"train": reader.n_train, "test": int(reader.tokens.sum()) - reader.n_train},
        "context_length": reader.context_length,
        "choose_by": choose_by,
        "random_draws": random_draws,
        "resamples": resamples,
        "seed": seed,
        "shuffle_labels": shuffle_labels,
        "sample_tokens": len(sample),
        "versions": {"saeforge": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    table = ConceptTable(tuple(concepts), about, tuple(_notes(documents, baselines, probe=probe)))
    if folder is None or not (folder / "sae").is_dir():
        return table
    path = folder / "concepts.json"
    write_json(path, table.to_json())
    if (folder / STORE_FILE).is_file():
        stored = _store_labels(folder, table)
    else:
        stored = f"no {STORE_FILE} here to put labels in: after `saeforge features build` run this again"
    return replace(table, path=path, notes=(*table.notes, stored))


def _train_tokens(sae: SAE, reader: Reader, protocol: Protocol) -> tuple[LabelMeans, TokenSample]:
    """What a pass over the texts fills with train tokens."""
    sample = TokenSample(reader.n_train, sae.d_in, seed=protocol.seed)
    return LabelMeans(len(protocol.texts.labels), sae.d_in), sample


def _judge_control(sae: SAE, protocol: Protocol, settings: dict[str, Any]) -> list[Score]:
    """The best latent of each comparison of another SAE, on its own model."""
    reader = Reader(sae, protocol.texts, **settings)
    means, sample = _train_tokens(sae, reader, protocol)
    found = read_latents(sae, reader, protocol, "control", means=means, sample=sample)
    judge = Judge(protocol.texts, reader.document, resamples=protocol.resamples, seed=protocol.seed)
    return [top[0].score for top in found.top(judge, protocol, 1)]


def _failures(row: Concept) -> list[Failure]:
    mine, means = row.sae.token_auroc, row.difference_of_means.token_auroc.value
    found = []
    for claim, other in (("random", row.random), ("control", row.control)):
        if other is not None and mine.low <= other.token_auroc.high:
            found.append(Failure(claim, mine.low, other.token_auroc.high))
    if mine.value < means - TOLERANCE:
        found.append(Failure("difference_of_means", mine.value, means - TOLERANCE))
    return found


def _store_labels(folder: Path, table: ConceptTable) -> str:
    """Hand the labels to the run's feature store: those of latents that clear what chance and the control reach."""
    good = [row for row in table.concepts if not {"random", "control"} & {one.claim for one in row.failures}]
    labels = [
        Label(row.latent, row.label, row.sae.token_auroc.value, {"against": list(row.against), **asdict(row.sae)})
        for row in good
    ]
    with FeatureStore.open(folder) as store:
        store.add_labels("concepts", labels)
    return f"{len(good)} of {len(table.concepts)} labels went to {folder / STORE_FILE}; the others fail a claim"


def _notes(texts: LabelledTexts, baselines: Baselines, *, probe: bool) -> list[str]:
    """What a reader has to know beside the figures."""
    notes = []
    if texts.shuffled is not None:
        notes.append(f"labels were shuffled (seed {texts.shuffled}): everything here is chance, and nothing is stored")
    if texts.duplicates:
        notes.append(f"{texts.duplicates:,} documents were left out because another has the same text and label")
    if not probe:
        notes.append("the logistic probe was left out")
    if baselines.unconverged:
        notes.append(f"the probe's solver stopped before its tolerance for {', '.join(baselines.unconverged)}")
    return notes

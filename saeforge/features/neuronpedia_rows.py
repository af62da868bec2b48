"""The rows of Neuronpedia's tables for the latents of a store; the keys are its columns (see `neuronpedia.py`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from saeforge.features.pieces import Pieces
from saeforge.features.store import Example, Feature, FeatureStore
from saeforge.features.unembedding import Logits, Unembedding
from saeforge.sae import SAE

#: The user that its own converter takes, and that a fresh instance of it has.
CREATOR_ID = "clkht01d40000jv08hvalcvly"
TOP = 20
#: Columns about neurons and other latents, which a store does not hold; its converter leaves most of them empty.
NOT_MADE = (
    "topkCosSimIndices",
    "topkCosSimValues",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "decoder_weights_dist",
)


@dataclass(frozen=True)
class Release:
    """Under which names the latents stand there.

    Attributes:
        model_id: of the model there, for example gemma-2-2b.
        source_set: of a set of SAEs of its layers, for example res-16k; with the layer the source's: `12-res-16k`.
        layer: of this SAE.
        name: of the release.
        title: of the release, for people.
        creator: who made it. creator_id: the user there that owns the rows.
        url: of the release, or None.
        dataset: name of the text, or None.
        hf_repo, hf_folder: where the weights are on the HuggingFace hub, or None.
    """

    model_id: str
    source_set: str
    layer: int
    name: str
    title: str
    creator: str
    creator_id: str = CREATOR_ID
    url: str | None = None
    dataset: str | None = None
    hf_repo: str | None = None
    hf_folder: str | None = None

    @property
    def source(self) -> str:
        """Id of the source, which its tables of latents and activations call the layer."""
        return f"{self.layer}-{self.source_set}"


class Rows:
    """The rows of its tables, from a store."""

    def __init__(
        self, release: Release, store: FeatureStore, pieces: Pieces, logits: Unembedding, sae: SAE, card: dict[str, Any]
    ) -> None:
        self._release, self._store, self._pieces, self._logits = release, store, pieces, logits
        self._d, self._layers = sae.d_in, card.get("layers")
        self._hook = str((sae.meta.get("site") or {}).get("id") or "")
        self._created = datetime.now(UTC).isoformat(timespec="seconds")

    def about(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The four files of one line."""
        names, made = self._release, {"creatorId": self._release.creator_id, "createdAt": self._created}
        shown = {"visibility": "PUBLIC", **made}
        urls = [names.url] if names.url else []
        yield (
            "release.jsonl",
            {
                "name": names.name,
                "description": names.title,
                "descriptionShort": names.title,
                "creatorName": names.creator,
                "creatorNameShort": names.creator,
                "urls": urls,
                **shown,
            },
        )
        yield (
            "model.jsonl",
            {
                "id": names.model_id,
                "instruct": names.model_id.endswith(("-it", "-instruct")),
                "displayName": names.model_id,
                "displayNameShort": names.model_id,
                "dimension": self._d,
                "layers": self._layers or 0,
                "neuronsPerLayer": 0,
                "owner": "",
                "updatedAt": self._created,
                **shown,
            },
        )
        yield (
            "sourceset.jsonl",
            {
                "modelId": names.model_id,
                "name": names.source_set,
                "description": names.title,
                "type": "",
                "creatorName": names.creator,
                "releaseName": names.name,
                "urls": urls,
                "hasDashboards": True,
                **shown,
            },
        )
        yield (
            "source.jsonl",
            {
                "id": names.source,
                "modelId": names.model_id,
                "setName": names.source_set,
                "dataset": names.dataset,
                "hfRepoId": names.hf_repo,
                "hfFolderId": names.hf_folder,
                "hasDashboards": True,
                "inferenceEnabled": False,
                "inferenceHosts": [],
                "notes": f"{int(self._store.meta['tokens'])} tokens",
                **shown,
            },
        )

    def batch(self, first: int, last: int) -> dict[str, list[dict[str, Any]]]:
        """Features, activations and explanations of latents first to last - 1."""
        found: dict[str, list[dict[str, Any]]] = {"features": [], "activations": [], "explanations": []}
        logits = self._logits(first, last)
        for latent in range(first, last):
            feature = self._store.latent(latent)
            found["features"].append(self._feature(feature, logits, latent - first))
            found["activations"] += self._activations(feature)
            found["explanations"] += self._explanations(feature)
        return found

    def _of(self, latent: int) -> dict[str, Any]:
        return {
            "modelId": self._release.model_id,
            "layer": self._release.source,
            "index": str(latent),
            "createdAt": self._created,
        }

    def _feature(self, feature: Feature, logits: Logits, row: int) -> dict[str, Any]:
        octaves = sorted(feature.histogram.items())
        return {
            **self._of(feature.latent),
            "creatorId": self._release.creator_id,
            "sourceSetName": self._release.source_set,
            "hookName": self._hook,
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": None,
            "maxActApprox": feature.max,
            "frac_nonzero": feature.density,
            # Parallel arrays: bars in the middle of each octave (2^e to 2^(e + 1)), counts of activations.
            "freq_hist_data_bar_values": [1.5 * 2.0**octave for octave, _ in octaves],
            "freq_hist_data_bar_heights": [count for _, count in octaves],
            "logits_hist_data_bar_values": _rounded(logits.centres[row].tolist()),
            "logits_hist_data_bar_heights": logits.heights[row].tolist(),
            "pos_str": self._words(logits.top[row].tolist()),
            "pos_values": _rounded(logits.top_values[row].tolist()),
            "neg_str": self._words(logits.bottom[row].tolist()),
            "neg_values": _rounded(logits.bottom_values[row].tolist()),
            **{name: [] for name in NOT_MADE},
        }

    def _activations(self, feature: Feature) -> Iterator[dict[str, Any]]:
        """The strongest (bin -1), then the samples of each octave below the maximum."""
        for example in self._store.top(feature.latent, TOP):
            yield self._activation(example, -1.0, feature.max, -1.0)
        if not feature.count:
            return
        highest = max(feature.histogram)
        ranges = self._store.samples(feature.latent)
        for number, examples in enumerate(ranges):
            rest = number == len(ranges) - 1
            above = 2.0 ** (highest - number + 1)
            inside = [
                n
                for octave, n in feature.histogram.items()
                if highest - octave == number or (rest and highest - octave >= number)
            ]
            share = feature.density * sum(inside) / feature.count
            for example in examples:
                yield self._activation(example, 0.0 if rest else above / 2, min(above, feature.max), share)

    def _activation(self, example: Example, low: float, high: float, share: float) -> dict[str, Any]:
        values = [0.0 if value is None else float(value) for value in example.values]  # the column has no null
        largest = max(values)
        return {
            **self._of(example.latent),
            "id": self._id(example.latent, example.kind, example.range, example.rank),
            "creatorId": self._release.creator_id,
            "tokens": [_text(token) for token in example.tokens],
            "values": values,
            "maxValue": largest,
            "maxValueTokenIndex": values.index(largest),
            "minValue": min(values),
            "qualifyingTokenIndex": example.centre,
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "dataSource": _text(example.document),
            "dataIndex": str(example.position),
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
        }

    def _explanations(self, feature: Feature) -> Iterator[dict[str, Any]]:
        for number, label in enumerate(feature.labels):
            score = "" if label["score"] is None else f", score {label['score']:.3f}"
            yield {
                **self._of(feature.latent),
                "id": self._id(feature.latent, "label", label["source"], number),
                "description": _text(label["label"]),
                "authorId": self._release.creator_id,
                "embedding": None,
                "triggeredById": None,
                "typeName": None,
                "explanationModelName": None,
                "notes": f"saeforge, {label['source']}{score}",
            }

    def _words(self, ids: list[int]) -> list[str]:
        return [_text(self._pieces([token])[0]) for token in ids]

    def _id(self, *parts: Any) -> str:
        """Of 25 characters like theirs, the same at every export."""
        key = json.dumps([self._release.model_id, self._release.source, *parts])
        return f"c{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def _text(text: str) -> str:
    """Text that Postgres takes: no NUL, and no half of a character."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()

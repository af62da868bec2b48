"""The concept table with a model: the same figures as a dense computation, its controls, its store, the command."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from saeforge.cli.concepts import run as run_command
from saeforge.errors import ConfigError
from saeforge.features import FeatureStore, build_features
from saeforge.features.concepts import ConceptTable, concept_table
from saeforge.features.concepts.baselines import PROBE_C
from saeforge.lm.labelled import LabelledTexts, read_labelled
from saeforge.lm.labelled_rows import Reader
from saeforge.lm.load import load_model
from saeforge.lm.text import Document
from saeforge.metrics.logistic import fit_probe
from saeforge.sae import SAE
from tests.tiny_models import WORDS, save_model

SITE = "resid_post.1"


def make_documents(labels: Sequence[str], per_label: int, *, own_share: float = 0.5) -> list[Document]:
    """Each label has a share of words of its own; the others are anyone's."""
    rng = random.Random(0)
    found = []
    for number, label in enumerate(labels):
        own = WORDS[4 * number : 4 * number + 4]
        for i in range(per_label):
            words = [rng.choice(own if rng.random() < own_share else WORDS) for _ in range(rng.randint(10, 30))]
            split = "train" if i % 2 == 0 else "test"
            found.append(Document(f"{label} {i}", " ".join(words) + f" {number}{i}", label, split))
    return found


def make_sae(folder: Path, *, d_sae: int = 96, seed: int = 0) -> SAE:
    """An SAE that says it belongs to the model: random directions of its embedding's scale, threshold rule."""
    loaded = load_model(str(folder), [SITE])
    site = loaded.sites[0]
    directions = torch.randn(d_sae, 32, generator=torch.Generator().manual_seed(seed))
    meta = {"model": loaded.card, "site": {"id": site.id, "module_path": site.module_path, "where": site.where}}
    threshold = torch.full((d_sae,), 10.0)
    return SAE(
        directions, torch.zeros(d_sae), directions, torch.zeros(32), rule="threshold", threshold=threshold, meta=meta
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def texts() -> list[Document]:
    return make_documents(("cat", "hill", "mat"), 24)


@pytest.fixture(scope="module")
def table(model: Path, texts: list[Document]) -> ConceptTable:
    return concept_table(make_sae(model), texts, resamples=100, random_draws=2, control=make_sae(model, seed=9))


def read_dense(sae: SAE, texts: list[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray, LabelledTexts]:
    """Raw activations, dense latents and document of every token, straight from the model."""
    labelled = read_labelled(texts)
    reader = Reader(sae, labelled)
    x = np.concatenate([rows.numpy() for rows, _ in reader.batches("")])
    return x, sae.encode(torch.from_numpy(x)).to_dense().numpy(), reader.document, labelled


def test_the_table_equals_a_dense_computation(model: Path, texts: list[Document], table: ConceptTable) -> None:
    x, dense, document, labelled = read_dense(make_sae(model), texts)
    train = labelled.train[document]
    for concept in table.concepts:
        positive = labelled.label[document] == labelled.labels.index(concept.label)
        on_train = [roc_auc_score(positive[train], dense[train, i]) for i in range(dense.shape[1])]
        assert concept.latent == int(np.argmax(on_train))
        assert concept.sae.train_token_auroc == pytest.approx(max(on_train))
        score = dense[~train, concept.latent]
        assert concept.sae.token_auroc.value == pytest.approx(roc_auc_score(positive[~train], score), abs=1e-6)
        ap = average_precision_score(positive[~train], score)
        assert concept.sae.token_average_precision == pytest.approx(ap, abs=1e-6)
        assert concept.sae.token_auroc.low <= concept.sae.token_auroc.value <= concept.sae.token_auroc.high
        assert concept.sae.active_on_label == pytest.approx((score[positive[~train]] != 0).mean())
        assert concept.sae.active_on_others == pytest.approx((score[~positive[~train]] != 0).mean())
        assert concept.sae.token_auroc.value <= (1 + concept.sae.active_on_label) / 2
        direction = x[train & positive].mean(0) - x[train & ~positive].mean(0)
        means = roc_auc_score(positive[~train], x[~train] @ direction)
        assert concept.difference_of_means.token_auroc.value == pytest.approx(means, abs=1e-4)
        best = [top.score.train_token_auroc for top in concept.top]
        assert best == pytest.approx(sorted(on_train, reverse=True)[:5])
        assert concept.random.token_auroc.high == max(draw.token_auroc.high for draw in concept.random_draws)
        assert concept.control is not None
        assert concept.probe is not None
        assert concept.probe.token_auroc.value > concept.random.token_auroc.value


def test_claims_that_fail_are_said(table: ConceptTable) -> None:
    # The SAE is as random as its control, so no claim against chance can hold.
    assert all({"random", "control"} & {failure.claim for failure in row.failures} for row in table.concepts)
    assert len(table.failures()) >= 2
    for row in table.concepts:
        for failure in row.failures:
            assert failure.found <= failure.needed


def test_a_latent_that_is_the_concept_is_found_and_clears_chance(model: Path) -> None:
    texts = make_documents(("cat", "hill", "mat"), 40, own_share=0.9)
    planted = make_sae(model, d_sae=24)
    x, _, document, labelled = read_dense(planted, texts)
    train = labelled.train[document]
    positive = labelled.label[document] == labelled.labels.index("hill")
    direction = fit_probe(x[train], positive[train], c=PROBE_C).direction
    score = x @ direction
    planted.W_enc[17] = torch.from_numpy(direction)
    planted.b_enc[17] = 10 - float(np.quantile(score, 0.6))  # the threshold is 10: it fires on two fifths
    found = concept_table(planted, texts, labels=["hill"], resamples=200)
    (row,) = found.concepts
    assert (row.label, row.against, row.latent) == ("hill", ("cat", "mat"), 17)
    assert not row.failures, found.failures()
    assert row.sae.token_auroc.low > row.random.token_auroc.high
    assert row.sae.document_auroc.value > 0.95


def test_with_shuffled_labels_the_model_tells_nothing_held_out(model: Path) -> None:
    texts = make_documents(("cat", "hill", "mat", "rain"), 60)
    sae = make_sae(model, d_sae=256)
    values = []
    for seed in range(6):
        found = concept_table(sae, texts, shuffle_labels=seed, probe=False, random_draws=1, resamples=20)
        values += [row.sae.token_auroc.value for row in found.concepts]
        assert "labels were shuffled" in found.notes[0]
    assert abs(np.mean(values) - 0.5) < 0.02


def test_the_result_does_not_depend_on_whether_activations_are_kept(
    model: Path, texts: list[Document], table: ConceptTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeforge.lm.labelled_rows.KEPT_BYTES", 0)
    again = concept_table(make_sae(model), texts, resamples=100, random_draws=2, control=make_sae(model, seed=9))
    assert again.to_json() == table.to_json()


def test_against_limits_the_documents_that_are_read(model: Path, texts: list[Document]) -> None:
    found = concept_table(make_sae(model), texts, against=["cat=mat"], probe=False, resamples=20)
    assert set(found.about["documents"]) == {"cat", "mat"}
    assert [(row.label, row.against) for row in found.concepts] == [("cat", ("mat",))]
    assert found.concepts[0].probe is None
    assert "the logistic probe was left out" in found.notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_draws": 0}, "random_draws = 0"),
        ({"choose_by": "luck"}, "choose_by 'luck'"),
        ({"context_length": 4096}, "context_length 4096: this model and its tokenizer allow 128"),
        ({"context_length": 0}, "context_length 0 leaves no room"),
        ({"seed": -1}, "seed = -1"),
        ({"shuffle_labels": -1}, "shuffle_labels = -1"),
    ],
)
def test_impossible_settings_are_refused(
    model: Path, texts: list[Document], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        concept_table(make_sae(model), texts, probe=False, **settings)


def test_a_text_without_tokens_is_refused_by_name(model: Path, texts: list[Document]) -> None:
    with pytest.raises(ConfigError, match="text 'cat 0' holds no token"):
        concept_table(make_sae(model), [replace(texts[0], text="<s>"), *texts[1:]], probe=False)


def test_a_missing_scikit_learn_is_said_at_once(
    model: Path, texts: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'saeforge\[probe\]'"):
        concept_table(make_sae(model), texts)


def test_labels_that_clear_chance_go_to_the_store_and_others_do_not(model: Path, tmp_path: Path) -> None:
    texts = make_documents(("cat", "hill", "mat"), 40, own_share=0.9)
    sae = make_sae(model, d_sae=24)
    x, _, document, labelled = read_dense(sae, texts)
    positive = labelled.label[document] == labelled.labels.index("hill")
    direction = fit_probe(x, positive, c=PROBE_C).direction
    sae.W_enc[17] = torch.from_numpy(direction)
    sae.b_enc[17] = 10 - float(np.quantile(x @ direction, 0.6))
    sae.save(tmp_path / "run" / "sae")
    build_features(tmp_path / "run", texts=str(write_texts(tmp_path / "texts.jsonl", texts)))
    found = concept_table(tmp_path / "run", texts, resamples=100)
    failing = {row.label for row in found.concepts if {"random"} & {failure.claim for failure in row.failures}}
    assert "hill" not in failing
    with FeatureStore.open(tmp_path / "run") as store:
        labels = [(i, one["label"], one["source"]) for i in range(24) for one in store.latent(i).labels]
    expected = [(row.latent, row.label, "concepts") for row in found.concepts if row.label not in failing]
    assert sorted(labels) == sorted(expected)
    assert (17, "hill", "concepts") in labels
    assert any(f"{len(expected)} of 3 labels went to" in note for note in found.notes)


def write_texts(path: Path, texts: list[Document]) -> Path:
    lines = [json.dumps({"text": d.text, "label": d.label, "split": d.split, "name": d.name}) for d in texts]
    path.write_text("\n".join(lines))
    return path


def test_the_command_prints_a_table_and_writes_json(
    model: Path, texts: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sae(model).save(tmp_path / "run" / "sae")
    file = write_texts(tmp_path / "texts.jsonl", texts)
    arguments = [str(tmp_path / "run"), "--texts", str(file), "--resamples", "50", "--random_draws", "1"]
    assert run_command([*arguments, "--against", "cat=mat", "--against", "hill=cat,mat"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "concepts.json").read_text())
    assert written["format"] == "saeforge-concepts"
    assert [row["label"] for row in written["concepts"]] == ["cat", "hill"]
    for row in written["concepts"]:
        estimate = row["top"][0]["score"]["token_auroc"]
        assert f"{row['label']} *" in printed  # random directions: a claim fails
        assert f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" in printed
    assert "* not lower bound above the upper bound of the best random latents: cat" in printed
    assert max(map(len, printed.splitlines()[:12])) <= 110

    (tmp_path / "run" / "concepts.json").unlink()
    assert run_command([*arguments, "--labels", "cat,mat", "--probe", "false", "--shuffle_labels", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in shown["concepts"]] == ["cat", "mat"]
    assert shown["shuffle_labels"] == 1
    assert not (tmp_path / "run" / "concepts.json").exists()  # chance is never stored as a finding


@pytest.mark.parametrize(
    "given",
    [
        ["--against", "cat=mat", "--against", "hill=cat,mat", "RUN"],
        ["RUN", "--against", "cat=mat", "hill=cat,mat", "--probe", "false"],
        ["--against=cat=mat", "--against=hill=cat,mat", "RUN"],
        ["--against", "cat=mat", "RUN", "--against=hill=cat,mat"],
        ["RUN", "-c", "CONFIG"],
    ],
)
def test_against_may_be_given_in_any_way(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text('against: ["cat=mat", "hill=cat,mat"]\nresamples: 50\n')
    seen: dict[str, Any] = {}

    def stop(run: str, texts: str, **settings: Any) -> None:
        seen.update(settings, run=run)
        raise ConfigError("far enough")

    monkeypatch.setattr("saeforge.features.concepts.concept_table", stop)
    with pytest.raises(ConfigError, match="far enough"):
        run_command([str(config) if word == "CONFIG" else word for word in given])
    assert seen["against"] == ["cat=mat", "hill=cat,mat"]
    assert seen["run"] == "RUN"
    assert seen["labels"] is None


@pytest.mark.parametrize(
    "given", [["RUN", "--against"], ["RUN", "--against", "--probe", "false"], ["RUN", "--texs", "x"]]
)
def test_a_broken_command_line_is_one_line(given: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        run_command(given)
    assert "\n" not in str(caught.value)

"""`saeforge features export`: the columns that Neuronpedia imports, with the numbers of the store."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saeforge.cli.main import main
from saeforge.errors import CheckpointError, ConfigError, DatasetError
from saeforge.features import FeatureStore, Label, build_features, neuronpedia
from saeforge.features.unembedding import Unembedding
from saeforge.lm.origin import describe_origin, origin_of
from saeforge.sae import SAE, load
from tests.test_features import make_sae
from tests.tiny_models import D, make_documents, save_model, write_text_folder

D_SAE = 96
TEXT, NUMBER, NUMBERS, WORDS = str, (int, float), [(int, float)], [str]

#: Columns and their types, written down from db_models/{feature,activation,explanation,model,source,source_set,
#: source_release}.py of github.com/hijohnnylin/neuronpedia, utils/neuronpedia-utils. A tuple with None: may be null.
#: Postgres fills in nothing for a row from JSON lines, so that all columns of these tables must be there.
ROW = {"modelId": TEXT, "layer": TEXT, "index": TEXT, "createdAt": TEXT}
TABLES: dict[str, dict[str, Any]] = {
    "features": ROW
    | {
        "creatorId": TEXT,
        "maxActApprox": NUMBER,
        "hasVector": bool,
        "vector": NUMBERS,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": TEXT,
        "topkCosSimIndices": NUMBERS,
        "topkCosSimValues": NUMBERS,
        "neuron_alignment_indices": NUMBERS,
        "neuron_alignment_values": NUMBERS,
        "neuron_alignment_l1": NUMBERS,
        "correlated_neurons_indices": NUMBERS,
        "correlated_neurons_pearson": NUMBERS,
        "correlated_neurons_l1": NUMBERS,
        "correlated_features_indices": NUMBERS,
        "correlated_features_pearson": NUMBERS,
        "correlated_features_l1": NUMBERS,
        "neg_str": WORDS,
        "neg_values": NUMBERS,
        "pos_str": WORDS,
        "pos_values": NUMBERS,
        "frac_nonzero": NUMBER,
        "freq_hist_data_bar_heights": NUMBERS,
        "freq_hist_data_bar_values": NUMBERS,
        "logits_hist_data_bar_heights": NUMBERS,
        "logits_hist_data_bar_values": NUMBERS,
        "decoder_weights_dist": NUMBERS,
        "sourceSetName": TEXT,
    },
    "activations": ROW
    | {
        "id": TEXT,
        "tokens": WORDS,
        "maxValue": NUMBER,
        "maxValueTokenIndex": int,
        "minValue": NUMBER,
        "values": NUMBERS,
        "creatorId": TEXT,
        "dataSource": TEXT,
        "dataIndex": TEXT,
        "dfaValues": NUMBERS,
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": NUMBERS,
        "logitContributions": None,
        "binMin": NUMBER,
        "binMax": NUMBER,
        "binContains": NUMBER,
        "qualifyingTokenIndex": int,
    },
    "explanations": ROW
    | {
        "id": TEXT,
        "description": TEXT,
        "authorId": TEXT,
        "embedding": None,
        "triggeredById": None,
        "typeName": None,
        "explanationModelName": None,
        "notes": TEXT,
    },
}
#: These go through an ORM, which fills in defaults and refuses unknown columns: what may be there, and what must.
ABOUT: dict[str, tuple[set[str], set[str]]] = {
    "model": (
        {"id", "instruct", "creatorId", "displayNameShort", "displayName", "tlensId", "dimension", "visibility"}
        | {"defaultSourceSetName", "defaultSourceId", "inferenceEnabled", "layers", "neuronsPerLayer", "createdAt"}
        | {"owner", "updatedAt", "website"},
        {"id", "instruct", "creatorId"},
    ),
    "source": (
        {"id", "modelId", "setName", "creatorId", "hasDashboards", "inferenceEnabled", "inferenceHosts"}
        | {"saelensConfig", "saelensRelease", "saelensSaeId", "hfRepoId", "hfFolderId", "visibility"}
        | {"defaultOfModelId", "hasUmap", "hasUmapLogSparsity", "hasUmapClusters", "num_prompts"}
        | {"num_tokens_in_prompt", "dataset", "notes", "createdAt"},
        {"id", "modelId", "setName", "creatorId"},
    ),
    "release": (
        {"name", "description", "creatorName", "creatorId", "visibility", "isNewUi", "featured", "descriptionShort"}
        | {"urls", "creatorEmail", "creatorNameShort", "defaultSourceSetName", "defaultSourceId"}
        | {"defaultUmapSourceIds", "createdAt"},
        {"name", "description", "creatorName", "creatorId"},
    ),
    "sourceset": (
        {"modelId", "name", "creatorId", "hasDashboards", "visibility", "description", "type", "creatorName", "urls"}
        | {"creatorEmail", "releaseName", "defaultOfModelId", "defaultRange", "defaultShowBreaks", "showDfa"}
        | {"showCorrelated", "showHeadAttribution", "showUmap", "createdAt"},
        {"modelId", "name", "creatorId"},
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with features of a little text, a label, and a latent that never fires."""
    home = tmp_path_factory.mktemp("neuronpedia")
    save_model("llama", home / "llama")
    write_text_folder(home / "text", make_documents(20, words=60))
    meta = describe_origin(str(home / "llama"), "resid_post.1", widths=(D, D))
    sae = make_sae("threshold", meta)
    sae.save(home / "run/sae")
    build_features(home / "run", texts=str(home / "text"), device="cpu")
    with FeatureStore.open(home / "run") as store:
        store.add_labels("concepts", [Label(3, "always"), Label(7, "seven \0", 0.5)])
    return home


@pytest.fixture(scope="module")
def source(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "LATENTS_AT_ONCE", 40)
        return neuronpedia.export(home / "run", home / "out", model_id="tiny", source_set="res", creator="me")


def lines(place: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(place.read_bytes()) if place.suffix == ".gz" else place.read_bytes()
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def table(source: Path, name: str) -> list[dict[str, Any]]:
    return [row for place in sorted((source / name).glob("batch-*.jsonl.gz")) for row in lines(place)]


def fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if kind is None:
        return value is None
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def test_every_table_has_the_columns_of_neuronpedia(source: Path) -> None:
    assert source.relative_to(source.parents[1]).as_posix() == "tiny/1-res"
    for name, columns in TABLES.items():
        rows = table(source, name)
        assert rows
        for row in rows:
            assert row.keys() == columns.keys()
            assert not [key for key, kind in columns.items() if not fits(row[key], kind)]
    for name, (known, needed) in ABOUT.items():
        (row,) = lines(source / f"{name}.jsonl")
        assert needed <= row.keys() <= known
    assert sorted(place.name for place in source.iterdir()) == sorted([*(f"{name}.jsonl" for name in ABOUT), *TABLES])


def test_names_in_one_file_are_those_in_the_others(source: Path) -> None:
    about = {name: lines(source / f"{name}.jsonl")[0] for name in ABOUT}
    assert about["source"]["id"] == "1-res"
    assert about["source"]["setName"] == about["sourceset"]["name"] == "res"
    assert about["sourceset"]["releaseName"] == about["release"]["name"]
    assert about["model"]["id"] == "tiny"
    for name in TABLES:
        assert {(row["modelId"], row["layer"]) for row in table(source, name)} == {("tiny", "1-res")}


def test_each_latent_is_there_once_with_the_numbers_of_the_store(source: Path, home: Path) -> None:
    rows = {int(row["index"]): row for row in table(source, "features")}
    assert sorted(rows) == list(range(D_SAE))
    assert len(list((source / "features").iterdir())) == 3  # 96 latents, 40 at a time
    with FeatureStore.open(home / "run") as store:
        for latent, row in rows.items():
            feature = store.latent(latent)
            assert (row["frac_nonzero"], row["maxActApprox"]) == (feature.density, feature.max)
            assert len(row["freq_hist_data_bar_values"]) == len(row["freq_hist_data_bar_heights"])  # read in parallel
            assert sum(row["freq_hist_data_bar_heights"]) == feature.count


def test_logits_are_those_of_the_decoder_and_the_unembedding(source: Path, home: Path) -> None:
    sae = load(home / "run")
    lm = origin_of(sae).load_causal()
    logits = sae.W_dec @ lm.model.lm_head.weight.T  # type: ignore[union-attr, operator]
    for row in table(source, "features")[::17]:
        line = logits[int(row["index"])]
        torch.testing.assert_close(torch.tensor(row["pos_values"]), line.topk(10).values, atol=6e-4, rtol=0)  # rounded
        torch.testing.assert_close(torch.tensor(row["neg_values"]), -(-line).topk(10).values, atol=6e-4, rtol=0)
        for token, text in zip(line.topk(10).indices.tolist(), row["pos_str"], strict=True):
            known = token < len(lm.tokenizer)  # the model has more tokens than its tokenizer
            assert text.strip() == (lm.tokenizer.decode([token]).strip() if known else f"<{token}>")
        heights = torch.histc(line, 50)
        assert sum(row["logits_hist_data_bar_heights"]) == len(line)
        # A logit on the border of two bins may fall to either.
        assert (torch.tensor(row["logits_hist_data_bar_heights"]) - heights).abs().sum() <= 4
        assert row["logits_hist_data_bar_values"] == sorted(row["logits_hist_data_bar_values"])


def test_activations_are_the_examples_of_the_store(source: Path, home: Path) -> None:
    rows = table(source, "activations")
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert len(row["tokens"]) == len(row["values"])
        assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
        assert row["minValue"] == min(row["values"])
        assert 0 <= row["qualifyingTokenIndex"] < len(row["tokens"])
        if row["binMin"] >= 0:
            assert (
                row["binMin"] <= row["values"][row["qualifyingTokenIndex"]] <= row["binMax"] * (1 + 1e-5)
            )  # of six digits
            assert 0 < row["binContains"] <= 1
    with FeatureStore.open(home / "run") as store:
        for latent in (3, 7, 50):
            mine = [row for row in rows if row["index"] == str(latent)]
            top = [row for row in mine if row["binMin"] == -1]
            assert [row["dataIndex"] for row in top] == [str(example.position) for example in store.top(latent)]
            assert [row["tokens"] for row in top] == [example.tokens for example in store.top(latent)]
            assert len(mine) - len(top) == sum(map(len, store.samples(latent)))
            shares = {(row["binMin"], row["binContains"]) for row in mine if row["binMin"] >= 0}
            assert sum(share for _, share in shares) <= store.latent(latent).density * (1 + 1e-9)
    assert not [row for row in rows if row["index"] == "0"]  # it never fires


def test_labels_are_explanations(source: Path) -> None:
    rows = table(source, "explanations")
    assert [(row["index"], row["description"], row["notes"]) for row in rows] == [
        ("3", "always", "saeforge, concepts"),
        ("7", "seven �", "saeforge, concepts, score 0.500"),  # Postgres takes no NUL
    ]


def test_the_command_names_what_is_not_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "export", str(home / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "v1/llama/1-run" in capsys.readouterr().out
    assert lines(tmp_path / "out/llama/1-run/release.jsonl")[0]["name"] == "run"
    assert main(["features", "export", str(home / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert main(["features", "export", str(home / "run"), "--to", "delphi"]) == 2
    assert "expected neuronpedia" in capsys.readouterr().err


def test_mistakes_are_refused_and_leave_nothing(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="model_id 'a/b'"):
        neuronpedia.export(home / "run", out, model_id="a/b")
    sae = load(home / "run")
    sae.meta["site"] = {**sae.meta["site"], "module_path": "norm", "id": "norm:out"}
    sae.save(tmp_path / "norm/sae")
    with pytest.raises(ConfigError, match="names no layer; give --layer"):
        neuronpedia.export(tmp_path / "norm", out)
    sae.meta = load(home / "run").meta
    sae.save(tmp_path / "new/sae")
    with pytest.raises(DatasetError, match="features build"):
        neuronpedia.export(tmp_path / "new", out)
    assert not out.exists()
    out.write_text("")
    with pytest.raises(CheckpointError, match="already holds something"):
        neuronpedia.export(home / "run", out)


def test_latents_that_write_elsewhere_have_no_logits(home: Path) -> None:
    lm = origin_of(load(home / "run")).load_causal()
    narrow = SAE(torch.zeros(4, D), torch.zeros(4), torch.zeros(4, 3), torch.zeros(3), rule="topk", k=1)
    with pytest.raises(ConfigError, match="does not write in the residual stream"):
        Unembedding(lm.model, narrow)


def test_equal_logits_make_a_histogram_too(home: Path) -> None:
    lm = origin_of(load(home / "run")).load_causal()
    silent = SAE(torch.zeros(4, D), torch.zeros(4), torch.zeros(4, D), torch.zeros(D), rule="topk", k=1)
    logits = Unembedding(lm.model, silent)(0, 4)
    assert logits.heights[:, 0].tolist() == [lm.model.lm_head.weight.shape[0]] * 4  # type: ignore[union-attr, index]

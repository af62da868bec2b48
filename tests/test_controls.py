"""Controls: what they are, at the SAE's L0, and how they stand beside it in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import saeforge
from saeforge.cli.main import main
from saeforge.controls import CONTROLS, make_controls, pca, train_topk
from saeforge.data.shard_source import ShardSource
from saeforge.data.writer import write_dataset
from saeforge.errors import ConfigError, DatasetError
from saeforge.harvest import harvest
from saeforge.lm.fresh import save_fresh_model
from saeforge.lm.load import load_model
from saeforge.sae import SAE
from tests.tiny_models import D, make_documents, save_model
from tests.toy import D_IN, toy_dataset, toy_rows

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_dataset(tmp_path_factory.mktemp("controls") / "acts")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, labelled texts, a dataset of them and a RUN folder with an SAE of it."""
    home = tmp_path_factory.mktemp("reinit")
    save_model("llama", home / "model")
    words = {"hill": "hills rain spain", "mat": "cat mat red", "sat": "sat seven ran"}
    lines = [
        json.dumps({"text": f"{words[label]} {text} {words[label]}", "label": label})
        for number, text in enumerate(make_documents(150))
        for label in [list(words)[number % 3]]
    ]
    (home / "texts.jsonl").write_text("\n".join(lines) + "\n")
    harvest(
        model=str(home / "model"),
        sites=[SITE],
        text=str(home / "texts.jsonl"),
        out=str(home / "acts"),
        context_length=64,
        validation_share=0.4,
        device="cpu",
    )
    source = ShardSource(str(home / "acts"))
    directions = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    meta = {**source.pairs[0].identity, "training": {"tokens": 2048, "steps": 16}}
    sae = SAE(directions / 4, torch.zeros(64), directions / 4, torch.zeros(D), rule="topk", k=8, meta=meta)
    sae.save(home / "run" / "sae")
    return home


def test_pca_of_full_rank_is_exact_and_of_a_rank_the_best_linear_map(toy: Path) -> None:
    source = ShardSource(str(toy))
    x = torch.cat([source.read_block("train", i)[0] for i in range(source.n_blocks("train"))]).double()
    mean = torch.tensor(source.statistics[0].mean, dtype=torch.float64)
    directions = torch.linalg.svd(x - mean, full_matrices=False)[2][:5]
    expected = mean + (x - mean) @ directions.T @ directions
    found = pca(source, 5)
    rows = x.float()
    assert torch.allclose(found(rows).double(), expected, atol=1e-4)
    assert found.encode(rows).l0().float().mean().item() == pytest.approx(5, abs=0.01)
    assert torch.allclose(pca(source, D_IN)(rows), rows, atol=1e-4)


def test_pca_refuses_a_transcoder_and_ranks_that_there_are_not(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank = 33: expected 1 to 32"):
        pca(ShardSource(str(toy)), 33)


def test_a_frozen_decoder_stays_where_it_began_and_the_encoder_does_not(toy: Path) -> None:
    def trained(tokens: int, *, frozen: bool) -> SAE:
        source = ShardSource(str(toy))
        trainer = {"enable_progress_bar": False, "accelerator": "cpu"}
        return train_topk(source, d_sae=64, k=4, tokens=tokens, batch_size=256, frozen=frozen, lr=1e-3, trainer=trainer)

    short, long, free = trained(256, frozen=True), trained(2560, frozen=True), trained(2560, frozen=False)
    assert torch.allclose(short.W_dec, long.W_dec, atol=1e-6)  # its rows are brought back to norm 1 every step
    assert not torch.allclose(short.W_enc, long.W_enc, atol=1e-3)
    assert not torch.allclose(free.W_dec, long.W_dec, atol=1e-3)
    rows = toy_rows(512, seed=5)
    errors = [(sae(rows) - rows).square().sum().item() for sae in (short, long)]
    assert errors[1] < errors[0]  # it learns all the same


def test_fresh_weights_are_another_model_with_the_same_tokens(home: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    fresh = save_fresh_model(str(home / "model"), tmp_path / "fresh", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b = (load_model(str(folder), [SITE]).model.state_dict() for folder in (home / "model", fresh))
    assert {name: value.shape for name, value in a.items()} == {name: value.shape for name, value in b.items()}
    assert not any(torch.equal(a[name], b[name]) for name in a if a[name].ndim == 2)
    again = load_model(str(save_fresh_model(str(home / "model"), tmp_path / "again", seed=3)), [SITE])
    assert all(torch.equal(value, b[name]) for name, value in again.model.state_dict().items())


@pytest.mark.timeout(600)
def test_controls_stand_beside_the_sae_with_the_same_figures(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "run"
    # Another seed than the tiny model's own, which has never been trained.
    options = ["--effect_tokens", "500", "--device", "cpu", "--control_lr", "1e-3", "--seed", "1"]
    assert main(["evaluate", str(run), "--controls", "pca", "random_decoder", "reinit", *options]) == 0
    shown = capsys.readouterr()
    assert "making the control reinit" in shown.err
    assert "beside controls" in shown.out
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["controls"]) == list(CONTROLS)
    assert found["probing"]["settings"]["documents"]["hill"]["test"] >= 8
    for name, control in found["controls"].items():
        assert control["definition"].startswith(CONTROLS[name])
        assert control["metrics"]["l0_mean"] == pytest.approx(found["metrics"]["l0_mean"], rel=0.05)
        assert control["probing"]["settings"]["documents"] == found["probing"]["settings"]["documents"]
        assert "conventions" not in json.dumps(control)
        assert set(control["tpp"]["mean"]) <= {"2", "5", "10", "20", "50"}
        # The activations are the same, so what they tell themselves is; a fresh model's are others.
        chosen = [part["probing"]["by_label"]["hill"]["chosen_dimensions"] for part in (found, control)]
        assert (chosen[0] == chosen[1]) == (name != "reinit")
        assert (control["effect"] is None) == (name == "reinit")
    assert (
        found["controls"]["random_decoder"]["effect"]["overall"]["delta_ce"] != found["effect"]["overall"]["delta_ce"]
    )

    stamps = {path: path.stat().st_mtime_ns for path in run.glob("controls/*/sae/*")}
    assert len(stamps) == 6
    made = make_controls(run, lr=1e-3, seed=1, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in run.glob("controls/*/sae/*")} == stamps
    own = {"random_decoder": made["random_decoder"]}
    again = json.loads(
        json.dumps(saeforge.evaluate(run, controls=own, effect_tokens=500, seed=1, device="cpu").to_json())
    )
    assert again.pop("controls")["random_decoder"] == found.pop("controls")["random_decoder"]
    assert again == found  # the functions are the command


def test_labelled_texts_through_the_model_are_those_of_the_dataset_without_it(home: Path) -> None:
    sae = saeforge.load(home / "run")
    found = saeforge.evaluate(sae, effect=False, probe=True, probe_texts=str(home / "texts.jsonl"), device="cpu")
    probing, tpp = found.labelled.probing, found.labelled.tpp
    assert probing is not None
    assert tpp is not None
    assert probing.settings["documents"] == {name: {"train": 25, "test": 25} for name in ("hill", "mat", "sat")}
    assert probing.mean.residual.auroc.value > 0.6
    assert sum(probing.settings["tokens"].values()) > 0.9 * sum(
        record["kept"] for record in map(json.loads, (home / "acts/tokens/documents.jsonl").read_text().splitlines())
    )


def test_what_a_control_needs_and_lacks_is_said(home: Path, toy: Path, tmp_path: Path) -> None:
    sae = saeforge.load(home / "run")
    with pytest.raises(ConfigError, match="reinit keeps a model and its activations: give a RUN folder"):
        make_controls(sae, ["reinit"])
    with pytest.raises(ConfigError, match="control 'pac': expected some of pca, random_decoder, reinit"):
        make_controls(sae, ["pac"])
    with pytest.raises(ConfigError, match="tokens = 0"):
        make_controls(sae, ["pca"], tokens=0)
    plain = SAE(torch.eye(D_IN), torch.zeros(D_IN), torch.eye(D_IN), torch.zeros(D_IN), rule="topk", k=2)
    with pytest.raises(ConfigError, match="leave it out"):
        make_controls(plain, ["reinit"], data=toy, folder=tmp_path)
    write_dataset(tmp_path / "two", {"train": toy_rows(4096), "validation": toy_rows(2048)}, dtype="float32")
    assert list(make_controls(plain, ["pca"], data=tmp_path / "two")) == ["pca"]


def test_probing_that_cannot_be_is_noted_or_an_error(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = SAE(torch.eye(D_IN), torch.zeros(D_IN), torch.eye(D_IN), torch.zeros(D_IN), rule="topk", k=2)
    found = saeforge.evaluate(plain, data=toy, effect=False).to_json()
    assert found["probing"] is found["tpp"] is None
    assert "--probe_texts" in found["probing_reason"]
    with pytest.raises(ConfigError, match="--probe_texts"):
        saeforge.evaluate(plain, data=toy, effect=False, probe=True)
    wrong: Any = "perhaps"
    with pytest.raises(ConfigError, match="probe 'perhaps': expected auto, true or false"):
        saeforge.evaluate(plain, data=toy, probe=wrong)


def test_a_changed_text_is_no_control(home: Path, tmp_path: Path) -> None:
    texts = home / "texts.jsonl"
    kept = texts.read_text()
    try:
        texts.write_text(kept.replace("red", "green"))
        with pytest.raises(DatasetError, match=r"is not what .* was made of"):
            make_controls(home / "run", ["reinit"], folder=tmp_path, device="cpu")
    finally:
        texts.write_text(kept)

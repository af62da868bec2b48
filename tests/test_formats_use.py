"""What was imported works like what was trained here: the commands, evaluate, steer, init_from; and the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import saeforge
from saeforge import formats
from saeforge.cli.main import main
from saeforge.data.writer import write_dataset
from saeforge.errors import CheckpointError, ConfigError
from saeforge.lm.origin import origin_of
from saeforge.sae import SAE
from tests.tiny_models import D, save_model
from tests.toy import toy_rows

GOLDEN = Path(__file__).parent / "golden"
D_SAE = 48


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SAELens for the second layer of a small model, which says nothing of saeforge."""
    folder = tmp_path_factory.mktemp("theirs") / "their-sae"
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(D_SAE, D, generator=generator)
    meta = {"imported": {"metadata": {"model_name": "their-name", "hook_name": "blocks.1.hook_resid_post"}}}
    bias = torch.zeros(D_SAE)
    threshold = torch.full((D_SAE,), 0.1)
    formats.write(SAE(W, bias, W, torch.zeros(D), rule="threshold", threshold=threshold, meta=meta), folder, "saelens")
    return folder


# ---- the commands


def test_import_makes_a_run_that_knows_its_model_and_can_be_steered(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_model("llama", tmp_path / "model")
    assert main(["import", str(theirs), "--model", str(model)]) == 0
    assert "layers.1:out" in capsys.readouterr().out
    sae = saeforge.load("runs/their-sae")
    assert origin_of(sae).site.id == "layers.1:out"
    steer = ["steer", "runs/their-sae", "--edit", "3=add:2", "--prompt", "the cat", "--max_new_tokens=3", "--json"]
    assert main(steer) == 0
    assert '"touched"' in capsys.readouterr().out


def test_import_without_a_model_says_what_the_files_say(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["import", str(theirs), "--from", "saelens", "--run", str(run)]) == 0
    assert "their-name at blocks.1.hook_resid_post" in capsys.readouterr().out
    assert main(["import", str(theirs), "--run", str(run)]) == 2
    assert "already holds an SAE" in capsys.readouterr().err
    assert main(["import", str(theirs), "--run", str(tmp_path / "other"), "--site", "layers.1"]) == 2
    assert "give --model too" in capsys.readouterr().err


def test_import_refuses_a_model_of_another_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model("llama", tmp_path / "model")
    arguments = ["--run", str(tmp_path / "run"), "--model", str(model), "--site", "resid_post.1"]
    assert main(["import", str(GOLDEN / "saelens" / "gated"), *arguments]) == 2
    assert f"is {D} wide, this SAE is 12 there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_export_goes_beside_the_sae_and_comes_back_with_its_origin(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model("llama", tmp_path / "model")
    run = tmp_path / "run"
    assert main(["import", str(theirs), "--run", str(run), "--model", str(model)]) == 0
    assert main(["export", str(run), "--to", "dictionary_learning"]) == 0
    back = saeforge.load(run / "exports" / "dictionary_learning")
    sae = saeforge.load(run)
    assert (back.meta["model"], back.meta["site"]) == (sae.meta["model"], sae.meta["site"])
    assert torch.equal(back.W_enc, sae.W_enc)
    capsys.readouterr()
    assert main(["export", str(run), "--to", "sparsify"]) == 2
    assert "top-k of each token only" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "saelense"]) == 2
    assert "did you mean 'saelens'?" in capsys.readouterr().err


# ---- evaluate, init_from


def test_an_imported_sae_is_evaluated_and_trained_on(tmp_path: Path) -> None:
    x = toy_rows(4096)
    trained = saeforge.train(x, variant="topk", d_sae=64, k=6, tokens=4096 * 4, batch_size=512)
    formats.write(trained, tmp_path / "out", "sparsify")
    back = saeforge.load(tmp_path / "out")
    write_dataset(tmp_path / "data", {"train": x, "validation": toy_rows(2048, seed=1)}, dtype="float32")
    one, other = (saeforge.evaluate(sae, data=tmp_path / "data", effect=False).metrics for sae in (trained, back))
    assert other.fvu == pytest.approx(one.fvu, rel=1e-4)
    assert other.l0_mean == pytest.approx(one.l0_mean, rel=1e-4)
    more = saeforge.train(x, variant="topk", d_sae=64, k=6, tokens=512, batch_size=512, training={"init_from": back})
    assert torch.nn.functional.cosine_similarity(more.W_dec, trained.W_dec).min() > 0.99  # one step from it


# ---- the hub, up to the network


class Hub:
    """Stands in for huggingface_hub: a folder as a repository, and what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str, str | None]] = []

    def list_repo_files(self, name: str, *, revision: str | None = None) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())

    def download(self, name: str, file: str, *, revision: str | None = None) -> str:
        self.asked.append((name, file, revision))
        return str(self.root / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    root = tmp_path / "snapshot"
    for name in ("saelens/gated", "sparsify/sae"):
        shutil.copytree(GOLDEN / name, root / "layer_5" / name.partition("/")[2])
    (root / "layer_5" / "gated" / "pytorch_model.bin").write_bytes(b"gigabytes")
    found = Hub(root)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    return found


def test_the_hub_is_asked_for_the_files_of_one_sae_alone(hub: Hub) -> None:
    sae = saeforge.load("hf://user/saes@v2/layer_5/gated")
    assert sae.meta["imported"]["architecture"] == "gated"
    assert hub.asked == [
        ("user/saes", "layer_5/gated/cfg.json", "v2"),
        ("user/saes", "layer_5/gated/sae_weights.safetensors", "v2"),
    ]


def test_a_file_of_the_hub_can_be_named(hub: Hub) -> None:
    torch.save({name: torch.zeros(3, 3) for name in ("W_enc", "W_dec")}, hub.root / "layer3.sae.pt")
    with pytest.raises(ConfigError, match="name of the repository"):
        formats.read("hf://user/saes/layer3.sae.pt")
    assert hub.asked == [("user/saes", "layer3.sae.pt", None)]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hf://user", "expected hf://USER/NAME"),
        ("hf://datasets/user/name/x", "expected hf://USER/NAME"),
        ("hf://user/saes/../../etc", "without '..'"),
        ("hf://user/saes", "layer_5"),
        ("hf://user/saes/layer_6", "holds no SAE's files"),
    ],
)
def test_a_place_on_the_hub_that_is_none_is_one_clear_error(hub: Hub, location: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        saeforge.load(location)
    assert hub.asked == []


def test_a_hub_that_lists_files_outside_of_the_folder_is_not_followed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hostile(*_: Any, **__: Any) -> list[str]:
        return ["a/../../cfg.json", "a/../../sae_weights.safetensors"]

    monkeypatch.setattr(hub, "list_repo_files", hostile)
    with pytest.raises(CheckpointError, match="holds no SAE's files"):
        saeforge.load("hf://user/saes/a")
    assert hub.asked == []


def test_without_a_network_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # tests/conftest.py keeps huggingface_hub offline: the call itself refuses.
    with pytest.raises(CheckpointError, match="hf://user/saes") as refused:
        saeforge.load("hf://user/saes")
    assert "\n" not in str(refused.value)

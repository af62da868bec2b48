"""The demo model that ships: small, whole, usable by its name wherever a model name is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saeforge.cli.main import main
from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.demo import model_path
from saeforge.lm.causal import load_causal_lm
from saeforge.lm.load import load_tokenizer
from saeforge.lm.text import read_passages
from tests.tiny_models import write_jsonl

pytestmark = pytest.mark.skipif(
    not (model_path() / "model.safetensors").is_file(),
    reason="this tree lacks the demo model: make it with scripts/train_demo_lm.py",
)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in model_path().iterdir()) < 20e6


def test_it_is_the_network_that_its_script_describes() -> None:
    loaded = load_causal_lm("demo")
    config: Any = loaded.model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 256, 6)
    assert (config.vocab_size, config.tie_word_embeddings, loaded.context_limit) == (8192, True, 256)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 6_843_648
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.tokenizer("a")["input_ids"][0] == loaded.tokenizer.bos_token_id == 1
    assert loaded.card["name"] == "demo"


def test_its_tokenizer_returns_every_passage() -> None:
    tokenizer = load_tokenizer("demo")
    assert tokenizer.model_max_length == 256
    for passage in read_passages():
        ids = tokenizer(passage.text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == passage.text


def test_it_predicts_the_passages_better_than_chance() -> None:
    """Uniform guesses cost 13 bits a token; an untrained or a wrongly read model is above that."""
    loaded = load_causal_lm("demo")
    ids = loaded.tokenizer(read_passages()[0].text, return_tensors="pt", verbose=False)["input_ids"][:, :256]
    assert loaded.model(input_ids=ids, labels=ids).loss.item() < 8.0


def test_a_harvest_by_name_is_portable(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No path of this machine is in what a dataset says, so that it is the same on another one."""
    texts = [passage.text for passage in read_passages() if passage.split == "train"]
    text = write_jsonl(tmp_path / "text.jsonl", texts)
    command = ["--model", "demo", "--sites", "[resid_post.3]", "--text", str(text), "--n_tokens", "12000"]
    command += ["--validation_share", "0.3"]
    assert main(["harvest", *command, "--out", str(tmp_path / "data"), "--device", "cpu"]) in (0, None)
    assert "model       demo (LlamaModel, float32, 4 of 6 layers)" in capfd.readouterr().out
    manifest = Manifest.load(tmp_path / "data" / "manifest.json")
    assert manifest.model["name"] == "demo"
    assert (manifest.model["layers"], manifest.model["layers_loaded"]) == (6, 4)
    assert manifest.packing["context_length"] == 256
    for name in ("manifest.json", "dataset.json"):
        content = (tmp_path / "data" / name).read_text(encoding="utf-8")
        assert json.loads(content)
        assert str(model_path().parent) not in content
    assert ActivationDataset.open(tmp_path / "data").d == 256

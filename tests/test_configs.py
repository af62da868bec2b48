"""Every YAML that ships is accepted by the command that it names in its comments, and says true things of its model."""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel

from saeforge.cli.main import main
from saeforge.harvest.config import HarvestConfig
from saeforge.lm.capture import Capture, TokenBatch
from saeforge.lm.load import quiet, wrap_module
from saeforge.registry import VARIANTS
from saeforge.sae import load
from saeforge.training.member import Member
from saeforge.training.settings import Settings
from saeforge.training.sweep import entries
from tests.readme import ROOT
from tests.toy import toy_dataset

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
#: Names that our own plugins give, which an environment without them lacks.
OF_PLUGINS = {
    name: tomllib.loads(path.read_text())["project"]["name"]
    for path in ROOT.glob("plugins/*/pyproject.toml")
    for name in tomllib.loads(path.read_text())["project"]["entry-points"]["saeforge.variants"]
}


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("config", CONFIGS, ids=identity)
def test_a_configuration_is_accepted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"saeforge (\w+) --config (\S+)", config.read_text())
    assert command, "the first lines say the command"
    assert ROOT / command[2] == config
    given = yaml.safe_load(config.read_text())
    model = given.get("model", {}) if command[1] == "fit" else {}
    for entry in [model, *model.get("sweep", {}).values()]:
        variant = (entry or {}).get("variant")
        variant = variant.get("class_path") if isinstance(variant, dict) else variant
        if variant in OF_PLUGINS and variant not in VARIANTS.names():
            pytest.skip(f"{OF_PLUGINS[variant]} is not installed")
    with pytest.raises(SystemExit) as stopped:
        main([command[1], "--config", str(config), "--print_config"])
    assert stopped.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert given.keys() <= printed.keys()
    if command[1] == "fit":  # the variant itself has the last word on its options
        made, model = printed["model"]["variant"], printed["model"]
        build = functools.partial(VARIANTS.load(made["class_path"]), **made["init_args"])
        for entry in entries(build, Settings(), model.get("sweep"), model.get("grid"), (8, 8)):
            Member(entry.build(8, 8), entry.settings)


def test_the_sweep_over_k_trains_its_four(tmp_path: Path) -> None:
    given = toy_dataset(tmp_path / "acts")
    run = tmp_path / "run"
    small = [f"--run={run}", f"--data.path={given}", "--data.batch_size=256", "--data.tokens=2560"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=5", "--trainer.enable_progress_bar=false"]
    config = str(ROOT / "configs" / "sweeps" / "topk-k.yaml")
    assert main(["fit", "--config", config, *small, *trainer, "--trainer.logger=false"]) == 0
    assert {name: load(run / name).k for name in ("k16", "k32", "k64", "k128")} == {
        "k16": 16,
        "k32": 32,
        "k64": 64,
        "k128": 128,
    }


# Models: what configs/models says of each, against transformers' classes ------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {"model_type": "gpt2", "layers": 12, "d": 768},
    "EleutherAI/pythia-160m-deduped": {"model_type": "gpt_neox", "layers": 12, "d": 768},
    "google/gemma-2-2b": {"model_type": "gemma2", "layers": 26, "d": 2304},
    "meta-llama/Llama-3.1-8B": {"model_type": "llama", "layers": 32, "d": 4096},
    "Qwen/Qwen3-0.6B": {"model_type": "qwen3", "layers": 28, "d": 1024},
    "Qwen/Qwen3-8B": {"model_type": "qwen3", "layers": 36, "d": 4096},
}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 50}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
FAMILY = {"gpt2": {}, "gpt_neox": {}, "gemma2": GROUPED, "llama": GROUPED, "qwen3": GROUPED}
LAYER = {"gpt2": "h", "gpt_neox": "layers", "gemma2": "layers", "llama": "layers", "qwen3": "layers"}


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.parent.name == "models"], ids=identity)
def test_the_site_of_a_model_is_where_its_comment_says(config: Path) -> None:
    text, data = config.read_text(), yaml.safe_load(config.read_text())["data"]
    facts = MODELS[data["model"]]
    said = re.search(r"after layer (\d+) \(counted from 0\) of (\d+), ([\d,]+) wide", " ".join(text.split("\n# ")))
    assert said
    layer, layers, d = (int(number.replace(",", "")) for number in said.groups())
    assert (layers, d) == (facts["layers"], facts["d"])
    with quiet():
        kind = facts["model_type"]
        small = AutoConfig.for_model(kind, num_hidden_layers=layers, **SMALL, **FAMILY[kind])
        model = wrap_module(AutoModel.from_config(small), [data["sites"]])
    (site,) = model.sites
    assert site.id == f"{LAYER[kind]}.{layer}:out"
    with Capture(model.model, model.sites) as capture:
        rows = capture(TokenBatch(torch.arange(6).view(2, 3)))[site.id]
    assert rows.shape == (2, 3, SMALL["hidden_size"])


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.parent.name == "models"], ids=identity)
def test_a_model_run_is_one_pass_on_any_number_of_gpus(config: Path) -> None:
    data = yaml.safe_load(config.read_text())["data"]
    harvest = HarvestConfig.build(
        None, {"model": data["model"], "sites": [data["sites"]], "out": "o", "text": data["text"], **data["harvest"]}
    )
    train = harvest.n_tokens * (1 - harvest.validation_share)
    assert data["tokens"] <= train <= 1.02 * data["tokens"]
    assert data["lanes"] % 8 == 0
    assert data["batch_size"] % data["lanes"] == 0

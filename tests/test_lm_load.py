"""Models that bring code, and models over several devices."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError
from saeforge.harvest import HarvestConfig, harvest
from saeforge.harvest.work import TextWork
from saeforge.lm.capture import Capture, TokenBatch, input_place
from saeforge.lm.load import load_model, load_tokenizer
from tests.tiny_models import own_modules, save_model

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: pip install accelerate"
)

CONFIGURATION = """
from pathlib import Path
from types import SimpleNamespace
Path(r"{marker}").touch()
from transformers import PretrainedConfig

class HutConfig(PretrainedConfig):
    model_type = "hut"

    def __init__(self, hidden_size=16, num_hidden_layers=3, vocab_size=160, **kwargs):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        super().__init__(**kwargs)
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from .configuration_hut import HutConfig

class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.mlp = nn.Linear(d, d)

    def forward(self, x):
        return x + self.mlp(x).tanh()

class HutModel(PreTrainedModel):
    config_class = HutConfig
    base_model_prefix = "hut"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x
"""


@pytest.fixture
def hut(tmp_path: Path) -> Path:
    """A model whose code stands beside it; running any of it leaves a mark."""
    folder = save_model("llama", tmp_path / "hut")  # for its tokenizer
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    weights = {"embed.weight": torch.randn(160, 16)}
    for layer in range(3):
        weights |= {f"layers.{layer}.mlp.weight": torch.randn(16, 16), f"layers.{layer}.mlp.bias": torch.randn(16)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    classes = {"AutoConfig": "configuration_hut.HutConfig", "AutoModel": "modeling_hut.HutModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "hut", "auto_map": classes, "dtype": "float32"}))
    (folder / "configuration_hut.py").write_text(CONFIGURATION.replace("{marker}", str(tmp_path / "ran")))
    (folder / "modeling_hut.py").write_text(MODELING)
    return folder


def text_of(folder: Path) -> Path:
    lines = [
        json.dumps({"text": f"the cat sat on a red mat and ran over {i} hills to see rain in spain"})
        for i in range(300)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "text.jsonl"


def options(model: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "sites": ["resid_post.1"],
        "out": str(tmp_path / "o"),
        "text": str(text_of(tmp_path)),
        "n_tokens": 4000,
        "store_dtype": "float32",
        "validation_share": 0.0,
        "device": "cpu",
    } | changes


def test_code_of_a_model_does_not_run_unless_allowed(hut: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"brings its own Python code, and none of it was run; .* trust_remote_code: true"
    ) as caught:
        harvest(**options(hut, tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="none of it was run"):
        load_model(str(hut), ["resid_post.1"])
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o").exists()


def test_code_of_a_model_runs_if_allowed_and_the_card_says_so(hut: Path, tmp_path: Path) -> None:
    with own_modules(tmp_path / "modules"):
        manifest = harvest(**options(hut, tmp_path, trust_remote_code=True))
        assert (tmp_path / "ran").exists()
        assert (manifest.model["remote_code"], manifest.model["class"]) == (True, "HutModel")
        assert (manifest.model["layers"], manifest.model["layers_loaded"]) == (3, 2)
        weights = load_file(hut / "model.safetensors")
        dataset = ActivationDataset.open(tmp_path / "o")
        x, rows = dataset.read_block("train", 0), dataset.read_rows("train", 0)
        expected = weights["embed.weight"][torch.from_numpy(rows[:, 2].astype("int64"))]
        for layer in range(2):
            mlp = expected @ weights[f"layers.{layer}.mlp.weight"].T + weights[f"layers.{layer}.mlp.bias"]
            expected = expected + mlp.tanh()
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
        # Other code is another model.
        before = load_model(str(hut), ["resid_post.1"], trust_remote_code=True).card["files_sha256"]
        (hut / "modeling_hut.py").write_text(MODELING + "\n# changed\n")
        assert load_model(str(hut), ["resid_post.1"], trust_remote_code=True).card["files_sha256"] != before


def test_code_of_a_tokenizer_does_not_run_unless_allowed(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "m")
    path = folder / "tokenizer_config.json"
    classes = {"AutoTokenizer": [None, "tokenization_hut.HutTokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "HutTokenizer", "auto_map": classes}))
    (folder / "tokenization_hut.py").write_text(f"open(r'{tmp_path / 'ran'}', 'w')\n")
    with pytest.raises(ConfigError, match="none of it was run"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


def test_revision_and_trust_reach_configuration_model_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model("llama", tmp_path / "m")
    seen: list[tuple[str, Any, Any]] = []

    def watched(name: str, real: Any) -> Any:
        def from_pretrained(*args: Any, **given: Any) -> Any:
            seen.append((name, given.get("revision"), given.get("trust_remote_code")))
            return real(*args, **given)

        return from_pretrained

    for kind in (AutoConfig, AutoModel, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", watched(kind.__name__, kind.from_pretrained))
    for trust in (False, True):
        seen.clear()
        config = HarvestConfig.build(None, options(folder, tmp_path, revision="v2", trust_remote_code=trust))
        work = TextWork.load(config, "cpu")
        assert {name for name, *_ in seen} == {"AutoConfig", "AutoModel", "AutoTokenizer"}
        assert {(revision, trusted) for _, revision, trusted in seen} == {("v2", trust)}
        assert work.loaded.card["revision"] == "v2"
        assert "remote_code" not in work.loaded.card  # allowed, but there was none


def test_weights_of_another_size_matter_only_before_the_site(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file(weights | {name: torch.zeros(7, 7)}, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(str(folder), ["resid_post.0"])
    with pytest.raises(
        ConfigError, match=r"has other sizes of weights that the sites need, for example .*layers\.1\.mlp"
    ):
        load_model(str(folder), ["resid_post.1"])


def test_a_device_map_needs_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model("llama", tmp_path / "m")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else real(name, *a))
    with pytest.raises(ConfigError, match="device_map 'auto' needs the package accelerate; pip install accelerate"):
        load_model(str(folder), ["resid_post.0"], device_map="auto")


LAYERS = ("layers.0", "layers.1", "layers.2")
MAPS: dict[str, Any] = {
    "whole": {"": "cpu"},
    "auto": "auto",
    "disk": {"embed_tokens": "cpu", "rotary_emb": "cpu", "norm": "cpu", **dict.fromkeys(LAYERS, "disk")},
    "all on disk": {"embed_tokens": "disk", "rotary_emb": "cpu", "norm": "disk", **dict.fromkeys(LAYERS, "disk")},
    "first on disk": {"embed_tokens": "disk", "rotary_emb": "cpu", "norm": "cpu", **dict.fromkeys(LAYERS, "cpu")},
}


@needs_accelerate
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", list(MAPS))
def test_a_spread_model_gives_the_rows_of_a_whole_one(tmp_path: Path, kind: str, dtype: str) -> None:
    """Disk stands for a device without room: there, weights are on "meta" but for the moment when they are used."""
    folder = str(save_model("llama", tmp_path / "m"))
    sites = ["resid_pre.0", "layers.1.mlp:in", "mlp_out.1", "resid_post.2", "embed_tokens"]
    batch = TokenBatch(torch.randint(3, 150, (2, 9)), torch.ones(2, 9, dtype=torch.long))
    plain = load_model(folder, sites, dtype=dtype)
    spread = load_model(folder, sites, dtype=dtype, device_map=MAPS[kind])
    on_meta = [name for name, p in spread.model.named_parameters() if p.device.type == "meta"]
    assert bool(on_meta) == ("disk" in kind)
    assert input_place(spread.model) == (torch.device("cpu"), getattr(torch, dtype))
    assert spread.card["device_map"] == MAPS[kind]
    assert spread.card["dtype"] == dtype
    with Capture(plain.model, plain.sites) as one, Capture(spread.model, spread.sites) as other:
        for _ in range(2):
            wanted, found = one(batch), other(batch)
            assert wanted.keys() == found.keys()
            for site in wanted:
                assert found[site].device.type == "cpu"
                assert torch.equal(wanted[site], found[site])


@needs_accelerate
def test_a_harvest_with_a_device_map_writes_the_same_rows(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path / "m")
    harvest(**options(folder, tmp_path, out=str(tmp_path / "a")))
    harvest(**options(folder, tmp_path, out=str(tmp_path / "b"), device_map="auto"))
    a, b = (Manifest.load(tmp_path / name / "manifest.json") for name in "ab")
    assert (b.model["device_map"], "device_map" in a.model) == ("auto", False)
    assert [s.sha256 for s in a.sites[0].shards["train"]] == [s.sha256 for s in b.sites[0].shards["train"]]
    with pytest.raises(ConfigError, match="its weights cannot be loaded"):
        harvest(**options(folder, tmp_path, out=str(tmp_path / "c"), device_map="abacus"))


def test_inputs_go_where_the_first_layer_works(tmp_path: Path) -> None:
    """As accelerate leaves a model whose weights wait in memory for the second of two devices."""
    model = load_model(str(save_model("llama", tmp_path / "m")), ["resid_post.0"]).model
    assert input_place(model) == (torch.device("cpu"), torch.float32)
    hook = SimpleNamespace(execution_device=1)
    model.get_submodule("embed_tokens")._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), hook])  # type: ignore[assignment]
    assert input_place(model)[0] == torch.device("cuda", 1)
    hook.execution_device = "cuda:3"
    assert input_place(model.to("meta"))[0] == torch.device("cuda", 3)


def test_the_command_takes_the_options(tmp_path: Path) -> None:
    given = ["--model", "m", "--sites", "[h.1]", "--out", "o", "--trust_remote_code", "true", "--device_map", "auto"]
    command = [
        sys.executable,
        "-m",
        "saeforge.cli.main",
        "harvest",
        *given,
        "--chat_keep",
        "assistant",
        "--print_config",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {"trust_remote_code: true", "device_map: auto", "chat_keep: assistant"} <= set(printed.splitlines())

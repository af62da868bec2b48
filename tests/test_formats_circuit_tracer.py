"""circuit-tracer: all layers in one folder, in the names and shapes of its loader; what it has not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from saeforge import formats
from saeforge.cli.export import run as export
from saeforge.errors import CheckpointError, ConfigError
from saeforge.formats.hub import _wanted
from saeforge.sae import SAE
from tests.test_formats import D_SAE, D, K, random_sae, same

#: What its SingleLayerTranscoder takes: `circuit_tracer/transcoder/single_layer_transcoder.py`, load_transcoder.
TENSORS = {"W_enc": (D_SAE, D), "W_dec": (D_SAE, D), "b_enc": (D_SAE,), "b_dec": (D,)}


def transcoder(layer: int, rule: str = "threshold", *, layers: int | None = None, **more: Any) -> SAE:
    sae = random_sae(rule, seed=layer, **more)
    for key, where in (("site", "in"), ("target", "out")):
        sae.meta[key] = {"id": f"layers.{layer}.mlp:{where}", "module_path": f"layers.{layer}.mlp", "where": where}
    sae.meta["model"] = {"name": "me/model", "layers": layers}
    return sae


@pytest.mark.parametrize(
    ("rule", "skip", "activation", "more"),
    [
        ("threshold", False, "jump_relu", {"activation_function.threshold": (D_SAE,)}),
        ("threshold", True, "jump_relu", {"activation_function.threshold": (D_SAE,), "W_skip": (D, D)}),
        ("relu", False, "relu", {}),
        ("topk", True, "topk", {"W_skip": (D, D)}),
    ],
)
def test_a_layer_has_the_tensors_of_its_loader_and_computes_by_its_formulas(
    rule: str, skip: bool, activation: str, more: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    saes = [transcoder(layer, rule, skip=skip) for layer in (2, 0, 1)]  # their order is that of their layers
    formats.write_set(saes, tmp_path / "out", "circuit-tracer")
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config | {"saeforge": None} == {
        "model_name": "me/model",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "activation": activation,
        **({"k": K} if rule == "topk" else {}),
        "saeforge": None,
    }
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    for sae in saes:
        layer = int(sae.meta["site"]["id"][7])
        tensors = load_file(tmp_path / f"out/layer_{layer}.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == TENSORS | more
        pre = x @ tensors["W_enc"].T + tensors["b_enc"]
        if rule == "topk":
            acts = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0).mul(pre).relu()
        else:
            acts = pre * (pre > tensors.get("activation_function.threshold", torch.zeros(D_SAE)))
        out = acts @ tensors["W_dec"] + tensors["b_dec"] + (x @ tensors["W_skip"].T if skip else 0)
        assert torch.equal(sae.encode(x).to_dense() != 0, acts != 0)
        torch.testing.assert_close(sae(x), out, rtol=1e-5, atol=1e-5)  # sums of 24 floats in another order


@pytest.mark.parametrize("rule", ["threshold", "relu", "topk"])
def test_a_layer_reads_back_to_the_bit_with_its_places(rule: str, tmp_path: Path) -> None:
    saes = [transcoder(layer, rule, skip=True) for layer in range(2)]
    formats.write_set(saes, tmp_path / "out", "circuit-tracer")
    again = formats.load(tmp_path / "out/layer_1.safetensors")
    same(saes[1], again, 0.0)
    assert {key: again.meta[key] for key in ("site", "target", "model")} == {
        key: saes[1].meta[key] for key in ("site", "target", "model")
    }
    assert again.meta["imported"]["hook_name"] == "mlp_in.1"
    with pytest.raises(CheckpointError, match=r"of 2 layers; give one: .*layer_0\.safetensors"):
        formats.load(tmp_path / "out")


def test_one_layer_that_jumps_gives_every_layer_thresholds(tmp_path: Path) -> None:
    formats.write_set([transcoder(0, "relu"), transcoder(1)], tmp_path / "out", "circuit-tracer")
    first = load_file(tmp_path / "out/layer_0.safetensors")["activation_function.threshold"]
    assert torch.equal(first, torch.zeros(D_SAE))
    same(transcoder(0, "relu"), formats.load(tmp_path / "out/layer_0.safetensors"), 0.0)


def other(layer: int, **place: Any) -> SAE:
    sae = transcoder(layer)
    sae.meta["site"] = sae.meta["site"] | place
    return sae


def nowhere() -> SAE:
    sae = random_sae("relu")
    sae.meta = {}
    return sae


REFUSED: dict[str, tuple[list[SAE], str]] = {
    "nothing": ([], "no transcoder given"),
    "a gap": ([transcoder(0), transcoder(2)], "layer 1 has no transcoder"),
    "not the last": ([transcoder(0, layers=3), transcoder(1, layers=3)], "layer 2 has no transcoder"),
    "twice": ([transcoder(0), transcoder(0)], "two transcoders of layer 0"),
    "two rules": ([transcoder(0), transcoder(1, "topk")], f"layer 1 has k {K}, another None"),
    "half skip": ([transcoder(0), transcoder(1, skip=True)], "layer 1 has skip True, another False"),
    "widths": ([transcoder(0, d_out=5)], "reads 8 values and writes 5"),
    "an SAE": ([random_sae("relu")], r"an SAE of layers\.3:out"),
    "a tensor's": ([nowhere()], "reads a place that it does not name"),
    "from attention": ([other(0, module_path="layers.0.self_attn", id="layers.0.self_attn:in")], "self_attn:in"),
    "ambiguous": (
        [other(0, module_path="layers.0.post_attention_layernorm")],
        "circuit-tracer knows what an MLP reads",
    ),
    "across": ([other(0, module_path="layers.1.mlp")], "reads layer 1 and writes layer 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_express_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    saes, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason):
        formats.write_set(saes, tmp_path / "out", "circuit-tracer")
    assert not list(tmp_path.iterdir())


def test_a_format_of_one_sae_takes_no_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sparsify holds one SAE in a folder"):
        formats.write_set([transcoder(0)], tmp_path / "out", "sparsify")


@pytest.mark.parametrize(
    ("module_path", "where", "hook"),
    [
        ("h.0.mlp", "in", "mlp.hook_in"),
        ("h.0.ln_2", "in", "hook_resid_mid"),
        ("language_model.layers.0.pre_feedforward_layernorm", "in", "hook_resid_mid"),
        ("layers.0.pre_feedforward_layernorm", "out", "mlp.hook_in"),
    ],
)
def test_places_become_the_hooks_that_stand_there(module_path: str, where: str, hook: str, tmp_path: Path) -> None:
    formats.write_set([other(0, module_path=module_path, where=where)], tmp_path / "out", "circuit-tracer")
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["feature_input_hook"] == hook


def test_what_was_imported_goes_by_the_hooks_that_its_files_named(tmp_path: Path) -> None:
    sae = random_sae("threshold")
    names = {"hook_name": "blocks.0.hook_resid_mid", "hook_name_out": "blocks.0.hook_mlp_out", "model_name": "gpt2"}
    sae.meta = {"imported": names}
    formats.write_set([sae], tmp_path / "out", "circuit-tracer")
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("hook_resid_mid", "hook_mlp_out")
    again = formats.load(tmp_path / "out/layer_0.safetensors").meta["imported"]
    assert names.items() <= again.items()


def test_the_command_exports_a_run_of_all_layers_and_says_what_top_k_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layer in range(11):  # mlp_in.10 comes after mlp_in.9
        transcoder(layer, "topk").save(tmp_path / f"run/mlp_in.{layer}/sae")
    assert [folder.name for folder in formats.Stored(tmp_path / "run").folders][-1] == "mlp_in.10"
    assert export([str(tmp_path / "run"), "--to", "circuit-tracer"]) == 0
    said = capsys.readouterr().out
    assert "11 SAEs" in said
    assert f"TopK({K})" in said
    assert len(list((tmp_path / "run/exports/circuit-tracer").glob("layer_*.safetensors"))) == 11


def test_of_a_hub_one_layer_is_fetched_with_its_configuration() -> None:
    files = ["plt/config.yaml", "plt/layer_0.safetensors", "plt/layer_1.safetensors", "README.md"]
    assert _wanted(files, "plt/layer_1.safetensors", []) == ["plt/config.yaml", "plt/layer_1.safetensors"]


def test_damaged_or_strange_configurations_are_one_clear_error(tmp_path: Path) -> None:
    formats.write_set([transcoder(0)], tmp_path / "out", "circuit-tracer")
    place, config = tmp_path / "out/layer_0.safetensors", tmp_path / "out/config.yaml"
    for text, reason in (
        ("model_kind: cross_layer_transcoder\n", "cross-layer transcoders write to several"),
        ("- a\n", "holds a YAML list"),
        ("a: !!python/object/apply:os.getcwd []\n", "no plain YAML"),
        ("model_kind: transcoder_set\nactivation: topk\n", "k is None, expected a whole number"),
    ):
        config.write_text(text)
        with pytest.raises((CheckpointError, ConfigError), match=reason):
            formats.load(place)

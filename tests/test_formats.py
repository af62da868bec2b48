"""Formats: what is written reads back, what cannot be expressed is refused, and strangers' files run nothing."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saeforge
from saeforge import formats
from saeforge.errors import CheckpointError, ConfigError, SaeforgeError
from saeforge.formats.base import Format
from saeforge.registry import FORMATS
from saeforge.sae import SAE
from tests.test_own_encoder import Signed

GOLDEN = Path(__file__).parent / "golden"
D, D_SAE, K = 8, 24, 4
SITE = {"id": "layers.3:out", "module_path": "layers.3", "where": "out", "d": D}
TARGET = {"id": "layers.3.mlp:out", "module_path": "layers.3.mlp", "where": "out", "d": D}


def random_sae(rule: str, *, d_out: int = D, skip: bool = False, target: bool = False, seed: int = 0) -> SAE:
    """Biases that matter and decoder norms far from 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    thresholds = {"threshold": torch.rand(D_SAE, generator=generator), "relu": torch.zeros(D_SAE)}
    meta: dict[str, Any] = {"model": {"name": "demo", "files_sha256": None}, "site": SITE}
    return SAE(
        normal(D_SAE, D),
        normal(D_SAE),
        normal(D_SAE, d_out) * 2,
        normal(d_out),
        rule="topk" if rule == "topk" else "threshold",
        threshold=thresholds.get(rule),
        k=K if rule == "topk" else None,
        W_skip=normal(d_out, D) if skip else None,
        meta=meta | ({"target": TARGET} if target else {}),
    )


def rows(n: int = 200) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(5)) + 0.3


def same(one: SAE, other: SAE, tolerance: float) -> None:
    x = rows()
    left, right = one.encode(x).to_dense(), other.encode(x).to_dense()
    assert torch.equal(left != 0, right != 0)
    assert 0 < (left != 0).float().mean() < 0.9
    assert (left - right).abs().max() <= tolerance * left.abs().max()
    assert (one(x) - other(x)).abs().max() <= tolerance * one(x).abs().max()


# ---- ours, written and read


#: To what each kind goes; "=": to the bit, "~": the bias b_enc + W_enc b_dec is rounded to float32 once.
KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "threshold": ({"rule": "threshold"}, {"native": "=", "saelens": "=", "dictionary_learning": "="}),
    "relu": ({"rule": "relu"}, {"native": "=", "saelens": "=", "dictionary_learning": "="}),
    "topk": ({"rule": "topk"}, {"native": "=", "saelens": "=", "dictionary_learning": "~", "sparsify": "~"}),
    "narrow": ({"rule": "threshold", "d_out": 5}, {"native": "=", "saelens": "="}),
    "skip": ({"rule": "relu", "skip": True}, {"native": "=", "saelens": "="}),
    "jump skip": ({"rule": "threshold", "skip": True, "target": True}, {"native": "=", "saelens": "="}),
    "topk skip": ({"rule": "topk", "skip": True}, {"native": "=", "sparsify": "~"}),
    "topk elsewhere": ({"rule": "topk", "target": True}, {"native": "=", "sparsify": "="}),
    "elsewhere": ({"rule": "relu", "target": True}, {"native": "=", "saelens": "="}),
}
WRITERS = ("native", "saelens", "sparsify", "dictionary_learning")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", WRITERS)
def test_written_and_read_it_is_the_same_or_it_is_refused(kind: str, format: str, tmp_path: Path) -> None:
    options, takes = KINDS[kind]
    sae = random_sae(**options)
    if format not in takes:
        with pytest.raises(ConfigError):
            formats.write(sae, tmp_path / "out", format)
        assert not (tmp_path / "out").exists()  # refused before anything is written
        return
    formats.write(sae, tmp_path / "out", format)
    again = formats.read(tmp_path / "out")  # recognised, too
    assert again.meta["imported"]["format"] == format
    same(sae, again, 0.0 if takes[format] == "=" else 1e-5)
    for key in ("model", "site", "target"):
        assert again.meta.get(key) == sae.meta.get(key)


def test_no_format_but_native_takes_an_encoder_of_its_own_or_several_sources(tmp_path: Path) -> None:
    own = Signed(D, D, d_sae=D_SAE)
    signed = SAE(None, None, torch.randn(D_SAE, D), torch.zeros(D), rule="plugin", encoder=own)
    several = random_sae("threshold")
    several.meta["sources"] = [{"d": 4}, {"d": 4}]
    for format in WRITERS[1:]:
        with pytest.raises(ConfigError, match="own code, which does not fold"):
            formats.write(signed, tmp_path / "out", format)
        with pytest.raises(ConfigError, match="reads 2 sources"):
            formats.write(several, tmp_path / "out", format)


@pytest.mark.parametrize("format", ["gemma_scope", "gemma_scope_2", "llama_scope", "qwen_scope", "openai"])
def test_a_format_that_is_only_read_says_so(format: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is read, not written; export to saelens"):
        formats.write(random_sae("relu"), tmp_path / "out", format)


def test_an_export_does_not_go_where_something_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already holds something"):
        formats.write(random_sae("relu"), tmp_path, "saelens")


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saeforge.formats.saelens.save_file", full)  # after cfg.json was written
    with pytest.raises(CheckpointError, match="No space left"):
        formats.write(random_sae("relu"), tmp_path / "out", "saelens")
    assert list(tmp_path.iterdir()) == []


def test_the_export_says_what_saelens_asks_for(tmp_path: Path) -> None:
    formats.write(random_sae("threshold", target=True), tmp_path / "out", "saelens")
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (config["architecture"], config["d_out"], config["apply_b_dec_to_input"]) == (
        "jumprelu_transcoder",
        D,
        False,
    )
    metadata = config["metadata"]
    assert metadata["sae_lens_version"] >= "6.0.0"  # below, its loader drops the rest
    assert (metadata["hook_name"], metadata["hook_name_out"]) == ("blocks.3.hook_resid_post", "blocks.3.hook_mlp_out")


# ---- saeforge.load, the registry


def test_load_reads_other_tools_folders_and_its_own() -> None:
    assert saeforge.load(GOLDEN / "saelens" / "gated").rule == "threshold"
    assert saeforge.load(GOLDEN / "sparsify" / "skip").W_skip is not None


def test_load_says_what_it_found_in_no_format(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="in no known format"):
        formats.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"sae\.json is missing.*`saeforge import`"):
        saeforge.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        saeforge.load(tmp_path / "nowhere")


class Plain(Format):
    """A format of somebody else's: one file, W, used for both."""

    title: ClassVar[str] = "plain"
    files: ClassVar[tuple[str, ...]] = ("w.safetensors",)

    def recognises(self, path: Path) -> bool:
        """By its file."""
        return (path / "w.safetensors").is_file()

    def read(self, path: Path) -> SAE:
        """See `Format.read`."""
        W = load_file(path / "w.safetensors")["W"]
        return SAE(W, torch.zeros(len(W)), W, torch.zeros(W.shape[1]), rule="topk", k=2)


class Greedy(Plain):
    """Recognises everything."""

    def recognises(self, path: Path) -> bool:
        """Always."""
        return True


def test_a_format_of_a_plugin_reads_too(tmp_path: Path) -> None:
    save_file({"W": torch.randn(6, 3)}, tmp_path / "w.safetensors")
    with FORMATS.register("plain", Plain):
        assert formats.read(tmp_path).k == 2
        with FORMATS.register("greedy", Greedy), pytest.raises(CheckpointError, match="looks like"):
            formats.read(tmp_path)


# ---- arithmetic that no golden file shows


def saelens_folder(folder: Path, config: dict[str, Any], *, source: str = "standard") -> Path:
    folder.mkdir(exist_ok=True)
    tensors = load_file(GOLDEN / "saelens" / source / "sae_weights.safetensors")
    save_file(tensors, folder / "sae_weights.safetensors")
    base = json.loads((GOLDEN / "saelens" / source / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(base | config))
    return folder


@pytest.mark.parametrize("shift", [True, False])
def test_a_scale_of_the_dataset_folds(shift: bool, tmp_path: Path) -> None:
    plain = formats.read(saelens_folder(tmp_path / "a", {"apply_b_dec_to_input": shift}))
    scaled = {"apply_b_dec_to_input": shift, "normalize_activations": "expected_average_only_in"}
    folder = saelens_folder(tmp_path / "b", scaled)
    with pytest.raises(ConfigError, match="the scale is not in the folder"):
        formats.read(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 3.5, "has_whitening": False}))
    x = torch.randn(50, plain.d_in)
    # What goes in is multiplied, what comes out divided.
    assert torch.allclose(formats.read(folder)(x), plain(x * 3.5) / 3.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_norms_of_each_token_are_refused(norm: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divides each token by its own norm"):
        formats.read(saelens_folder(tmp_path / "x", {"normalize_activations": norm}))


def test_configurations_of_saelens_before_6_are_read(tmp_path: Path) -> None:
    old = json.loads((GOLDEN / "saelens" / "topk" / "cfg.json").read_text())
    kept = {key: old[key] for key in ("d_in", "d_sae", "dtype", "apply_b_dec_to_input")}
    folder = saelens_folder(tmp_path / "x", {}, source="topk")
    old = kept | {"hook_point": "blocks.1.hook_mlp_out", "model_name": "gpt2", "normalize_activations": False}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    (folder / "cfg.json").write_text(json.dumps(old))
    sae = formats.read(folder)
    assert sae.k == 5
    assert sae.meta["imported"]["hook_name"] == "blocks.1.hook_mlp_out"
    expected = load_file(GOLDEN / "saelens" / "topk" / "expected.safetensors")
    assert torch.allclose(sae(expected["x"]), expected["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["abstopk", "matching_pursuit", "temporal", "batchtopk", "new_thing"])
def test_architectures_that_do_not_fold_are_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=architecture):
        formats.read(saelens_folder(tmp_path / "x", {"architecture": architecture}))


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "x", {"dtype": "bfloat16"})
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    assert formats.read(folder).W_enc.dtype == torch.float32


def jump_relu(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Tensor:
    p = x @ W_enc + b_enc
    return torch.relu(p) * (p > threshold)


def gemma_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"w_enc": (D, D_SAE), "w_dec": (D_SAE, D), "b_enc": (D_SAE,), "b_dec": (D,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, "threshold": torch.rand(D_SAE, generator=generator)}


def test_gemma_scope(tmp_path: Path) -> None:
    t = gemma_tensors()
    arrays: dict[str, Any] = {key.replace("w_", "W_"): tensor.numpy() for key, tensor in t.items()}
    np.savez(tmp_path / "params.npz", **arrays)
    sae, x = formats.read(tmp_path), rows()
    acts = jump_relu(x, t["w_enc"], t["b_enc"], t["threshold"])
    assert torch.equal(sae.encode(x).to_dense() != 0, acts != 0)
    assert torch.allclose(sae(x), acts @ t["w_dec"] + t["b_dec"], atol=1e-4)


@pytest.mark.parametrize("skip", [True, False])
def test_gemma_scope_2(skip: bool, tmp_path: Path) -> None:
    t = gemma_tensors()
    affine = {"affine_skip_connection": torch.randn(D, D)} if skip else {}
    save_file(t | affine, tmp_path / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.7.output"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae, x = formats.read(tmp_path), rows()
    out = jump_relu(x, t["w_enc"], t["b_enc"], t["threshold"]) @ t["w_dec"] + t["b_dec"]
    assert torch.allclose(sae(x), out + (x @ affine["affine_skip_connection"] if skip else 0), atol=1e-4)
    assert sae.meta["imported"]["model_name"] == "gemma-v3-1b-pt"


def test_gemma_scope_2_across_layers_is_refused(tmp_path: Path) -> None:
    save_file(gemma_tensors() | {"w_dec": torch.randn(D_SAE, 3, D)}, tmp_path / "params.safetensors")
    with pytest.raises(ConfigError, match="writes 3 layers"):
        formats.read(tmp_path)


@pytest.mark.parametrize("decoder_norms", [True, False])
def test_llama_scope_folds_both_scales(decoder_norms: bool, tmp_path: Path) -> None:
    t = gemma_tensors()
    (tmp_path / "checkpoints").mkdir()
    tensors = {"encoder.weight": t["w_enc"].T.contiguous(), "encoder.bias": t["b_enc"]}
    tensors |= {"decoder.weight": t["w_dec"].T.contiguous(), "decoder.bias": t["b_dec"]}
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "checkpoints" / "final.safetensors"
    )
    config = {"d_model": D, "d_sae": D_SAE, "act_fn": "jumprelu", "jump_relu_threshold": 0.4}
    config |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 2.0, "out": 5.0}}
    config |= {"hook_point_in": "blocks.1.ln2.hook_normalized", "sparsity_include_decoder_norm": decoder_norms}
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    s_in, s_out, x = D**0.5 / 2.0, D**0.5 / 5.0, rows()
    # Their order: bias and decoder into raw units, then decoder norms into the encoder, then the threshold.
    pre = x @ t["w_enc"] + t["b_enc"] / s_in
    norms = (t["w_dec"] * s_in / s_out).norm(dim=1) * (s_out / s_in) if decoder_norms else torch.ones(D_SAE)
    acts = torch.relu(pre * norms) * (pre * norms > 0.4)
    out = (acts / norms) @ t["w_dec"] * (s_in / s_out) + t["b_dec"] / s_out
    sae = formats.read(tmp_path)
    assert torch.equal(sae.encode(x).to_dense() != 0, acts != 0)
    assert torch.allclose(sae(x), out, atol=1e-3)


def test_qwen_scope_takes_k_from_the_name_of_the_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_5" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    t = gemma_tensors()
    tensors = {"W_enc": t["w_enc"].T, "W_dec": t["w_dec"].T, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    torch.save(tensors, folder / "layer7.sae.pt")
    sae, x = formats.read(folder / "layer7.sae.pt"), rows()
    assert sae.k == 5
    assert sae.meta["imported"]["hook_name"] == "blocks.7.hook_resid_post"
    pre = x @ t["w_enc"] + t["b_enc"]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(5).indices, pre.topk(5).values.relu())
    assert torch.allclose(sae(x), kept @ t["w_dec"] + t["b_dec"], atol=1e-4)
    torch.save(tensors, tmp_path / "layer7.sae.pt")
    with pytest.raises(ConfigError, match="name of the repository"):
        formats.read(tmp_path / "layer7.sae.pt")


def test_openai_with_relu_is_read_and_with_topk_refused(tmp_path: Path) -> None:
    t = gemma_tensors()
    tensors: dict[str, Any] = {"encoder.weight": t["w_enc"].T, "decoder.weight": t["w_dec"].T}
    tensors |= {"latent_bias": t["b_enc"], "pre_bias": t["b_dec"], "stats_last_nonzero": torch.zeros(D_SAE).long()}
    torch.save(tensors | {"activation": "ReLU"}, tmp_path / "5.pt")
    sae, x = formats.read(tmp_path / "5.pt"), rows()
    out = torch.relu((x - t["b_dec"]) @ t["w_enc"] + t["b_enc"]) @ t["w_dec"] + t["b_dec"]
    assert torch.allclose(sae(x), out, atol=1e-4)
    torch.save(tensors | {"activation": "TopK", "activation_state_dict": {"k": 32}}, tmp_path / "6.pt")
    with pytest.raises(ConfigError, match="its own standard deviation"):
        formats.read(tmp_path / "6.pt")


# ---- damaged, cut short, hostile


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def _payload_pt(folder: Path, mark: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    torch.save({"encoder.weight": Payload(mark)}, folder / "ae.pt")


def _payload_raw(folder: Path, mark: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    (folder / "ae.pt").write_bytes(pickle.dumps({"encoder.weight": Payload(mark)}))


def _payload_npz(folder: Path, mark: Path) -> None:
    np.savez(folder / "params.npz", W_enc=np.array([Payload(mark)], dtype=object), allow_pickle=True)


def _payload_openai(folder: Path, mark: Path) -> None:
    torch.save(Payload(mark), folder / "autoencoder.pt")


def _payload_qwen(folder: Path, mark: Path) -> None:
    folder = folder / "SAE-Res-X-W1K-L0_5"
    folder.mkdir()
    torch.save([Payload(mark)], folder / "layer1.sae.pt")


@pytest.mark.parametrize("make", [_payload_pt, _payload_raw, _payload_npz, _payload_openai, _payload_qwen])
def test_nothing_in_a_file_is_run(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder, mark = tmp_path / "sae", tmp_path / "it-ran"
    folder.mkdir()
    make(folder, mark)
    place = next(folder.glob("*/*.pt"), folder)
    with pytest.raises(CheckpointError) as refused:
        formats.read(place)
    assert not mark.exists()
    assert "\n" not in str(refused.value)


def _cut(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) * 2 // 3])


def _gone(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _noise(folder: Path, name: str) -> None:
    (folder / name).write_bytes(np.random.default_rng(0).bytes(4000))


WEIGHTS = {"saelens/jumprelu": "sae_weights.safetensors", "sparsify/sae": "sae.safetensors"}
WEIGHTS |= {"dictionary_learning/AutoEncoderTopK": "ae.pt"}
CONFIGS = {"saelens/jumprelu": "cfg.json", "sparsify/sae": "cfg.json"}
CONFIGS |= {"dictionary_learning/AutoEncoderTopK": "config.json"}


def copied(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (GOLDEN / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("damage", [_cut, _gone, _noise])
@pytest.mark.parametrize("which", [WEIGHTS, CONFIGS], ids=["weights", "config"])
def test_damaged_files_are_one_clear_error(
    name: str, damage: Callable[[Path, str], None], which: dict[str, str], tmp_path: Path
) -> None:
    folder = copied(name, tmp_path)
    damage(folder, which[name])
    with pytest.raises(CheckpointError, match="copy") as refused:
        formats.read(folder, name.partition("/")[0])
    assert "\n" not in str(refused.value)


def _tensors(folder: Path, name: str) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    """The tensors of a folder, and what writes them back."""
    path = folder / WEIGHTS[name]
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True), lambda changed: torch.save(changed, path)
    return load_file(path), lambda changed: save_file(changed, path)


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_extra_or_wrong_tensors_are_named(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    tensors, write = _tensors(folder, name)
    write({key: tensor for key, tensor in tensors.items() if key != "b_dec"})
    with pytest.raises(CheckpointError, match="lacks b_dec"):
        formats.read(folder)
    write(tensors | {"lora_A": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="has lora_A too"):
        formats.read(folder)
    write(tensors | {"b_dec": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"\(3,\)"):
        formats.read(folder)
    write(tensors | {"b_dec": torch.zeros(12, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"b_dec is torch\.int64"):
        formats.read(folder)
    write(tensors | {"b_dec": torch.full((12,), float("nan"))})
    with pytest.raises(CheckpointError, match="not finite"):
        formats.read(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("saelens/topk", {"k": "many"}),
        ("saelens/topk", {"k": 0}),
        ("saelens/topk", {"k": True}),
        ("saelens/topk", {"d_in": 13}),
        ("saelens/topk", {"architecture": ["topk"]}),
        ("saelens/topk", {"metadata": {"saeforge": {"site": {"id": 1}}}}),
        ("saelens/topk", {"metadata": {"saeforge": "x"}}),
        ("sparsify/sae", {"k": 1.5}),
        ("sparsify/sae", {"num_latents": 7}),
        ("sparsify/sae", {"activation": "groupmax"}),
        ("sparsify/sae", {"signed": True}),
        ("dictionary_learning/AutoEncoderTopK", {"trainer": None}),
        ("dictionary_learning/AutoEncoderTopK", {"trainer": {"dict_class": "AutoEncoderTopK", "k": 6}}),
        ("dictionary_learning/AutoEncoderTopK", {"trainer": {"dict_class": "os.system"}}),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_clear_error(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = copied(name, tmp_path)
    place = folder / ("config.json" if (folder / "config.json").exists() else "cfg.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(SaeforgeError, match="copy") as refused:
        formats.read(folder)
    assert "\n" not in str(refused.value)


def test_a_configuration_of_a_gigabyte_or_nested_without_end_is_not_parsed(tmp_path: Path) -> None:
    folder = copied("saelens/topk", tmp_path)
    with (folder / "cfg.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="bytes; a configuration"):
        formats.read(folder)
    (folder / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="no JSON"):
        formats.read(folder)

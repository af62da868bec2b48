"""Files of the formats that are only read, and our own, cut short or with tensors that do not fit: one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeforge import formats
from saeforge.errors import CheckpointError
from saeforge.registry import FORMATS
from tests.readme import ROOT
from tests.test_formats import D, gemma_tensors, random_sae

Tensors = dict[str, Tensor]


def _gemma_scope(folder: Path, tensors: Tensors) -> Path:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(folder / "params.npz", **arrays)
    return folder / "params.npz"


def _gemma_scope_2(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "params.safetensors")
    return folder / "params.safetensors"


def _llama_scope(folder: Path, tensors: Tensors) -> Path:
    config = {"d_model": D, "act_fn": "jumprelu", "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise"}
    config |= {"dataset_average_activation_norm": {"in": 2.0, "out": 5.0}}
    (folder / "hyperparams.json").write_text(json.dumps(config))
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    return folder / "checkpoints" / "final.safetensors"


def _qwen_scope(folder: Path, tensors: Tensors) -> Path:
    (folder / "SAE-Res-Q-W1K-L0_5").mkdir(exist_ok=True)
    torch.save(tensors, folder / "SAE-Res-Q-W1K-L0_5" / "layer3.sae.pt")
    return folder / "SAE-Res-Q-W1K-L0_5" / "layer3.sae.pt"


def _openai(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "autoencoder.pt")
    return folder / "autoencoder.pt"


def _native(folder: Path, tensors: Tensors) -> Path:
    if not (folder / "sae.json").exists():
        random_sae("threshold").save(folder)
    save_file(tensors, folder / "sae.safetensors")
    return folder / "sae.safetensors"


LINEAR = {"w_enc": "encoder.weight", "w_dec": "decoder.weight"}
LLAMA = LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"}
OPENAI = LINEAR | {"b_enc": "latent_bias", "b_dec": "pre_bias"}
SAME = {name: name for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}
PLAIN = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
#: format -> what writes its files, its names of the tensors.
MAKERS: dict[str, tuple[Callable[[Path, Tensors], Path], dict[str, str]]] = {
    "gemma_scope": (_gemma_scope, SAME),
    "gemma_scope_2": (_gemma_scope_2, SAME),
    "llama_scope": (_llama_scope, LLAMA),
    "qwen_scope": (_qwen_scope, PLAIN),
    "openai": (_openai, OPENAI),
}


def tensors_of(format: str) -> Tensors:
    """Its tensors, by its names and in its layout: (d_in, d_sae) in Gemma Scope's, the transposed elsewhere."""
    names = MAKERS[format][1]
    found = {names[key]: tensor for key, tensor in gemma_tensors().items() if key in names}
    if names is SAME:
        return found
    return {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in found.items()}


def place_of(weights: Path, format: str) -> Path:
    """What is given to `read`."""
    return weights.parents[1] if format == "llama_scope" else weights


def refused(place: Path, format: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        formats.read(place, format)
    assert "\n" not in str(error.value)
    assert place.name in str(error.value)


@pytest.mark.parametrize("format", MAKERS)
def test_files_that_are_whole_are_recognised_and_read(format: str, tmp_path: Path) -> None:
    weights = MAKERS[format][0](tmp_path, tensors_of(format))
    sae = formats.read(place_of(weights, format))
    assert (sae.meta["imported"]["format"], sae.d_in) == (format, D)


@pytest.mark.parametrize("format", MAKERS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.99])
def test_a_file_cut_short_is_refused(format: str, share: float, tmp_path: Path) -> None:
    weights = MAKERS[format][0](tmp_path, tensors_of(format))
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * share)])
    refused(place_of(weights, format), format, "damaged|holds more than tensors")


@pytest.mark.parametrize("format", MAKERS)
def test_missing_and_extra_tensors_are_named(format: str, tmp_path: Path) -> None:
    make, names = MAKERS[format]
    tensors = tensors_of(format)
    weights = make(tmp_path, {name: tensor for name, tensor in tensors.items() if name != names["b_dec"]})
    refused(place_of(weights, format), format, f"lacks {names['b_dec']}")
    weights = make(tmp_path, tensors | {"surprise": torch.zeros(3)})
    refused(place_of(weights, format), format, "has surprise too")


@pytest.mark.parametrize("format", MAKERS)
@pytest.mark.parametrize("which", ["w_enc", "w_dec", "b_enc", "b_dec"])
def test_tensors_of_other_shapes_or_kinds_are_refused(format: str, which: str, tmp_path: Path) -> None:
    make, names = MAKERS[format]
    tensors, name = tensors_of(format), names[which]
    for wrong, match in (
        (torch.zeros(5), "shape"),
        (torch.zeros(0, 3), "shape"),
        (torch.zeros(7, 3), "shape|latents in"),
        (tensors[name].int(), "int32"),
        (torch.full_like(tensors[name], float("inf")), "not finite"),
    ):
        refused(place_of(make(tmp_path, tensors | {name: wrong}), format), format, match)


def test_our_own_format_is_as_strict(tmp_path: Path) -> None:
    random_sae("threshold").save(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    for changed in ({"b_dec": torch.zeros(3)}, {"W_dec": torch.zeros(24, 9)}, {"threshold": torch.zeros(24) - 1}):
        weights = _native(tmp_path, tensors | changed)
        refused(weights.parent, "native", "damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": "wide"},
        {"jump_relu_threshold": None},
        {"dataset_average_activation_norm": {"in": 0, "out": 1}},
        {"dataset_average_activation_norm": {"in": 1}},
        {"dataset_average_activation_norm": 3},
    ],
)
def test_hyperparameters_of_llama_scope_that_are_none_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    weights = _llama_scope(tmp_path, tensors_of("llama_scope"))
    place = tmp_path / "hyperparams.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    refused(place_of(weights, "llama_scope"), "llama_scope", next(iter(change)))


def test_the_documentation_has_a_row_for_every_format() -> None:
    text = (ROOT / "docs" / "interop.md").read_text()
    own = [record.name for record in FORMATS.records() if record.distribution == "saeforge"]
    assert [name for name in own if f"| `{name}` |" not in text] == []

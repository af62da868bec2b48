"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`): JumpReLU over raw activations, encoder (d_in, d_sae).

Neither takes b_dec off the input. The SAEs of Gemma Scope 1 over embeddings read them as the embedding table has them,
before Gemma multiplies them by sqrt(d): that is what transformers' `embed_tokens` gives.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.formats.base import Format, plain_sae
from saeforge.formats.files import matrix, read_json, read_npz, read_safetensors, take
from saeforge.sae import SAE

NAMES = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
SKIP = "affine_skip_connection"
EMBEDDINGS = "embedding"


class GemmaScope(Format):
    """Gemma Scope 1: the residual stream, attention and MLP SAEs, and its transcoders."""

    title = "Gemma Scope"
    files = ("params.npz",)

    def recognises(self, path: Path) -> bool:
        """By the name of its weights."""
        return (path / "params.npz").is_file() or (path.is_file() and path.name == "params.npz")

    def read(self, path: Path) -> SAE:
        """See `Format.read`."""
        weights = path if path.is_file() else path / "params.npz"
        found = {name.lower(): tensor for name, tensor in read_npz(weights).items()}
        scaling = found.pop("scaling_factor", None)
        if scaling is not None and not bool((scaling == 1).all()):
            raise ConfigError(f"{weights}: scaling_factor is not 1 (finetuned latents), which cannot be imported")
        return _jump_relu(weights, take(weights, found, NAMES), None)


class GemmaScope2(Format):
    """Gemma Scope 2: SAEs and transcoders, with and without the affine skip connection; of one layer, no CLTs."""

    title = "Gemma Scope 2"
    files = ("params.safetensors", "config.json")

    def recognises(self, path: Path) -> bool:
        """By the name of its weights."""
        return (path / "params.safetensors").is_file() or (path.is_file() and path.name == "params.safetensors")

    def read(self, path: Path) -> SAE:
        """See `Format.read`."""
        weights = path if path.is_file() else path / "params.safetensors"
        place = weights.with_name("config.json")
        config = read_json(place) if place.is_file() else {}
        if config.get("architecture", "jump_relu") != "jump_relu":
            raise ConfigError(f"{place}: architecture {config['architecture']!r} cannot be imported; known: jump_relu")
        found = read_safetensors(weights)
        tensors = take(weights, found, [*NAMES, *([SKIP] if SKIP in found else [])])
        if tensors["w_dec"].ndim == 3:
            layers = tensors["w_dec"].shape[1]
            raise ConfigError(f"{weights} writes {layers} layers (a CLT), an SAE here has one output")
        sae = _jump_relu(weights, {name: tensors[name] for name in NAMES}, tensors.get(SKIP))
        named = {"model_name": "model_name", "hook_name": "hf_hook_point_in", "hook_name_out": "hf_hook_point_out"}
        sae.meta["imported"] |= {ours: config[theirs] for ours, theirs in named.items() if theirs in config}
        return sae


def _jump_relu(weights: Path, tensors: dict[str, Tensor], skip: Tensor | None) -> SAE:
    W_enc = matrix(weights, "w_enc", tensors["w_enc"]).T
    embeddings = EMBEDDINGS in str(weights.parent)
    return plain_sae(
        weights,
        W_enc,
        tensors["b_enc"],
        tensors["w_dec"],
        tensors["b_dec"],
        threshold=tensors["threshold"],
        W_skip=None if skip is None else matrix(weights, SKIP, skip).T,
        meta={"imported": {"units": "embeddings before Gemma's factor sqrt(d)"} if embeddings else {}},
    )

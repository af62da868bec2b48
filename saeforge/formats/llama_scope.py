"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, torch `Linear`s for encoder and decoder.

Activations go in as x s_in with s_in = sqrt(d_model) / dataset_average_activation_norm.in and come out divided by
s_out, likewise of .out: numbers of the whole dataset, which fold. Its own code folds them (and the decoder's norms, if
`sparsity_include_decoder_norm`) before it applies `jump_relu_threshold`, so that this is in raw units; values here are
in scaled units, as other importers give them, and the threshold is multiplied by s_in for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saeforge.errors import CheckpointError, ConfigError
from saeforge.formats.base import Format, plain_sae, with_unit_decoder
from saeforge.formats.files import matrix, number, read_json, read_safetensors, shaped, take
from saeforge.sae import SAE

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"


class LlamaScope(Format):
    """Llama Scope: SAEs and transcoders of Llama 3.1 8B with one JumpReLU threshold."""

    title = "Llama Scope"
    files = (CONFIG, WEIGHTS)

    def recognises(self, path: Path) -> bool:
        """By both files."""
        return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()

    def read(self, path: Path) -> SAE:
        """See `Format.read`."""
        place, config = path / CONFIG, read_json(path / CONFIG)
        activation = config.get("act_fn", "jumprelu")
        threshold = number(place, config, "jump_relu_threshold", float)
        if activation not in ("jumprelu", "relu") and not (activation == "topk" and threshold > 0):
            raise ConfigError(f"{place}: act_fn {activation!r} without a jump_relu_threshold cannot be imported")
        if config.get("use_glu_encoder"):
            raise ConfigError(f"{place}: use_glu_encoder: two products that multiply; an SAE here encodes by one")
        s_in, s_out = _scales(place, config)
        biased = bool(config.get("use_decoder_bias", True))
        names = ["encoder.weight", "encoder.bias", "decoder.weight", *(["decoder.bias"] if biased else [])]
        tensors = take(path / WEIGHTS, read_safetensors(path / WEIGHTS), names)
        W_enc = matrix(path / WEIGHTS, "encoder.weight", tensors["encoder.weight"]).float() * s_in
        W_dec = matrix(path / WEIGHTS, "decoder.weight", tensors["decoder.weight"]).T.float() / s_out
        b_enc = shaped(path / WEIGHTS, "encoder.bias", tensors["encoder.bias"], (W_enc.shape[0],)).float()
        b_dec = tensors["decoder.bias"].float() / s_out if biased else torch.zeros(W_dec.shape[1])
        if W_dec.shape[0] != W_enc.shape[0]:
            raise CheckpointError(f"{path / WEIGHTS}: {len(W_enc)} latents in, {len(W_dec)} out; it is damaged")
        shift = b_dec * (s_out / s_in) if config.get("apply_decoder_bias_to_pre_encoder") else None
        sae = plain_sae(
            path,
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            threshold=0.0 if activation == "relu" else threshold * s_in,
            shift=shift,
            meta={
                "imported": {
                    "model_name": config.get("model_name"),
                    "hook_name": config.get("hook_point_in"),
                    "hook_name_out": config.get("hook_point_out"),
                }
            },
        )
        if not config.get("sparsity_include_decoder_norm"):
            return sae
        # Norms of what is stored, in which the threshold is meant: those of W_dec before it was divided by s_out.
        unit = with_unit_decoder(sae.W_enc, sae.b_enc, sae.W_dec * s_out)
        return plain_sae(path, *unit[:2], unit[2] / s_out, sae.b_dec, threshold=sae.threshold, meta=sae.meta)


def _scales(place: Path, config: dict[str, Any]) -> tuple[float, float]:
    """s_in and s_out.

    Raises:
        ConfigError: each token or batch is divided by its own norm.
        CheckpointError: norms that are missing or not positive.
    """
    kind = config.get("norm_activation", "dataset-wise")
    if kind in ("inference", "none", None):
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise ConfigError(
            f"{place}: norm_activation {kind!r} does not fold into weights; known: dataset-wise, inference"
        )
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise CheckpointError(f"{place}: dataset_average_activation_norm is {norms!r}, expected numbers 'in' and 'out'")
    root = number(place, config, "d_model", int) ** 0.5
    named = {f"dataset_average_activation_norm.{key}": norms.get(key) for key in ("in", "out")}
    given = [number(place, named, key, float) for key in named]
    if min(given) <= 0:
        raise CheckpointError(f"{place}: dataset_average_activation_norm {given}: expected positive numbers")
    return root / given[0], root / given[1]

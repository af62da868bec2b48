"""sparsify of EleutherAI: `cfg.json` and `sae.safetensors`, top-k of each token only.

Its layout is ours: `encoder.weight (d_sae, d_in)`, `W_dec (d_sae, d_in)`. It encodes x - b_dec, a transcoder x itself;
relu, then the k largest; a skip connection adds W_skip x. `normalize_decoder` and `multi_topk` are of training alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saeforge.errors import CheckpointError, ConfigError
from saeforge.formats.base import (
    Format,
    check_plain,
    identity_of,
    is_transcoder,
    own_identity,
    plain_sae,
    product,
)
from saeforge.formats.files import matrix, number, read_json, read_safetensors, take
from saeforge.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
IDENTITY_FILE = "saeforge.json"  # of its own: sparsify warns of keys in cfg.json that it does not know


class Sparsify(Format):
    """sparsify: top-k SAEs and transcoders, with and without a skip connection."""

    title = "sparsify"
    files = (CONFIG, WEIGHTS, IDENTITY_FILE)
    writes = True

    def recognises(self, path: Path) -> bool:
        """By `sae.safetensors` beside `cfg.json`, where saeforge's own has `sae.json`."""
        return (path / WEIGHTS).is_file() and (path / CONFIG).is_file() and not (path / "sae.json").exists()

    def read(self, path: Path) -> SAE:
        """See `Format.read`."""
        place, config = path / CONFIG, read_json(path / CONFIG)
        d_in, k = number(place, config, "d_in", int), number(place, config, "k", int)
        activation = config.get("activation", "topk")
        if activation != "topk":
            raise ConfigError(
                f"{place}: activation {activation!r} cannot be imported: it takes the largest of each group, "
                "an SAE here has one top-k over all latents"
            )
        if config.get("signed"):
            raise ConfigError(f"{place}: signed latents cannot be imported: an SAE here has latents of at least 0")
        skip, transcode = bool(config.get("skip_connection")), bool(config.get("transcode"))
        names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if skip else [])]
        weights = take(path / WEIGHTS, read_safetensors(path / WEIGHTS), names)
        W_enc = matrix(path / WEIGHTS, "encoder.weight", weights["encoder.weight"])
        expansion = number(place, {"expansion_factor": 32, **config}, "expansion_factor", int)
        latents = config.get("num_latents") or d_in * expansion
        if tuple(W_enc.shape) != (latents, d_in):
            raise CheckpointError(
                f"{path}: {WEIGHTS} has an encoder of shape {tuple(W_enc.shape)}, {CONFIG} says {(latents, d_in)}; "
                "the files do not belong together"
            )
        own = path / IDENTITY_FILE
        return plain_sae(
            path,
            W_enc,
            weights["encoder.bias"],
            weights["W_dec"],
            weights["b_dec"],
            k=k,
            shift=None if transcode else weights["b_dec"],
            W_skip=weights.get("W_skip"),
            meta={
                **(own_identity(own, read_json(own)) if own.exists() else {}),
                "imported": {"transcode": transcode, "hookpoint": path.name},
            },
        )

    def check(self, sae: SAE) -> None:
        """Refuses thresholds, other widths out than in, several sources and rules of plugins."""
        check_plain(sae, self.title)
        if sae.rule != "topk":
            raise ConfigError("sparsify has top-k of each token only, this SAE has thresholds; export it to saelens")
        if sae.d_in != sae.d_out:
            raise ConfigError(
                f"sparsify writes as many values as it reads; this SAE reads {sae.d_in}, writes {sae.d_out}"
            )

    def write(self, sae: SAE, folder: Path) -> None:
        """Writes the files. What it takes off an SAE's input goes into the encoder's bias: b_enc + W_enc b_dec."""
        transcode = is_transcoder(sae)
        bias = sae.b_enc if transcode else (sae.b_enc.double() + product(sae.W_enc, sae.b_dec)).to(sae.b_enc.dtype)
        tensors = {"encoder.weight": sae.W_enc, "encoder.bias": bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        if sae.W_skip is not None:
            tensors["W_skip"] = sae.W_skip
        norms = sae.W_dec.norm(dim=1)
        config: dict[str, Any] = {
            "activation": "topk",
            "expansion_factor": max(1, sae.d_sae // sae.d_in),
            "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4)),
            "num_latents": sae.d_sae,
            "k": sae.k,
            "multi_topk": False,
            "skip_connection": sae.W_skip is not None,
            "transcode": transcode,
            "d_in": sae.d_in,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (folder / IDENTITY_FILE).write_text(json.dumps(identity_of(sae), indent=2) + "\n")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

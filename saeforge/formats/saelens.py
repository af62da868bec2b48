"""SAELens, version 6 and the configurations before it: `cfg.json` and `sae_weights.safetensors`.

Its layout: `W_enc (d_in, d_sae)`, `W_dec (d_sae, d_out)`, so the encoder is ours transposed. With c = b_dec if
`apply_b_dec_to_input`, else 0, and p = (x - c) W_enc + b_enc: standard is relu(p); jumprelu relu(p) where
p > threshold; topk the k largest, then relu, of p times the decoder's norm if `rescale_acts_by_decoder_norm`; gated as
in Rajamanoharan et al. 2024; a skip transcoder adds x W_skip^T. Loading there is strict: these tensors and no others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saeforge.errors import CheckpointError, ConfigError
from saeforge.formats.base import (
    OWN_KEY,
    Format,
    check_plain,
    gated_as_threshold,
    identity_of,
    is_transcoder,
    own_identity,
    plain_sae,
    with_unit_decoder,
)
from saeforge.formats.files import matrix, number, read_json, read_safetensors, take
from saeforge.formats.hooks import transformer_lens_name
from saeforge.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: Below 6.0.0 its loader rebuilds the metadata from top-level keys and drops the nested ones.
WRITTEN_VERSION = "6.0.0"
TENSORS = {
    "standard": ("W_enc", "W_dec", "b_enc", "b_dec"),
    "topk": ("W_enc", "W_dec", "b_enc", "b_dec"),
    "jumprelu": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    "transcoder": ("W_enc", "W_dec", "b_enc", "b_dec"),
    "skip_transcoder": ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"),
    "jumprelu_transcoder": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
    "jumprelu_skip_transcoder": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip"),
}
REFUSED = {
    "abstopk": "its latents keep their sign, and an SAE here has latents of at least 0",
    "matching_pursuit": "it encodes in a loop over its decoder, not by one product",
    "temporal": "its encoder looks at other tokens",
    "batchtopk": "this is a checkpoint of its training; export it there first (save_inference_model)",
    "matryoshka_batchtopk": "this is a checkpoint of its training; export it there first (save_inference_model)",
}
#: Keys of configurations before version 6 -> now.
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


class SAELens(Format):
    """SAELens: standard, top-k, JumpReLU and gated SAEs, transcoders with and without a skip connection."""

    title = "SAELens"
    files = (CONFIG, WEIGHTS, "activation_scaler.json")
    writes = True

    def recognises(self, path: Path) -> bool:
        """By the name of its weights beside a `cfg.json`."""
        return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()

    def read(self, path: Path) -> SAE:
        """See `Format.read`; a scale of the whole dataset folds, norms of each token are refused."""
        place = path / CONFIG
        config = _modern(place, read_json(place))
        architecture = config["architecture"]
        if architecture in REFUSED:
            raise ConfigError(f"{place}: architecture {architecture!r} cannot be imported: {REFUSED[architecture]}")
        if architecture not in TENSORS:
            raise ConfigError(f"{place}: architecture {architecture!r} is not known; known: {', '.join(TENSORS)}")
        _check_units(place, config)
        found = _old_names(read_safetensors(path / WEIGHTS))
        _check_scaling(path / WEIGHTS, found)
        weights = take(path / WEIGHTS, found, TENSORS[architecture])
        for name in ("W_enc", "W_dec"):
            matrix(path / WEIGHTS, name, weights[name])
        widths = (number(place, config, "d_in", int), number(place, config, "d_sae", int))
        if tuple(weights["W_enc"].shape) != widths:
            raise CheckpointError(
                f"{path}: {WEIGHTS} has W_enc of shape {tuple(weights['W_enc'].shape)}, {CONFIG} says {widths}; "
                "the files do not belong together"
            )
        return self._assembled(path, config, weights)

    def _assembled(self, path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> SAE:
        architecture = config["architecture"]
        W_enc, W_dec, b_dec = weights["W_enc"].T, weights["W_dec"], weights["b_dec"]
        b_enc, threshold = weights.get("b_enc"), weights.get("threshold")
        k = None
        if architecture == "topk":
            k = number(path / CONFIG, config, "k", int)
        elif architecture == "gated":
            vectors = {name: weights[name] for name in ("r_mag", "b_gate", "b_mag")}
            for name, vector in vectors.items():
                if vector.shape != (W_enc.shape[0],):
                    raise CheckpointError(f"{path}: {name} has shape {tuple(vector.shape)}, expected {W_enc.shape[:1]}")
            W_enc, b_enc, threshold = gated_as_threshold(W_enc, **vectors)
        elif threshold is None:
            threshold = torch.zeros(W_enc.shape[0])
        shift = b_dec if config.get("apply_b_dec_to_input", True) and "transcoder" not in architecture else None
        scale = _scale(path, config)
        if scale != 1.0:
            # y = s x goes in, y comes out: W_enc s, and W_dec and b_dec (the shift too) in units of x.
            W_enc, W_dec, b_dec = W_enc * scale, W_dec / scale, b_dec / scale
            shift = None if shift is None else b_dec
        sae = plain_sae(
            path,
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            threshold=threshold,
            k=k,
            shift=shift,
            W_skip=weights.get("W_skip"),
            meta=_meta(path, config),
        )
        if architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False):
            # Chosen and reported in units of the decoder's norm, which divides out again in its decode.
            W_enc, b_enc, W_dec = with_unit_decoder(sae.W_enc, sae.b_enc, sae.W_dec)
            sae = plain_sae(path, W_enc, b_enc, W_dec, sae.b_dec, k=k, meta=sae.meta)
        return sae

    def check(self, sae: SAE) -> None:
        """Refuses several sources, rules of plugins, and top-k transcoders, which SAELens does not have."""
        check_plain(sae, self.title)
        if sae.rule == "topk" and (is_transcoder(sae) or sae.W_skip is not None):
            raise ConfigError(
                "SAELens has transcoders with thresholds only, this one has top-k; export it to sparsify, or train it "
                "with thresholds (batchtopk, jumprelu)"
            )

    def write(self, sae: SAE, folder: Path) -> None:
        """Writes `cfg.json` and `sae_weights.safetensors`; weights as they are, `apply_b_dec_to_input` false."""
        tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
        jump = sae.threshold is not None and bool((sae.threshold > 0).any())
        if sae.threshold is not None and jump:
            tensors["threshold"] = sae.threshold
        if sae.W_skip is not None:
            tensors["W_skip"] = sae.W_skip
        if is_transcoder(sae) or sae.W_skip is not None:
            architecture = f"{'jumprelu_' if jump else ''}{'skip_' if sae.W_skip is not None else ''}transcoder"
        else:
            architecture = "topk" if sae.rule == "topk" else "jumprelu" if jump else "standard"
        config: dict[str, Any] = {
            "architecture": architecture,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
        }
        if architecture == "topk":
            config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
        if "transcoder" in architecture:
            config["d_out"] = sae.d_out
        config["metadata"] = _their_metadata(sae)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def _modern(place: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of any version as one of version 6 (its own loader knows the same old keys)."""
    nested = config.get("metadata")
    metadata = dict(nested) if isinstance(nested, dict) else {}
    config = {RENAMED.get(key, key): value for key, value in config.items()}
    activation, arguments = config.get("activation_fn"), config.get("activation_fn_kwargs") or {}
    config.setdefault("architecture", "standard")
    if not isinstance(config["architecture"], str):
        raise CheckpointError(f"{place}: architecture {config['architecture']!r}: expected a name")
    if activation == "topk" and config["architecture"] == "standard":
        config["architecture"] = "topk"
        config.setdefault("k", arguments.get("k") if isinstance(arguments, dict) else None)
    elif activation not in (None, "relu", "topk"):
        raise ConfigError(f"{place}: activation_fn {activation!r} cannot be imported: known are relu and topk")
    keys = ("model_name", "hook_name", "hook_name_out", "hf_hook_name", "context_size", "prepend_bos", "dataset_path")
    for key in (*keys, "neuronpedia_id"):
        if config.get(key) is not None:
            metadata.setdefault(key, config[key])
    norm = config.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        config["normalize_activations"] = "expected_average_only_in" if norm else "none"
    return {**config, "metadata": metadata}


def _old_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`log_threshold`, of training before 6.48, as `threshold`."""
    if "log_threshold" in found and "threshold" not in found:
        return {**{k: v for k, v in found.items() if k != "log_threshold"}, "threshold": found["log_threshold"].exp()}
    return found


def _check_units(place: Path, config: dict[str, Any]) -> None:
    """Refuses norms of each token: no SAE over raw activations computes them.

    Raises:
        ConfigError: such a norm, or one that is not known.
    """
    norm = config["normalize_activations"]
    if norm in ("layer_norm", "constant_norm_rescale"):
        raise ConfigError(
            f"{place}: normalize_activations {norm!r} divides each token by its own norm, which does not fold into "
            "weights; only SAEs over raw activations, or scaled by one number, can be imported"
        )
    if norm not in ("none", "expected_average_only_in"):
        raise ConfigError(f"{place}: normalize_activations {norm!r} cannot be imported: it is not known how to fold it")


def _scale(path: Path, config: dict[str, Any]) -> float:
    """The one number that activations are multiplied by; 1 if there is none.

    Raises:
        ConfigError: the configuration says that there is one, and no file says which.
    """
    if config["normalize_activations"] == "none":
        return 1.0
    place = path / "activation_scaler.json"
    if not place.is_file():
        raise ConfigError(
            f"{path / CONFIG}: normalize_activations is 'expected_average_only_in', the scale is not in the folder; "
            "export it from SAELens with the scale folded in, or bring activation_scaler.json of its checkpoint"
        )
    scaler = read_json(place)
    if scaler.get("has_whitening"):
        raise ConfigError(f"{place}: whitened activations; export it from SAELens, which folds the whitening")
    scale: float = number(place, scaler, "scaling_factor", float)
    if not 0 < scale < float("inf"):
        raise CheckpointError(f"{place}: scaling_factor is {scale}, expected a positive number")
    return scale


def _check_scaling(place: Path, found: dict[str, Tensor]) -> None:
    """Drops a tensor of ones that old SAELens left beside the weights.

    Raises:
        ConfigError: it is not of ones: latents finetuned after training.
    """
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = found.pop(name, None)
        if factor is not None and not bool((factor == 1).all()):
            raise ConfigError(f"{place}: {name} is not 1 (finetuned latents), which SAELens itself no longer loads")


def _meta(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    metadata = config["metadata"]
    theirs = {key: value for key, value in metadata.items() if key != OWN_KEY and value is not None}
    named = {"model_name": theirs.get("model_name"), "hook_name": theirs.get("hook_name")}
    named["hook_name_out"] = theirs.get("hook_name_out")
    return {
        **own_identity(path / CONFIG, metadata.get(OWN_KEY)),
        "imported": {"architecture": config["architecture"], **named, "metadata": theirs},
    }


def _their_metadata(sae: SAE) -> dict[str, Any]:
    """What SAELens's own tools ask for (model, hook, context), and our identity under a key of our own."""
    theirs = dict((sae.meta.get("imported") or {}).get("metadata") or {})
    model = (sae.meta.get("model") or {}).get("name")
    site, target = sae.meta.get("site"), sae.meta.get("target")
    hook = transformer_lens_name(site) if site else theirs.get("hook_name")
    out = transformer_lens_name(target) if target and is_transcoder(sae) else theirs.get("hook_name_out")
    metadata = {
        **theirs,
        "sae_lens_version": WRITTEN_VERSION,
        "model_name": model or theirs.get("model_name"),
        "hook_name": hook,
        "hook_head_index": None,
        "model_from_pretrained_kwargs": {},
        OWN_KEY: identity_of(sae),
    }
    return metadata | ({"hook_name_out": out} if out else {})

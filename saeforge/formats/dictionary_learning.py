"""dictionary_learning: `ae.pt`, a state_dict, and `config.json`, whose `trainer.dict_class` says what it is of.

Classes, with the input shift c that each takes off before encoding:
AutoEncoder (c = bias): relu. AutoEncoderNew (no c): relu. GatedAutoEncoder (c = decoder_bias). AutoEncoderTopK
(c = b_dec): relu, then the k largest. BatchTopKSAE and MatryoshkaBatchTopKSAE (c = b_dec): relu(p) above one threshold,
which is -1, and so no matter, before it was estimated. JumpReluAutoEncoder (no c): a threshold per latent.
Torch's `Linear` keeps the encoder as ours, (d_sae, d_in), and the decoder transposed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
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
    product,
)
from saeforge.formats.files import matrix, read_json, read_torch, shaped, take
from saeforge.sae import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "decoder.weight")
PLAIN = ("W_enc", "W_dec", "b_enc", "b_dec")
#: dict_class -> the tensors that must be there.
TENSORS = {
    "AutoEncoder": (*LINEAR, "encoder.bias", "bias"),
    "AutoEncoderNew": (*LINEAR, "encoder.bias", "decoder.bias"),
    "GatedAutoEncoder": (*LINEAR, "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "AutoEncoderTopK": (*LINEAR, "encoder.bias", "b_dec"),
    "BatchTopKSAE": (*LINEAR, "encoder.bias", "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": (*PLAIN, "threshold"),
    "JumpReluAutoEncoder": (*PLAIN, "threshold"),
}
#: That may be there without being needed.
OPTIONAL = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes"),
}


class DictionaryLearning(Format):
    """dictionary_learning: its dictionaries with ReLU, gates, JumpReLU, top-k, batch top-k and Matryoshka."""

    title = "dictionary_learning"
    files = (CONFIG, WEIGHTS)
    writes = True

    def recognises(self, path: Path) -> bool:
        """By the name of its weights."""
        return (path / WEIGHTS).is_file() or (path.is_file() and path.name == WEIGHTS)

    def read(self, path: Path) -> SAE:
        """See `Format.read`; `ae.pt` is read as plain tensors."""
        folder = path if path.is_dir() else path.parent
        place, weights = folder / CONFIG, folder / WEIGHTS
        config = read_json(place)
        trainer = config.get("trainer")
        if not isinstance(trainer, dict):
            raise CheckpointError(f"{place} has no entry 'trainer'; it says what ae.pt is, bring the whole folder")
        found = read_torch(weights)
        name = _class(place, trainer, found)
        tensors = take(weights, found, TENSORS[name], optional=OPTIONAL.get(name, ()))
        if "W_enc" in tensors:
            W_enc, W_dec = matrix(weights, "W_enc", tensors["W_enc"]).T, tensors["W_dec"]
        else:
            W_enc = matrix(weights, "encoder.weight", tensors["encoder.weight"])
            W_dec = matrix(weights, "decoder.weight", tensors["decoder.weight"]).T
        b_enc = tensors.get("encoder.bias", tensors.get("b_enc"))
        b_dec = next(tensors[key] for key in ("b_dec", "bias", "decoder_bias", "decoder.bias") if key in tensors)
        threshold: Tensor | None = torch.zeros(W_enc.shape[0])
        k = None
        if name == "AutoEncoderTopK":
            k, threshold = _k(place, trainer, found), None
        elif name == "GatedAutoEncoder":
            gates = [shaped(weights, key, tensors[key], (len(W_enc),)) for key in ("r_mag", "gate_bias", "mag_bias")]
            W_enc, b_enc, threshold = gated_as_threshold(W_enc, *gates)
        elif "threshold" in tensors:
            threshold = tensors["threshold"]
            threshold = threshold.expand(len(W_enc)) if threshold.ndim == 0 else threshold
        return plain_sae(
            folder,
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            threshold=threshold,
            k=k,
            shift=None if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else b_dec,
            meta={
                **own_identity(place, config.get(OWN_KEY)),
                "imported": {
                    "dict_class": name,
                    "model_name": trainer.get("lm_name"),
                    "layer": trainer.get("layer"),
                    "submodule_name": trainer.get("submodule_name"),
                },
            },
        )

    def check(self, sae: SAE) -> None:
        """Refuses transcoders, skip connections, several sources and rules of plugins."""
        check_plain(sae, self.title)
        if sae.W_skip is not None or is_transcoder(sae):
            raise ConfigError(
                "dictionary_learning has autoencoders only, this is a transcoder or has a skip connection; export to "
                "saelens or sparsify"
            )

    def write(self, sae: SAE, folder: Path) -> None:
        """Writes `ae.pt` and `config.json`: AutoEncoderTopK, JumpReluAutoEncoder, or AutoEncoderNew for plain ReLU."""
        linear = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T}
        if sae.rule == "topk":
            name = "AutoEncoderTopK"
            bias = (sae.b_enc.double() + product(sae.W_enc, sae.b_dec)).to(sae.b_enc.dtype)  # it encodes x - b_dec
            tensors = {**linear, "encoder.bias": bias, "b_dec": sae.b_dec}
            tensors |= {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        elif sae.threshold is not None and bool((sae.threshold > 0).any()):
            name = "JumpReluAutoEncoder"
            tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
            tensors["threshold"] = sae.threshold
        else:
            name = "AutoEncoderNew"
            tensors = {**linear, "encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec}
        found = sae.meta.get("imported") or {}
        layer = re.search(r"\.(\d+)(?:\.|$)", str((sae.meta.get("site") or {}).get("module_path") or ""))
        trainer: dict[str, Any] = {
            "trainer_class": None,
            "dict_class": name,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "lm_name": (sae.meta.get("model") or {}).get("name") or found.get("model_name"),
            "layer": int(layer[1]) if layer else found.get("layer"),
            "submodule_name": (sae.meta.get("site") or {}).get("id") or found.get("submodule_name"),
        }
        if sae.rule == "topk":
            trainer["k"] = sae.k
        config = {"trainer": trainer, OWN_KEY: identity_of(sae)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


def _class(place: Path, trainer: dict[str, Any], found: dict[str, Any]) -> str:
    """Which dictionary it is. Some of its trainers write "AutoEncoder" beside the weights of an AutoEncoderNew.

    Raises:
        ConfigError: a class that is not known.
    """
    name = trainer.get("dict_class")
    if name == "AutoEncoder" and "decoder.bias" in found:
        return "AutoEncoderNew"
    if not isinstance(name, str) or name not in TENSORS:
        raise ConfigError(f"{place}: dict_class {name!r} cannot be imported; known: {', '.join(TENSORS)}")
    return name


def _k(place: Path, trainer: dict[str, Any], found: dict[str, Any]) -> int:
    """k of the weights, which the configuration must not deny; old weights have none.

    Raises:
        CheckpointError: none, or two that differ.
    """
    stored, said = found.get("k"), trainer.get("k")
    if isinstance(stored, Tensor) and stored.ndim == 0:
        stored = stored.item()
    given = {value for value in (stored, said) if value is not None}
    if len(given) != 1 or not all(isinstance(value, int) and not isinstance(value, bool) for value in given):
        raise CheckpointError(f"{place}: k is {said!r}, in {WEIGHTS} {stored!r}; expected one whole number")
    return int(given.pop())

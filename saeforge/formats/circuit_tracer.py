"""circuit-tracer: the transcoders of all layers of a model in one folder, `config.yaml` and `layer_K.safetensors`.

Its layout is ours: `W_enc (d_sae, d_model)`, `W_dec (d_sae, d_model)`, `b_enc`, `b_dec`, `W_skip (d_model, d_model)`
applied as x W_skip^T, and `activation_function.threshold`, with which a latent is x where x > threshold. Loading there
is strict: these tensors and no others (`circuit_tracer/transcoder/single_layer_transcoder.py`). `config.yaml` names the
places of every block that the transcoders read and write, by hooks of TransformerLens (`feature_input_hook`,
`feature_output_hook`), and since April 2026 the `activation`, with `k` for top-k. Before that, and from a folder on
disk, it takes weights without thresholds for those of a ReLU, and its own top-k keeps the negative values of a row with
less than k positive ones: `notes` says what to set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from saeforge.errors import CheckpointError, ConfigError
from saeforge.formats.base import (
    OWN_KEY,
    SetFormat,
    check_plain,
    identity_of,
    is_transcoder,
    own_identity,
    plain_sae,
)
from saeforge.formats.files import matrix, number, read_safetensors, read_yaml, take
from saeforge.sae import SAE

CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"
KIND = "transcoder_set"
JUMP = "jump_relu"
_FILE = re.compile(r"layer_(\d+)\.safetensors")
_BLOCK = re.compile(r"(?:.*\.)?(?:layers?|h|blocks?)\.(\d+)\.(.+)")
#: (child of a block, in or out) -> hook. `post_attention_layernorm` is left out: Llama has it before the MLP, Gemma 2
#: after attention.
_READS = {
    **{(name, "in"): "mlp.hook_in" for name in ("mlp", "feed_forward", "ffn")},
    **{(name, "out"): "mlp.hook_in" for name in ("pre_feedforward_layernorm", "ln_2")},
    **{(name, "in"): "hook_resid_mid" for name in ("pre_feedforward_layernorm", "ln_2")},
}
_WRITES = {
    **{(name, "out"): "mlp.hook_out" for name in ("mlp", "feed_forward", "ffn")},
    ("post_feedforward_layernorm", "out"): "hook_mlp_out",
}
_THEIR_READS = ("mlp.hook_in", "hook_resid_mid", "ln2.hook_normalized", "hook_mlp_in")
_THEIR_WRITES = ("hook_mlp_out", "mlp.hook_out")


@dataclass(frozen=True)
class _Shared:
    """What all transcoders of a set have in common there."""

    reads: str
    writes: str
    d_model: int
    d_sae: int
    k: int | None
    skip: bool
    model: str | None
    layers: int | None


class CircuitTracer(SetFormat):
    """circuit-tracer: per-layer transcoders of every layer of a model; one of them is read from its own file."""

    title = "circuit-tracer"
    files = ()  # of a hub one file is fetched, the one that the path names: there is no SAE of all layers

    def recognises(self, path: Path) -> bool:
        """By the name of a layer's file, or `config.yaml` beside such files."""
        if path.is_file():
            return bool(_FILE.fullmatch(path.name))
        return (path / CONFIG).is_file() and any(path.glob("layer_*.safetensors"))

    def read(self, path: Path) -> SAE:
        """See `Format.read`; path is the file of one layer, `config.yaml` stands beside it."""
        if path.is_dir():
            names = sorted(file.name for file in path.glob("layer_*.safetensors"))
            if not names:
                raise CheckpointError(f"{path} holds no layer_K.safetensors; give the folder that has them, whole")
            raise CheckpointError(f"{path} holds the transcoders of {len(names)} layers; give one: {path}/{names[0]}")
        named = _FILE.fullmatch(path.name)
        if named is None:
            raise CheckpointError(f"{path}: expected the file of a layer, layer_3.safetensors")
        layer, place = int(named[1]), path.with_name(CONFIG)
        config = read_yaml(place)
        if config.get("model_kind") != KIND:
            raise ConfigError(
                f"{place}: model_kind {config.get('model_kind')!r} cannot be imported: {KIND} alone has one transcoder "
                "a layer; cross-layer transcoders write to several"
            )
        found = read_safetensors(path)
        optional = [name for name in (THRESHOLD, "W_skip") if name in found]
        tensors = take(path, found, ("W_enc", "W_dec", "b_enc", "b_dec", *optional))
        k = number(place, config, "k", int) if config.get("activation") == "topk" else None
        threshold = tensors.get(THRESHOLD, 0.0) if k is None else None
        return plain_sae(
            path,
            matrix(path, "W_enc", tensors["W_enc"]),
            tensors["b_enc"],
            matrix(path, "W_dec", tensors["W_dec"]),
            tensors["b_dec"],
            threshold=threshold,
            k=k,
            W_skip=tensors.get("W_skip"),
            meta=_meta(place, config, layer),
        )

    def check_set(self, saes: Iterable[SAE]) -> None:
        """Refuses what is no transcoder from an MLP's input to its output for every layer, all of one kind."""
        self._shared(saes)

    def write_set(self, saes: Iterable[SAE], folder: Path) -> None:
        """Writes `config.yaml` and a file for each layer; weights as they are."""
        shared, jump = self._shared(saes)
        identities: dict[int, dict[str, Any]] = {}
        for sae in saes:
            layer = _places(sae)[0]
            tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
            if jump and sae.threshold is not None:
                tensors[THRESHOLD] = sae.threshold
            if sae.W_skip is not None:
                tensors["W_skip"] = sae.W_skip
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                folder / f"layer_{layer}.safetensors",
            )
            identities[layer] = identity_of(sae)
        activation = "topk" if shared.k is not None else JUMP if jump else "relu"
        config: dict[str, Any] = {"model_name": shared.model} if shared.model else {}
        config |= {
            "model_kind": KIND,
            "feature_input_hook": shared.reads,
            "feature_output_hook": shared.writes,
            "activation": activation,
        }
        if shared.k is not None:
            config["k"] = shared.k
        config[OWN_KEY] = [identities[layer] for layer in sorted(identities)]
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))

    def notes(self, sae: SAE) -> list[str]:
        """That top-k has to be said there again."""
        if sae.rule != "topk":
            return []
        return [
            "circuit-tracer takes these for ReLU, without a word, from a folder on disk or in a version up to 0.5.0; "
            "and its top-k keeps negative values: after loading set, for every transcoder, activation_function = "
            f"Sequential(TopK({sae.k}), ReLU()) (docs/interop.md)"
        ]

    def _shared(self, saes: Iterable[SAE]) -> tuple[_Shared, bool]:
        """What the transcoders have in common, and whether any has a threshold above 0.

        Raises:
            ConfigError: one of them is none that circuit-tracer takes, they differ, or a layer is missing.
        """
        found: dict[int, _Shared] = {}
        jump = False
        for sae in saes:
            layer, alike = self._one(sae)
            if layer in found:
                raise ConfigError(f"two transcoders of layer {layer}; circuit-tracer takes one for each layer")
            found[layer] = alike
            jump = jump or (sae.threshold is not None and bool((sae.threshold > 0).any()))
        if not found:
            raise ConfigError("no transcoder given; circuit-tracer takes one for each layer of a model")
        first = next(iter(found.values()))
        if missing := sorted(set(range(max(max(found) + 1, first.layers or 0))) - found.keys()):
            raise ConfigError(
                f"layer {missing[0]} has no transcoder; circuit-tracer needs those of all layers of a model: train "
                "them in one run (data.input 'mlp_in.*', data.target 'mlp_out.*')"
            )
        for layer, other in sorted(found.items()):
            for name in _Shared.__dataclass_fields__:
                if getattr(other, name) != getattr(first, name):
                    raise ConfigError(
                        f"layer {layer} has {name} {getattr(other, name)!r}, another {getattr(first, name)!r}; in "
                        "circuit-tracer the transcoders of all layers are alike"
                    )
        return first, jump

    def _one(self, sae: SAE) -> tuple[int, _Shared]:
        check_plain(sae, self.title)
        layer, reads, writes = _places(sae)
        if sae.d_in != sae.d_out:
            raise ConfigError(
                f"layer {layer} reads {sae.d_in} values and writes {sae.d_out}; circuit-tracer reads and writes the "
                "width of the residual stream"
            )
        layers = (sae.meta.get("model") or {}).get("layers")
        return layer, _Shared(reads, writes, sae.d_in, sae.d_sae, sae.k, sae.W_skip is not None, _model(sae), layers)


def _places(sae: SAE) -> tuple[int, str, str]:
    """Layer, and the hooks that a transcoder reads and writes.

    Raises:
        ConfigError: it does not say, or it does not go from an MLP's input to its output in one layer.
    """
    said = sae.meta.get("imported") or {}
    site, target = sae.meta.get("site"), sae.meta.get("target")
    if site and not is_transcoder(sae):
        raise ConfigError(
            f"this is an SAE of {site.get('id')}; circuit-tracer replaces MLPs, by transcoders from what they read to "
            "what they add (data.input 'mlp_in.*', data.target 'mlp_out.*')"
        )
    reads = _hook(site, _READS) or _their_hook(said.get("hook_name"), _THEIR_READS)
    writes = _hook(target, _WRITES) or _their_hook(said.get("hook_name_out"), _THEIR_WRITES)
    if reads is None or writes is None:
        fault = "reads" if reads is None else "writes"
        place = (site if reads is None else target) or {}
        where = place.get("id") or said.get("hook_name" if reads is None else "hook_name_out")
        raise ConfigError(
            f"this transcoder {fault} {where or 'a place that it does not name'}; circuit-tracer knows what an MLP "
            "reads (mlp_in.K, or the residual stream before its norm) and what it adds (mlp_out.K)"
        )
    if reads[0] != writes[0]:
        raise ConfigError(f"it reads layer {reads[0]} and writes layer {writes[0]}; in circuit-tracer both are one")
    return reads[0], reads[1], writes[1]


def _hook(site: Mapping[str, Any] | None, known: Mapping[tuple[str, str], str]) -> tuple[int, str] | None:
    found = _BLOCK.fullmatch(str(site.get("module_path"))) if site else None
    hook = known.get((found[2], str(site.get("where")))) if found and site else None
    return (int(found[1]), hook) if found and hook else None


def _their_hook(name: Any, known: tuple[str, ...]) -> tuple[int, str] | None:
    """Layer and hook of `blocks.K.HOOK`, or of our own alias of what an MLP reads."""
    if isinstance(name, str) and (alias := re.fullmatch(r"mlp_in\.(\d+)", name)):
        return int(alias[1]), "mlp.hook_in"
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name) if isinstance(name, str) else None
    return (int(found[1]), found[2]) if found and found[2] in known else None


def _model(sae: SAE) -> str | None:
    """The model's name, as transformers would load it; our own names for models mean nothing there."""
    name = (sae.meta.get("model") or {}).get("name") or (sae.meta.get("imported") or {}).get("model_name")
    return None if name is None or name == "demo" or str(name).startswith("package:") else str(name)


def _meta(place: Path, config: dict[str, Any], layer: int) -> dict[str, Any]:
    """Model and places, in their words, but what an MLP reads by our alias: TransformerLens has no such hook."""
    owns = config.get(OWN_KEY)
    own = owns[layer] if isinstance(owns, list) and layer < len(owns) else None
    reads, writes = config.get("feature_input_hook"), config.get("feature_output_hook")
    return {
        **own_identity(place, own),
        "imported": {
            "model_name": config.get("model_name"),
            "hook_name": f"mlp_in.{layer}" if reads == "mlp.hook_in" else f"blocks.{layer}.{reads}",
            "hook_name_out": f"blocks.{layer}.{writes}",
        },
    }

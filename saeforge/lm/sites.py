"""Sites: places in a model whose activations are read, named by module path or by alias.

A site id is `module.path:in` (the module's first input) or `module.path:out` (its output); `:out` may be left out.
Paths are those of the base model (`AutoModel`); the prefix of a head model (`model.`, `transformer.`) is accepted.

Aliases, K being a layer: `resid_pre.K`, `resid_mid.K`, `resid_post.K`, `attn_out.K` and `mlp_out.K` mean what stands
in, or is added to, the residual stream; `attn_in.K` and `mlp_in.K` what attention and MLP read, after their norm (the
input of a transcoder to `mlp_out.K`); `attn_z.K` what the heads, side by side, give to the output projection;
`mlp_act.K` the MLP's neurons. TransformerLens's names of these places are understood: `blocks.K.hook_resid_post` etc.

`*`, `?` and `[...]` in a name or alias stand for several sites: `resid_post.*`, `resid_post.[0-3]`, `layers.*.mlp`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from saeforge.data.site_names import KINDS, no_equal_place, parse_alias
from saeforge.errors import ConfigError

# In order of preference: the child of a layer whose output is added to the residual stream.
_ATTENTION = ("attention.output.dense", "self_attn", "attn", "attention", "self_attention")
_ATTENTION_IN = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "output.dense")
_MLP_IN = ("mlp", "feed_forward", "ffn", "intermediate")
# Its input is all heads side by side, and all neurons after the nonlinearity.
_HEADS_OUT = (
    *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attention.dense"),
    *("attn.c_proj", "attn.attention.out_proj", "attention.dense", "attention.output.dense"),
)
_NEURONS_OUT = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2", "output.dense")
# Attention and MLP one after the other, and the norm between them reads the sum (elsewhere it stands after, or beside).
_SEQUENTIAL = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gpt2", "gpt_neo")
_NORM_BETWEEN = ("post_attention_layernorm", "ln_2")
# Their attention and MLP modules add the residual themselves, so that the module's output is not what is added.
_ADD_RESIDUAL_INSIDE = ("bloom", "mpt")


@dataclass(frozen=True)
class Site:
    """A resolved site: `module_path` exists in the model; `alias` is the name given, when it was another one."""

    module_path: str
    where: str
    alias: str | None = None

    @property
    def id(self) -> str:
        """The canonical name: path, colon, in or out."""
        return f"{self.module_path}:{self.where}"


def find_layers(model: nn.Module, n_layers: int) -> str | None:
    """Return the path of the list of layers: the outermost ModuleList of `n_layers` equal classes, or None.

    A language model inside a multimodal model goes before the other towers.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and len({type(child) for child in module}) == 1
    ]
    found.sort(key=lambda name: (not re.search(r"language|text|decoder", name), name.count(".")))
    return found[0] if found else None


def resolve_sites(
    model: nn.Module, names: Sequence[str], *, layers: str | None, n_layers: int, prefix: str = "", model_type: str = ""
) -> list[Site]:
    """Resolve site names against a model (it may be on the meta device).

    Args:
        model: base model.
        names: ids, module paths or aliases.
        layers: path of the list of layers, from `find_layers`.
        n_layers: number of layers.
        prefix: name under which a head model keeps this base model.
        model_type: transformers' name of the architecture.

    Raises:
        ConfigError: unknown site, layer out of range, or the same site twice.
    """
    if not names:
        raise ConfigError("sites is empty; name at least one, for example resid_post.6")
    modules = dict(model.named_modules())
    sites: list[Site] = []
    for name in expand_patterns(names, list(modules), n_layers if layers is not None else 0):
        alias = parse_alias(name)
        if alias:
            kind, layer = alias
            if layers is None:
                raise ConfigError(f"site {name!r}: this model has no plain list of layers; give a module path instead")
            if layer >= n_layers:
                raise ConfigError(f"site {name!r}: the model has {n_layers} layers, 0 to {n_layers - 1}")
            path, where = _expand(name, kind, f"{layers}.{layer}", modules, model_type)
            site = Site(path, where, name)
        elif reason := no_equal_place(name):
            raise ConfigError(f"site {name!r}: {reason}")
        else:
            path, where = name.rsplit(":", 1) if ":" in name else (name, "out")
            if where not in ("in", "out"):
                raise ConfigError(f"site {name!r} ends in :{where}; expected :in or :out")
            if path not in modules and prefix and path.removeprefix(f"{prefix}.") in modules:
                path = path.removeprefix(f"{prefix}.")
            if path not in modules or not path:
                raise ConfigError(_unknown(name, path, list(modules), layers, n_layers))
            site = Site(path, where, name if name not in (path, f"{path}:{where}") else None)
        if site.id in {other.id for other in sites}:
            raise ConfigError(f"site {name!r} is named twice (it is {site.id})")
        sites.append(site)
    return sites


def expand_patterns(names: Sequence[str], modules: Sequence[str], n_layers: int) -> list[str]:
    """Replace patterns by the aliases or module paths that are like them, in the model's order.

    Raises:
        ConfigError: nothing is like a pattern.
    """
    found: list[str] = []
    for name in names:
        if not any(character in name for character in "*?["):
            found.append(name)
            continue
        kind = name.partition(".")[0]
        path, where = name.rsplit(":", 1) if ":" in name else (name, "")
        if kind in KINDS:
            like = [f"{kind}.{layer}" for layer in range(n_layers) if fnmatchcase(f"{kind}.{layer}", name)]
        else:
            ending = f":{where}" if where else ""
            like = [f"{module}{ending}" for module in modules if module and fnmatchcase(module, path)]
        if not like:
            raise ConfigError(f"site {name!r}: the model has no site like that; expected for example resid_post.*")
        found += [site for site in like if site not in found]
    return found


def last_layer_needed(model: nn.Module, sites: Sequence[Site], layers: str | None) -> int | None:
    """Return the index of the deepest layer that the sites need, or None if all layers must be loaded."""
    if layers is None:
        return None
    order = {name: number for number, name in enumerate(dict(model.named_modules()))}
    deepest = 0
    for site in sites:
        inside = re.match(rf"{re.escape(layers)}\.(\d+)(\.|$)", site.module_path)
        if inside:
            deepest = max(deepest, int(inside[1]))
        elif order[site.module_path] > order[layers] or layers.startswith(f"{site.module_path}."):
            return None  # after the layers (a final norm), or around them
    return deepest


def _expand(name: str, kind: str, layer: str, modules: dict[str, nn.Module], model_type: str) -> tuple[str, str]:
    """Return path and in/out of an alias at one layer."""
    if kind == "resid_pre":
        return layer, "in"
    if kind == "resid_post":
        return layer, "out"
    if kind == "resid_mid":
        # Sandwich norms (Gemma 2 and 3): the norm before the MLP reads the sum, the one after attention its output.
        children = ("pre_feedforward_layernorm", *(_NORM_BETWEEN if model_type in _SEQUENTIAL else ()))
    elif kind in ("attn_out", "mlp_out"):
        children = _ATTENTION if kind == "attn_out" else _MLP
        if model_type in _ADD_RESIDUAL_INSIDE:
            children = ()
        elif f"{layer}.post_feedforward_layernorm" in modules:
            # Sandwich norms (Gemma 2 and 3, OLMo 2): what is added is the output of the norm after the sublayer.
            children = ("post_attention_layernorm" if kind == "attn_out" else "post_feedforward_layernorm",)
    else:
        inputs = {"mlp_in": _MLP_IN, "attn_in": _ATTENTION_IN, "attn_z": _HEADS_OUT, "mlp_act": _NEURONS_OUT}
        children = inputs[kind]
    for child in children:
        if f"{layer}.{child}" in modules:
            return f"{layer}.{child}", "out" if kind in ("attn_out", "mlp_out") else "in"
    known = sorted(path for path in modules if path.startswith(f"{layer}.") and path.count(".") == layer.count(".") + 1)
    raise ConfigError(
        f"site {name!r}: {kind} has no known module here; give a module path, for example of: {', '.join(known)}"
    )


def _unknown(name: str, path: str, modules: list[str], layers: str | None, n_layers: int) -> str:
    """Return the message for a site that does not exist, with real paths that are near to it."""
    near = difflib.get_close_matches(path, [module for module in modules if module], n=3, cutoff=0.5)
    if layers is not None and not near:
        near = [f"{layers}.{min(n_layers - 1, n_layers // 2)}", f"resid_post.{n_layers // 2}"]
    return f"unknown site {name!r}: the model has no such module; did you mean {', '.join(near)}?"

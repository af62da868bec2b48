"""Names of places in a transformer: aliases like `resid_post.3`, and TransformerLens's hooks that are the same places.

Text only: which module of a model it is, `saeforge.lm.sites` finds out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: TransformerLens's hook in a block -> the kind of alias of the same place.
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "ln1.hook_normalized": "attn_in",
    "ln2.hook_normalized": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "attn.hook_z": "attn_z",
    "mlp.hook_post": "mlp_act",
}
KINDS = tuple(dict.fromkeys(HOOKS.values()))
#: As wide as the heads together, or as there are neurons; all others are as wide as the residual stream.
INSIDE = ("attn_z", "mlp_act")

#: Hooks without an equal place in a HuggingFace model, and what stands nearest.
_NEAREST = {
    "hook_mlp_in": "it is what the MLP's norm reads: resid_mid.{layer}; what the MLP reads is mlp_in.{layer}",
    "hook_attn_in": "it is what the attention's norm reads, a copy for each head: resid_pre.{layer}",
    "attn.hook_q": "give the path of the module that makes the queries, like layers.{layer}.self_attn.q_proj",
    "attn.hook_k": "give the path of the module that makes the keys, like layers.{layer}.self_attn.k_proj",
    "attn.hook_v": "give the path of the module that makes the values, like layers.{layer}.self_attn.v_proj",
    "mlp.hook_pre": "give the path of the module before the nonlinearity, like layers.{layer}.mlp.gate_proj",
    "attn.hook_result": "each head's own output is not computed there; their sum is attn_out.{layer}",
    "hook_embed": "what enters the first layer, positions included, is resid_pre.0",
    "hook_pos_embed": "what enters the first layer, positions included, is resid_pre.0",
    "ln_final.hook_normalized": "give the path of the last norm, like norm or ln_f",
}
_BLOCK_HOOK = re.compile(r"blocks\.(\d+)\.((?:\w+\.)?hook_\w+)")
_ANY_HOOK = re.compile(r"(?:\w+\.)*hook_\w+")
_ALIAS = re.compile(rf"({'|'.join(KINDS)})\.(\d+)")

_CENTRED = (
    "HookedTransformer.from_pretrained takes the mean over d off whatever is written to the residual stream of a model "
    "with LayerNorm (center_writing_weights)"
)
_FOLDED = "HookedTransformer.from_pretrained moves the norm's weight into the next layer (fold_ln)"
_VALUE = "HookedTransformer.from_pretrained moves the values' bias into the output's (fold_value_biases)"
_PROCESSED = {
    **dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), _CENTRED),
    **dict.fromkeys(("attn_in", "mlp_in"), _FOLDED),
    "attn_z": _VALUE,
}
#: Options of TransformerLens that change activations.
PROCESSING = ("fold_ln", "center_writing_weights", "fold_value_biases")


def parse_alias(name: str) -> tuple[str, int] | None:
    """Kind and layer of an alias or of a hook that is one; None for any other name."""
    if found := _ALIAS.fullmatch(name):
        return found[1], int(found[2])
    found = _BLOCK_HOOK.fullmatch(name)
    if found and found[2] in HOOKS:
        return HOOKS[found[2]], int(found[1])
    return None


def hook_of_alias(name: str) -> str | None:
    """TransformerLens's name of an alias's place; a hook's name stays; None for any other name."""
    parsed = parse_alias(name)
    if parsed is None:
        return None
    if _BLOCK_HOOK.fullmatch(name):
        return name
    kind, layer = parsed
    return f"blocks.{layer}.{next(hook for hook, other in HOOKS.items() if other == kind)}"


def no_equal_place(name: str) -> str | None:
    """Why a name of TransformerLens's is no site here; None if it is none of its names, or one that is a site."""
    if parse_alias(name) is not None or not _ANY_HOOK.fullmatch(name):
        return None
    found = _BLOCK_HOOK.fullmatch(name)
    layer, hook = (found[1], found[2]) if found else ("K", name)
    nearest = _NEAREST.get(hook)
    if nearest is None:
        nearest = f"those of a block that have one: {', '.join(HOOKS)}"
    return f"TransformerLens's hook {name} has no equal place in a HuggingFace model; {nearest.format(layer=layer)}"


def processing_note(name: str, options: Mapping[str, Any] | None = None) -> str | None:
    """How the activations at a hook may differ from a HuggingFace model's; None where they do not.

    Args:
        name: the hook's name, as TransformerLens has it.
        options: with which the model was loaded there (`model_from_pretrained_kwargs` of SAELens, whose own default is
            to change nothing); None if that is not known.
    """
    found = _BLOCK_HOOK.fullmatch(name)
    said = _PROCESSED.get(HOOKS.get(found[2], "")) if found else None
    if said is None or (options is not None and not any(options.get(option) for option in PROCESSING)):
        return None
    return f"{said}; activations at {name} are those of a HuggingFace model only with from_pretrained_no_processing"

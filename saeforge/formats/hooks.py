"""Sites by the hook names of TransformerLens, for tools that know no others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LAYER = re.compile(r"(?:.*\.)?(?:layers?|h|blocks?)\.(\d+)(?:\.(.+))?")
#: What is added to the residual stream by a layer's child; with sandwich norms it is the norm after the sublayer.
_HOOKS = {
    ("", "in"): "hook_resid_pre",
    ("", "out"): "hook_resid_post",
    **{(name, "out"): "hook_attn_out" for name in ("self_attn", "attn", "attention", "self_attention")},
    **{(name, "out"): "hook_mlp_out" for name in ("mlp", "feed_forward", "ffn", "post_feedforward_layernorm")},
}


def transformer_lens_name(site: Mapping[str, Any]) -> str | None:
    """The hook `blocks.K.hook_...` at a site's record (module_path, where).

    A site without such a hook, like what an MLP reads after its norm, keeps its own path; None without a path.
    """
    path, where = str(site.get("module_path") or ""), str(site.get("where") or "")
    found = _LAYER.fullmatch(path)
    hook = _HOOKS.get((found[2] or "", where)) if found else None
    if found and hook:
        return f"blocks.{found[1]}.{hook}"
    return path or None

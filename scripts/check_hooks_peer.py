"""An SAE attached to TransformerLens's and nnsight's own models; runs in an environment with one of them.

    PYTHONPATH=. PYTHON scripts/check_hooks_peer.py transformer_lens
    PYTHONPATH=. PYTHON scripts/check_hooks_peer.py nnsight

PYTHON is the interpreter of an environment of scripts/interop_environments.sh (saelens, dictionary_learning). A random
GPT-2 is given to the tool, and what it computes with the SAE in place must be what transformers computes with it.
Prints one line for each comparison and ends with 1 if one fails. Of saeforge it needs torch and safetensors alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from saeforge.sae import SAE
from saeforge.steering import Clamp, Splice, attached

D, D_SAE, LAYERS = 32, 64, 3
IDS = torch.arange(3, 31).reshape(2, 14)
SITE = {"id": "h.1:out", "module_path": "h.1", "where": "out"}
LARGEST = 1e-4


def main() -> int:
    """1 if something differs."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=D,
        n_layer=LAYERS,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    W = torch.randn(D_SAE, D)
    threshold = torch.full((D_SAE,), 0.2)
    sae = SAE(W, torch.zeros(D_SAE), W / 30, torch.randn(D), rule="threshold", threshold=threshold, meta={"site": SITE})
    rows: list[tuple[str, Tensor, Tensor]] = []
    with torch.no_grad():
        {"transformer_lens": transformer_lens, "nnsight": nnsight}[sys.argv[1]](model, sae, rows)
    failed = 0
    for name, found, expected in rows:
        error = float((found - expected).abs().max() / expected.abs().max())
        failed += not error <= LARGEST
        print(f"{name:<52} {error:.1e}{'' if error <= LARGEST else '  FAILS'}")
    return int(failed > 0)


def expected_of(model: Any, sae: SAE, **options: Any) -> Tensor:
    """Logits of transformers with the SAE in place."""
    with attached(model, sae, **options):
        logits: Tensor = model(IDS).logits
    return logits


CASES: dict[str, dict[str, Any]] = {
    "reconstruction": {},
    "error kept": {"keep_error": True},
    "error kept, an edit": {"keep_error": True, "edits": {3: Clamp(4.0)}},
    "first tokens left alone": {"mask": torch.arange(14).expand(2, 14) > 0},
}


def transformer_lens(model: Any, sae: SAE, rows: list[tuple[str, Tensor, Tensor]]) -> None:
    """HookedTransformer without processing, by its own hooks and by `attached`."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D,
        n_ctx=64,
        d_head=D // 4,
        n_heads=4,
        d_vocab=64,
        act_fn="gelu_new",
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
    )
    hooked = HookedTransformer(config)
    hooked.load_and_process_state_dict(
        convert_gpt2_weights(model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    hooked.eval()
    rows.append(("plain", hooked(IDS), model(IDS).logits))
    for name, options in CASES.items():
        expected = expected_of(model, sae, **options)
        with attached(hooked, sae, **options):
            rows.append((f"attached: {name}", hooked(IDS), expected))
        logits = hooked.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_post", Splice(sae, **options))])
        rows.append((f"fwd_hooks: {name}", logits, expected))
    _, cache = hooked.run_with_cache(IDS)
    for hook in (
        *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
        *("ln1.hook_normalized", "ln2.hook_normalized", "attn.hook_z", "mlp.hook_post"),
    ):
        name = f"blocks.1.{hook}"
        rows.append(
            (f"site: {name}", cache[name].flatten(2) if hook == "attn.hook_z" else cache[name], seen(model, name))
        )


def seen(model: Any, name: str) -> Tensor:
    """A site's activations in the model of transformers."""
    from saeforge.lm.hooks import attach
    from saeforge.lm.sites import resolve_sites

    base = model.transformer
    (site,) = resolve_sites(base, [name], layers="h", n_layers=LAYERS, prefix="transformer", model_type="gpt2")
    found: list[Tensor] = []
    keep: Callable[[Tensor], None] = found.append
    handle = attach(model, site, keep)
    model(IDS)
    handle.remove()
    return found[0]


def nnsight(model: Any, sae: SAE, rows: list[tuple[str, Tensor, Tensor]]) -> None:
    """A model wrapped by nnsight, by its traces and by `attached`."""
    from nnsight import NNsight

    wrapped = NNsight(model)
    for name, options in CASES.items():
        expected = expected_of(model, sae, **options)
        with attached(wrapped, sae, **options):
            with wrapped.trace(IDS):
                logits = wrapped.lm_head.output.save()
        rows.append((f"attached: {name}", logits, expected))
        splice = Splice(sae, **options)
        with wrapped.trace(IDS):
            layer = wrapped.transformer.h[1]
            given = layer.output
            layer.output = splice(given) if isinstance(given, torch.Tensor) else (splice(given[0]), *given[1:])
            logits = wrapped.lm_head.output.save()
        rows.append((f"trace: {name}", logits, expected))


if __name__ == "__main__":
    sys.exit(main())

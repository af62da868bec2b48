"""Tiny random causal models of five architectures, random SAEs for them, and steering written out once more, slowly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from saeforge.sae import SAE

KINDS = ("gpt2", "gpt_neox", "gemma2", "qwen3", "llama")
D, D_SAE, K = 32, 96, 12
VOCABULARY = 120
SPECIAL = {0, 1, 2}  # PAD, BOS, EOS
SITE = "resid_post.1"
# The layer's path in the model with its head; written out here, not asked of the code under test.
LAYER = {"gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1"}


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of 3 layers; wide weights and a head of its own, so that it does not repeat one token for ever."""
    common: dict[str, Any] = dict(
        tie_word_embeddings=False,
        vocab_size=VOCABULARY,
        initializer_range=0.35,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    sizes: dict[str, Any] = dict(hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    grouped: dict[str, Any] = dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    config: Any
    if kind == "gpt2":
        config = GPT2Config(n_positions=256, n_embd=D, n_layer=3, n_head=4, **common)
    elif kind == "gpt_neox":
        config = GPTNeoXConfig(max_position_embeddings=256, **sizes, **common)
    elif kind == "gemma2":  # a window shorter than what the tests generate
        config = Gemma2Config(sliding_window=16, query_pre_attn_scalar=8, **sizes, **grouped, **common)
    elif kind == "qwen3":
        config = Qwen3Config(**sizes, **grouped, **common)
    else:
        config = LlamaConfig(**sizes, **grouped, **common)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # so that every text gets its full length
    return model


def make_sae(rule: str, kind: str = "llama", *, seed: int = 0, d: int = D) -> SAE:
    """A random SAE whose latents fire at some tokens only; decoder rows long enough that edits turn the text."""
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(D_SAE, d, generator=generator) / d**0.5
    b_enc = 0.1 * torch.randn(D_SAE, generator=generator)
    W_dec = 2 * torch.randn(D_SAE, d, generator=generator)
    path = LAYER.get(kind, "model.layers.1").partition(".")[2]
    meta = {"site": {"id": f"{path}:out", "module_path": path, "where": "out", "d": d}}
    if rule == "topk":
        return SAE(W_enc, b_enc, W_dec, torch.zeros(d), rule="topk", k=K, meta=meta)
    threshold = torch.rand(D_SAE, generator=generator)
    return SAE(W_enc, b_enc, W_dec, torch.zeros(d), rule="threshold", threshold=threshold, meta=meta)


def dense_latents(sae: SAE, x: Tensor) -> Tensor:
    """(rows, d_sae) by the definition of the rule, in float64."""
    pre = x.double() @ sae.W_enc.double().T + sae.b_enc.double()
    if sae.threshold is not None:
        return pre * (pre > sae.threshold.double())
    best = pre.topk(sae.k or 0, dim=-1)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.clamp_min(0))


Rule = Callable[[Tensor], Tensor]  # a latent's values -> its new values


@contextmanager
def steered_by_hand(model: Any, kind: str, sae: SAE, edits: dict[int, Rule], mask: Tensor | None) -> Iterator[None]:
    """The oracle: at each token of the mask (batch, length), x + sum over latents of (f' - f) d, one after another."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        f = dense_latents(sae, x)
        new = x.double()
        for latent, rule in edits.items():
            here = f[..., latent]
            step = (rule(here) - here)[..., None] * sae.W_dec[latent].double()
            new = new + (step if mask is None else step * mask[..., None])
        new = new.to(x.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.get_submodule(LAYER.get(kind, "model.layers.1")).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def some_ids(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids that are not special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)

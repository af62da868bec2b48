"""The object that SAEBench, sae-probes and other code with dense latents take, around an SAE.

They ask of an SAE what SAEBench's `custom_saes/base_sae.py` has: `encode`, `decode` and `forward` on dense tensors,
`W_enc (d_in, d_sae)`, `W_dec (d_sae, d_in)` with rows of norm 1, `b_enc`, `b_dec`, `device`, `dtype`, `to`, and a `cfg`
that can be written to, with `to_dict`. Nothing of theirs is imported.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.formats.base import check_plain, is_transcoder
from saeforge.formats.hooks import transformer_lens_name
from saeforge.sae import SAE


@dataclass
class Config:
    """What they read of an SAE's configuration (`custom_saes/custom_sae_config.py`); they add more to it.

    Attributes:
        model_name: by which TransformerLens loads the model.
        hook_name: of TransformerLens. hook_layer: its layer.
        d_in, d_sae: widths.
        dtype: of the weights, as a word.
        architecture: threshold or topk.
        context_size, dataset_path: of the activations it was trained on, where known.
    """

    model_name: str
    hook_name: str
    hook_layer: int
    d_in: int
    d_sae: int
    dtype: str
    device: str
    architecture: str
    context_size: int | None = None
    dataset_path: str = ""
    hook_head_index: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = False
    dataset_trust_remote_code: bool = False
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    finetuning_scaling_factor: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields above, for a file of results."""
        return asdict(self)


class DenseSAE(nn.Module):
    """An SAE with dense latents, in units of unit decoder rows; made by `for_saebench`.

    Attributes:
        W_enc: (d_in, d_sae). W_dec: (d_sae, d_in), rows of norm 1. b_enc: (d_sae,). b_dec: (d_in,).
        cfg: see `Config`.
    """

    def __init__(self, sae: SAE, cfg: Config) -> None:
        """See `for_saebench`."""
        super().__init__()
        norms = sae.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))  # a latent that writes nothing stays as it is
        self.sae = sae
        self.cfg = cfg
        self.register_buffer("norms", norms)
        self.W_enc = nn.Parameter((sae.W_enc * norms[:, None]).T.contiguous(), requires_grad=False)
        self.b_enc = nn.Parameter(sae.b_enc * norms, requires_grad=False)
        self.W_dec = nn.Parameter(sae.W_dec / norms[:, None], requires_grad=False)
        self.b_dec = nn.Parameter(sae.b_dec.clone(), requires_grad=False)

    norms: Tensor

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.W_dec.dtype

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents (..., d_sae) of activations (..., d_in): those of the SAE times the norms of its decoder's rows."""
        return self.sae.encode(x).to_dense().reshape(*x.shape[:-1], -1) * self.norms

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Activations (..., d_in) of latents (..., d_sae)."""
        return latents.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of activations (..., d_in)."""
        return self.decode(self.encode(x))


def for_saebench(
    sae: SAE, *, model_name: str | None = None, hook_name: str | None = None, context_size: int | None = None
) -> DenseSAE:
    """What SAEBench and sae-probes take for this SAE.

    Latents are in units of unit decoder rows, as they ask, so that each is the SAE's own times the norm of its row;
    what is active, and what is reconstructed, stay.

    Args:
        sae: trained here, or imported.
        model_name: by which TransformerLens loads the model; default: what the SAE says.
        hook_name: of TransformerLens, `blocks.K.hook_...`; default: that of its site.
        context_size: tokens of a context, for the suites that make their own activations.

    Raises:
        ConfigError: a transcoder, an encoder of a plugin, several sources, or no model or hook.
    """
    check_plain(sae, "SAEBench")
    if is_transcoder(sae) or sae.W_skip is not None:
        raise ConfigError("SAEBench puts a reconstruction in the place that was read; this is a transcoder")
    said = sae.meta.get("imported") or {}
    site = sae.meta.get("site")
    model_name = model_name or (sae.meta.get("model") or {}).get("name") or said.get("model_name")
    hook_name = hook_name or (transformer_lens_name(site) if site else said.get("hook_name"))
    layer = re.fullmatch(r"blocks\.(\d+)\..+", hook_name or "")
    if not model_name or layer is None:
        raise ConfigError(
            f"this SAE reads model {model_name or '?'} at {hook_name or '?'}; give model_name and hook_name as "
            "TransformerLens has them, blocks.K.hook_resid_post and so on"
        )
    cfg = Config(
        model_name=model_name,
        hook_name=str(hook_name),
        hook_layer=int(layer[1]),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        dtype=str(sae.W_dec.dtype).removeprefix("torch."),
        device=str(sae.device),
        architecture=sae.rule,
        context_size=context_size,
        dataset_path=str(sae.meta.get("dataset_path") or ""),
    )
    return DenseSAE(sae, cfg)

"""`steer`: a causal language model with latents edited, inside a `with`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.lm.hooks import attach
from saeforge.lm.sites import Site, find_layers, resolve_sites
from saeforge.sae import SAE
from saeforge.steering.audit import Audit, Tally
from saeforge.steering.delta import Delta
from saeforge.steering.edits import Edit, Edits, parse_edits
from saeforge.steering.positions import Positions, Where, find_special_ids
from saeforge.steering.scales import LatentScales, read_scales


class Steering:
    """What `steer` gives: the edits that hold, and what they have done so far.

    Attributes:
        edits: by latent.
        site: where.
        where: at which tokens.
    """

    def __init__(self, delta: Delta, edits: dict[int, Edit], site: Site, positions: Positions) -> None:
        self.edits = edits
        self.site = site
        self.where = positions.where
        self._delta = delta
        self._positions = positions
        self._tally = Tally.empty(len(edits), delta.latents.device)

    def audit(self) -> Audit:
        """Return what the edits have done since the context was entered. Waits for the device."""
        return self._tally.read(self.edits, self.site.id, self.where)

    def _edit(self, x: Tensor) -> Tensor | None:
        """What the hook at the site calls: the edited activations, or None if none of them changes."""
        editable = self._positions.editable
        d = self._delta.sae.d_in
        if editable is None:
            raise ConfigError(
                f"site {self.site.id} ran outside of a forward pass of the model given to steer; call that model, or "
                "give steer the one that is called"
            )
        if x.shape[-1] != d or x.numel() != editable.numel() * d:
            raise ConfigError(
                f"site {self.site.id}: activations of shape {tuple(x.shape)} are not one row of {d} per token of "
                f"{tuple(editable.shape)}; check the model and site"
            )
        if x.device != self._delta.sae.device:
            raise ConfigError(
                f"the SAE is on {self._delta.sae.device}, its site {self.site.id} on {x.device}; move it: "
                f"saeforge.load(RUN, device='{x.device}')"
            )
        with torch.autocast(x.device.type, enabled=False):
            rows, selected = x.reshape(-1, d), editable.reshape(-1, 1).to(x.device)
            f = self._delta.values(rows)
            change = torch.where(selected, self._delta.change(f), torch.zeros_like(f))
            touched = (change != 0).any(1, keepdim=True)
            delta = change @ self._delta.W_dec
            self._tally.add(selected, touched, f, change, delta, rows)
            if not self._delta.changes:
                return None
            wide = torch.promote_types(x.dtype, torch.float32)
            edited = (rows.to(wide) + delta.to(wide)).to(x.dtype)
            # Not left to adding zero, which would turn a -0 into 0: what is not edited keeps its bits.
            return torch.where(touched, edited, rows).reshape(x.shape)


@contextmanager
def steer(
    model: nn.Module,
    sae: SAE,
    edits: Edits,
    *,
    site: Site | str | None = None,
    where: Where = "all",
    scales: LatentScales | str | Path | None = None,
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    skip_special: bool = True,
) -> Iterator[Steering]:
    """Edit latents of a HuggingFace causal language model's activations while inside the `with`.

    At the SAE's site, x becomes x + (f' - f) @ W_dec over the edited latents, in fp32, cast back to x's dtype: the
    error of the SAE stays as it is, and where nothing changes x keeps its bits. f is what the SAE's encoder finds in x.
    Contexts nest: each edits what the ones entered before it left.

        with saeforge.steer(model, sae, {123: Clamp(0), 456: Scale(2)}, tokenizer=tokenizer) as steering:
            model.generate(**inputs)
        print(steering.audit())

    Prompt and generated: inside `model.generate`, its prompt and what it adds, with a cache or without. In forward
    passes that you call yourself, what a pass without past_key_values (or with empty ones) reads is the prompt, and
    what is read later with the cache that it filled is generated; so teacher forcing has no generated tokens.

    Args:
        model: the model that will be called; the base model or one with a head.
        sae: on the device of its site.
        edits: by latent, `{123: Clamp(0)}`, or texts `["123=clamp:0"]`.
        site: where the SAE belongs; None: what the SAE says.
        where: "all" tokens, those of the "prompt", or the "generated" ones.
        scales: sizes of the units max and p99, or the RUN folder whose features hold them.
        tokenizer: of the model; says which tokens are special (a model's configuration may name only some).
        special_ids: the special tokens, instead.
        skip_special: never edit at special tokens. Padding is never edited.

    Yields:
        The `Steering`; its `audit()` tells what was done, also after the context.

    Raises:
        ConfigError: edits, site or SAE that do not fit the model; in a forward pass: inputs that do not say which of
            its tokens may be edited.
        DatasetError: `scales` is a RUN without features, or with those of another SAE.
    """
    parsed = parse_edits(edits)
    if not isinstance(scales, LatentScales | None):
        wanted = [latent for latent, edit in parsed.items() if getattr(edit, "unit", "abs") != "abs"]
        scales = read_scales(scales, wanted) if wanted else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"steering: {type(model).__name__} is an encoder-decoder; give a causal language model")
    special = find_special_ids(model, tokenizer, special_ids) if skip_special else None
    positions = Positions(model, where, special)
    delta = Delta.of(sae, parsed, scales)
    steering = Steering(delta, parsed, find_site(model, sae, site), positions)
    with positions:
        handle = attach(model, steering.site, steering._edit)
        try:
            yield steering
        finally:
            handle.remove()


def find_site(model: nn.Module, sae: SAE, site: Site | str | None) -> Site:
    """Return where in the model to steer.

    Raises:
        ConfigError: the SAE does not say, or the model has no such site.
    """
    if isinstance(site, Site):
        return site
    if site is None:
        record = sae.meta.get("site")
        if not record:
            raise ConfigError("steering: this SAE does not say where in a model it belongs; give site=")
        return Site(record["module_path"], record["where"])
    config: Any = getattr(model, "config", None)
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, model) if prefix else model
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", 0) if config is not None else 0
    (found,) = resolve_sites(
        base,
        [site],
        layers=find_layers(base, n_layers) if n_layers else None,
        n_layers=n_layers,
        prefix=prefix,
        model_type=getattr(config, "model_type", ""),
    )
    return found

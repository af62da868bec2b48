"""`attached`: an SAE in its place in a model, its reconstruction going on from there; and the hook that does it.

`steer` is for generating text with a HuggingFace model: it knows prompts, caches, padding and special tokens. This is
the plain thing below it, for any torch module and for whatever calls functions on activations (TransformerLens,
nnsight).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saeforge.data.site_names import hook_of_alias
from saeforge.errors import ConfigError
from saeforge.formats.hooks import transformer_lens_name
from saeforge.lm.hooks import attach_to, site_module
from saeforge.lm.sites import Site
from saeforge.ops import Above, SparseCode, TopK, encode
from saeforge.sae import SAE
from saeforge.steering.context import find_site
from saeforge.steering.delta import Delta
from saeforge.steering.edits import Edits, parse_edits
from saeforge.steering.scales import LatentScales, read_scales


class Splice:
    """A function of activations that puts an SAE in their place: reconstruction, or edits alone.

        splice = Splice(sae)
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.hook_resid_post", splice)])
        splice.code.to_dense()

    The activations become `decode(f')`, f' being the latents after the edits. With `keep_error` they become
    x + decode(f') - decode(f): the SAE's error stays, so that without edits nothing changes, to the bit (SAELens's
    `use_error_term`). Where gradients are enabled they go through the latents and not through the error, and
    `splice.code.values.grad` holds those of the latents after a backward pass.

    A transcoder reads one place and writes another: `splice.read` is the function for the first, `splice.write` for the
    second. For an SAE `splice(x)` does both.

    Attributes:
        code: latents of the last pass, before edits; rows are all tokens, masked ones too. None before the first.
        runs: how many passes there were.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        keep_error: bool = False,
        edits: Edits = (),
        scales: LatentScales | str | Path | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Makes the edits ready.

        Args:
            sae: on the device of the activations.
            keep_error: add what the SAE does not explain.
            edits: by latent, `{123: Clamp(0)}`, or texts `["123=clamp:0"]`.
            scales: sizes of the units max and p99, or the RUN folder whose features hold them.
            mask: bool, as many as there are tokens: where the SAE acts; elsewhere activations keep their bits. A first
                token, which many SAEs never saw, is left alone by `mask=tokens != bos_token_id`.

        Raises:
            ConfigError: edits that do not fit the SAE.
        """
        parsed = parse_edits(edits)
        if not isinstance(scales, LatentScales | None):
            wanted = [latent for latent, edit in parsed.items() if getattr(edit, "unit", "abs") != "abs"]
            scales = read_scales(scales, wanted) if wanted else None
        self.sae, self.keep_error, self.mask = sae, keep_error, mask
        self.delta = Delta.of(sae, parsed, scales, transcoders=True)
        self.code: SparseCode | None = None
        self.runs = 0
        self._read: tuple[Tensor, torch.Size] | None = None

    def __call__(self, x: Tensor, hook: Any = None) -> Tensor:
        """The activations that go on.

        Args:
            x: (..., d_in), or (..., heads, d_head) with d_in = heads * d_head.
            hook: what TransformerLens passes; not used.

        Returns:
            The same shape and dtype.

        Raises:
            ConfigError: activations of another width or device, or a mask for other tokens.
        """
        self.read(x)
        return self.write(x)

    def read(self, x: Tensor, hook: Any = None) -> None:
        """Encodes the activations that the SAE reads; they stay."""
        rows = self._rows(x, self.sae.d_in, "reads")
        with torch.autocast(x.device.type, enabled=False):
            self.code = _encode(self.sae, rows)
        self._read = rows, rows.shape[:1]

    def write(self, y: Tensor, hook: Any = None) -> Tensor:
        """What takes the place of the activations that the SAE writes, from what was read last."""
        if self._read is None or self.code is None:
            raise ConfigError(
                "the place that this SAE writes ran before the one that it reads, or twice; check the sites"
            )
        (x, count), code = self._read, self.code
        self._read = None
        target = self._rows(y, self.sae.d_out, "writes")
        if target.shape[:1] != count:
            raise ConfigError(f"this SAE read {count[0]} tokens and is to write {len(target)}; check the sites")
        with torch.autocast(y.device.type, enabled=False):
            new = self._new(x, code, target)
        if self.mask is not None:
            if self.mask.numel() != len(target):
                raise ConfigError(
                    f"the mask has shape {tuple(self.mask.shape)}, the activations are of {len(target)} tokens; "
                    "expected one value for each"
                )
            new = torch.where(self.mask.reshape(-1, 1).to(new.device), new, target)
        self.runs += 1
        return new.reshape(y.shape)

    def _new(self, x: Tensor, code: SparseCode, target: Tensor) -> Tensor:
        grows = torch.is_grad_enabled()
        change = self.delta.change(self.delta.values_of(code)) if self.delta.changes else None
        moved = None if change is None else change @ self.delta.W_dec
        if self.keep_error and not grows and moved is None:
            return target
        wide = torch.promote_types(target.dtype, torch.float32)
        if not self.keep_error:
            out = self.sae.decode(code, x).to(wide)
            return (out if moved is None else out + moved.to(wide)).to(target.dtype)
        out = target.to(wide)
        if grows:  # through the latents alone: the difference is 0, its gradient is not
            out = self.sae.decode(code, x).to(wide)
            out = target.detach().to(wide) + (out - out.detach())
        if moved is None or change is None:
            return out.to(target.dtype)
        # Not left to adding zero, which would turn a -0 into 0: a token that no edit touches keeps its bits.
        return torch.where((change != 0).any(1, keepdim=True), out + moved.to(wide), out).to(target.dtype)

    def _rows(self, x: Tensor, d: int, what: str) -> Tensor:
        heads = x.dim() > 1 and x.shape[-1] != d and x.shape[-2] * x.shape[-1] == d
        if x.shape[-1] != d and not heads:
            raise ConfigError(
                f"activations of shape {tuple(x.shape)}, this SAE {what} {d} values a token; check the model and site"
            )
        if x.device != self.sae.device:
            raise ConfigError(
                f"the SAE is on {self.sae.device}, the activations are on {x.device}; move it: "
                f"saeforge.load(RUN, device='{x.device}')"
            )
        return x.reshape(-1, d)


@contextmanager
def attached(
    model: Any,
    sae: SAE,
    *,
    site: Site | str | None = None,
    target: Site | str | None = None,
    keep_error: bool = False,
    edits: Edits = (),
    scales: LatentScales | str | Path | None = None,
    mask: Tensor | None = None,
) -> Iterator[Splice]:
    """Puts an SAE in its place in a model while inside the `with`.

        with saeforge.attached(model, sae, keep_error=True, edits={123: Clamp(0)}) as splice:
            logits = model(tokens)
        splice.code  # the latents

    The model may be a HuggingFace model, TransformerLens's HookedTransformer or TransformerBridge, nnsight's
    LanguageModel (inside its traces), or any torch module with `site` a path in it. Contexts nest.

    Args:
        model: that will be called.
        sae: an SAE, or a transcoder, of one site; on the device of its site.
        site: where it reads: an id, a path, an alias or TransformerLens's hook; None: what the SAE says.
        target: where a transcoder writes; None: what the SAE says, or `site`.
        keep_error, edits, scales, mask: see `Splice`.

    Yields:
        The `Splice`: latents of the last pass, also after the context.

    Raises:
        ConfigError: a site or edits that do not fit; in a forward pass: activations that do not.
    """
    splice = Splice(sae, keep_error=keep_error, edits=edits, scales=scales, mask=mask)
    module, place = locate(model, sae, site)
    record = sae.meta.get("target")
    if target is None and site is None and record:
        target = Site(record["module_path"], record["where"])
    with ExitStack() as stack:
        if target is None:
            stack.callback(attach_to(module, place, splice).remove)
        else:
            there, other = locate(model, sae, target)
            # A hook that is attached first runs first: where both are one, it reads before it writes.
            stack.callback(attach_to(module, place, splice.read).remove)
            stack.callback(attach_to(there, other, splice.write).remove)
        yield splice


def locate(model: Any, sae: SAE, site: Site | str | None) -> tuple[nn.Module, Site]:
    """The module of a site, in a model of any of the kinds that `attached` takes.

    Raises:
        ConfigError: no such place.
    """
    hooks = getattr(model, "hook_dict", None)
    if isinstance(hooks, dict):  # TransformerLens: a hook is a module that returns what it is given
        if site is None and not sae.meta.get("site"):
            raise ConfigError("this SAE does not say where in a model it belongs; give site=")
        name = _hook_name(sae.meta["site"] if site is None else site)
        if name is None or name not in hooks:
            raise ConfigError(f"site {site or name!r}: this {type(model).__name__} has no hook {name}")
        return hooks[name], Site(name, "out")
    if not isinstance(model, nn.Module):  # nnsight wraps one
        inner = getattr(model, "_module", None) or getattr(model, "_model", None)
        if not isinstance(inner, nn.Module):
            raise ConfigError(
                f"{type(model).__name__} is no torch module and wraps none; call saeforge.Splice(sae) on activations"
            )
        model = inner
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError(f"this {type(model).__name__} has no weights yet; load it with dispatch=True")
    found = find_site(model, sae, site)
    return site_module(model, found), found


def _hook_name(site: Any) -> str | None:
    """TransformerLens's name of a site's record, id, alias or hook."""
    if isinstance(site, str):
        if (name := hook_of_alias(site)) is not None or "hook_" in site:
            return name or site
        path, _, where = site.partition(":")
        site = Site(path, where or "out")
    if isinstance(site, Site):
        site = {"module_path": site.module_path, "where": site.where}
    return transformer_lens_name(site)


def _encode(sae: SAE, rows: Tensor) -> SparseCode:
    """The latents; where gradients are enabled, values that take one."""
    if not torch.is_grad_enabled() or sae.encoder is not None:
        code = sae.encode(rows)
    else:
        rule = TopK(sae.k) if sae.k is not None else Above(_threshold(sae))
        code = encode(rows.to(sae.W_dec.dtype), sae.W_enc, sae.b_enc, rule).trimmed()
        code = code.with_values(code.values.relu() if sae.k is not None else code.values)
    if torch.is_grad_enabled():
        values = code.values if code.values.requires_grad else code.values.detach().clone().requires_grad_()
        values.retain_grad()
        code = code.with_values(values)
    return code


def _threshold(sae: SAE) -> Tensor:
    assert sae.threshold is not None
    return sae.threshold

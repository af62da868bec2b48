"""What a format is, and the arithmetic by which other tools' weights become a plain `SAE`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from saeforge.errors import CheckpointError, ConfigError
from saeforge.sae import SAE

#: Key under which our identity (model, sites, variant) travels in a configuration of another tool.
OWN_KEY = "saeforge"
IDENTITY = ("model", "site", "target", "dataset", "variant", "training")
ROWS_AT_ONCE = 4096


class Format(ABC):
    """One way to keep an SAE on disk.

    A format of your own: a subclass, and an entry point `name = "module:Class"` in the group `saeforge.formats`.

    Attributes:
        title: what it is, for lists.
        files: patterns of the file names that it reads, relative to the folder; these are fetched from a hub.
        writes: whether it writes too.
    """

    title: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    writes: ClassVar[bool] = False

    def __init__(self) -> None:  # noqa: B027, plugins are checked by the signature of this
        """Takes no options: what a format means is fixed."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether the folder or file is in this format, from the names of files and a look into their JSON at most."""

    @abstractmethod
    def read(self, path: Path) -> SAE:
        """Reads an SAE.

        Raises:
            CheckpointError: missing or damaged files.
            ConfigError: it computes something that `SAE` cannot express.
        """

    def check(self, sae: SAE) -> None:
        """Refuses what the format cannot express, before anything is written.

        Raises:
            ConfigError: with the reason.
        """
        if not self.writes:
            raise ConfigError(f"{self.title} is read, not written; export to saelens, sparsify or dictionary_learning")

    def write(self, sae: SAE, folder: Path) -> None:
        """Writes an SAE that passed `check` into a new folder."""
        raise ConfigError(f"{self.title} is read, not written")

    def notes(self, sae: SAE) -> list[str]:
        """What a person should know who loads this SAE there; shown after an export."""
        return []


class SetFormat(Format):
    """A format whose folder holds the SAEs of all layers of a model together; one SAE is a set of one."""

    writes = True

    @abstractmethod
    def check_set(self, saes: Iterable[SAE]) -> None:
        """Refuses what the format cannot express, before anything is written.

        Args:
            saes: may be gone through several times; each may be loaded anew as its turn comes.

        Raises:
            ConfigError: with the reason.
        """

    @abstractmethod
    def write_set(self, saes: Iterable[SAE], folder: Path) -> None:
        """Writes SAEs that passed `check_set` into a new folder."""

    def check(self, sae: SAE) -> None:
        """See `check_set`."""
        self.check_set([sae])

    def write(self, sae: SAE, folder: Path) -> None:
        """See `write_set`."""
        self.write_set([sae], folder)


def plain_sae(
    path: Path,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    threshold: Tensor | float | None = None,
    k: int | None = None,
    shift: Tensor | None = None,
    W_skip: Tensor | None = None,
    meta: dict[str, Any] | None = None,
) -> SAE:
    """Assembles an SAE in float32.

    Args:
        path: for messages.
        W_enc: (d_sae, d_in). b_enc: (d_sae,), None: zero. W_dec: (d_sae, d_out). b_dec: (d_out,).
        threshold: (d_sae,) or one for all; a latent is active above it and above 0. Without k, needed.
        k: latents of a row, instead of thresholds.
        shift: (d_in,) that the tool takes off the input before encoding: b_enc - W_enc @ shift, summed in float64.
        W_skip: (d_out, d_in).
        meta: of the SAE.

    Raises:
        CheckpointError: shapes that do not fit each other, or values that are not finite.
    """
    if W_enc.ndim != 2 or W_dec.ndim != 2:
        raise CheckpointError(
            f"{path}: the encoder has shape {tuple(W_enc.shape)}, the decoder {tuple(W_dec.shape)}; expected matrices"
        )
    d_sae = W_enc.shape[0]
    if b_enc is None:
        b_enc = torch.zeros(d_sae)
    if shift is not None:
        if shift.shape != (W_enc.shape[1],) or b_enc.shape != (d_sae,):
            raise CheckpointError(
                f"{path}: biases of shape {tuple(shift.shape)} and {tuple(b_enc.shape)} beside an encoder of "
                f"{tuple(W_enc.shape)} (latents, inputs); the files do not belong together"
            )
        b_enc = b_enc.double() - product(W_enc, shift)
    if isinstance(threshold, float):
        threshold = torch.full((d_sae,), threshold)
    if threshold is not None:
        threshold = threshold.float().clamp_min(0.0)  # relu(p) where p > t: below 0 the ReLU decides alone
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold, "W_skip": W_skip}
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds values that are not finite; fetch the file again")
    try:
        return SAE(
            W_enc.float(),
            b_enc.float(),
            W_dec.float(),
            b_dec.float(),
            rule="topk" if threshold is None else "threshold",
            threshold=threshold,
            k=k,
            W_skip=None if W_skip is None else W_skip.float(),
            meta=meta,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} does not hold one SAE: {error}") from error


def product(W: Tensor, x: Tensor) -> Tensor:
    """`W @ x` in float64, without a float64 copy of the whole of W (n, d)."""
    parts = [W[start : start + ROWS_AT_ONCE].double() @ x.double() for start in range(0, W.shape[0], ROWS_AT_ONCE)]
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


def gated_as_threshold(W_gate: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gated encoder (Rajamanoharan et al. 2024) as one product with a threshold per latent; all of (d_sae, ...).

    With pi = W_gate x: gate pi + b_gate > 0, magnitude relu(e^r pi + b_mag). As e^r > 0 the gate is open where
    e^r pi + b_mag > b_mag - e^r b_gate.

    Returns:
        W_enc, b_enc, threshold (clamped to 0 by whoever takes it).
    """
    rate = r_mag.double().exp()
    threshold = b_mag.double() - rate * b_gate.double()
    return (W_gate * rate[:, None].to(W_gate.dtype)), b_mag, threshold


def decoder_norms(W_dec: Tensor) -> Tensor:
    """(d_sae,) norms of the decoder's rows, in float64."""
    return torch.cat([W_dec[i : i + ROWS_AT_ONCE].double().norm(dim=1) for i in range(0, len(W_dec), ROWS_AT_ONCE)])


def with_unit_decoder(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same SAE with decoder rows of norm 1, their norms moved into the encoder; a row of zeros stays one."""
    norms = decoder_norms(W_dec)
    divisor = torch.where(norms > 0, norms, torch.ones_like(norms))
    return (
        (W_enc.float() * norms[:, None].float()),
        b_enc.double() * norms,
        W_dec.float() / divisor[:, None].float(),
    )


def check_plain(sae: SAE, title: str) -> None:
    """Refuses what no other tool's format holds.

    Raises:
        ConfigError: rule plugin, or several sources.
    """
    if sae.rule == "plugin":
        variant = (sae.meta.get("variant") or {}).get("name", "its variant")
        raise ConfigError(
            f"{title} holds one product with a threshold or top-k; this SAE is encoded by {variant}'s own code, which "
            "does not fold into that"
        )
    if sae.meta.get("sources"):
        raise ConfigError(f"{title} has one input; this SAE reads {len(sae.meta['sources'])} sources side by side")


def is_transcoder(sae: SAE) -> bool:
    """Whether it writes another place than it reads, as far as its shapes and origin say."""
    site, target = sae.meta.get("site"), sae.meta.get("target")
    return sae.d_in != sae.d_out or bool(site and target and place_of(site) != place_of(target))


def place_of(site: Mapping[str, Any]) -> tuple[Any, Any]:
    """Module path and in/out of a site's record."""
    return site.get("module_path"), site.get("where")


def identity_of(sae: SAE) -> dict[str, Any]:
    """What of an SAE's provenance travels with an export."""
    return {key: sae.meta[key] for key in IDENTITY if sae.meta.get(key) is not None}


def own_identity(path: Path, found: Any) -> dict[str, Any]:
    """Our identity from a configuration that we exported; {} if there is none.

    Raises:
        CheckpointError: there is one, of another shape.
    """
    if found is None:
        return {}
    fits = isinstance(found, dict)
    if fits:
        sites = [found[key] for key in ("site", "target") if found.get(key) is not None]
        words = [site.get(key) for site in sites if isinstance(site, dict) for key in ("id", "module_path", "where")]
        model = found.get("model")
        fits = all(isinstance(site, dict) for site in sites) and all(isinstance(word, str) for word in words)
        fits = fits and (model is None or (isinstance(model, dict) and isinstance(model.get("name"), str)))
    if not fits:
        raise CheckpointError(f"{path}: what {OWN_KEY} wrote of its origin is damaged; remove it or export again")
    return {key: found[key] for key in IDENTITY if found.get(key) is not None}

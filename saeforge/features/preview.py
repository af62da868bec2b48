"""The latents that matter most on some stored rows, with the contexts where each is strongest: a quick look.

`build_features` reads all latents and keeps what it found; this reads a few, of a few rows, and keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError
from saeforge.features.aggregate import segment_keys
from saeforge.features.pieces import Pieces
from saeforge.features.sources import ShardRows
from saeforge.lm.origin import check_one_site, origin_of
from saeforge.ops import SparseCode
from saeforge.sae import SAE

REACH = 12  # tokens to both sides of a context's strongest
UNIT_ROWS = 4096


@dataclass(frozen=True)
class Shown:
    """One latent.

    Attributes:
        density: share of the rows on which it fires.
        share: of the sum over rows and latents of |value| |W_dec row|: how much of what is written it writes.
        largest: its strongest activation.
        contexts: texts, strongest first, of different segments; its strongest token is in ⟦brackets⟧.
    """

    latent: int
    density: float
    share: float
    largest: float
    contexts: tuple[str, ...]


@torch.no_grad()
def top_latents(sae: SAE, *, latents: int = 50, contexts: int = 3, max_tokens: int = 32_768) -> list[Shown]:
    """Those that write most on held-out rows of the SAE's own dataset, most first.

    Args:
        sae: with the provenance that `saeforge fit` leaves.
        latents: at most so many; those that never fire are left out.
        contexts: of each.
        max_tokens: rows to read (whole blocks, at least one); without held-out ones training rows.

    Raises:
        ConfigError: the SAE names no dataset or model, or several sites.
        DatasetError: the dataset is not there, is damaged or has no texts.
    """
    check_one_site(sae)
    path = sae.meta.get("dataset_path")
    if path is None:
        raise ConfigError("this SAE does not say which dataset it was trained on")
    model, site = origin_of(sae).model, sae.meta["site"]["id"]
    split = "validation" if ActivationDataset.open(str(path), site=site).n_blocks("validation") else "train"
    source = ShardRows(str(path), site=site, split=split, max_tokens=max_tokens, unit_rows=UNIT_ROWS, model=model)
    written, fired, largest = _written(sae, source)
    order = torch.argsort(written, descending=True, stable=True)[:latents]
    chosen = order[fired[order] > 0]
    if len(chosen) == 0:
        return []
    texts = _texts(source, _strongest(sae, source, chosen, contexts))
    total = float(written.sum())
    return [
        Shown(
            latent,
            float(fired[latent]) / source.rows,
            float(written[latent]) / total,
            float(largest[latent]),
            tuple(texts[number]),
        )
        for number, latent in enumerate(chosen.tolist())
    ]


def _encoded(sae: SAE, source: ShardRows, unit: int) -> SparseCode:
    return sae.encode(source.read(unit).to(sae.device).float()).trimmed()


def _written(sae: SAE, source: ShardRows) -> tuple[Tensor, Tensor, Tensor]:
    """By latent, on the CPU: sum of |value| |W_dec row|, rows on which it fires, greatest |value|."""
    norms = sae.W_dec.norm(dim=1).double()
    written, fired = torch.zeros_like(norms), torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    largest = torch.zeros(sae.d_sae, device=sae.device)
    for unit in range(source.units):
        code = _encoded(sae, source, unit)
        size = code.values.abs().float()
        written.index_add_(0, code.indices, size.double())
        fired += code.active_counts()
        largest.scatter_reduce_(0, code.indices, size, "amax")
    return (written * norms).cpu(), fired.cpu(), largest.cpu()


def _strongest(sae: SAE, source: ShardRows, chosen: Tensor, contexts: int) -> list[list[np.uint64]]:
    """Of each chosen latent the packed keys of the tokens where it is strongest, one of each segment."""
    number = torch.full((sae.d_sae,), -1, dtype=torch.int64)
    number[chosen] = torch.arange(len(chosen))
    parts = []
    for unit in range(source.units):
        code = _encoded(sae, source, unit)
        latent, size = number[code.indices.cpu()].numpy(), code.values.abs().float().cpu().numpy()
        kept = (latent >= 0) & (size > 0)
        parts.append((latent[kept], size[kept], source.keys(unit)[code.rows().cpu().numpy()[kept]]))
    latent, size, key = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((key, -size, latent))
    segment = segment_keys(key, source.tokens.room)
    bounds = np.searchsorted(latent[order], np.arange(len(chosen) + 1))
    found: list[list[np.uint64]] = [[] for _ in range(len(chosen))]
    for own, start, stop in zip(found, bounds, bounds[1:], strict=False):
        seen: set[int] = set()
        for at in order[start:stop]:
            if len(own) == contexts:
                break
            if int(segment[at]) not in seen:
                seen.add(int(segment[at]))
                own.append(key[at])
    return found


def _texts(source: ShardRows, places: list[list[np.uint64]]) -> list[list[str]]:
    """The contexts of each latent."""
    pieces = Pieces(source.tokenizer)
    found = []
    for own in places:
        centres = np.array(own, dtype=np.uint64)
        segments, starts, sizes = source.tokens.around(centres, REACH)
        texts = []
        for key, segment, start, size in zip(own, segments.tolist(), starts.tolist(), sizes.tolist(), strict=True):
            parts = pieces(source.tokens.tokens(segment, start, size))
            centre = int(key & np.uint64(0xFFFFFFFF)) - start
            parts[centre] = f"⟦{parts[centre]}⟧"
            texts.append(" ".join("".join(parts).split()))
        found.append(texts)
    return found

"""`build_features`: two passes over the rows of a dataset or a text, then one SQLite file."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeforge import __version__
from saeforge.data.manifest import fsync_folder, sha256_json
from saeforge.errors import ConfigError, DatasetError
from saeforge.features.aggregate import Aggregate
from saeforge.features.sources import RowSource, ShardRows, TextRows
from saeforge.features.store import STORE_FILE, FeatureStore, progress_file, sae_digest
from saeforge.features.windows import REACH, Windows
from saeforge.features.write import write_store
from saeforge.lm.device import resolve_device
from saeforge.lm.origin import check_one_site, origin_of
from saeforge.lm.pack import hash_file
from saeforge.ops import SparseCode
from saeforge.sae import SAE, WEIGHTS_FILE, load

UNIT_ROWS = 16_384
CODE_BYTES = 1 << 28  # codes of the first pass that are kept for the second
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes:
        path: the store.
        reused: it was there already, and nothing was done.
        resumed: an interrupted build went on.
        tokens: rows that were read.
        latents: d_sae. fired: how many of them fired.
        examples: windows in the store.
        seconds: of work by stage: statistics, windows, writing; of this call alone.
    """

    path: Path
    reused: bool
    resumed: bool
    tokens: int
    latents: int
    fired: int
    examples: int
    seconds: dict[str, float]


def build_features(
    run: str | Path,
    *,
    data: str | Path | None = None,
    split: str = "all",
    texts: str | None = None,
    max_tokens: int | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    save_seconds: float = 30.0,
    unit_rows: int = UNIT_ROWS,
    on_progress: Progress | None = None,
) -> Built:
    """Finds what fires each latent: statistics, strongest contexts and samples of all latents in one pass.

    Progress is kept beside the store, so that the same call goes on after an interruption, with an equal result.

    Args:
        run: RUN folder; RUN/features.sqlite is written.
        data: dataset; default: the one that the SAE was trained on.
        split: "train", "validation" or "all" of the dataset.
        texts: read text with the model instead: "demo", or what `saeforge harvest --text` takes.
        max_tokens: read at most so many tokens, in whole blocks or segments.
        model: where the model is now, if it moved.
        trust_remote_code: run Python code that comes with the model.
        seed: of the samples.
        device: "auto", "cpu", "cuda", ... for the encoder and the model.
        overwrite: replace a store, or an unfinished build, that was made with other options.
        save_seconds: keep the progress so often.
        unit_rows: rows at a time.
        on_progress: called with (stage, done, in all); stages are "statistics", "windows" and "writing".

    Raises:
        SaeforgeError: no SAE, no dataset, no provenance in it, another width, other options without overwrite.
    """
    run = Path(run)
    sae = load(run)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens}: expected a positive number")
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed = {seed}: expected 0 to 2^64 - 1")
    place = resolve_device(device)
    source = _open_source(
        sae, data, split, texts, max_tokens, model, unit_rows, str(place), trust_remote_code=trust_remote_code
    )
    try:
        weights = run / "sae" / WEIGHTS_FILE if (run / "sae").is_dir() else run / WEIGHTS_FILE
        identity = {"sae": hash_file(weights), "seed": seed, "reach": REACH, **source.identity}
        found = _existing(run, identity, overwrite)
        if found is not None:
            return found
        return _Build(run, sae.to(place), source, identity, seed, save_seconds, overwrite, on_progress).run()
    finally:
        source.close()


class _Build:
    """One build: its state is the aggregate, the stage, the next unit and, in the second pass, the windows' values."""

    def __init__(
        self,
        run: Path,
        sae: SAE,
        source: RowSource,
        identity: dict[str, Any],
        seed: int,
        save_seconds: float,
        overwrite: bool,
        on_progress: Progress | None,
    ) -> None:
        self.folder, self.sae, self.source, self.identity = run, sae, source, identity
        self.save_seconds = save_seconds
        self.on_progress = on_progress or (lambda stage, done, total: None)
        n_documents = max(document.id for document in source.documents) + 1
        self.aggregate = Aggregate(sae.d_sae, n_documents=n_documents, room=source.tokens.room, seed=seed)
        self.next_unit = {"statistics": 0, "windows": 0}
        self.window_values: np.ndarray | None = None
        self._codes: dict[int, SparseCode] = {}
        self._code_bytes = 0
        self.seconds = {"statistics": 0.0, "windows": 0.0, "writing": 0.0}
        self._saved_at = time.monotonic()
        self.resumed = self._resume(overwrite)

    def run(self) -> Built:
        start = time.monotonic()
        for unit in range(self.next_unit["statistics"], self.source.units):
            self.on_progress("statistics", unit, self.source.units)
            keys = self.source.keys(unit)
            code = self._encode(self.source.read(unit))
            self._remember(unit, code)
            rows = code.rows().numpy()
            self.aggregate.update(code.indices.numpy(), code.values.numpy(), keys[rows], len(keys))
            self._advance("statistics", unit + 1)
        start = self._clock("statistics", start)
        examples = self.aggregate.examples()
        windows = Windows(examples["latent"], examples["key"], examples["value"], self.source.tokens)
        if self.window_values is not None:
            windows.values[:] = self.window_values
        self.window_values = windows.values
        for unit in range(self.next_unit["windows"], self.source.units):
            self.on_progress("windows", unit, self.source.units)
            keys = self.source.keys(unit)
            needed = windows.needed(keys)
            # A choice by the rows alone: a resumed build, which has no codes, must come to the same bits.
            if 2 * len(needed) >= len(keys):
                code = self._codes.pop(unit) if unit in self._codes else self._encode(self.source.read(unit))
                windows.fill(keys, code)
            elif len(needed):
                x = self.source.read(unit)
                picked = x.index_select(0, torch.from_numpy(needed).to(x.device))
                windows.fill(keys[needed], self._encode(picked))
            self._advance("windows", unit + 1)
        windows.finish()
        start = self._clock("windows", start)
        write_store(
            self.folder,
            self.aggregate,
            examples,
            windows,
            self.source,
            {
                "saeforge_version": __version__,
                "sae_digest": sae_digest(self.folder),
                "identity": self.identity,
                "identity_sha256": sha256_json(self.identity),
                "tokens": self.aggregate.rows,
                "model": self.sae.meta.get("model"),
                "site": self.sae.meta.get("site"),
            },
            lambda done, total: self.on_progress("writing", done, total),
        )
        progress_file(self.folder).unlink(missing_ok=True)
        self._clock("writing", start)
        fired = int((self.aggregate.count > 0).sum())
        return Built(
            path=self.folder / STORE_FILE,
            reused=False,
            resumed=self.resumed,
            tokens=self.aggregate.rows,
            latents=self.sae.d_sae,
            fired=fired,
            examples=len(examples["latent"]),
            seconds=self.seconds,
        )

    @torch.no_grad()
    def _encode(self, x: torch.Tensor) -> SparseCode:
        """Return the code of rows, on the CPU."""
        code = self.sae.encode(x.to(self.sae.device).float()).trimmed()
        return SparseCode(code.values.cpu(), code.indices.cpu(), code.offsets.cpu(), code.d_sae, code.k)

    def _remember(self, unit: int, code: SparseCode) -> None:
        size = code.values.numel() * (code.values.element_size() + code.indices.element_size())
        if self._code_bytes + size <= CODE_BYTES:
            self._code_bytes += size
            self._codes[unit] = SparseCode(code.values, code.indices, code.offsets, code.d_sae, code.k)

    def _clock(self, stage: str, start: float) -> float:
        now = time.monotonic()
        self.seconds[stage] += now - start
        return now

    def _advance(self, stage: str, unit: int) -> None:
        """Count a unit as done, and now and then keep what there is."""
        self.next_unit[stage] = unit
        if time.monotonic() - self._saved_at >= self.save_seconds:
            self._save()
            self._saved_at = time.monotonic()

    def _save(self) -> None:
        """Write the state under another name, sync and rename: a kill leaves the old state or the new one."""
        path = progress_file(self.folder)
        part = path.with_name(f"{path.name}.part-{os.getpid()}")
        state = {**self.aggregate.state(), "identity": np.array(json.dumps(self.identity, sort_keys=True))}
        state["next_unit"] = np.array([self.next_unit["statistics"], self.next_unit["windows"]])
        if self.window_values is not None:
            state["window_values"] = self.window_values
        try:
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, **state)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            fsync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)

    def _resume(self, overwrite: bool) -> bool:
        """Go on from a kept state, if there is one.

        Raises:
            ConfigError: it is that of a build with other options.
            DatasetError: it is damaged.
        """
        path = progress_file(self.folder)
        if not path.is_file():
            return False
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # it leaves a damaged one open
                state = {name: file[name] for name in file.files}
            identity = json.loads(str(state["identity"]))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            if overwrite:
                path.unlink()
                return False
            raise DatasetError(f"{path} is damaged ({error}); start again with --overwrite") from error
        if identity != self.identity:
            if overwrite:
                path.unlink()
                return False
            raise ConfigError(
                f"{self.folder} holds an unfinished build with another {_difference(identity, self.identity)}; "
                "give the same options to go on, or start again with --overwrite"
            )
        self.aggregate.restore(state)
        self.next_unit = dict(zip(("statistics", "windows"), map(int, state["next_unit"]), strict=True))
        self.window_values = state.get("window_values")
        return True


def _open_source(
    sae: SAE,
    data: str | Path | None,
    split: str,
    texts: str | None,
    max_tokens: int | None,
    model: str | None,
    unit_rows: int,
    device: str,
    *,
    trust_remote_code: bool,
) -> RowSource:
    """Open what the features are read from.

    Raises:
        SaeforgeError: it does not exist, or does not fit the SAE.
    """
    check_one_site(sae)
    if texts is not None:
        if data is not None or split != "all":
            raise ConfigError("--texts is read whole and in place of a dataset: leave out --data and --split")
        origin = origin_of(sae, model=model, trust_remote_code=trust_remote_code)
        return TextRows(texts, origin=origin, max_tokens=max_tokens, device=device)
    path = data or sae.meta.get("dataset_path")
    if path is None:
        raise ConfigError("this SAE does not say which dataset it was trained on; give one with --data, or --texts")
    site = (sae.meta.get("site") or {}).get("id")
    source = ShardRows(
        str(path),
        site=site,
        split=split,
        max_tokens=max_tokens,
        unit_rows=unit_rows,
        model=origin_of(sae, model=model).model if model or sae.meta.get("model") else None,
        trust_remote_code=trust_remote_code,
    )
    hashes = [card.get("files_sha256") for card in (sae.meta.get("model") or {}, source.dataset.manifest.model)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise DatasetError(f"{path} holds activations of another model than the SAE's; give its own with --data")
    if source.dataset.d != sae.d_in:
        raise DatasetError(
            f"{path} holds activations {source.dataset.d} wide, this SAE reads {sae.d_in}; give its own with --data"
        )
    return source


def _existing(run: Path, identity: dict[str, Any], overwrite: bool) -> Built | None:
    """Return a store with the same identity, None if there is none or it may be replaced.

    Raises:
        ConfigError: there is one with another identity.
    """
    path = run / STORE_FILE
    if not path.is_file() or overwrite:
        return None
    with FeatureStore.open(run) as store:
        if store.meta["identity"] != identity:
            raise ConfigError(
                f"{path} was built with another {_difference(store.meta['identity'], identity)}; "
                "build it again with --overwrite"
            )
        fired = int((store.column("count") > 0).sum())
        return Built(path, True, False, store.meta["tokens"], store.d_sae, fired, store.meta["examples"], {})


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return what differs between two identities, in words for a message."""
    if old.get("source") != new.get("source"):
        return f"source of rows ({old.get('source')}, now {new.get('source')})"
    return ", ".join(sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)))


def describe(built: Built) -> dict[str, Any]:
    """Return a build as plain JSON values."""
    return {**asdict(built), "path": str(built.path)}

"""`saeforge features export`: a store in the files that Neuronpedia imports in bulk.

    MODEL/LAYER-SET/release.jsonl model.jsonl sourceset.jsonl source.jsonl
    MODEL/LAYER-SET/features/batch-N.jsonl.gz activations/batch-N.jsonl.gz explanations/batch-N.jsonl.gz

The keys are the columns of its tables, as `utils/neuronpedia-utils/neuronpedia_utils/db_models` names them and
`apps/webapp/app/api/admin/import` reads them (github.com/hijohnnylin/neuronpedia); what they mean is what
`convert-saedashboard-to-neuronpedia-export.py` puts there. Latents are written as they are read, a batch at a time.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeforge.errors import CheckpointError, ConfigError
from saeforge.features.neuronpedia_rows import CREATOR_ID, Release, Rows
from saeforge.features.pieces import Pieces
from saeforge.features.store import FeatureStore
from saeforge.features.unembedding import Unembedding
from saeforge.lm.origin import origin_of
from saeforge.sae import SAE, load

LATENTS_AT_ONCE = 256
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?:\.|$)")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def release_of(run: str | Path, sae: SAE, *, layer: int | None = None, **given: str | None) -> Release:
    """The names of a run's release: those given, and what the run itself says for the others.

    Raises:
        ConfigError: no layer in the site's name, or a name with other characters than letters, digits, `_`, `.`, `-`.
    """
    site = str((sae.meta.get("site") or {}).get("module_path") or "")
    found = _LAYER.search(site)
    if layer is None:
        if found is None:
            raise ConfigError(f"site {site or '?'} names no layer; give --layer")
        layer = int(found[1])
    set_name = given.get("source_set") or Path(run).resolve().name
    names: dict[str, Any] = {
        "model_id": given.get("model_id") or Path(str((sae.meta.get("model") or {}).get("name") or "model")).name,
        "source_set": set_name,
        "name": given.get("release") or set_name,
    }
    for key, name in names.items():
        if not _NAME.fullmatch(str(name)):
            raise ConfigError(f"{key} {name!r}: expected letters, digits, '_', '.' and '-'; it is a part of addresses")
    return Release(
        **names,
        layer=layer,
        title=given.get("title") or str(names["name"]),
        creator=given.get("creator") or "unknown",
        creator_id=given.get("creator_id") or CREATOR_ID,
        url=given.get("url"),
        dataset=given.get("dataset"),
        hf_repo=given.get("hf_repo"),
        hf_folder=given.get("hf_folder"),
    )


def export(
    run: str | Path,
    out: str | Path,
    *,
    layer: int | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    **names: str | None,
) -> Path:
    """Writes the store of a run in Neuronpedia's files.

    Args:
        run: RUN folder with `features.sqlite`.
        out: folder; made, and must be empty.
        layer: of the site; default: what its name says.
        model: where the model is now, if it moved: for the logits of each latent.
        trust_remote_code: run Python code that comes with the model.
        **names: see `release_of`.

    Returns:
        The folder of the source, OUT/MODEL/LAYER-SET.

    Raises:
        DatasetError: no store, or a damaged one.
        ConfigError: names that do not do, no model, or latents that write elsewhere than in its residual stream.
        CheckpointError: the folder is not empty, or the disk refused.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} already holds something; choose another --out or empty it")
    sae = load(run)
    release = release_of(run, sae, layer=layer, **names)
    with FeatureStore.open(run) as store:
        lm = origin_of(sae, model=model, trust_remote_code=trust_remote_code).load_causal()
        rows = Rows(release, store, Pieces(lm.tokenizer), Unembedding(lm.model, sae), sae, lm.card)
        part = out.with_name(f".{out.name}.part-{os.getpid()}")
        try:
            source = part / release.model_id / release.source
            source.mkdir(parents=True)
            for file, row in rows.about():
                _write_lines(source / file, [row])
            for number, first in enumerate(range(0, store.d_sae, LATENTS_AT_ONCE)):
                for table, lines in rows.batch(first, min(first + LATENTS_AT_ONCE, store.d_sae)).items():
                    if lines:
                        _write_lines(source / table / f"batch-{number}.jsonl.gz", lines)
            part.replace(out)
        except OSError as error:
            raise CheckpointError(f"could not write {out}: {error}; free space or choose another folder") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return out / release.model_id / release.source


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, compressed if the name says so."""
    path.parent.mkdir(exist_ok=True)
    content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content, 5, mtime=0) if path.suffix == ".gz" else content)

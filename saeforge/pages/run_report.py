"""`report`: one self-contained HTML file about one run or several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from saeforge import __version__
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.pages import several, single
from saeforge.pages.page import Section, page
from saeforge.pages.runs import Run, read_runs

REPORT_FILE = "report.html"
LATENTS, CONTEXTS = 24, 4


def report(*runs: str | Path, out: str | Path | None = None, latents: int = LATENTS, contexts: int = CONTEXTS) -> Path:
    """Writes a page about runs: what was trained on what, how good it is, curves, latents in their contexts.

    One HTML file that loads nothing, for light and dark, desk and phone, screen and paper. What is missing (an
    evaluation, features) is named with the command that makes it. Several runs, or the SAEs of a sweep, are compared:
    the frontier of L0, FVU and ΔCE, a table to sort, the settings in which they differ.

    Args:
        runs: RUN folders, or `sae/` folders; a sweep's RUN stands for all of its SAEs.
        out: the file; default: RUN/report.html, of several runs report.html in the folder that holds them all.
        latents: most latents to show, over all runs.
        contexts: strongest contexts of each.

    Returns:
        Path of the file.

    Raises:
        SaeforgeError: no run there, a damaged one, or the file cannot be written.
    """
    for name, value, least in (("latents", latents, 0), ("contexts", contexts, 1)):
        if value < least:
            raise ConfigError(f"{name} = {value}: expected at least {least}")
    found = read_runs(runs)
    path = _place(runs, out)
    title = path.resolve().parent.name if len(runs) > 1 else Path(runs[0]).resolve().name
    html = _single(found[0], latents, contexts) if len(found) == 1 else _several(found, title, latents, contexts)
    _write(path, html)
    return path


def _place(runs: Sequence[str | Path], out: str | Path | None) -> Path:
    """Where the page goes.

    Raises:
        ConfigError: `out` is a folder.
    """
    if out is not None:
        if Path(out).is_dir():
            raise ConfigError(
                f"out = {out} is a folder; give the name of a file in it, such as {Path(out) / REPORT_FILE}"
            )
        return Path(out)
    folders = [Path(run).parent if Path(run).name == "sae" else Path(run) for run in runs]
    if len(folders) == 1:
        return folders[0] / REPORT_FILE
    return Path(os.path.relpath(os.path.commonpath([folder.resolve().parent for folder in folders]))) / REPORT_FILE


def _foot() -> str:
    return f"Made by saeforge {__version__}. This file holds everything it shows and loads nothing."


def _single(run: Run, latents: int, contexts: int) -> str:
    groups = single.chosen(run, latents)
    parts = [
        single.overview(run),
        single.judged(run, groups),
        single.training_curves(run),
        single.concept_section(run, groups),
        single.latent_section(run, groups, contexts) if latents else None,
        single.settings(run),
    ]
    return page(run.name, single.head(run, "saeforge · run report"), _there(parts), foot=_foot())


def _several(runs: Sequence[Run], title: str, latents: int, contexts: int) -> str:
    parts = [
        several.frontiers(runs),
        several.table(runs),
        several.differences(runs),
        several.curves(runs),
        several.densities(runs),
        several.latents(runs, latents, contexts),
    ]
    return page(title, several.head(runs, title), _there(parts), foot=_foot())


def _there(parts: Sequence[Section | None]) -> list[Section]:
    return [part for part in parts if part is not None]


def _write(path: Path, html: str) -> None:
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(html, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise SaeforgeError(
            f"could not write {path}: {error}; free space, or choose another place with --out"
        ) from error
    finally:
        part.unlink(missing_ok=True)

"""What a RUN folder holds, read without torch: the SAE's card, configuration, judgement, concepts, curves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saeforge.errors import CheckpointError, ConfigError, DatasetError
from saeforge.features.store import STORE_FILE
from saeforge.pages.curves import Curves, read_curves

CARD = "sae.json"


@dataclass(frozen=True)
class Run:
    """One SAE of a run.

    Attributes:
        name: what it is called on the page.
        path: its RUN folder, as it was given.
        card: `sae.json`; empty where training has not finished.
        config: resolved configuration of the run, or empty.
        evaluation: `evaluation.json`, or None.
        concepts: `concepts.json`, or None.
        curves: from the CSV log, or None.
        member: its name among the SAEs that the run trained side by side, or "".
    """

    name: str
    path: Path
    card: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    concepts: dict[str, Any] | None = None
    curves: Curves | None = None
    member: str = ""

    @property
    def variant(self) -> str:
        """Name of its variant, or of the class where it came from elsewhere."""
        of_card = self.card.get("variant")
        if isinstance(of_card, dict):
            return str(of_card.get("name") or of_card.get("class_path"))
        configured = ((self.config.get("model") or {}).get("variant") or {}).get("class_path")
        return str(configured or self.card.get("rule") or "unknown")

    @property
    def d_sae(self) -> int | None:
        """Latents."""
        found = self.card.get("d_sae") or self.options.get("d_sae")
        return None if found is None else int(found)

    @property
    def options(self) -> dict[str, Any]:
        """Options of its variant."""
        of_card = self.card.get("variant")
        if isinstance(of_card, dict):
            return dict(of_card.get("options") or {})
        configured = (self.config.get("model") or {}).get("variant") or {}
        return dict(configured.get("init_args") or {}) if isinstance(configured, dict) else {}

    @property
    def has_features(self) -> bool:
        """Whether `saeforge features build` has finished."""
        return (self.path / STORE_FILE).is_file()

    def metric(self, name: str) -> float | None:
        """A figure of reconstruction and sparsity, or None."""
        return _figure((self.evaluation or {}).get("metrics"), name)

    def effect(self, name: str) -> float | None:
        """A figure of the effect on the model over all documents, or None."""
        return _figure(((self.evaluation or {}).get("effect") or {}).get("overall"), name)

    def effect_interval(self, name: str) -> tuple[float, float] | None:
        """Its interval, or None."""
        overall = ((self.evaluation or {}).get("effect") or {}).get("overall") or {}
        found = (overall.get("intervals") or {}).get(name)
        return (float(found[0]), float(found[1])) if found else None


def _figure(part: Any, name: str) -> float | None:
    value = part.get(name) if isinstance(part, dict) else None
    return value if isinstance(value, int | float) else None


def read_runs(given: Sequence[str | Path]) -> list[Run]:
    """The SAEs behind the folders given: one for a RUN, all of a sweep's.

    Raises:
        ConfigError: no folder, one that holds no run, or the same SAE twice.
        CheckpointError, DatasetError: a file that is damaged.
    """
    if not given:
        raise ConfigError("no RUN was given; expected one or more folders such as runs/quickstart")
    found: list[Run] = []
    for each in given:
        if str(each).startswith("hf://"):
            raise ConfigError(
                f"{each} is not on this disk, and a report reads more than its SAE: `saeforge import {each} --run "
                "runs/NAME` brings it here"
            )
        path = Path(each)
        if not path.is_dir():
            raise ConfigError(f"{path} does not exist; expected a RUN folder (runs/<name>)")
        if path.name == "sae" and (path / CARD).is_file():
            path = path.parent
        members = sorted(card.parents[1] for card in path.glob(f"*/sae/{CARD}"))
        if members:
            curves = read_curves(path, [member.name for member in members])
            found += [_read(member, path, curves.get(member.name)) for member in _ordered(members, path)]
        else:
            found.append(_read_alone(path))
    places = [run.path.resolve() for run in found]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"{place} is given twice; name every RUN once")
    return _named(found)


def _ordered(members: list[Path], sweep: Path) -> list[Path]:
    """The SAEs of a sweep in the order of its configuration, then the others by name."""
    named = list((_config(sweep / "config.yaml").get("model") or {}).get("sweep") or {})

    def place(path: Path) -> tuple[int, list[tuple[int, str]]]:
        parts = re.split(r"(\d+)", path.name)  # k16 before k128
        natural = [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
        return (named.index(path.name) if path.name in named else len(named), natural)

    return sorted(members, key=place)


def _read_alone(path: Path) -> Run:
    """The SAE of a folder of its own, which may lie in that of the sweep that trained it."""
    sweep = path.parent
    if (path / "config.yaml").is_file() or not ((path / "sae").is_dir() and (sweep / "config.yaml").is_file()):
        return _read(path, path, read_curves(path).get(""))
    names = [card.parents[1].name for card in sweep.glob(f"*/sae/{CARD}")]
    return _read(path, sweep, read_curves(sweep, names).get(path.name))


def _read(path: Path, home: Path, curves: Curves | None) -> Run:
    """One SAE. `home`: the folder of the run that trained it, alone (`path` itself) or beside others."""
    card = next((_json(place / CARD) for place in (path / "sae", path) if (place / CARD).is_file()), {})
    config = _config(home / "config.yaml")
    if not card and not config and curves is None:
        raise ConfigError(
            f"{path} holds no run (no sae/, no config.yaml, no csv/ log); expected a folder that `saeforge fit` wrote"
        )
    evaluation, concepts = path / "evaluation.json", path / "concepts.json"
    return Run(
        name=path.resolve().name,
        path=path,
        card=card,
        config=config,
        evaluation=_json(evaluation, metrics=dict, sae=dict) if evaluation.is_file() else None,
        concepts=_json(concepts, concepts=list) if concepts.is_file() else None,
        curves=curves,
        member="" if home == path else path.name,
    )


def _named(runs: list[Run]) -> list[Run]:
    """Runs by the shortest ends of their paths that tell all of them apart."""
    length = 1
    while True:
        names = ["/".join(run.path.resolve().parts[-length:]) for run in runs]
        if len(set(names)) == len(names):
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
        length += 1


def _json(path: Path, **parts: type) -> dict[str, Any]:
    """A file that saeforge wrote, with these parts of these types.

    Raises:
        CheckpointError: the SAE's card is damaged.
        DatasetError: another file is.
    """
    kind = CheckpointError if path.name == CARD else DatasetError
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise kind(f"{path} is damaged ({error}); make it again, or remove it") from error
    lost = [
        name for name, of in parts.items() if not isinstance(content, dict) or not isinstance(content.get(name), of)
    ]
    if lost or not isinstance(content, dict):
        raise kind(f"{path} is damaged (no {', '.join(lost) or 'mapping'} in it); make it again, or remove it")
    return content


def _config(path: Path) -> dict[str, Any]:
    """RUN/config.yaml, or nothing.

    Raises:
        ConfigError: it is damaged.
    """
    import yaml

    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())}); restore or remove it") from error
    return content if isinstance(content, dict) else {}

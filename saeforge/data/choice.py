"""Which sites train which SAE: `data.input` and `data.target` as a user writes them.

* One name: an SAE of that site, or a transcoder from it to the target.
* A list: sites that stand side by side as one input (a crosscoder's), in the list's order. A pattern in it stands for
  all sites that are like it. `PATH#SITE` is a site of another dataset, of the same tokens in the same order.
* A pattern (`mlp_in.*`) with a pattern as target (`mlp_out.*`): a transcoder for each layer, paired by what `*` is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from saeforge.data.manifest import Manifest, SiteRecord
from saeforge.errors import ConfigError, DatasetError

#: What `data.input` and `data.target` may be.
SitesWanted: TypeAlias = str | Sequence[str] | None


@dataclass(frozen=True)
class Place:
    """A site of a dataset, by the path that was given."""

    path: str
    site: SiteRecord

    @property
    def key(self) -> tuple[str, str]:
        """What tells places apart."""
        return self.path, self.site.id


@dataclass(frozen=True)
class Choice:
    """What one SAE reads and what it reconstructs; the same places for an SAE."""

    inputs: tuple[Place, ...]
    targets: tuple[Place, ...]


def choose(
    path: str | None, wanted: SitesWanted, target: SitesWanted, load: Callable[[str], Manifest]
) -> tuple[Choice, ...]:
    """The SAEs that `data.input` and `data.target` ask for.

    Args:
        path: the dataset of all names that give none.
        wanted: `data.input`; None is the dataset's only site.
        target: `data.target`; None is the input.
        load: the manifest of a dataset.

    Raises:
        ConfigError: a name without a dataset, a site twice in a list, patterns that do not pair.
        DatasetError: no such dataset or site.
    """
    if check_patterns(wanted, target):
        return _paired(path, str(wanted), str(target), load)
    inputs = _side_by_side("data.input", path, wanted, load)
    return (Choice(inputs, inputs if target is None else _side_by_side("data.target", path, target, load)),)


def check_patterns(wanted: SitesWanted, target: SitesWanted) -> bool:
    """Whether input and target are patterns, which pair by layer.

    Raises:
        ConfigError: one of them is, and the other is not.
    """
    patterns = [isinstance(one, str) and is_pattern(_split(one, None)[1]) for one in (wanted, target)]
    if patterns[0] and target is None:
        raise ConfigError(
            f"data.input = {wanted} is a pattern: data.sites = {wanted} trains an SAE for each site, a list "
            f"([{wanted}]) one crosscoder of all, and data.target with a pattern a transcoder for each"
        )
    if patterns[0] != patterns[1]:
        raise ConfigError(
            f"data.input = {wanted} and data.target = {target}: expected patterns in both (mlp_in.* and mlp_out.*), "
            "which pair by layer, or in neither"
        )
    return patterns[0]


def names_in(wanted: SitesWanted) -> list[str]:
    """The names and patterns in what was wanted."""
    return [wanted] if isinstance(wanted, str) else list(wanted or ())


def is_pattern(name: str | None) -> bool:
    """Whether a name stands for several sites."""
    return name is not None and any(character in name for character in "*?[")


def _split(name: str, path: str | None) -> tuple[str | None, str | None]:
    """Path and site of `PATH#SITE`, `PATH#` (its only site) or `SITE`."""
    if "#" not in name:
        return path, name
    before, _, site = name.rpartition("#")
    return before, site or None


def _located(what: str, name: str, path: str | None) -> tuple[str, str | None]:
    folder, site = _split(name, path)
    if not folder:
        raise ConfigError(f"{what} {name!r} names no dataset: give data.path, or PATH#SITE")
    return folder, site


def _side_by_side(
    what: str, path: str | None, wanted: SitesWanted, load: Callable[[str], Manifest]
) -> tuple[Place, ...]:
    if wanted is None:
        if path is None:
            raise ConfigError(f"{what} and data.path are missing; give the dataset that `saeforge harvest` wrote")
        return (Place(path, load(path).site(None, root=path)),)
    places: list[Place] = []
    for name in names_in(wanted):
        folder, site = _located(what, name, path)
        manifest = load(folder)
        if site is not None and is_pattern(site):
            found = [Place(folder, record) for record, _ in _like(site, manifest, folder)]
        else:
            found = [Place(folder, manifest.site(site, root=folder))]
        for place in found:
            if place.key in {other.key for other in places}:
                raise ConfigError(f"{what} names {place.site.id} of {folder} twice; name each site once")
        places += found
    if not places:
        raise ConfigError(f"{what} is an empty list; name at least one site")
    return tuple(places)


def _paired(path: str | None, wanted: str, target: str, load: Callable[[str], Manifest]) -> tuple[Choice, ...]:
    sides: list[dict[tuple[str, ...], Place]] = []
    for what, pattern in (("data.input", wanted), ("data.target", target)):
        folder, site = _located(what, pattern, path)
        side: dict[tuple[str, ...], Place] = {}
        for record, stands_for in _like(site or "", load(folder), folder):
            if stands_for in side:
                raise ConfigError(
                    f"{what} {pattern!r} is like {side[stands_for].site.id} and {record.id} with the same "
                    f"{'.'.join(stands_for)!r}; make it more definite (:in or :out)"
                )
            side[stands_for] = Place(folder, record)
        sides.append(side)
    inputs, targets = sides
    alone = [f"{inputs[key].site.id} has no target" for key in inputs if key not in targets]
    alone += [f"{targets[key].site.id} has no input" for key in targets if key not in inputs]
    if alone:
        raise ConfigError(
            f"data.input {wanted!r} and data.target {target!r} do not pair: {'; '.join(alone)}; harvest both sites of "
            "each layer, or narrow the patterns (mlp_in.[0-3])"
        )
    return tuple(Choice((place,), (targets[key],)) for key, place in inputs.items())


def site_names(site: SiteRecord) -> list[str]:
    """The names by which patterns know a site: alias, id (without `:out`, too), folder."""
    short = [site.module_path] if site.where == "out" else []
    return list(dict.fromkeys([*([site.alias] if site.alias else []), site.id, *short, site.folder]))


def _like(pattern: str, manifest: Manifest, path: str) -> list[tuple[SiteRecord, tuple[str, ...]]]:
    """Sites with a name like a pattern, in the dataset's order, and what its wildcards stand for in each."""
    expression = re.compile(_expression(pattern))
    found = []
    for site in manifest.sites:
        matches = (expression.fullmatch(name) for name in site_names(site))
        match = next((match for match in matches if match), None)
        if match:
            found.append((site, match.groups()))
    if not found:
        raise DatasetError(
            f"{path} holds no site like {pattern!r}; it holds: {', '.join(site.id for site in manifest.sites)}"
        )
    return found


_TOKEN = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)


def _expression(pattern: str) -> str:
    """A shell pattern as a regular expression that captures what each wildcard stands for."""
    parts = []
    for token in _TOKEN.findall(pattern):
        if token in "*?":
            parts.append("(.*)" if token == "*" else "(.)")
        elif len(token) > 2:
            inside = token[1:-1].replace("\\", r"\\")
            parts.append(f"([{'^' + inside[1:] if inside[0] == '!' else inside}])")
        else:
            parts.append(re.escape(token))
    return "".join(parts)

"""`model.sweep` and `model.grid`: several SAEs of each site in one run, told apart by what differs from the base.

Each is what it would be alone, to the bit on a CPU: it has its own generator, optimizer, schedules and counters. What
they share is the data: its order, reading, the language model's forward pass, the copy to the device.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jsonargparse import ArgumentParser

from saeforge.errors import ConfigError
from saeforge.registry import VARIANTS
from saeforge.training.data import run_seed
from saeforge.training.settings import Settings
from saeforge.variants import Variant

#: What an entry of a sweep differs in: None for nothing.
Differences = Mapping[str, Any] | None

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: What else lies in a RUN folder.
_TAKEN = {"sae", "checkpoints", "csv", "wandb", "data", "config.yaml", "report.html"}
_SETTINGS = {field.name for field in fields(Settings)}
_SHORT = {"d_sae": "d"}  # k32-d4096


@dataclass(frozen=True)
class Entry:
    """One SAE of a sweep.

    Attributes:
        name: "" where there is no sweep.
        build: makes the variant for d_in and d_out.
        settings: of its training.
    """

    name: str
    build: Callable[[int, int], Variant]
    settings: Settings


def entries(
    build: Callable[[int, int], Variant],
    settings: Settings,
    sweep: Mapping[str, Differences] | None,
    grid: Mapping[str, list[Any]] | None,
    widths: tuple[int, int],
) -> list[Entry]:
    """The SAEs of every site.

    Args:
        build: makes the base's variant. settings: the base's.
        sweep: differences to the base, by name.
        grid: values by option; their product, on top of every entry of `sweep`.
        widths: some site's, to make the base's variant with and see its options.

    Raises:
        ConfigError: unknown options, names that clash or cannot be folders, values of the wrong type.
        PluginError: unknown variants.
    """
    if sweep is None and grid is None:
        return [Entry("", build, settings)]
    base = build(*widths)
    options = {name: value for name, value in base.arguments.items() if name not in ("d_in", "d_out")}
    named = expand(sweep, grid)
    return [_entry(name, differences, type(base), options, settings) for name, differences in named.items()]


def expand(sweep: Mapping[str, Differences] | None, grid: Mapping[str, list[Any]] | None) -> dict[str, dict[str, Any]]:
    """The differences of every SAE by name: those of `sweep`, each with every combination of `grid`.

    Raises:
        ConfigError: nothing to train, names that clash or cannot be folders.
    """
    if sweep is not None and not sweep:
        raise ConfigError("model.sweep is empty: give a mapping from names to differences, or leave it out")
    for option, values in (grid or {}).items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"model.grid.{option} = {values!r}: expected a list of values")
    if grid is not None and not grid:
        raise ConfigError("model.grid is empty: give a mapping from options to lists, or leave it out")
    axes = [[(option, value) for value in values] for option, values in (grid or {}).items()]
    found: dict[str, dict[str, Any]] = {}
    for name, differences in ({"": None} if sweep is None else sweep).items():
        if not isinstance(differences, Mapping | None):
            raise ConfigError(f"model.sweep.{name} = {differences!r}: expected a mapping such as {{k: 32}}")
        for point in itertools.product(*axes):
            given = dict(differences or {})
            if twice := sorted(given.keys() & {option for option, _ in point}):
                raise ConfigError(f"{twice[0]} is in model.sweep.{name} and in model.grid: leave one of them out")
            full = "-".join([*([str(name)] if sweep is not None else []), *(_label(*pair) for pair in point)])
            _check_name(full, found)
            found[full] = {**given, **dict(point)}
    return found


def _check_name(name: str, others: Mapping[str, Any]) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"model.sweep: {name!r} is to name a folder: letters, digits, '.', '_' and '-', a letter or digit first"
        )
    if name.lower() in _TAKEN:
        raise ConfigError(f"model.sweep: {name!r} lies in the RUN folder already; take another name")
    if name.lower() in {other.lower() for other in others}:  # some file systems do not tell them apart
        raise ConfigError(f"model.sweep: two SAEs are called {name!r}; give each a name of its own")


def _label(option: str, value: Any) -> str:
    """One value of a grid as part of a name: k32, d4096, topk, pre_bias-false."""
    if isinstance(value, Mapping | list | tuple):
        raise ConfigError(f"model.grid.{option}: {value!r} gives no name; list these SAEs in model.sweep")
    if isinstance(value, type):
        return value.__name__
    if option == "variant":
        return str(value).rpartition(".")[2]
    if isinstance(value, bool | None):
        return f"{option}-{'null' if value is None else str(value).lower()}"
    return f"{_SHORT.get(option, option)}{value}" if isinstance(value, int | float) else f"{option}-{value}"


def _entry(
    name: str, differences: Mapping[str, Any], base: type[Variant], base_options: Mapping[str, Any], settings: Settings
) -> Entry:
    """One SAE: an option is the run's if it has one of that name, else the variant's."""
    where = f"model.sweep.{name}"
    given = dict(differences)
    cls, inner = _variant(given.pop("variant", None), base, where)
    accepted = set(inspect.signature(cls).parameters) - {"d_in", "d_out"}
    of_run = {key: value for key, value in given.items() if key in _SETTINGS}
    flat = {key: value for key, value in given.items() if key not in _SETTINGS}
    if twice := sorted(flat.keys() & inner.keys()):
        raise ConfigError(f"{where}: {twice[0]} is given twice, beside variant and in its init_args")
    own = {**inner, **flat}
    if unknown := sorted(own.keys() - accepted):
        known = sorted(accepted | (_SETTINGS if unknown[0] in flat else set()))
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; options: {', '.join(known)}"
        raise ConfigError(f"{where}: neither the run nor {cls.__name__} has an option {unknown[0]!r}{hint}")
    # Another variant's options mean other things under the same names, and have other defaults.
    kept = base_options if cls is base else {key: base_options[key] for key in ("d_sae",) if key in accepted}
    options = {**kept, **_typed(cls, own, where)}
    changed = _typed(Settings, {key: value for key, value in of_run.items() if value is not None}, where)
    changed |= {key: None for key, value in of_run.items() if value is None}
    if "seed" in changed:
        changed["seed"] = run_seed(changed["seed"])
    return Entry(name, functools.partial(cls, **options), replace(settings, **changed))


def _variant(given: Any, base: type[Variant], where: str) -> tuple[type[Variant], dict[str, Any]]:
    """The class that an entry asks for, and the options that it gives inside."""
    if given is None:
        return base, {}
    if isinstance(given, str):
        return VARIANTS.load(given), {}
    if isinstance(given, type) and issubclass(given, Variant):
        return given, {}
    if not isinstance(given, Mapping) or given.keys() - {"class_path", "init_args"}:
        raise ConfigError(
            f"{where}.variant = {given!r}: expected a variant's name, or a mapping of class_path and init_args"
        )
    cls = VARIANTS.load(str(given["class_path"])) if given.get("class_path") else base
    return cls, dict(given.get("init_args") or {})


def _typed(cls: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options as the signature wants them, converted and refused as in a config's base section.

    Raises:
        ConfigError: values of the wrong type.
    """
    if not given:
        return {}
    others = set(inspect.signature(cls).parameters) - given.keys()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "of", skip=others)
    try:
        parsed = parser.instantiate(parser.parse_object({"of": dict(given)}), instantiate_groups=False)
    except ArgumentError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).replace('of.', '').split())[:400]}") from error
    return dict(vars(parsed["of"]))

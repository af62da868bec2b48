"""Plugins by name: which classes exist, who ships them, and how to load one.

A plugin is an entry point of an installed distribution in a group like `saeforge.variants`: `jump = "my_plugin:Jump"`.
Finding plugins reads metadata files only; a plugin's module is imported when it is asked for by name, and checked once.
Two distributions that claim one name are an error that names both. A broken plugin is reported and stops nothing else.

This is the only importer of `entrypoints`, and it imports no torch. It scans `sys.path` folder by folder because one
malformed `entry_points.txt` of any package makes `entrypoints` raise for the whole path. Names and versions come from
`importlib.metadata` because `entrypoints` guesses them from folder names ("my-plug.egg-info" becomes "my").
"""

from __future__ import annotations

import configparser
import difflib
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import entrypoints

from saeforge import __version__
from saeforge.errors import PluginError

Status = Literal["unloaded", "ok", "broken", "clash", "incompatible"]

ENVIRONMENT_VARIABLE = "SAEFORGE_PLUGINS"
"""`off`, or the comma-separated names of the only third-party plugins to see; built-ins are always there."""

_OWN_DISTRIBUTION = "saeforge"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class PluginRecord:
    """What is known of one plugin without importing it, and how its last load went.

    Attributes:
        name: The name that configuration files and the command line use.
        module: The module to import.
        object: The attribute of the module, dotted if nested.
        distribution: The distribution that ships it, "" if none does (registered in this process, or a class path).
        version: Version of that distribution, "" if unknown.
        status: unloaded (not tried), ok (loaded and valid), broken (cannot be used), clash (two distributions claim the
            name) or incompatible (made for another version of saeforge; it may still load).
        error: One line that says what is wrong, else "".
    """

    name: str
    module: str
    object: str
    distribution: str = ""
    version: str = ""
    status: Status = "unloaded"
    error: str = ""

    @property
    def class_path(self) -> str:
        """The full class path, `module.Class`, which always names this plugin and no other."""
        return f"{self.module}.{self.object}"

    @property
    def origin(self) -> str:
        """Who ships it, for messages: `distribution version (module:object)`."""
        owner = f"{self.distribution} {self.version}".strip()
        return f"{owner or 'this process'} ({self.module}:{self.object})"


class PluginGroup:
    """The plugins of one entry-point group.

    Args:
        group: Its name.
        base: `module:Class` that every plugin must extend; imported at the first load only.
        builtins: name -> `module:Class` of what saeforge ships itself. A static table, so that a source tree without
            metadata works.
        kind: What one plugin is called in messages.
    """

    def __init__(self, group: str, base: str, builtins: Mapping[str, str], *, kind: str = "plugin") -> None:
        self.group = group
        self.base = base
        self.kind = kind
        split = {name: target.split(":") for name, target in sorted(builtins.items())}
        self._builtins = [PluginRecord(n, m, o, _OWN_DISTRIBUTION, __version__) for n, (m, o) in split.items()]
        self._scanned: tuple[list[PluginRecord], list[str]] | None = None
        self._registered: dict[str, type] = {}
        self._loaded: dict[str, type] = {}
        self._failed: dict[str, str] = {}

    def records(self) -> list[PluginRecord]:
        """Every visible plugin, built-ins first; each claimant of a contested name has its own record. Imports none."""
        found = self._visible()
        return [self._judged(record, [r for r in found if r.name == record.name]) for record in found]

    def names(self) -> list[str]:
        """The names that can be asked for, sorted: neither contested nor known to be broken."""
        return sorted(r.name for r in self.records() if r.status not in ("clash", "broken"))

    def warnings(self) -> list[str]:
        """One line for each metadata file or folder that could not be read as it should be."""
        return list(self._scan()[1])

    def refresh(self) -> None:
        """Forget what was found and loaded, so that packages installed since then are seen."""
        self._scanned = None
        self._loaded.clear()
        self._failed.clear()

    def load(self, name: str) -> type:
        """Import the plugin `name`, check it once, and return its class.

        Args:
            name: A name of `names()`, or a full class path (`package.module.Class`), which always works.

        Raises:
            PluginError: The name is unknown or contested, or the plugin cannot be imported or breaks the contract.
        """
        record = self._find(name)
        if name in self._loaded:
            return self._loaded[name]
        try:
            cls = self._registered[name] if name in self._registered else self._import(record)
            self._validate(cls, record)
        except PluginError as error:
            self._failed[name] = str(error)
            raise
        if record.status == "incompatible":
            warnings.warn(f"{self.kind} {name!r} of {record.origin}: {record.error}", stacklevel=2)
        self._failed.pop(name, None)
        self._loaded[name] = cls
        return cls

    def class_path(self, name: str) -> str:
        """The full class path of `name`, as configurations store it; imports nothing. PluginError as for `load`."""
        return self._find(name).class_path

    def name_of(self, cls: type) -> PluginRecord:
        """The record of the plugin that is `cls`, for provenance: name, distribution and version.

        A class that no plugin names (chosen by its class path) gets a record with the class path for its name, and the
        distribution of its top package if exactly one ships it.
        """
        for record in self.records():
            # The class exists, so its module is imported: comparing never needs to import another plugin.
            if _attribute(sys.modules.get(record.module), record.object) is cls:
                return record
        top = cls.__module__.partition(".")[0]
        owners = set(importlib.metadata.packages_distributions().get(top, []))
        owner = owners.pop() if len(owners) == 1 else ""
        version = importlib.metadata.version(owner) if owner else ""
        record = _record_of(cls.__module__, cls)
        return replace(record, name=record.class_path, distribution=owner, version=version)

    def register(self, name: str, cls: type) -> ExitStack:
        """Name a class of this process, for notebooks and tests.

        `register("mine", Mine)` lasts as long as the process; `with register("mine", Mine): ...` gives the name back.

        Raises:
            PluginError: The class breaks the contract, or the name belongs to another class.
        """
        record = _record_of(name, cls)
        if not _NAME.fullmatch(name):
            raise PluginError(f"{self.kind} name {name!r} is not usable: take letters, digits, '_' and '-'")
        holders = [r for r in self._visible() if r.name == name]
        if holders and self._registered.get(name) is not cls:
            raise PluginError(f"{self._clash(name, [*holders, record])}, or register under another name")
        self._validate(cls, record)
        self._registered[name] = cls
        handle = ExitStack()
        handle.callback(self._registered.pop, name, None)
        handle.callback(self._loaded.pop, name, None)
        return handle

    def _scan(self) -> tuple[list[PluginRecord], list[str]]:
        if self._scanned is None:
            # Python caches metadata by folder time, too coarse for a package installed within the same second.
            importlib.invalidate_caches()
            problems: list[str] = []
            found = sorted(_installed(self.group, problems), key=lambda r: (r.name, r.distribution))
            self._scanned = (found, problems)
        return self._scanned

    def _visible(self) -> list[PluginRecord]:
        """Built-ins, what this process registered, and the installed plugins that the environment allows."""
        allowed = _allow_list()
        installed = [r for r in self._scan()[0] if allowed is None or r.name in allowed]
        return [*self._builtins, *(_record_of(*item) for item in sorted(self._registered.items())), *installed]

    def _judged(self, record: PluginRecord, claimants: list[PluginRecord]) -> PluginRecord:
        if len(claimants) > 1:
            return replace(record, status="clash", error=self._clash(record.name, claimants))
        if record.name in self._failed:
            return replace(record, status="broken", error=self._failed[record.name])
        if record.name in self._loaded and record.status == "unloaded":
            return replace(record, status="ok")
        return record

    def _clash(self, name: str, claimants: list[PluginRecord]) -> str:
        origins = " and ".join(r.origin for r in claimants)
        paths = " or ".join(r.class_path for r in claimants)
        return f"{self.kind} name {name!r} is claimed by {origins}: give the full class path ({paths}) or uninstall one"

    def _find(self, name: str) -> PluginRecord:
        """The one record that answers to `name`; PluginError if there is none, or more than one."""
        claimants = [r for r in self._visible() if r.name == name]
        if len(claimants) > 1:
            raise PluginError(self._clash(name, claimants))
        if claimants:
            return claimants[0]
        module, _, attribute = name.rpartition(".")
        if module:
            return PluginRecord(name, module, attribute)
        raise PluginError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        names = self.names()
        message = f"unknown {self.kind} {name!r}; available: {', '.join(names) or 'none'}"
        if close := difflib.get_close_matches(name.lower(), names, n=1):
            message += f"; did you mean {close[0]!r}?"
        if any(r.name == name for r in self._scan()[0]):
            message += f"; it is installed, but {ENVIRONMENT_VARIABLE}={os.environ[ENVIRONMENT_VARIABLE]!r} hides it"
        if self.warnings():
            message += "; some package metadata could not be read, see `saeforge variants`"
        return message

    def _import(self, record: PluginRecord) -> type:
        if record.status == "broken":
            raise PluginError(record.error)
        try:
            cls: type = entrypoints.EntryPoint(record.name, record.module, record.object).load()
        except Exception as error:  # whatever a stranger's module does at import is a broken plugin, not our crash
            advice = f"mend or uninstall {record.distribution}" if record.distribution else "mend that module"
            reason = f"{self.kind} {record.name!r} of {record.origin} cannot be loaded: {_one_line(error)}"
            raise PluginError(
                f"{reason} ({record.error}); {advice}" if record.error else f"{reason}; {advice}"
            ) from error
        return cls

    def _validate(self, candidate: object, record: PluginRecord) -> None:
        module, name = self.base.split(":")
        faults = contract_faults(candidate, getattr(importlib.import_module(module), name))
        if faults:
            raise PluginError(f"{self.kind} {record.name!r} of {record.origin} is not usable: {'; '.join(faults)}")


def contract_faults(candidate: object, base: type) -> list[str]:
    """What keeps `candidate` from being a plugin class under `base`; empty if nothing does.

    Arguments must be typed and named one by one because configuration files and `--help` are made from the signature.
    """
    if not inspect.isclass(candidate):
        return [f"expected a class, got {type(candidate).__name__}"]
    if not issubclass(candidate, base):
        return [f"expected a subclass of {base.__module__}.{base.__qualname__}"]
    faults = []
    if abstract := sorted(getattr(candidate, "__abstractmethods__", ())):
        faults.append(f"it is abstract: implement {', '.join(abstract)}")
    for argument in list(inspect.signature(candidate.__init__).parameters.values())[1:]:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            faults.append(f"__init__ takes {str(argument).split(':')[0]}: name every argument")
        elif argument.annotation is argument.empty:
            faults.append(f"__init__ argument {argument.name!r} has no type annotation")
    if not candidate.__doc__:
        faults.append("it has no docstring")
    return faults


def _installed(group: str, problems: list[str]) -> Iterator[PluginRecord]:
    """The third-party plugins on `sys.path`, each distribution once; each malformed file adds a line to `problems`."""
    seen = {_OWN_DISTRIBUTION}  # its plugins are the static table
    for folder in dict.fromkeys(os.fspath(entry) for entry in sys.path):
        try:
            # "all": by default the second of "my-a.egg-info" and "my-b.egg-info" is dropped, both being taken for "my".
            configs = entrypoints.iter_files_distros(path=[folder], repeated_distro="all")
            declared = [pair for config, _ in configs if group in config for pair in config[group].items()]
            if not declared:
                continue
        except (configparser.Error, UnicodeDecodeError, zipfile.BadZipFile, OSError) as error:
            problems.append(f"malformed entry points in {folder}: {_one_line(error)}; read with importlib.metadata")
            declared = []
        read = set()
        for distribution in importlib.metadata.distributions(path=[folder]):
            try:
                points = {(p.name, p.value) for p in distribution.entry_points if p.group == group}
                if not points:
                    continue
                owner, version = distribution.metadata["Name"], distribution.metadata["Version"]
            except Exception as error:  # a stranger's file, in any state of damage
                place = getattr(distribution, "_path", folder)
                problems.append(f"unreadable metadata {place}: {_one_line(error)}; its plugins are not available")
                continue
            canonical = re.sub(r"[-_.]+", "-", owner or "").lower()
            read |= points if owner else set()
            # Of one distribution at several places Python imports the first on sys.path, so that one counts.
            if owner and canonical not in seen:
                seen.add(canonical)
                misfit = _misfit(distribution)
                yield from (_record(name, value, owner, version or "", misfit) for name, value in points)
        lost = [f"{name} = {value}" for name, value in declared if (name, value) not in read]
        problems += [f"{line} in {folder}: its distribution has no readable metadata; not available" for line in lost]


def _record(name: str, value: str, owner: str, version: str, misfit: str) -> PluginRecord:
    record = PluginRecord(name, "", "", owner, version)
    try:
        point = entrypoints.EntryPoint.from_string(value, name)
    except entrypoints.BadEntryPoint:
        point = None
    if point is None or not point.object_name:
        error = f"entry point {name} = {value!r} of {owner} {version} is not of the form 'module:Class'"
        return replace(record, status="broken", error=error)
    record = replace(record, module=point.module_name, object=point.object_name)
    if not _NAME.fullmatch(name):
        return replace(record, status="broken", error=f"name {name!r} of {record.origin} has more than A-Z a-z 0-9 _ -")
    return replace(record, status="incompatible", error=misfit) if misfit else record


def _misfit(distribution: importlib.metadata.Distribution) -> str:
    """Why the distribution is not made for this saeforge, from its Requires-Dist; "" if it is."""
    own = [line for line in distribution.requires or [] if re.match(r"saeforge(?![\w.-])", line, re.IGNORECASE)]
    for line in own:
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            needed = Requirement(line)
        except InvalidRequirement as error:
            return f"its requirement {line!r} cannot be read: {_one_line(error)}"
        applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if applies and not needed.specifier.contains(__version__, prereleases=True):
            return f"made for saeforge{needed.specifier}, this is {__version__}"
    return ""


def _allow_list() -> set[str] | None:
    """Names that SAEFORGE_PLUGINS allows; None if it is unset or empty and everything is allowed."""
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not value:
        return None
    return set() if value.lower() == "off" else {name.strip() for name in value.split(",")}


def _record_of(name: str, cls: type) -> PluginRecord:
    return PluginRecord(name, cls.__module__, cls.__qualname__, status="ok")


def _attribute(root: object, dotted: str) -> object:
    for part in dotted.split("."):
        root = getattr(root, part, None)
    return root


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_VARIANTS = {
    "gated": "saeforge.variants:Gated",
    "l1_relu": "saeforge.variants:L1ReLU",
    "topk": "saeforge.variants:TopK",
}
VARIANTS = PluginGroup("saeforge.variants", "saeforge.variants.base:Variant", _VARIANTS, kind="variant")
"""The SAE variants: the built-in ones and those of installed plugins."""

_FORMATS = {
    "circuit-tracer": "saeforge.formats.circuit_tracer:CircuitTracer",
    "dictionary_learning": "saeforge.formats.dictionary_learning:DictionaryLearning",
    "gemma_scope": "saeforge.formats.gemma_scope:GemmaScope",
    "gemma_scope_2": "saeforge.formats.gemma_scope:GemmaScope2",
    "llama_scope": "saeforge.formats.llama_scope:LlamaScope",
    "native": "saeforge.formats.native:Native",
    "openai": "saeforge.formats.openai:OpenAI",
    "qwen_scope": "saeforge.formats.qwen_scope:QwenScope",
    "saelens": "saeforge.formats.saelens:SAELens",
    "sparsify": "saeforge.formats.sparsify:Sparsify",
}
FORMATS = PluginGroup("saeforge.formats", "saeforge.formats.base:Format", _FORMATS, kind="format")
"""The formats of SAEs on disk: the built-in ones and those of installed plugins."""

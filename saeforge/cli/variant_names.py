"""Entry-point names (`topk`) as values of `model.variant`, in YAML and on the command line.

jsonargparse resolves class paths and names of imported classes, and has no public way to add names. This one shim
extends its resolver for subclasses of `Variant` [style A1.4, option b]; the pin `jsonargparse<5` and a test guard it.
"""

from __future__ import annotations

from typing import Any

from jsonargparse import _typehints as typehints

from saeforge.errors import PluginError
from saeforge.registry import VARIANTS
from saeforge.variants import Variant

_original = typehints.resolve_class_path_by_name


def install() -> None:
    """Teaches jsonargparse the registered names; a second call changes nothing."""
    typehints.resolve_class_path_by_name = _resolve


def _resolve(cls: Any, name: str) -> str:
    wanted = cls if isinstance(cls, tuple) else (cls,)
    if not any(isinstance(c, type) and issubclass(c, Variant) for c in wanted):
        return _original(cls, name)
    if "." in name:
        return name
    if name not in VARIANTS.names():
        known = _original(cls, name)  # the class name of a variant that is imported already
        if "." in known:
            return known
    loaded = VARIANTS.load(name)  # an unknown, broken or contested name raises PluginError: one line, with the fix
    try:
        return _original(cls, loaded.__name__)  # the shortest stable path, e.g. saeforge.variants.TopK
    except ValueError as error:
        raise PluginError(f"variant {name!r}: {error}") from error

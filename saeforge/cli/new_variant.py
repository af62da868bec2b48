"""`saeforge new-variant`: a package with a variant of one's own that trains, passes its tests and can be published."""

from __future__ import annotations

import argparse
import ast
import keyword
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from saeforge import __version__
from saeforge.errors import ConfigError
from saeforge.registry import VARIANTS

KINDS = {"topk": "so many latents per token", "penalty": "ReLU latents under a penalty"}
_TEST_OPTIONS = {"topk": '"k": 4', "penalty": '"strength": 0.2'}
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def run(argv: Sequence[str]) -> int:
    """Writes the package and prints what to do with it.

    Returns:
        0.

    Raises:
        ConfigError: a bad or taken name, a folder that exists or cannot be written.
    """
    args = _parser().parse_args(argv)
    folder = new_variant(args.name, kind=args.kind, into=args.into)
    name, here = folder.name.removeprefix("saeforge-").replace("-", "_"), shlex.quote(str(folder))
    print(f"made {folder}: the variant is src/saeforge_{name}/variant.py. Next:")
    for command in (
        f"pip install -e {here}",
        f"pytest {here}",
        "saeforge variants --check",
        f"saeforge fit --data.path DATASET --model.variant {name}",
    ):
        print(f"  {command}")
    return 0


def new_variant(name: str, *, kind: str = "topk", into: str | Path = ".") -> Path:
    """Writes the package `saeforge-NAME`, whose class is a short working variant to change.

    Args:
        name: of the variant in configurations, in lower case: `my_variant`; `-` is read as `_`.
        kind: "topk" or "penalty": where its latents get their sparsity.
        into: folder in which the package's folder is made.

    Returns:
        The package's folder.

    Raises:
        ConfigError: a bad or taken name, a folder that exists or cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r}: expected {' or '.join(KINDS)}")
    name, class_name = _checked(name, kind)
    module, folder = f"saeforge_{name}", Path(into) / f"saeforge-{name.replace('_', '-')}"
    values = {
        "name": name,
        "class_name": class_name,
        "module": module,
        "distribution": folder.name,
        "options": _TEST_OPTIONS[kind],
        "saeforge_version": __version__,
    }
    files = {
        "pyproject.toml": "pyproject.toml.in",
        "README.md": "README.md.in",
        f"src/{module}/__init__.py": "init.py.in",
        f"src/{module}/variant.py": f"{kind}.py.in",
        f"tests/test_{name}.py": "test.py.in",
    }
    texts = {path: _rendered(template, values) for path, template in files.items()}
    try:
        folder.mkdir(parents=True)
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(f"{folder} exists: remove it, choose another name, or another place with --into") from error
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; choose another place with --into") from error
    return folder


def _checked(given: str, kind: str) -> tuple[str, str]:
    """The variant's name and its class's, or ConfigError: they become a file, an import, a command line and a class."""
    name = given.replace("-", "_")
    if given.startswith(("saeforge-", "saeforge_")):
        raise ConfigError(
            f"name {given!r}: leave out the prefix, the package is called {given.replace('_', '-')} anyway"
        )
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {given!r}: expected lower-case letters, digits and single underscores, like my_variant"
        )
    class_name = "".join(part.capitalize() for part in name.split("_"))
    for record in VARIANTS.records():
        # The command line finds classes by their names too, whatever their case; so one name for two is asking for it.
        if name == record.name.replace("-", "_").lower() or class_name.lower() == record.object.lower():
            raise ConfigError(f"name {given!r} is taken by {record.origin}; choose another name")
    if keyword.iskeyword(class_name) or class_name in _imported_names(kind):
        raise ConfigError(
            f"name {given!r} makes a class {class_name}, a name that Python or the file uses; choose another"
        )
    return name, class_name


def _imported_names(kind: str) -> set[str]:
    """What a template imports: its class must not have such a name."""
    tree = ast.parse(_rendered(f"{kind}.py.in", {"class_name": "A"}))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _rendered(template: str, values: dict[str, str]) -> str:
    from string import Template

    return Template(_template(template)).substitute(values)


def _template(name: str) -> str:
    from importlib.resources import files

    return files("saeforge.cli").joinpath("templates", name).read_text(encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("saeforge new-variant", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "name", metavar="NAME", help="of the variant, like my_variant; the package is saeforge-my-variant"
    )
    parser.add_argument(
        "--kind", choices=KINDS, default="topk", help="; ".join(f"{k}: {text}" for k, text in KINDS.items())
    )
    parser.add_argument(
        "--into", metavar="DIR", default=".", help="folder in which the package is made (default: here)"
    )
    return parser

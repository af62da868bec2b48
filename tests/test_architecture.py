"""The floors of the house: who may import whom, read from the syntax tree of every module.

Lower floors never import higher ones, and rooms on one floor do not import each other; within a room everything may. An
import inside a function counts like one at the top: it is the same dependency, only later.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS: list[set[str]] = [
    {"errors"},
    {"registry", "schedules", "scaling", "demo"},
    {"ops", "data", "own_encoder"},
    {"sae", "optim", "metrics"},
    {"variants", "formats", "lm"},
    {"harvest", "evaluation", "features"},
    {"training", "steering"},
    {"pages", "benchmark", "controls"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TESTING = "testing"  # beside the house: floors 0 to 4 when it is imported, 6 inside functions
PACKAGE = ""  # saeforge/__init__.py, which hands out names from every floor, lazily

ONLY_IN: dict[str, tuple[str, ...]] = {
    "entrypoints": ("saeforge.registry",),
    "lightning": ("saeforge.training", "saeforge.cli.fit"),
    "pytorch_lightning": (),
    "lightning_fabric": (),
    "transformers": ("saeforge.lm",),
    "wandb": ("saeforge.training",),
    "triton": ("saeforge.ops.triton_kernels",),
}
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
PLUGIN_CONTRACT = {"variants", "ops", "testing", "errors"}

# What is behind `saeforge --help` and `saeforge variants` imports these at the top, beside the standard library.
LIGHT_ROOMS = {"errors", "registry", PACKAGE}
LIGHT_COMMANDS = {"saeforge.cli", "saeforge.cli.main", "saeforge.cli.new_variant", "saeforge.cli.variants"}
# LightningCLI must be subclassed at the top; every other command parses its options before anything heavy is loaded.
HEAVY_COMMANDS = {"saeforge.cli.fit", "saeforge.cli.variant_names"}


@dataclass(frozen=True)
class Import:
    """One imported module: its full name, its line, and whether it happens inside a function or for types only."""

    name: str
    line: int
    lazy: bool
    typing_only: bool


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every module that `source` imports, with relative names resolved against `module`."""

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, typing_only)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from saeforge import data` imports the room, not a name.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "saeforge" else [base]
            for name in names:
                yield Import(name, node.lineno, lazy, typing_only)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch, typing in ((node.body, True), (node.orelse, typing_only)):
                for statement in branch:
                    yield from visit(statement, lazy, typing)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typing_only)

    yield from visit(ast.parse(source), False, False)


def room_of(module: str) -> str:
    """`saeforge.data.manifest` -> `data`; `saeforge` and its version -> the package itself."""
    room = [*module.split("."), PACKAGE][1]
    return PACKAGE if room == "__version__" else room


def direction_fault(module: str, imported: Import) -> str:
    """Why `module` may not import that part of saeforge; "" if it may."""
    room, target = room_of(module), room_of(imported.name)
    if target == PACKAGE:
        light = imported.name == "saeforge.__version__"
        return "" if light or room == PACKAGE else "take it from its room, not from the package"
    if target not in FLOOR_OF and target != TESTING:
        return "it is in no room of the house"
    if room in (target, PACKAGE):
        return ""
    if target == TESTING:
        checks = module == "saeforge.cli.variants" and (imported.lazy or imported.typing_only)
        return "" if checks else "testing is for plugins, tests and `saeforge variants --check`"
    if room == TESTING:
        allowed = FLOOR_OF[target] <= 4 or (imported.lazy and FLOOR_OF[target] == 6)
        return "" if allowed else "testing uses floors 0 to 4, and 6 inside functions"
    if FLOOR_OF[target] == FLOOR_OF[room]:
        return f"both are rooms of floor {FLOOR_OF[room]}"
    return "" if FLOOR_OF[target] < FLOOR_OF[room] else f"floor {FLOOR_OF[room]} imports floor {FLOOR_OF[target]}"


def weight_fault(module: str, imported: Import) -> str:
    """Why the import is too heavy for the top of `module`; "" if it is not."""
    room, top = room_of(module), imported.name.partition(".")[0]
    if module in HEAVY_COMMANDS or imported.lazy or imported.typing_only or top in sys.stdlib_module_names:
        return ""
    if room in LIGHT_ROOMS or module in LIGHT_COMMANDS:
        rooms = LIGHT_ROOMS | ({"cli"} if room == "cli" else set())
        fits = room_of(imported.name) in rooms if top == "saeforge" else top == "entrypoints"
    elif room == "cli":
        fits = top in ("saeforge", "jsonargparse")  # that no room brings torch with it, a test below runs to see
    else:
        return ""
    return "" if fits else "import it inside a function, this module must stay quick to import"


def owner_fault(module: str, imported: Import) -> str:
    """Why this third-party package may not be imported in `module`; "" if it may."""
    owners = ONLY_IN.get(imported.name.partition(".")[0])
    if owners is None or any(module == owner or module.startswith(f"{owner}.") for owner in owners):
        return ""
    return f"only {' and '.join(owners) or 'nobody'} may"


def violations(root: Path) -> list[str]:
    """One line for each breach of the plan under `root`/saeforge, and in the plugins beside it."""
    found = []
    for path in sorted((root / "saeforge").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        room = room_of(module)
        if room not in {*FLOOR_OF, TESTING, PACKAGE}:
            found.append(f"{module}: {room!r} is no room of the house; give it a floor in the design and in this test")
            continue
        if NO_NAMES & set(parts):
            found.append(f"{module}: name a module after what it holds")
        for imported in imports(path.read_text(encoding="utf-8"), module, is_package):
            faults = [owner_fault(module, imported), weight_fault(module, imported)]
            if imported.name.partition(".")[0] == "saeforge":
                faults.append(direction_fault(module, imported))
            found += [f"{module}:{imported.line} imports {imported.name}: {fault}" for fault in faults if fault]
    return found + plugin_violations(root)


def plugin_violations(root: Path) -> list[str]:
    """Imports in plugins/*/src that are not part of the public contract."""
    found = []
    for path in sorted(root.glob("plugins/*/src/**/*.py")):
        for imported in imports(path.read_text(encoding="utf-8"), path.stem, False):
            if imported.name.partition(".")[0] == "saeforge" and room_of(imported.name) not in PLUGIN_CONTRACT:
                found.append(f"{path.relative_to(root)}:{imported.line} imports {imported.name}: not public")
    return found


def test_the_house_stands_as_planned() -> None:
    assert (ROOT / "saeforge" / "registry.py").is_file()
    assert violations(ROOT) == []


COMMANDS = {f"saeforge.cli.{path.stem}" for path in (ROOT / "saeforge" / "cli").glob("[!_]*.py")}


@pytest.mark.parametrize("module", sorted(COMMANDS - HEAVY_COMMANDS))
def test_a_command_but_fit_parses_its_options_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(str({{'torch', 'transformers', 'lightning'}} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("ops/code.py", "from saeforge.variants import TopK", "floor 2 imports floor 4"),
        ("ops/code.py", "def f():\n    import saeforge.training.module", "floor 2 imports floor 6"),
        ("ops/code.py", "if TYPE_CHECKING:\n    from ..sae import SAE", "floor 2 imports floor 3"),
        ("ops/deep/code.py", "from ...sae import SAE", "floor 2 imports floor 3"),
        ("ops/__init__.py", "from ..sae import SAE", "floor 2 imports floor 3"),
        ("ops/code.py", "from saeforge import data", "both are rooms of floor 2"),
        ("ops/code.py", "from .. import data", "both are rooms of floor 2"),
        ("variants/topk.py", "from saeforge.lm.sites import Site", "both are rooms of floor 4"),
        ("features/store.py", "import saeforge.evaluation", "both are rooms of floor 5"),
        ("steering/edit.py", "import saeforge.training", "both are rooms of floor 6"),
        ("sae.py", "from saeforge.metrics import FVU", "both are rooms of floor 3"),
        ("pages/report.py", "import saeforge.cli.main", "floor 7 imports floor 8"),
        ("training/run.py", "from saeforge import train", "it is in no room"),
        ("training/run.py", "import saeforge", "take it from its room"),
        ("training/run.py", "import saeforge.testing", "testing is for plugins, tests and"),
        ("cli/fit.py", "def f():\n    import saeforge.testing", "testing is for plugins, tests and"),
        ("testing/kit.py", "import saeforge.training", "testing uses floors 0 to 4"),
        ("testing/kit.py", "def f():\n    import saeforge.pages", "testing uses floors 0 to 4"),
        ("cli/variants.py", "import entrypoints", "only saeforge.registry may"),
        ("harvest/run.py", "import lightning.pytorch as pl", "only saeforge.training and saeforge.cli.fit may"),
        ("cli/fitting.py", "def f():\n    import lightning", "only saeforge.training and saeforge.cli.fit may"),
        ("training/run.py", "import pytorch_lightning", "only nobody may"),
        ("harvest/run.py", "from transformers import AutoModel", "only saeforge.lm may"),
        ("evaluation/run.py", "def f():\n    import wandb", "only saeforge.training may"),
        ("cli/main.py", "import torch", "import it inside a function"),
        ("cli/harvest.py", "try:\n    from torch import nn\nexcept E:\n    pass", "import it inside a function"),
        ("cli/main.py", "from saeforge.cli import x\nimport saeforge.harvest", "import it inside a function"),
        ("cli/variants.py", "import jsonargparse", "import it inside a function"),
        ("cli/harvest.py", "class A:\n    import numpy", "import it inside a function"),
        ("registry.py", "import torch", "import it inside a function"),
        ("__init__.py", "from saeforge.training import train", "import it inside a function"),
        ("__init__.py", "import numpy", "import it inside a function"),
        ("data/utils.py", "", "name a module after what it holds"),
        ("common/thing.py", "", "'common' is no room of the house"),
        ("attic.py", "", "'attic' is no room of the house"),
        ("../plugins/jump/src/jump/main.py", "from saeforge.training import train", "not public"),
        ("../plugins/jump/src/jump/main.py", "from saeforge import registry", "not public"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, fault: str) -> None:
    plant(tmp_path, file, source)
    (found,) = violations(tmp_path)
    assert fault in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "ops/code.py",
            "import torch\nfrom .engine import run\nfrom saeforge.ops.group import Group\nimport saeforge.errors",
        ),
        ("variants/topk.py", "from saeforge import ops\nfrom saeforge.sae import SAE\nfrom saeforge.optim import adam"),
        ("registry.py", "import entrypoints\nfrom saeforge import __version__\ndef f():\n    import packaging"),
        ("__init__.py", "import os\ndef __getattr__(name):\n    from saeforge.training import train"),
        ("__init__.py", "if TYPE_CHECKING:\n    from saeforge.sae import SAE"),
        ("training/run.py", "import lightning.pytorch, wandb, torch\nfrom saeforge.variants import TopK"),
        ("lm/load.py", "def f():\n    import transformers"),
        ("cli/fit.py", "import lightning.pytorch.cli, torch\nfrom saeforge.training import module"),
        ("cli/harvest.py", "import jsonargparse\nfrom saeforge.harvest import x\ndef f():\n    import torch"),
        ("cli/variants.py", "def f():\n    from saeforge.testing import conformance"),
        ("testing/kit.py", "import saeforge.variants\ndef f():\n    import saeforge.training"),
        (
            "../plugins/jump/src/jump/main.py",
            "import torch\nfrom saeforge.variants.base import Variant\nimport saeforge.ops",
        ),
    ],
)
def test_what_the_plan_allows_is_no_violation(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


def plant(root: Path, file: str, source: str) -> None:
    path = (root / "saeforge").joinpath(file)
    (root / "saeforge").mkdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)

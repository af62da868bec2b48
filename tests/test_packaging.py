"""The distribution: metadata, what the wheel carries, and the exact set of packages that the tests ran with."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

from saeforge import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[NormalizedName, Version]:
    """canonical name -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built by the backend that is installed here, so that no network is needed."""
    out = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(out / done.stdout.split()[-1])


def test_the_wheel_carries_every_module_the_type_marker_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "saeforge"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        assert set(listed.stdout.split()) <= packed
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "saeforge").rglob("*.py")}
    assert modules <= packed
    assert "saeforge/py.typed" in packed
    assert all(name.startswith("saeforge/") for name in packed)
    assert not [name for name in packed if name.endswith(".pyc")]


def test_the_wheel_carries_the_demo_and_stays_small(wheel: zipfile.ZipFile) -> None:
    """Whatever of the model and its text this tree has; the files of each are there together or not at all."""
    packed = set(wheel.namelist())
    passages = {name for name in packed if name.startswith("saeforge/demo/passages/")}
    assert len(passages) == len(list((ROOT / "saeforge/demo/passages").glob("*.jsonl"))) >= 16
    model = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "training.json")
    for folder, files in (("model", model), ("", ("text.jsonl.gz", "text.json"))):
        here = {file for file in files if (ROOT / "saeforge/demo" / folder / file).is_file()}
        assert here in (set(), set(files))
        assert {(Path("saeforge/demo") / folder / file).as_posix() for file in here} <= packed
    assert sum(entry.compress_size for entry in wheel.infolist()) < 30e6


def test_the_wheel_carries_the_licence_and_the_entry_points(wheel: zipfile.ZipFile) -> None:
    info = f"saeforge-{__version__}.dist-info"
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "CC-BY-SA-3.0" in wheel.read(f"{info}/licenses/LICENSE-demo").decode()
    entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert "saeforge = saeforge.cli.main:main" in entries
    assert "[saeforge.variants]" in entries
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {__version__}\n" in metadata
    assert "License-Expression: Apache-2.0 AND CC-BY-SA-3.0\n" in metadata


def test_the_installed_command_starts() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="saeforge")
    assert script.value == "saeforge.cli.main:main"
    path = Path(sys.executable).parent / "saeforge"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout == f"saeforge {__version__}\n"


def test_every_requirement_has_an_exact_version_that_satisfies_it() -> None:
    exact = constraints()
    for requirement in requirements("dev", "hub", "probe", "explain"):
        assert requirement.specifier.contains(exact[canonicalize_name(requirement.name)]), requirement


def test_the_tests_run_with_the_exact_set() -> None:
    here = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in importlib.metadata.distributions()}
    wrong = {
        name: f"{here[name]} instead of {version}"
        for name, version in constraints().items()
        if name in here and here[name].public != version.public
    }
    assert wrong == {}


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_compromised_releases_of_lightning_can_not_be_installed(version: str) -> None:
    (lightning,) = [r for r in requirements() if r.name == "lightning"]
    assert not lightning.specifier.contains(version)
    assert f"!={version}" in str(lightning.specifier)
    assert lightning.specifier.contains("2.6.6")


def test_what_the_package_imports_is_what_it_requires() -> None:
    """Every third-party import of the package is a declared dependency or an extra."""
    extras = [name for name in PROJECT["optional-dependencies"] if name != "dev"]
    declared = {canonicalize_name(r.name) for r in requirements(*extras)}
    packages = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
    unknown = set()
    for path in (ROOT / "saeforge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"saeforge"}:
                if packages.get(top, canonicalize_name(top)) not in declared:
                    unknown.add(f"{path.relative_to(ROOT)} imports {top}")
    assert unknown == set()

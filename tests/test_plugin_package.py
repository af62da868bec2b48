"""The README's plugin, pip-installed: trains by name, and its SAE loads where the plugin is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme import ROOT, blocks
from tests.test_fit import CLI, arguments
from tests.toy import toy_dataset

PLUGIN = ROOT / "plugins" / "saeforge-log-relu"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path into which pip installed the plugin."""
    source, target = tmp_path_factory.mktemp("plugin") / PLUGIN.name, tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, source)  # a build leaves files beside the source
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, capture_output=True, text=True)
    return target


def test_the_readme_shows_the_plugin_as_it_is() -> None:
    assert (PLUGIN / "log_relu.py").read_text() in blocks("python")
    assert (PLUGIN / "pyproject.toml").read_text() in blocks("toml")


def run(command: list[str], site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command with or without the plugin on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_installed_plugin_trains_by_name_and_its_sae_loads_without_it(site: Path, tmp_path: Path) -> None:
    listed = run([*CLI, "variants", "--json"], site)
    assert listed.returncode == 0, listed.stderr
    records = {record["name"]: record for record in json.loads(listed.stdout)["variants"]}
    assert records["log_relu"]["distribution"] == "saeforge-log-relu"
    assert records["log_relu"]["version"] == "0.1.0"
    checked = run([*CLI, "variants", "--check", "log_relu"], site)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    dataset, folder = toy_dataset(tmp_path / "acts"), tmp_path / "run"
    args = arguments(dataset, folder, **{"model.variant": "log_relu", "model.variant.strength": 0.05})
    trained = run([*CLI, *args], site)
    assert trained.returncode == 0, trained.stderr

    script = (
        "import sys, torch, saeforge; sae = saeforge.load(sys.argv[1]);"
        "assert 'log_relu' not in sys.modules and 'lightning' not in sys.modules;"
        "print(sae.encode(torch.randn(3, 32)).n_rows, sae.meta['variant']['distribution'])"
    )
    loaded = run([sys.executable, "-c", script, str(folder)])
    assert loaded.stdout.split() == ["3", "saeforge-log-relu"], loaded.stderr

    own_tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PLUGIN)]
    tested = run([*own_tests, "-c", os.devnull], site)
    assert tested.returncode == 0, tested.stdout + tested.stderr

    refused = run([*CLI, *args, "--ckpt_path", "last"])
    assert refused.returncode == 2
    assert "log_relu" in refused.stderr.splitlines()[-1]

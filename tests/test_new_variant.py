"""`saeforge new-variant` makes a package that works, and refuses what would not become one."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import saeforge
from saeforge.cli.main import main
from saeforge.cli.new_variant import KINDS, new_variant
from saeforge.registry import contract_faults
from saeforge.testing import QUICK, conformance
from saeforge.variants import Variant
from tests.toy import D_IN, toy_rows


def made_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[Variant]:
    """The class of a package that is not installed."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    (target,) = project["entry-points"]["saeforge.variants"].values()
    monkeypatch.syspath_prepend(str(folder / "src"))
    module, name = target.split(":")
    cls: type[Variant] = getattr(importlib.import_module(module), name)
    return cls


def test_the_command_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-variant", "two-words", "--into", str(tmp_path / "a b"), "--kind", "penalty"]) == 0
    folder = tmp_path / "a b" / "saeforge-two-words"
    out = capsys.readouterr().out
    assert out.startswith(f"made {folder}: the variant is src/saeforge_two_words/variant.py. Next:\n")
    assert f"  pip install -e '{folder}'\n  pytest '{folder}'\n" in out
    assert "--model.variant two_words\n" in out
    assert "class TwoWords(Variant)" in (folder / "src/saeforge_two_words/variant.py").read_text()
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    module = "src/saeforge_two_words"
    tests = "tests/test_two_words.py"
    assert made == {"README.md", "pyproject.toml", f"{module}/__init__.py", f"{module}/variant.py", tests}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_keeps_the_contract_and_learns(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_variant(f"made_{kind}", kind=kind, into=tmp_path)
    cls = made_class(folder, monkeypatch)
    assert contract_faults(cls, Variant) == []
    assert conformance(cls, checks=QUICK).ok
    options: dict[str, Any] = {"k": 4} if kind == "topk" else {"strength": 0.05}
    x = toy_rows(8192)
    # Another seed than 0, which starts at toy_rows' own directions.
    run: dict[str, Any] = {"tokens": 400_000, "batch_size": 512, "lr": 3e-3, "progress": False, "seed": 1}
    sae = saeforge.train(x, variant=cls, d_sae=96, **run, **options)
    assert sae.rule == {"topk": "topk", "penalty": "threshold"}[kind]
    assert (sae(x) - x).square().sum() < 0.25 * (x - x.mean(0)).square().sum()
    assert sae.encode(x).l0().float().mean() < 20
    target = torch.cat([x, x[:, :3]], dim=1)
    transcoder = saeforge.train(x, target=target, variant=cls, d_sae=96, tokens=50_000, progress=False)
    assert (transcoder.d_in, transcoder.d_out) == (D_IN, D_IN + 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_is_clean(kind: str, tmp_path: Path) -> None:
    for name in ("a", "a_name_that_is_as_long_as_people_make_them"):
        folder = new_variant(name, kind=kind, into=tmp_path / name)
        rules = ["--isolated", "--line-length=120", "--select=E,F,UP,B,RUF,PTH,PT"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", *rules, str(folder)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
        assert "$" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_its_tests_run_by_its_own_settings_inside_another_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--no-such-option"\n')
    folder = new_variant("mine", kind="topk", into=tmp_path)
    (folder / "tests" / "test_mine.py").write_text("def test_nothing() -> None: ...\n")  # what is made imports torch
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("topk", r"taken by saeforge .*saeforge\.variants:TopK"),
        ("top-k", "taken by saeforge"),  # its class would be TopK, which the command line finds by that name too
        ("l1relu", "taken by saeforge"),
        ("saeforge-mine", "leave out the prefix, the package is called saeforge-mine anyway"),
        ("none", "makes a class None"),
        ("tensor", "makes a class Tensor"),
        ("step_output", "makes a class StepOutput"),
        ("Mine", "lower-case letters"),
        ("my__variant", "single underscores"),
        ("2fast", "lower-case letters"),
        ("my variant", "lower-case letters"),
        ("../mine", "lower-case letters"),
        ("", "lower-case letters"),
    ],
)
def test_a_bad_or_taken_name_is_refused(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-variant", name, "--into", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(saeforge.SaeforgeError, match=message):
        new_variant(name, into=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_ever_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_variant("mine", into=tmp_path)
    (tmp_path / "saeforge-mine" / "README.md").write_text("mine")
    assert main(["new-variant", "mine", "--into", str(tmp_path)]) == 2
    assert "saeforge-mine exists: remove it" in capsys.readouterr().err
    assert (tmp_path / "saeforge-mine" / "README.md").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(saeforge.SaeforgeError, match=r"cannot write .* --into"):
        new_variant("other", into=tmp_path / "file")
    with pytest.raises(saeforge.SaeforgeError, match="kind 'relu': expected topk or penalty"):
        new_variant("other", kind="relu", into=tmp_path)

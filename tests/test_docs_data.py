"""docs/data.md: its Python runs, and its commands are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from saeforge.cli import main as cli

DOC = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOC, flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(compile(block, "docs/data.md", "exec"), {})
    assert "torch.Size([" in capsys.readouterr().out


def test_the_commands_of_the_page_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cached").mkdir()
    for number in range(2):
        np.save(f"cached/{number}.npy", np.random.default_rng(number).standard_normal((16384, 8)))
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    imports = [words for words in commands if "import" in words]
    assert len(imports) == 1
    for words in [*imports, *(words for words in commands if words not in imports)]:
        assert words[0] == "saeforge"
        expanded = [str(p) for word in words[1:] for p in (sorted(Path().glob(word)) if "*" in word else [word])]
        assert cli.main(expanded) == 0, capsys.readouterr().err
    assert "all is well" in capsys.readouterr().out

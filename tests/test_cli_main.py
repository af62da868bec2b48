"""The dispatcher: quick to answer, one line and an exit code for whatever goes wrong, and the variants command."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from saeforge import __version__
from saeforge.cli import main as cli
from saeforge.cli import variants
from saeforge.errors import DatasetError
from saeforge.registry import VARIANTS, PluginGroup


def saeforge(*args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "saeforge.cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def best_of(runs: int, *args: str) -> float:
    """Shortest wall time of `saeforge ARGS` in seconds: the one that other work on the machine disturbed least."""

    def once() -> float:
        start = time.perf_counter()
        assert saeforge(*args).returncode == 0
        return time.perf_counter() - start

    return min(once() for _ in range(runs))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Puts a function in the place of the command `boom`."""

    def install(run: Callable[[list[str]], int]) -> None:
        module = ModuleType("boom_command")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "boom_command", module)
        monkeypatch.setitem(cli.COMMANDS, "boom", ("boom_command", "a command of the tests"))

    return install


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        raise error

    return run


Install = Callable[[Callable[[list[str]], int]], None]


# ---- help, version, names


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, summary) in cli.COMMANDS.items():
        assert any(line.split()[:1] == [name] and line.endswith(summary) for line in lines)
        assert len(summary) < 90


def test_no_command_shows_the_help_and_counts_as_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"saeforge {__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("varients", "did you mean 'variants'?"),
        ("--hlep", "unknown option '--hlep'; did you mean '--help'?"),
        ("q", "fit"),
    ],
)
def test_an_unknown_command_is_one_line_with_a_hint(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "--config", "x.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("saeforge: error: ")
    assert hint in err
    assert err.count("\n") == 1


def test_a_command_gets_its_arguments_and_gives_its_exit_code(command: Install) -> None:
    seen: list[list[str]] = []

    def run(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    command(run)
    assert cli.main(["boom", "--help", "x"]) == 7
    assert seen == [["--help", "x"]]


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_a_module_with_run_and_help(name: str) -> None:
    done = saeforge(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: saeforge" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# ---- errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DatasetError("shard x\nis damaged"), 2, "saeforge: error: shard x is damaged"),
        (KeyboardInterrupt(), 130, "saeforge: interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/last.ckpt"),
            1,
            "saeforge: error: no space left on the disk while writing run/last.ckpt; free some, then run the same"
            " command again",
        ),
    ],
)
def test_an_expected_error_is_one_line(
    command: Install, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    command(raising(error))
    assert cli.main(["boom"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_an_error_of_omegaconf_is_one_line_that_names_the_key(
    command: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf

    def run(argv: list[str]) -> int:
        OmegaConf.to_container(OmegaConf.create({"model": {"d_sae": "${data.nothing}"}}), resolve=True)
        return 0

    command(run)
    assert cli.main(["boom"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("saeforge: error: configuration key 'model.d_sae': ")
    assert "data.nothing" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a defect of ours"), OSError(errno.EIO, "Input/output error")])
def test_a_defect_keeps_its_traceback(command: Install, error: Exception) -> None:
    command(raising(error))
    with pytest.raises(type(error)):
        cli.main(["boom"])


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "saeforge", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# ---- quick


@pytest.mark.parametrize(("argv", "limit"), [(["--help"], 0.2), (["variants"], 0.5), (["variants", "--json"], 0.5)])
def test_a_light_command_answers_in_a_blink(argv: list[str], limit: float) -> None:
    assert best_of(5, *argv) < limit


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["nonsense"], ["variants"]])
def test_a_light_command_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from saeforge.cli.main import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'transformers', 'lightning', 'omegaconf', 'jsonargparse', 'wandb'};"
        "heavy &= set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_package_and_its_errors_import_nothing_heavy() -> None:
    code = "import sys, saeforge, saeforge.errors; sys.exit(str({'torch', 'numpy'} & set(sys.modules) or 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "0\n", done.stderr


# ---- saeforge variants


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginGroup:
    """A group with one good built-in, one broken plugin and, elsewhere on the path, a malformed file."""
    (tmp_path / "cli_plugins.py").write_text("class Base:\n    'Doc.'\n    def __init__(self, k: int = 1): ...\n")
    for name, entries in (
        ("bad-plug", "[test.cli]\nbad = nowhere_at_all:Bad\n"),
        ("foreign", "[a]\nx = y:z\nx = y:z\n"),
    ):
        info = tmp_path / f"{name.replace('-', '_')}-0.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.2\n")
        (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_plugins", raising=False)
    monkeypatch.delenv("SAEFORGE_PLUGINS", raising=False)
    return PluginGroup("test.cli", "cli_plugins:Base", {"good": "cli_plugins:Base"})


def test_the_table_is_aligned_and_shows_each_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["variants"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "distribution", "version", "status", "class"]
    for record in VARIANTS.records():
        (row,) = [row for row in rows if row.split()[0] == record.name]
        assert row.split()[1:3] == [record.distribution, record.version]
        assert row.index(record.class_path) == header.index("class")


def test_check_shows_the_error_under_the_broken_variant_and_fails(
    plugins: PluginGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert variants.run([], plugins) == 0
    assert "nowhere_at_all'" not in capsys.readouterr().out

    assert variants.run(["--check"], plugins) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[1:3]] == ["ok", "broken"]
    assert lines[3].startswith("  ")
    assert "No module named 'nowhere_at_all'" in lines[3]
    assert lines[4].startswith("warning: malformed entry points")


def test_check_passes_when_all_variants_load(plugins: PluginGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_PLUGINS", "off")
    assert variants.run(["--check"], plugins) == 0


def test_json_carries_every_field_and_the_warnings(plugins: PluginGroup, capsys: pytest.CaptureFixture[str]) -> None:
    assert variants.run(["--json", "--check"], plugins) == 1
    told = json.loads(capsys.readouterr().out)
    good, bad = told["variants"]
    assert (good["name"], good["status"], good["error"]) == ("good", "ok", "")
    assert (bad["distribution"], bad["version"], bad["status"]) == ("bad-plug", "0.2", "broken")
    assert (bad["module"], bad["object"]) == ("nowhere_at_all", "Bad")
    assert len(told["warnings"]) == 1


def test_check_of_the_real_variants_succeeds() -> None:
    done = saeforge("variants", "--check", "topk")  # tests/test_conformance.py has all of them
    assert done.returncode == 0, done.stdout + done.stderr
    assert " ok " in done.stdout

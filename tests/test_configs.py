"""Every YAML that ships is accepted by the command that it names in its comments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from saeforge.cli.main import main
from tests.readme import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_configuration_is_accepted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"saeforge (\w+) --config (\S+)", config.read_text())
    assert command, "the first lines say the command"
    assert ROOT / command[2] == config
    with pytest.raises(SystemExit) as stopped:
        main([command[1], "--config", str(config), "--print_config"])
    assert stopped.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(config.read_text())
    assert given.keys() <= printed.keys()

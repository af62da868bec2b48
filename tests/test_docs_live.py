"""The command of docs/live.md is accepted, and means what configs/live/demo.yaml means."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from saeforge.cli.main import main
from tests.readme import ROOT


def test_the_command_of_the_page_is_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "live.md").read_text(), flags=re.S)
    assert found
    words = shlex.split(found[1].replace("\\\n", " "))
    assert words[:2] == ["saeforge", "fit"]
    with pytest.raises(SystemExit) as stopped:
        main([*words[1:], "--print_config"])
    assert stopped.value.code in (0, None)
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    shipped = yaml.safe_load((ROOT / "configs" / "live" / "demo.yaml").read_text())["data"]
    assert {key: data[key] for key in ("source", "model", "text", "tokens")} == {
        key: shipped[key] for key in ("source", "model", "text", "tokens")
    }
    assert shipped["sites"] in (data["sites"], *data["sites"])

"""scripts/wandb_workspace.py: the view shows what runs log, and is whole up to the call that would send it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from saeforge.errors import ConfigError
from saeforge.training.figures import FIGURES, X_AXIS


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("wandb_workspace")


def test_the_view_shows_documented_names_of_every_namespace(script: Any) -> None:
    shown = {name for panels in script.SECTIONS.values() for panel in panels for name in panel.names} | {script.TABLE}
    assert shown - FIGURES.keys() == set()
    assert {name.partition("/")[0] for name in shown} == {name.partition("/")[0] for name in FIGURES}


def test_the_documentation_lists_the_view(script: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "logging.md").read_text()
    for title, panels in script.SECTIONS.items():
        assert f"| {title} | {'; '.join(panel.title for panel in panels)} |" in page


def test_without_the_package_the_advice_is_one_line(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ConfigError, match=r"pip install 'saeforge\[workspace\]'"):
        script.build("me", "mine", "view")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces uses validators of pydantic 1
def test_the_view_is_whole_up_to_the_network(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    import wandb
    from wandb_workspaces.workspaces import interface, internal

    sent: list[dict[str, Any]] = []

    def server(api: Any, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        sent.append(variables)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    monkeypatch.setattr(internal, "execute_graphql", server)
    assert script.main(["--entity", "me", "--project", "mine"]) == 0
    assert "https://wandb.example/me/mine?nw=abc" in capsys.readouterr().out
    (view,) = sent
    assert (view["entityName"], view["projectName"], view["type"]) == ("me", "mine", "project-view")
    bank = json.loads(view["spec"])["section"]["panelBankConfig"]
    sections = {section["name"]: section["panels"] for section in bank["sections"]}
    assert list(sections) == [*script.SECTIONS, "Top latents"]
    for title, panels in script.SECTIONS.items():
        assert [panel["config"]["chartTitle"] for panel in sections[title]] == [panel.title for panel in panels]
        assert {panel["config"]["xAxis"] for panel in sections[title]} == {X_AXIS}
        assert [panel["config"]["metrics"] for panel in sections[title]] == [list(panel.names) for panel in panels]

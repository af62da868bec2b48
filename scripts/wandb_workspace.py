"""Makes a saved view for saeforge runs in a wandb project: sections by question, tokens as the x axis.

    pip install 'saeforge[workspace]'
    python scripts/wandb_workspace.py --entity ME --project saeforge [--name saeforge] [--dry_run]

It shows what docs/logging.md names, and needs `wandb login`. --dry_run prints the view as JSON and sends nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from saeforge.errors import ConfigError, SaeforgeError
from saeforge.training.figures import X_AXIS


@dataclass(frozen=True)
class Panel:
    """One plot: a title over names of figures; `logarithmic` is its y axis; `regex` adds names that a pattern finds."""

    title: str
    names: tuple[str, ...]
    logarithmic: bool = False
    regex: str | None = None


#: The view, from top to bottom: is it good, is it sparse, is it healthy, does it run well.
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Quality": (
        Panel("FVU, held out", ("val/fvu",), logarithmic=True),
        Panel("FVU, training", ("train/fvu",), logarithmic=True),
        Panel("ΔCE, nats per token", ("model/delta_ce",)),
        Panel("loss recovered, mean ablation", ("model/ce_score_mean",)),
        Panel("cosine", ("val/cosine",)),
        Panel("shrinkage: reconstruction bias", ("val/reconstruction_bias",)),
    ),
    "Sparsity": (
        Panel("L0, training", ("train/l0",)),
        Panel("L0, held out: 5%, 50%, 95%", ("val/l0_p5", "val/l0_p50", "val/l0_p95")),
        Panel("dead latents", ("train/dead", "val/dead")),
        Panel("dense latents", ("val/dense_1pct", "val/dense_10pct")),
    ),
    "Latents": (
        Panel("log10 density", ("latents/log10_density",)),
        Panel("decoder norms", ("latents/decoder_norm",)),
        Panel("encoder norms", ("latents/encoder_norm",)),
        Panel("thresholds", ("latents/threshold",)),
    ),
    "Optimisation": (
        Panel("loss and its terms", ("train/loss",), logarithmic=True, regex=r"^train/(?!tokens$|l0$|fvu$|dead$).*"),
        Panel("learning rate", ("schedule/lr",)),
        Panel("schedules", ("schedule/lr",), regex=r"^schedule/(?!lr$).*"),
    ),
    "Speed": (
        Panel("tokens a second", ("speed/tokens_per_second",)),
        Panel("share of the encoder product's floor", ("speed/of_floor",)),
        Panel("waiting for data, ms a step", ("data/wait_ms",)),
        Panel("GB/s read", ("data/gb_per_second", "data/read_gb_per_second")),
        Panel("logging, ms a step", ("speed/logging_ms",)),
        Panel("memory, GB", ("memory/host_gb", "memory/device_gb")),
    ),
}
TABLE = "latents/top"


def build(entity: str, project: str, name: str) -> Any:
    """The view, a `wandb_workspaces.workspaces.Workspace` that was not saved.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError("this needs wandb-workspaces; pip install 'saeforge[workspace]'") from error

    def plot(panel: Panel) -> Any:
        options = {} if panel.regex is None else {"metric_regex": panel.regex}
        return reports.LinePlot(
            title=panel.title, x=X_AXIS, y=list(panel.names), log_y=panel.logarithmic or None, **options
        )

    sections = [
        workspaces.Section(name=title, panels=[plot(panel) for panel in panels], is_open=title != "Speed")
        for title, panels in SECTIONS.items()
    ]
    table = workspaces.Section(name="Top latents", panels=[reports.WeavePanelSummaryTable(table_name=TABLE)])
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[*sections, table],
        settings=workspaces.WorkspaceSettings(x_axis=X_AXIS, ignore_outliers=False, max_runs=20),
        runset_settings=workspaces.RunsetSettings(
            pinned_columns=["summary:val/fvu", "summary:val/l0_mean", "summary:model/delta_ce", "summary:train/dead"]
        ),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="user or team that owns the project")
    parser.add_argument("--project", default="saeforge")
    parser.add_argument("--name", default="saeforge", help="of the view")
    parser.add_argument("--dry_run", action="store_true", help="print the view, send nothing")
    given = parser.parse_args(argv)
    view = build(given.entity, given.project, given.name)
    if given.dry_run:
        # What `save` sends; the package has no public name for it.
        print(json.dumps(view._to_model().model_dump(by_alias=True, mode="json"), indent=1))
        return 0
    view.save()
    print(view.url)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SaeforgeError as error:
        sys.exit(f"wandb_workspace.py: {error}")

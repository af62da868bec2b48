"""What wandb gets beyond plain scalars: tokens as the x axis, histograms, tables, artifacts, and the same run again.

Lightning's `WandbLogger` is used as it is, so that a configuration names nothing of saeforge.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from saeforge.errors import CheckpointError
from saeforge.training.figures import X_AXIS
from saeforge.training.loggers import Histogram, Table, Value

#: Names whose x axis each logger's run knows.
_defined: weakref.WeakKeyDictionary[WandbLogger, set[str]] = weakref.WeakKeyDictionary()


def send(logger: WandbLogger, values: Mapping[str, Value], step: int) -> None:
    """Logs values of one moment in one row of the history; `X_AXIS` must be among them."""
    _define(logger, values)
    logger.log_metrics({name: _native(value) for name, value in values.items()}, step=step)


def _define(logger: WandbLogger, values: Mapping[str, Value]) -> None:
    """Puts new names over tokens. By name: of several patterns that fit, and Lightning has set `*`, any may win."""
    known = _defined.setdefault(logger, set())
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    for name in values.keys() - known:
        if name == X_AXIS:
            logger.experiment.define_metric(prefix + name)
        else:
            logger.experiment.define_metric(prefix + name, step_metric=prefix + X_AXIS)
        known.add(name)


def _native(value: Value) -> Any:
    import wandb  # only where a wandb logger exists: it takes a second

    if isinstance(value, Histogram):
        return wandb.Histogram(np_histogram=(value.counts, value.edges))
    if isinstance(value, Table):
        return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    return value


# Artifacts -------------------------------------------------------------------------------------------------------


def log_sae(logger: WandbLogger, folder: Path) -> None:
    """Makes an `sae/` folder an output of the run; an offline run holds it until `wandb sync`.

    The files are not copied: they must still be there when they are uploaded.
    """
    import wandb

    run = logger.experiment
    card = json.loads((folder / "sae.json").read_text())
    about = {name: card.get(name) for name in ("d_in", "d_sae", "rule", "k", "variant", "training", "dataset")}
    for name in ("model", "site"):
        about[name] = (card.get(name) or {}).get("name" if name == "model" else "id")
    artifact = wandb.Artifact(_artifact_name(f"sae-{run.name or run.id}"), type="sae", metadata=about)
    artifact.add_dir(str(folder), policy="immutable")
    run.log_artifact(artifact)


def use_dataset(logger: WandbLogger, identity: Mapping[str, Any]) -> bool:
    """Makes the dataset an input of the run, so that wandb draws the lineage; offline it cannot, and nothing is done.

    Args:
        logger: of the run.
        identity: of an SAE's data (`Pair.identity`): what it is, not its rows, is what wandb gets.

    Returns:
        Whether it was done.
    """
    import wandb

    run = logger.experiment
    if getattr(run, "offline", False) or getattr(run, "disabled", False):
        return False
    artifact = wandb.Artifact(
        _artifact_name(f"activations-{str(identity['dataset'])[:16]}"), type="dataset", metadata=dict(identity)
    )
    content = {name: value for name, value in identity.items() if name != "dataset_path"}
    with artifact.new_file("identity.json") as file:  # equal data, equal content: the same version for every run
        json.dump(content, file, indent=2, sort_keys=True)
    run.use_artifact(artifact)
    return True


def _artifact_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:128]


# The same run again ----------------------------------------------------------------------------------------------


def ids_file(run: Path) -> Path:
    """Where RUN remembers the ids of its wandb runs."""
    return run / "wandb" / "run-ids.json"


def remember(run: Path, loggers: Mapping[str, WandbLogger]) -> None:
    """Writes down the ids of the runs, by name of the SAE ("" where one run has all)."""
    ids = {name: logger.experiment.id for name, logger in loggers.items()}
    if all(isinstance(each, str) and each for each in ids.values()):
        path = ids_file(run)
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{path.name}.part-{os.getpid()}")
        part.write_text(json.dumps(ids, indent=2) + "\n")
        part.replace(path)


def remembered(run: Path) -> dict[str, str]:
    """The ids of RUN's wandb runs; empty if there were none.

    Raises:
        CheckpointError: damaged.
    """
    path = ids_file(run)
    if not path.is_file():
        return {}
    try:
        return {str(name): str(each) for name, each in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged; delete it to resume into a new wandb run") from error


def resume_into(logger: WandbLogger, run_id: str) -> None:
    """Lets a logger that has not started go on in an earlier run, unless its configuration names another."""
    if logger._wandb_init.get("id") is None and logger._experiment is None:
        logger._wandb_init["id"] = logger._id = run_id

"""What reaches wandb (read back from offline runs), TensorBoard, the CSV log and the screen, under documented names."""

from __future__ import annotations

import csv
import fcntl
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

import saeforge
from saeforge.cli.main import main
from saeforge.errors import CheckpointError
from saeforge.metrics import DENSITY_EDGES, density_histogram
from saeforge.ops import Group
from saeforge.training import figures
from saeforge.training.floor import product_seconds
from saeforge.training.latent_histograms import BINS, histogram
from saeforge.training.loggers import Table, as_markdown
from saeforge.training.run_folder import check_free
from saeforge.training.trainer import SAETrainer
from saeforge.training.wandb_log import ids_file, remembered, use_dataset
from tests.test_fit import arguments, logged
from tests.tiny_models import make_documents, save_model, write_jsonl
from tests.toy import toy_dataset, toy_rows
from tests.wandb_file import contents, each_run, records

ROOT = Path(__file__).parents[1]
WANDB = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline=true"]
#: What this machine, or a dataset on disk, does not log.
ELSEWHERE = {"memory/device_gb", "data/blocks_made", "data/rows_repeated"}
#: What Lightning and wandb add by themselves.
THEIRS = {"trainer/global_step", "_step", "_runtime", "_timestamp"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset."""
    return toy_dataset(tmp_path_factory.mktemp("toy") / "acts")


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of a tiny language model, with its texts."""
    home = tmp_path_factory.mktemp("harvested")
    save_model("llama", home / "llama")
    write_jsonl(home / "text.jsonl", make_documents(420))
    saeforge.harvest(
        model=str(home / "llama"),
        text=str(home / "text.jsonl"),
        sites=["resid_post.1"],
        out=str(home / "acts"),
        n_tokens=16_000,
        context_length=64,
        validation_share=0.2,
        store_dtype="float32",
        device="cpu",
    )
    return home / "acts"


@pytest.fixture(scope="module")
def offline(harvested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN with an offline wandb run, of the variant that has most to say: a penalty and thresholds."""
    run = tmp_path_factory.mktemp("offline") / "run"
    changes = {
        "model.variant": "gated",
        "data.tokens": 128 * 20,
        "data.batch_size": 128,
        "trainer.log_every_n_steps": 2,
        "validation.model_every": 10,
        "validation.model_tokens": 300,
        "logging.top_latents": 5,
    }
    assert main([*arguments(harvested, run, **changes), *WANDB]) == 0
    return run


def test_an_offline_run_holds_every_documented_name_and_no_other(offline: Path) -> None:
    history, _ = contents(offline)
    found = {name: figures.documented(name) for name in history - THEIRS}
    assert [name for name, entry in found.items() if entry is None] == []
    assert figures.FIGURES.keys() - set(found.values()) == ELSEWHERE


def test_the_table_in_the_documentation_is_the_one_of_the_code() -> None:
    assert figures.table() in (ROOT / "docs" / "logging.md").read_text()


def test_in_wandb_everything_is_plotted_against_tokens(offline: Path) -> None:
    (file,) = offline.glob("wandb/offline-run-*/*.wandb")
    axes = {record.metric.name: record.metric.step_metric for record in records(file) if record.HasField("metric")}
    history, _ = contents(offline)
    assert axes["train/tokens"] == ""
    assert {axes[name] for name in history - THEIRS - {"train/tokens"}} == {"train/tokens"}
    for record in records(file):  # a row without the axis would not be drawn
        row = {item.key or item.nested_key[0] for item in record.history.item}
        assert not row - THEIRS or "train/tokens" in row


def test_the_config_of_an_offline_run_holds_every_resolved_value_and_the_dataset(
    offline: Path, harvested: Path
) -> None:
    _, config = contents(offline)
    assert config["config"]["model"]["variant"]["class_path"] == "saeforge.variants.Gated"
    assert config["config"]["validation"]["model_every"] == 10
    assert config["dataset"] == saeforge.load(offline).meta["dataset"]
    assert config["data"]["dataset_path"] == str(harvested)
    resolved = config["resolved"]
    assert (resolved["total_steps"], resolved["rows_per_step"], resolved["tokens"]) == (20, 128, 2560)
    assert resolved["dead_after_tokens"] == 128  # 5% of 2,560 tokens
    assert resolved["members"][0]["options"]["d_sae"] == 128
    assert resolved["members"][0]["optimizer"]["lr"] == 0.003
    assert resolved["precision"] == "32-true"  # which was not given
    assert config["learning_rate"]["warmup_shape"] == "linear"
    assert config["variant"]["distribution"] == "saeforge"
    assert config["versions"]["torch"] == torch.__version__


def test_the_sae_is_an_output_artifact_of_an_offline_run_and_its_files_are_not_copied(offline: Path) -> None:
    (file,) = offline.glob("wandb/offline-run-*/*.wandb")
    (artifact,) = [r.artifact for r in records(file) if r.HasField("artifact") and r.artifact.type == "sae"]
    assert artifact.name == "sae-run"
    assert {(each.path, each.local_path) for each in artifact.manifest.contents} == {
        (name, str(offline / "sae" / name)) for name in ("sae.json", "sae.safetensors")
    }
    assert f'"dataset":"{saeforge.load(offline).meta["dataset"]}"' in artifact.metadata


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_a_new_one_does_not(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = arguments(dataset, run, **{"data.tokens": 256 * 4})
    assert main([*args, *WANDB]) == 0
    assert main([*args, *WANDB, "--data.tokens=1536", "--ckpt_path=last"]) == 0
    assert main([*args, *WANDB, "--overwrite=true"]) == 0
    ids = [about.run_id for about, _, _ in each_run(run, finished=False)]
    assert len(ids) == 3
    assert len(set(ids)) == 2
    ids_file(run).write_text("[")
    with pytest.raises(CheckpointError, match=r"run-ids\.json is damaged; delete it"):
        remembered(run)
    check_free(run, resume=True, overwrite=False)


class OnlineRun:
    """A wandb run that has a server."""

    offline = disabled = False
    id = name = "r"

    def __init__(self) -> None:
        self.used: list[Any] = []

    def use_artifact(self, artifact: Any) -> None:
        """Keeps it."""
        self.used.append(artifact)


def test_online_the_dataset_is_the_input_of_the_run(harvested: Path, offline: Path) -> None:
    identity = saeforge.load(offline).meta
    identity = {name: identity[name] for name in ("model", "site", "target", "dataset", "dataset_path")}
    run = OnlineRun()
    logger: Any = type("Stub", (), {"experiment": run})
    assert use_dataset(logger, identity)
    assert use_dataset(logger, {**identity, "dataset_path": "moved"})
    first, second = run.used
    assert first.type == "dataset"
    assert first.name == f"activations-{identity['dataset'][:16]}"
    assert first.metadata["dataset_path"] == str(harvested)
    assert first.manifest.digest() == second.manifest.digest()  # the same data is the same version
    run.offline = True
    assert not use_dataset(logger, identity)


def test_without_texts_there_is_no_table_and_a_line_says_why(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    assert main([*arguments(dataset, tmp_path / "run", **{"data.tokens": 1024}), *WANDB]) == 0
    assert "no table of top latents: this SAE does not say which model" in caplog.text
    assert "latents/top" not in contents(tmp_path / "run")[0]


def test_looking_at_the_model_changes_no_bit_of_what_is_trained_and_agrees_with_evaluate(
    harvested: Path, tmp_path: Path
) -> None:
    changes = {"data.tokens": 128 * 8, "data.batch_size": 128}
    looking = {"validation.model_every": 3, "validation.model_tokens": 400}
    assert main(arguments(harvested, tmp_path / "plain", **changes)) == 0
    assert main(arguments(harvested, tmp_path / "looking", **changes, **looking)) == 0
    plain, sae = (saeforge.load(tmp_path / name) for name in ("plain", "looking"))
    assert torch.equal(plain.W_enc, sae.W_enc)
    assert torch.equal(plain.W_dec, sae.W_dec)
    assert len(logged(tmp_path / "looking", "model/delta_ce")) == 3  # steps 3, 6 and 8, the last
    effect = saeforge.evaluate(tmp_path / "looking", effect=True, effect_tokens=400).effect
    assert effect is not None
    for name in ("delta_ce", "ce_original", "ce_zero", "ce_score_mean", "kl_sae", "top1_sae", "tokens"):
        theirs = getattr(effect.overall, name)
        ours = logged(tmp_path / "looking", f"model/{name}")[-1]
        assert ours == pytest.approx(math.nan if theirs is None else theirs, abs=1e-6, nan_ok=True), name


def test_a_model_that_is_not_there_is_one_line_before_the_first_step(
    dataset: Path, harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looking = {"validation.model_every": 3}
    assert main(arguments(dataset, tmp_path / "a", **looking)) == 2
    assert "validation.model_every: this SAE does not say which model" in capsys.readouterr().err
    moved = {**looking, "validation.model": str(tmp_path / "nowhere"), "data.batch_size": 128}
    assert main(arguments(harvested, tmp_path / "b", **moved)) == 2
    message = capsys.readouterr().err
    assert "validation.model_every: " in message
    assert "nowhere" in message
    assert not (tmp_path / "b" / "checkpoints").exists()
    assert main(arguments(harvested, tmp_path / "c", **{"validation.model_every": 0})) == 2
    assert "validation.model_every = 0: expected a positive number" in capsys.readouterr().err


def test_no_logger_writes_no_log(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(dataset, run, **{"trainer.logger": "false"})) == 0
    assert {path.name for path in run.iterdir()} == {"checkpoints", "sae", "config.yaml"}


def test_the_csv_log_holds_the_same_names(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(dataset, run)) == 0
    (file,) = (run / "csv").glob("version_*/metrics.csv")
    names = set(next(csv.reader(file.read_text().splitlines()))) - {"step", "epoch"}
    assert [name for name in names if figures.documented(name) not in figures.SCALARS] == []
    assert {"train/aux", "train/fvu", "speed/of_floor", "data/gb_per_second", "val/fvu", "memory/host_gb"} <= names


class Watched(CSVLogger):
    """Notes how many lines the file has when a reading comes."""

    lines: list[int]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As its base."""
        file = Path(self.log_dir) / "metrics.csv"
        self.lines.append(len(file.read_text().splitlines()) if file.is_file() else 0)
        super().log_metrics(metrics, step)


class Broken(Logger):
    """Fails at its second reading."""

    name = version = "broken"

    def __init__(self) -> None:
        super().__init__()
        self.readings = 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Fails."""
        self.readings += 1
        if self.readings == 2:
            raise OSError(28, "No space left on device")


def train(loggers: list[Logger], run: Path) -> saeforge.SAE:
    """A run of 10 steps with a reading every second one, and a validation at the end."""
    return saeforge.train(
        toy_rows(4096),
        d_sae=64,
        k=4,
        tokens=640,
        batch_size=64,
        run=run,
        progress=False,
        trainer={"accelerator": "cpu", "logger": loggers, "log_every_n_steps": 2, "val_check_interval": 10},
    )


def test_a_logger_that_fails_is_named_and_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    broken, kept = Broken(), Watched(tmp_path / "log", name="csv")
    kept.lines = []
    with pytest.warns(UserWarning, match=r"Broken failed at step 4 \(OSError: \[Errno 28\] No space left"):
        train([broken, kept], tmp_path / "run")
    assert broken.readings == 2
    assert kept.lines == [0, 2, 3, 4, 5, 6]  # and each reading is in the file before the next one


class SlowValidation(Callback):
    """Takes its time."""

    def on_validation_epoch_start(self, *args: Any) -> None:
        """One and a half seconds."""
        time.sleep(1.5)


def test_speed_is_that_of_training_without_validation(tmp_path: Path) -> None:
    options = {"logger": CSVLogger(tmp_path, name="csv"), "log_every_n_steps": 2, "val_check_interval": 5}
    saeforge.train(
        toy_rows(4096),
        d_sae=64,
        k=4,
        tokens=640,
        batch_size=64,
        progress=False,
        trainer={"accelerator": "cpu", "callbacks": [SlowValidation()], **options},
    )
    assert max(logged(tmp_path, "speed/step_ms")) < 500  # 750 with the validation between steps 4 and 6


def test_a_logger_that_cannot_start_is_one_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CSVLogger, "log_hyperparams", full)
    assert main(arguments(dataset, tmp_path / "run")) == 2
    assert "CSVLogger cannot start ([Errno 28] No space left on device); free space" in capsys.readouterr().err


def test_wandb_that_is_not_installed_or_not_logged_in_is_one_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def no_key(**options: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", no_key)
    assert main([*arguments(dataset, tmp_path / "run"), WANDB[0]]) == 2
    assert "wandb: No API key configured. Use `wandb login` to log in.; `wandb login`, or" in capsys.readouterr().err
    monkeypatch.setattr("saeforge.cli.fit.find_spec", lambda name: None)
    assert main([*arguments(dataset, tmp_path / "other"), WANDB[0]]) == 2
    assert "trainer.logger WandbLogger needs wandb: pip install wandb" in capsys.readouterr().err


def test_tensorboard_gets_scalars_histograms_and_the_table(offline: Path, harvested: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    args = arguments(harvested, run, **{"data.tokens": 128 * 10, "data.batch_size": 128, "logging.top_latents": 3})
    logger = ["--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir=."]
    assert main([*args, *logger]) == 0
    (file,) = run.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file), size_guidance={"histograms": 0}).Reload()
    tags = found.Tags()
    assert {"train/loss", "val/fvu", "speed/of_floor"} <= set(tags["scalars"])
    assert {"latents/log10_density", "latents/decoder_norm", "latents/encoder_norm"} == set(tags["histograms"])
    assert found.Histograms("latents/decoder_norm")[-1].histogram_value.num == 128
    assert "latents/top/text_summary" in tags["tensors"]


def test_a_table_as_text_keeps_one_line_a_row() -> None:
    text = as_markdown(Table(["latent", "share", "context"], [[3, 0.123456, "a | b\nc"]]))
    assert text.splitlines() == ["| latent | share | context |", "|---|---|---|", "| 3 | 0.1235 | a \\| b c |"]


def test_the_floor_is_a_share_of_the_work() -> None:
    once, tenfold = (product_seconds(n, 64, 512, torch.float32, torch.device("cpu")) for n in (256, 2560))
    assert 0 < once
    assert 2 < tenfold / once < 50  # the same product timed twice, and scaled by 10


def test_without_a_terminal_lines_show_l0_fvu_and_dead(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [a for a in arguments(dataset, tmp_path / "run") if "enable_progress_bar" not in a]
    assert main(args) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 10
    assert all(name in line for line in lines for name in ("loss", "l0", "fvu", "dead", "tokens/s", "left"))


def test_on_a_terminal_a_bar_shows_l0_fvu_and_dead(dataset: Path, tmp_path: Path) -> None:
    args = [a for a in arguments(dataset, tmp_path / "run") if "enable_progress_bar" not in a]
    shown = run_on_terminal([sys.executable, "-m", "saeforge.cli.main", *args])
    assert "training" in shown
    assert all(f"{name}:" in shown for name in ("l0", "fvu", "dead"))


def run_on_terminal(command: list[str]) -> str:
    """The output of a command whose stdout and stderr are a terminal 200 columns wide."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    process = subprocess.Popen(command, stdout=inside, stderr=inside, env={**os.environ, "TERM": "xterm"})
    os.close(inside)
    parts = []
    while True:
        try:
            part = os.read(outside, 65536)
        except OSError:  # the terminal is gone with its last writer
            break
        if not part:
            break
        parts.append(part)
    os.close(outside)
    assert process.wait() == 0
    return b"".join(parts).decode(errors="replace")


def test_the_density_histogram_counts_every_latent_that_fires_once() -> None:
    counts = torch.tensor([0, 1, 10, 1000])
    found = density_histogram(counts, 1000)
    assert found.sum() == 3
    assert found[DENSITY_EDGES.index(-3.0)] == found[DENSITY_EDGES.index(-2.0)] == found[-1] == 1


@pytest.mark.parametrize(
    "values", [torch.linspace(-1, 3, 100), torch.ones(100), torch.zeros(100), torch.tensor([1.0] * 100 + [torch.inf])]
)
def test_a_histogram_counts_every_finite_value_once(values: torch.Tensor) -> None:
    found = histogram(values, Group())
    assert found.counts.sum() == 100
    assert len(found.edges) == BINS + 1
    assert found.edges[0] <= values.min()
    assert found.edges[-1] >= values[values.isfinite()].max()
    assert (found.edges[1:] > found.edges[:-1]).all()


def test_a_callback_that_is_given_takes_the_place_of_the_usual_one() -> None:
    from saeforge.training.validation import Validation

    own = Validation(model_tokens=7)
    trainer = SAETrainer(callbacks=[own], logger=False, accelerator="cpu")
    assert [each for each in trainer.callbacks if isinstance(each, Validation)] == [own]  # type: ignore[attr-defined]
    with pytest.raises(saeforge.SaeforgeError, match="2 of Validation"):
        SAETrainer(callbacks=[own, Validation()], logger=False, accelerator="cpu")

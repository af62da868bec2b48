"""`saeforge fit`: from a dataset to an SAE, errors of one line, and runs that resume to the bit."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

import saeforge
from saeforge.cli.main import main
from saeforge.data.shards import ActivationDataset
from saeforge.training import run_folder
from tests.toy import D_IN, toy_dataset

CLI = [sys.executable, "-m", "saeforge.cli.main"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset."""
    return toy_dataset(tmp_path_factory.mktemp("toy") / "acts")


def arguments(dataset: Path, run: Path, **more: Any) -> list[str]:
    """Arguments of a short run on the CPU."""
    options = {
        "run": run,
        "data.path": dataset,
        "data.batch_size": 256,
        "data.tokens": 256 * 40,
        "model.variant": "topk",
        "model.variant.d_sae": 128,
        "model.variant.k": 4,
        "model.lr": 0.003,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        **more,
    }
    if options["model.variant"] != "topk":
        options.pop("model.variant.k", None)
    return ["fit", *(f"--{name}={value}" for name, value in options.items())]


def logged(run: Path, key: str = "train/loss") -> list[float]:
    """The values of a key in the CSV log, in order."""
    files = sorted((run / "csv").glob("version_*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(io.StringIO(file.read_text()))]
    return [float(row[key]) for row in rows if row.get(key)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The folded SAE's tensors."""
    return dict(saeforge.load(run).state_dict())


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("variant", ["topk", "l1_relu", "gated"])
def test_fit_learns_saves_and_is_judged(variant: str, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"model.variant": variant, "data.tokens": 256 * 200}
    if variant == "l1_relu":  # the paper's l1 = 5 is for 200k steps
        options |= {"model.variant.l1": 0.3, "model.lr": 0.01}
    assert main(arguments(dataset, run, **options)) == 0
    losses = logged(run)
    assert len(losses) == 200
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert 0 < logged(run, "train/fvu")[-1] < 1
    assert logged(run, "val/fvu")  # held-out documents were looked at
    sae = saeforge.load(run)
    assert (sae.d_in, sae.d_sae) == (D_IN, 128)
    assert sae.meta["variant"]["name"] == variant
    assert sae.meta["variant"]["distribution"] == "saeforge"
    assert main(["evaluate", str(run)]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["trained_on_this_dataset"]
    # The last validation of the run and the command look at the same rows with the same folded SAE.
    assert result["metrics"]["fvu"] == pytest.approx(logged(run, "val/fvu")[-1], rel=1e-6)


def test_the_saved_configuration_repeats_the_run(dataset: Path, tmp_path: Path) -> None:
    assert main(arguments(dataset, tmp_path / "a")) == 0
    assert main(["fit", "--config", str(tmp_path / "a" / "config.yaml"), "--run", str(tmp_path / "b")]) == 0
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_python_train_equals_the_command(dataset: Path, tmp_path: Path) -> None:
    assert main(arguments(dataset, tmp_path / "a")) == 0
    sae = saeforge.train(
        dataset, variant="topk", d_sae=128, k=4, lr=0.003, tokens=256 * 40, batch_size=256, progress=False
    )
    assert_same(weights(tmp_path / "a"), dict(sae.state_dict()))


def test_python_fit_takes_mappings_and_overrides(dataset: Path, tmp_path: Path) -> None:
    config = {
        "run": str(tmp_path / "run"),
        "data": {"path": str(dataset), "batch_size": 256, "tokens": 256 * 4},
        "model": {"variant": {"class_path": "l1_relu", "init_args": {"d_sae": 64}}},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    sae = saeforge.fit(config, model__variant__d_sae=96, run=str(tmp_path / "other"))
    assert sae.d_sae == 96
    assert not (tmp_path / "run").exists()


def test_interpolation_follows_the_command_line(dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "fit.yaml"
    file.write_text("data:\n  batch_size: 256\n  validation_rows: ${data.batch_size}\n")
    args = arguments(dataset, tmp_path / "run", **{"data.batch_size": 512})
    assert main(["fit", "--config", str(file), *args[1:]]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["data"]["validation_rows"] == 512


def test_variant_help_lists_the_options_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--model.variant.help", "gated"])
    assert stopped.value.code == 0
    assert "l1_warmup_share" in capsys.readouterr().out


def test_bf16_mixed_trains_and_stays_close(dataset: Path, tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        run = tmp_path / precision
        assert main(arguments(dataset, run, **{"trainer.precision": precision, "data.tokens": 256 * 200})) == 0
    ours, reduced = (logged(tmp_path / p, "val/fvu")[-1] for p in ("32-true", "bf16-mixed"))
    assert reduced == pytest.approx(ours, rel=0.05)
    assert weights(tmp_path / "bf16-mixed")["W_dec"].dtype == torch.float32


def test_another_optimizer_keeps_the_decoder_constraint(dataset: Path, tmp_path: Path) -> None:
    args = [a for a in arguments(dataset, tmp_path / "run") if "model.lr" not in a]
    assert main([*args, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"]) == 0
    sae = saeforge.load(tmp_path / "run")
    scale = sae.W_dec.norm(dim=1)  # rows are unit over the scale
    assert torch.allclose(scale, scale[:1].expand_as(scale), rtol=1e-5)


class Interrupt(Callback):
    """Sends this process a signal after a number of batches."""

    def __init__(self, at: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = at, number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Once, at the batch."""
        if batch_idx + 1 == self.at:
            os.kill(os.getpid(), self.number)


def interrupt(at: int, number: int = signal.SIGINT) -> dict[str, str]:
    """The option that adds an `Interrupt`."""
    options = {"at": at, "number": int(number)}
    return {"trainer.callbacks": json.dumps({"class_path": "tests.test_fit.Interrupt", "init_args": options})}


# Errors ----------------------------------------------------------------------------------------------------------


def flip_a_byte(dataset: Path, copy: Path) -> Path:
    """A copy of the dataset with one payload byte changed."""
    shutil.copytree(dataset, copy)
    shard = next(p for p in copy.rglob("train-*.tar") if p.parent.name != "rows")
    content = bytearray(shard.read_bytes())
    content[ActivationDataset.open(copy).site.shards["train"][0].blocks[3].offset + 17] ^= 1
    shard.write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.variant": "topkk"}, ["topkk", "did you mean 'topk'"]),
        ({"model.variant": "nowhere.Missing"}, ["nowhere"]),
        ({"data.path": "nowhere"}, ["nowhere", "saeforge harvest"]),
        ({"model.d_in": 12}, ["model.d_in", "dataset"]),
        ({"model.lrr": 1}, ["model.lrr", "did you mean 'model.lr'"]),
        ({"trainer.gradient_clip_val": 1}, ["gradient_clip_val", "model.max_grad_norm"]),
        ({"trainer.precision": "16-mixed"}, ["16-mixed", "bf16-mixed"]),
        ({"trainer.max_steps": 3}, ["data.tokens", "trainer.max_steps"]),
        ({"data.batch_size": 100}, ["batch_size = 100", "use 96"]),
        ({"data.tokens": 10}, ["data.tokens = 10", "256"]),
        ({"model.variant.k": 500}, ["k = 500", "d_sae = 128"]),
        ({"trainer.strategy": "fsdp"}, ["fsdp", "ddp"]),
        ({"trainer.default_root_dir": "x"}, ["default_root_dir", "`run`"]),
        ({"ckpt_path": "last"}, ["last.ckpt", "is missing"]),
        ({"ckpt_path": "nowhere.ckpt"}, ["nowhere.ckpt"]),
        ({"data.input": "nosuch"}, ["nosuch", "array:out"]),
        ({"config": "nowhere.yaml"}, ["nowhere.yaml"]),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, Any], words: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chdir(tmp_path)
    code = main(arguments(dataset, tmp_path / "run", **change))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert error.startswith("saeforge: error: ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model:\n  d_in: 12\n", ["model.d_in"]),
        ("fit:\n  model:\n    d_out: 12\n", ["model.d_out"]),
        ("modle:\n  lr: 1\n", ["modle"]),
        ("data:\n  batch_size: ${data.nothing}\n", ["data.batch_size", "nothing"]),
        ("data:\n  batch_size: ${oc.env:SAEFORGE_NOT_SET}\n", ["SAEFORGE_NOT_SET"]),
        ("model: [1, 2\n", ["config"]),
    ],
)
def test_mistakes_in_a_file_are_one_line(
    content: str, words: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    code = main([*arguments(dataset, tmp_path / "run"), "--config", str(tmp_path / "bad.yaml")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert error.startswith("saeforge: error: ")
    assert all(word in error for word in words), error


def test_a_flipped_byte_names_shard_and_block(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = flip_a_byte(dataset, tmp_path / "bad")
    assert main(arguments(bad, tmp_path / "run", **{"data.tokens": 256 * 64})) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "train-000000.tar, block" in error
    assert "checksum" in error


def test_a_loss_that_is_not_finite_is_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path / "run", **{"model.variant": "l1_relu", "model.lr": 1e30})) == 2
    assert "the loss is" in capsys.readouterr().err


def test_a_run_that_broke_between_two_readings_keeps_its_last_good_checkpoint(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model.variant": "l1_relu", "model.lr": 1e30, "trainer.log_every_n_steps": 40}
    assert main(arguments(dataset, tmp_path / "run", **options)) == 2
    assert "the weights are not finite at step 4;" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_run_folder_that_cannot_be_made_is_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(arguments(dataset, tmp_path / "file" / "run")) == 2
    assert "cannot be made" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_refused_run_leaves_no_folder(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(dataset, tmp_path / "first", **{"data.tokens": 256 * 4})) == 0
    options = {"model.variant": "l1_relu", "model.init_from": str(tmp_path / "first")}
    assert main(arguments(dataset, tmp_path / "run", **options)) == 2
    assert "this one has top-k" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    assert main(arguments(dataset, tmp_path / "link", **options)) == 2
    assert "this one has top-k" in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink()


def test_callbacks_can_monitor_the_validation(dataset: Path, tmp_path: Path) -> None:
    stop = {"monitor": "val/fvu", "patience": 1, "min_delta": 10.0}  # no improvement is that large
    keep = {"monitor": "val/fvu", "dirpath": str(tmp_path / "best"), "every_n_train_steps": 4}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep},
    ]
    assert main(arguments(dataset, tmp_path / "run", **{"trainer.callbacks": json.dumps(callbacks)})) == 0
    assert saeforge.load(tmp_path / "run").meta["training"]["steps"] == 8  # validations after 4 and 8
    assert list((tmp_path / "best").glob("*.ckpt"))


def test_no_traceback_reaches_a_person(dataset: Path, tmp_path: Path) -> None:
    command = [*CLI, *arguments(dataset, tmp_path / "run", **{"model.variant": "topkk"})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert len([line for line in done.stderr.splitlines() if line.startswith("saeforge: error")]) == 1


def test_a_folder_with_a_run_is_not_overwritten(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(dataset, tmp_path / "run", **{"data.tokens": 256 * 4})
    assert main(args) == 0
    assert main(args) == 2
    assert "--ckpt_path last" in capsys.readouterr().err
    results = [
        tmp_path / "run" / name
        for name in ("evaluation.json", "concepts.json", "features.sqlite", ".features.sqlite.progress.npz")
    ]
    for path in results:
        path.write_text("{}")
    assert main([*args, "--overwrite=true"]) == 0
    assert not any(path.exists() for path in results)  # they were of the former SAE
    with pytest.raises(saeforge.SaeforgeError, match="already holds a run"):
        saeforge.train(dataset, run=tmp_path / "run", progress=False)


# Resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["topk", "l1_relu", "gated"])
@pytest.mark.parametrize("steps", [1, 12, 31, 39])
def test_a_stopped_run_goes_on_to_the_same_bits(variant: str, steps: int, dataset: Path, tmp_path: Path) -> None:
    """Stops after `steps` steps as Ctrl-C does; passes are 32 batches long, so 31 and 39 lie around a boundary."""
    options = {"model.variant": variant, "model.dead_after_tokens": 1024}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(dataset, whole, **options)) == 0
    assert main(arguments(dataset, parts, **options, **interrupt(steps))) == 130
    assert not (parts / "sae").exists()
    assert main(arguments(dataset, parts, **options, ckpt_path="last")) == 0
    assert_same(weights(whole), weights(parts))
    assert logged(parts) == logged(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signals_stop_as_ctrl_c_does(
    number: signal.Signals, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(dataset, whole)) == 0
    assert main(arguments(dataset, parts, **interrupt(13, number))) == 128 + number
    assert f"stopped by {number.name} after step 13" in capsys.readouterr().err
    assert main(arguments(dataset, parts, ckpt_path="last")) == 0
    assert_same(weights(whole), weights(parts))


def test_only_a_second_ctrl_c_breaks_off_the_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sends SIGTERM after its warning, torchrun repeats what a terminal has sent to all processes already."""
    now = [100.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    folder = run_folder.RunFolder(tmp_path)
    folder._stop(signal.SIGUSR1, None)
    now[0] = 400.0
    folder._stop(signal.SIGTERM, None)
    assert folder.stopped_by == "SIGUSR1"
    again = run_folder.RunFolder(tmp_path)
    again._stop(signal.SIGINT, None)
    now[0] += 0.1
    again._stop(signal.SIGINT, None)
    now[0] += 2.0
    with pytest.raises(KeyboardInterrupt):
        again._stop(signal.SIGINT, None)


def test_a_stop_inside_an_accumulation_waits_for_the_step(dataset: Path, tmp_path: Path) -> None:
    options = {"data.batch_size": 128, "trainer.accumulate_grad_batches": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(dataset, whole, **options)) == 0
    assert main(arguments(dataset, parts, **options, **interrupt(25))) == 130
    state = torch.load(parts / "checkpoints" / "last.ckpt", weights_only=True)
    assert (state["global_step"], state["ActivationData"]["position"]) == (13, 26)
    assert main(arguments(dataset, parts, **options, ckpt_path="last")) == 0
    assert_same(weights(whole), weights(parts))


def test_a_run_killed_before_its_sae_was_written_gets_it_by_resuming(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(arguments(dataset, run)) == 0
    before = weights(run)
    shutil.rmtree(run / "sae")
    assert main(arguments(dataset, run, ckpt_path="last")) == 0
    assert_same(before, weights(run))


def test_a_finished_run_can_be_lengthened(dataset: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fixed = {"model.dead_after_tokens": 1024, "model.lr_warmup_steps": 0}
    assert main(arguments(dataset, whole, **fixed, **{"data.tokens": 256 * 60})) == 0
    assert main(arguments(dataset, parts, **fixed, **{"data.tokens": 256 * 40})) == 0
    assert main(arguments(dataset, parts, **fixed, **{"data.tokens": 256 * 60}, ckpt_path="last")) == 0
    assert_same(weights(whole), weights(parts))


def test_sigkill_and_resume_give_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    options = {"data.tokens": 256 * 400, "model.dead_after_tokens": 1024}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(dataset, whole, **options)) == 0
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(
            [*CLI, *arguments(dataset, parts, **options)], stdout=log, stderr=log, env=environment
        )
        checkpoint = parts / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 90
        while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (parts / "sae").exists()
    assert main(arguments(dataset, parts, **options, ckpt_path="last")) == 0
    assert_same(weights(whole), weights(parts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.variant": "gated"}, ["TopK", "Gated"]),
        ({"model.variant.k": 5}, ["k: 4 -> 5"]),
        ({"model.lr": 0.1}, ["lr: 0.003 -> 0.1"]),
        ({"data.batch_size": 128}, ["batch_size = 256", "128"]),
        ({"data.seed": 7}, ["seed = 0", "7"]),
        ({"trainer.accumulate_grad_batches": 2}, ["accumulate_grad_batches: 1 -> 2"]),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    change: dict[str, Any], words: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(arguments(dataset, run, **{"data.tokens": 256 * 4})) == 0
    before = (run / "config.yaml").read_text()
    assert main(arguments(dataset, run, **change, ckpt_path="last")) == 2
    assert (run / "config.yaml").read_text() == before  # the file that the run goes on with
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("saeforge: error: ")
    assert all(word in error for word in words), error


def test_a_damaged_checkpoint_is_one_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"nonsense")
    assert main(arguments(dataset, tmp_path / "run", ckpt_path=broken)) == 2
    assert "broken.ckpt" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_flipped_byte_in_a_checkpoint_is_found(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path / "run", **interrupt(8))) == 130
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1  # inside a weight, or Adam's
    checkpoint.write_bytes(content)
    assert main(arguments(dataset, tmp_path / "run", ckpt_path="last")) == 2
    assert "last.ckpt is damaged: " in capsys.readouterr().err.strip().splitlines()[-1]
    assert checkpoint.read_bytes() == content


def test_accumulated_batches_are_one_step_of_the_run(dataset: Path, tmp_path: Path) -> None:
    """Two batches of 128 rows a step make as many steps of as many tokens as batches of 256."""
    runs = {}
    for name, batch, accumulate in (("whole", 256, 1), ("halves", 128, 2)):
        options = {"data.batch_size": batch, "trainer.accumulate_grad_batches": accumulate}
        assert main(arguments(dataset, tmp_path / name, **options)) == 0
        runs[name] = saeforge.load(tmp_path / name).meta["training"]
    assert runs["halves"]["steps"] == runs["whole"]["steps"] == 40
    assert runs["halves"]["tokens"] == runs["whole"]["tokens"] == 256 * 40
    # A step is read out once, over all of its batches, and so is its loss that of the whole batch.
    assert logged(tmp_path / "halves")[0] == pytest.approx(logged(tmp_path / "whole")[0], rel=1e-5)
    assert len(logged(tmp_path / "halves")) == 40


def test_fast_dev_run_takes_one_step(dataset: Path, tmp_path: Path) -> None:
    assert main([*arguments(dataset, tmp_path / "run"), "--trainer.fast_dev_run=true"]) == 0
    assert saeforge.load(tmp_path / "run").meta["training"]["steps"] == 1


def test_without_checkpoints_only_the_sae_is_left(dataset: Path, tmp_path: Path) -> None:
    assert main([*arguments(dataset, tmp_path / "run"), "--trainer.enable_checkpointing=false"]) == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert saeforge.load(tmp_path / "run").d_sae == 128


def test_seed_everything_changes_weights_and_order(dataset: Path, tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", ["--seed_everything=1"]), ("c", ["--model.seed=1", "--data.seed=1"])):
        assert main([*arguments(dataset, tmp_path / name), *more]) == 0
    a, b, c = (weights(tmp_path / name)["W_dec"] for name in "abc")
    assert not torch.equal(a, b)
    assert torch.equal(b, c)


def test_train_takes_any_batch_size_and_sites_by_name(dataset: Path) -> None:
    x = torch.randn(2000, 8)
    assert saeforge.train(x, d_sae=16, k=2, batch_size=1000, tokens=4000, progress=False).d_in == 8
    sae = saeforge.train(
        dataset,
        site="array:out",
        target="array:out",
        d_sae=16,
        k=2,
        batch_size=64,
        tokens=640,
        progress=False,
        pre_bias=False,
    )
    assert sae.meta["site"]["id"] == "array:out"
    assert sae.meta["target"] is None  # the same site is no transcoder
    with pytest.raises(saeforge.SaeforgeError, match="name of one of its sites"):
        saeforge.train(dataset, target=x, progress=False)
    with pytest.raises(saeforge.SaeforgeError, match="rows too"):
        saeforge.train(x, target="array:out", progress=False)

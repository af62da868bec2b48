"""`saeforge fit`: LightningCLI over one module, one data module and one trainer."""

from __future__ import annotations

import platform
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from saeforge import __version__
from saeforge.cli import variant_names
from saeforge.cli.parsing import PARSER_MODE, configure_jsonargparse, fail
from saeforge.errors import ConfigError
from saeforge.registry import VARIANTS
from saeforge.sae import load
from saeforge.training.data import ActivationData
from saeforge.training.identity import identity_of
from saeforge.training.loggers import describe
from saeforge.training.member import Member
from saeforge.training.module import SAEModule
from saeforge.training.outputs import RunOutputs
from saeforge.training.run_folder import check_free, clear, make_folder
from saeforge.training.trainer import SAETrainer
from saeforge.training.validation import Validation
from saeforge.training.wandb_runs import WandbRuns

DEFAULT_RUN = "runs/default"
#: What each of Lightning's loggers needs, any one of several.
_LOGGER_PACKAGES = {
    "WandbLogger": ("wandb",),
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "MLFlowLogger": ("mlflow", "mlflow_skinny"),
    "CometLogger": ("comet_ml",),
    "NeptuneLogger": ("neptune",),
}
_LINKED = ("d_in", "d_out")
_LINKED_KEYS = {
    **{
        f"model.{name}": f"model.{name} is read from the dataset and cannot be set; remove it (data.path decides)"
        for name in _LINKED
    },
    "trainer.default_root_dir": "trainer.default_root_dir is the RUN folder; set `run` instead",
}


class FitParser(LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ConfigError with the message in one line."""
        fail(self, message, ex)


class FitCLI(LightningCLI):
    """What LightningCLI does, plus the RUN folder and the links from data to model."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` alone; judging is `saeforge evaluate`."""
        return {"fit": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--run`, `--overwrite`, and what the dataset tells the model."""
        parser.add_argument("--run", type=str, default=DEFAULT_RUN, help="Folder of this run (runs/<name>).")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in a folder that already holds a run."
        )
        parser.add_lightning_class_args(Validation, "validation")
        parser.add_lightning_class_args(RunOutputs, "logging")
        parser.link_arguments("run", "trainer.default_root_dir")
        for name in _LINKED:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, after refusing linked keys that were set by hand (a file's would be dropped silently)."""
        given = list(sys.argv[1:] if args is None else args)
        _refuse_linked(given)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let a checkpoint's settings override the command line [style A1.7]."""

    def _run_subcommand(self, subcommand: str) -> None:
        """As its base; afterwards no wandb run is open, which the next `fit` of this process would log to."""
        failed = True
        try:
            super()._run_subcommand(subcommand)
            failed = False
        finally:
            for logger in self.sae_trainer.loggers:
                if isinstance(logger, WandbLogger) and logger._experiment is not None:
                    logger.experiment.finish(exit_code=int(failed))

    @property
    def sae_trainer(self) -> SAETrainer:
        """The trainer, by its own type."""
        assert isinstance(self.trainer, SAETrainer)
        return self.trainer

    def before_instantiate_classes(self) -> None:
        """Checks the RUN folder and points loggers at it."""
        config = self.config["fit"]
        run = Path(config["run"])
        check_free(run, resume=config["ckpt_path"] is not None, overwrite=config["overwrite"])
        if config["data"]["source"] == "live":
            make_folder(run)
            self._place_live(config, run / "data")
        loggers = config["trainer"]["logger"]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            options = getattr(logger, "init_args", None)
            if options is not None:
                _check_installed(logger["class_path"].rpartition(".")[2])
            if options is not None and options.get("save_dir") in (None, "."):
                options["save_dir"] = str(run)
            if options is not None and logger["class_path"].endswith("WandbLogger"):
                make_folder(run)
                options["name"] = options.get("name") or run.name

    def _place_live(self, config: Any, own: Path) -> None:
        """Gives a live run its folder; what overwrites the run overwrites what lies there, if it is the run's own."""
        data = config["data"]
        if data["path"] is None:
            data["path"] = str(own)
        if config["overwrite"] and config["ckpt_path"] is None and Path(data["path"]) == own:
            data["harvest"] = {**(data["harvest"] or {}), "overwrite": True}


def _check_installed(logger: str) -> None:
    """Whether a logger's package is there; jsonargparse would bury that in an error about types.

    Raises:
        ConfigError: it is not.
    """
    packages = _LOGGER_PACKAGES.get(logger, ())
    if packages and not any(find_spec(package) for package in packages):
        raise ConfigError(f"trainer.logger {logger} needs {packages[0]}: pip install {packages[0]}")


class RunConfig(SaveConfigCallback):
    """Writes RUN/config.yaml, and hands every resolved value to the logger."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on rank 0, before the weights are made: makes the text that `on_fit_start` writes."""
        config = self.config.clone()
        config["ckpt_path"], config["overwrite"] = None, False
        if config["data"]["harvest"]:  # meant for this once, too
            config["data"]["harvest"].pop("overwrite", None)
        self._text = self.parser.dump(config, skip_unset=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once the module is bound to the run, what was left open is known, and a checkpoint has been accepted.

        A refused one must leave the file as it is: it says how to resume.
        """
        if not trainer.is_global_zero:
            return
        run = Path(self.config["run"])
        if self.config["overwrite"] and self.config["ckpt_path"] is None:
            clear(run)  # only now, when everything that could be refused has been accepted
        (run / "config.yaml").write_text(self._text)
        assert isinstance(pl_module, SAEModule)
        config, identity = yaml.safe_load(self._text), {**_resolved(trainer, pl_module), **pl_module.identity()}
        facts = {"config": config, **_facts(pl_module.members, identity)}
        for logger in trainer.loggers:
            if isinstance(logger, WandbRuns):
                for member in pl_module.members:
                    own = _facts([member], {**identity, "members": [identity_of(member)]})
                    describe(logger.loggers[member.name], {"config": config, **own})
            else:
                describe(logger, facts)


def _resolved(trainer: Trainer, module: SAEModule) -> dict[str, Any]:
    """What the run settled that its configuration may leave open, but for what belongs to one SAE."""
    return {
        "total_steps": trainer.max_steps,
        "rows_per_step": module.data.rows_per_step,
        "tokens": trainer.max_steps * module.data.rows_per_step,
        "precision": str(trainer.precision),
        "device": str(module.device),
        "ranks": trainer.world_size,
        "steps_between_validations": int(trainer.val_check_interval) // trainer.accumulate_grad_batches,
        "steps_between_readings": trainer.log_every_n_steps,  # type: ignore[attr-defined]  # a property
    }


def _facts(members: list[Member], identity: dict[str, Any]) -> dict[str, Any]:
    """What is known of SAEs once they are bound to the run; of several, each under its name."""
    each = {}
    for member in members:
        record = VARIANTS.name_of(type(member.variant))
        each[member.name] = {
            "data": member.pair.identity,
            "variant": {"name": record.name, "distribution": record.distribution, "version": record.version},
            "learning_rate": member.rate_shape(),
        }
    parts = {name: {key: facts[name] for key, facts in each.items()} for name in next(iter(each.values()))}
    if len(members) == 1:
        parts = each[members[0].name]
    resolved = {"dead_after_tokens": members[0].variant.run.dead_after_tokens, **identity}
    versions = {name: metadata.version(name) for name in ("torch", "lightning", "transformers")}
    versions |= {"saeforge": __version__, "python": platform.python_version()}
    datasets = list(dict.fromkeys(member.pair.identity["dataset"] for member in members))
    return {**parts, "dataset": "+".join(datasets), "resolved": resolved, "versions": versions}


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: arguments after `saeforge fit`.

    Returns:
        Exit code; 130, 143 or 138 after Ctrl-C, SIGTERM or SIGUSR1, with the run saved.
    """
    args = ["fit", *argv]
    # Lightning starts further ranks by running sys.argv again; where that is this very command, let it be the source.
    cli = run_cli(None if sys.argv[1:] == args else args)
    trainer = cli.sae_trainer
    folder = trainer.run_folder
    if folder is not None and folder.stopped_by is not None:
        if not trainer.is_global_zero:
            return 0  # Lightning's watcher would take another code for a crash, and kill rank 0
        print(
            f"saeforge: stopped by {folder.stopped_by} after step {trainer.global_step}; go on with "
            f"`saeforge fit --config {folder.run}/config.yaml --ckpt_path last`",
            file=sys.stderr,
        )
        return 128 + signal.Signals[folder.stopped_by].value
    if folder is not None and trainer.is_global_zero:
        assert isinstance(cli.model, SAEModule)
        names = [member.name for member in cli.model.members]
        where = f"the SAE is in {folder.run / 'sae'}"
        if names != [""]:
            shown = [str(folder.run / name / "sae") for name in names[:3]]
            more = f" and {len(names) - 3} more folders beside them" if len(names) > 3 else ""
            where = f"the SAEs are in {', '.join(shown)}{more}"
        print(f"saeforge: trained {trainer.global_step:,} steps; {where}")
    return 0


def run_cli(args: list[str] | None) -> FitCLI:
    """Parses, builds and trains. args: `["fit", ...]`, or None for this process's own."""
    configure_jsonargparse()
    variant_names.install()
    try:
        return FitCLI(
            SAEModule,
            ActivationData,
            trainer_class=SAETrainer,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            parser_class=FitParser,
            parser_kwargs={"parser_mode": PARSER_MODE, "prog": "saeforge"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except ModuleNotFoundError as error:  # a logger's package, say
        raise ConfigError(f"a package is missing: {str(error).splitlines()[0]}; install it with pip") from error


def fit(*configs: str | Path | dict[str, Any], **overrides: Any) -> Any:
    """`saeforge fit` from Python.

    Args:
        configs: YAML files, or mappings of the same shape; later ones win.
        overrides: single keys with dots as double underscores: `data__path="acts"`, `model__variant="topk"`.

    Returns:
        The trained `SAE`; where `data.sites` or `model.sweep` trains several, a dict of them by name.

    Raises:
        SaeforgeError: as the command would print it.
        KeyboardInterrupt: the run was stopped; RUN/checkpoints/last.ckpt holds its state.
    """
    args = ["fit"]
    for config in configs:
        args += ["--config", yaml.safe_dump(_plain(config)) if isinstance(config, dict) else str(config)]
    for key, given in overrides.items():
        value = _plain(given)
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
        args.append(f"--{key.replace('__', '.')}={text.strip()}")
    cli = run_cli(args)
    folder = cli.sae_trainer.run_folder
    assert folder is not None  # the command line always has a RUN folder
    if folder.stopped_by is not None:
        raise KeyboardInterrupt
    assert isinstance(cli.model, SAEModule)
    names = [member.name for member in cli.model.members]
    return load(folder.run) if names == [""] else {name: load(folder.run / name) for name in names}


def _plain(value: Any) -> Any:
    """A value with its paths as strings."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _refuse_linked(args: list[str]) -> None:
    """Refuses keys that follow from others, which LightningCLI drops silently in a file, and keys inside an entry."""
    for arg in args:
        if found := re.match(r"--model\.(sweep\.[^.=]+)\.([^=]+)", arg):
            raise ConfigError(
                f"--model.{found[1]}.{found[2]}: what an SAE of a sweep differs in is one mapping, for example "
                f"--model.{found[1]}='{{k: 32}}'"
            )
    for key, message in _LINKED_KEYS.items():
        if any(arg.split("=")[0] == f"--{key}" for arg in args):
            raise ConfigError(message)
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        name, _, inline = flag.partition("=")
        if name not in ("-c", "--config"):
            continue
        try:
            source = inline or value
            content = yaml.safe_load(source if "\n" in source or len(source) > 255 else Path(source).read_text())
        except (yaml.YAMLError, OSError):
            continue  # the parser says what is wrong with it
        for part in (content, content.get("fit")) if isinstance(content, dict) else ():
            for key, message in _LINKED_KEYS.items():
                group, option = key.split(".")
                if isinstance(part, dict) and isinstance(part.get(group), dict) and option in part[group]:
                    raise ConfigError(message)

"""`ActivationData`: the LightningDataModule between a block source and the trainer."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from saeforge.data.choice import SitesWanted, check_patterns, names_in
from saeforge.data.loader import TrainLoader, ValidationLoader
from saeforge.data.plain import PlainTarSource
from saeforge.data.plan import Plan
from saeforge.data.shard_source import ShardSource
from saeforge.data.source import BlockSource, Rows
from saeforge.errors import ConfigError, SaeforgeError
from saeforge.harvest.config import HarvestConfig
from saeforge.training.shared_rows import SharedLoader
from saeforge.training.strategy import mesh_of

#: Steps of a run whose length was not given: at least this many, however small the dataset.
MIN_DEFAULT_STEPS = 2000


def run_seed(seed: int | None) -> int:
    """The seed, or that of Lightning's `seed_everything` (which is equal on all ranks), or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


class ActivationData(LightningDataModule):
    """Batches of activations: from a dataset that `saeforge harvest` wrote, or live from a language model.

    Args:
        path: folder or URL of the dataset; plain webdataset tars of .npy members (`acts/*.tar`); with source live, the
            folder that gets the tokens and held-out rows (null: RUN/data).
        source: shards, or live: the model runs while the SAEs train, one forward pass for all sites.
        input: site to read, if the dataset has several; a list of sites side by side (a crosscoder), where PATH#SITE is
            one of another dataset of the same tokens; or a pattern like 'mlp_in.*' with one as target.
        target: site, or list, to reconstruct from the input (a transcoder); null reconstructs the input; a pattern
            like 'mlp_out.*' trains a transcoder for each layer.
        sites: instead of input and target, the sites that get an SAE each, all trained together; names or patterns like
            'resid_post.*'. With source live all sites are those of the model.
        model: with source live, the language model, as in `saeforge harvest`.
        text: with source live, the text, as in `saeforge harvest`.
        write: with source live, keep the activations as shards on the way.
        harvest: with source live, further options of `saeforge harvest` (n_tokens, context_length, ...); bucket_rows is
            the size of a block that the model makes at once.
        batch_size: rows of an optimizer step, over all devices together.
        tokens: length of the run in tokens; null leaves it to trainer.max_steps, else one pass (at least 2,000 steps).
        lanes: parallel streams that make up a batch; any multiple of every number of devices you will ever use.
        window_blocks: blocks of a lane that are shuffled together; null is 4, with source live 1.
        validation_rows: held-out rows per validation.
        seed: of the order; null is seed_everything.
    """

    #: Threads that read; None: `reading_threads`. More of them help a source that computes its rows.
    threads: int | None = None

    def __init__(
        self,
        path: str | None = None,
        source: Literal["shards", "live"] = "shards",
        input: str | list[str] | None = None,
        target: str | list[str] | None = None,
        sites: str | list[str] | None = None,
        model: str | None = None,
        text: str | None = None,
        write: bool = False,
        harvest: dict[str, Any] | None = None,
        batch_size: int = 4096,
        tokens: int | None = None,
        lanes: int = 8,
        window_blocks: int | None = None,
        validation_rows: int = 65_536,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        sites = [sites] if isinstance(sites, str) else sites
        if sites and (input is not None or target is not None):
            raise ConfigError("data.sites trains an SAE for each site: leave out data.input and data.target")
        live = {"model": model, "text": text, "write": write, "harvest": harvest}
        opened: BlockSource
        if source == "live":
            if not sites and input is None:
                raise ConfigError("data.source = live needs data.sites (an SAE for each), or data.input")
            if window_blocks not in (None, 1):
                raise ConfigError(
                    f"data.window_blocks = {window_blocks}: a live block is large, and shuffled already; leave it out, "
                    "or set data.harvest.bucket_rows"
                )
            window_blocks = 1
            opened = open_live(
                path,
                sites or [],
                model,
                text,
                harvest,
                write=write,
                validation_rows=validation_rows,
                lanes=lanes,
                input=input,
                target=target,
            )
        elif given := [name for name, value in live.items() if value]:
            raise ConfigError(f"data.{given[0]} is for data.source = live; a dataset on disk has its model and text")
        elif path is None and not any("#" in name for name in names_in(input)):
            raise ConfigError("data.path is missing: give what `saeforge harvest` wrote, or --data.source live")
        elif path is not None and (path.endswith(".tar") or any(character in path for character in "*?{")):
            if input is not None or target is not None or sites:
                raise ConfigError(
                    f"data.path = {path} is plain tars, which name no sites: leave out data.input and such"
                )
            opened = PlainTarSource(path)
        else:
            opened = ShardSource(path, input=input, target=target, sites=sites or ())
        self._configure(
            opened,
            batch_size,
            tokens,
            lanes,
            4 if window_blocks is None else window_blocks,
            validation_rows,
            seed,
        )

    @classmethod
    def of(
        cls, source: BlockSource, *, batch_size: int = 4096, tokens: int | None = None, **options: Any
    ) -> ActivationData:
        """The same over any block source. Options: lanes, window_blocks, validation_rows, seed."""
        data = cls.__new__(cls)
        LightningDataModule.__init__(data)
        defaults = {"lanes": 8, "window_blocks": 4, "validation_rows": 65_536, "seed": None}
        data._configure(source, batch_size, tokens, **{**defaults, **options})
        return data

    def _configure(
        self,
        source: BlockSource,
        batch_size: int,
        tokens: int | None,
        lanes: int,
        window_blocks: int,
        validation_rows: int,
        seed: int | None,
    ) -> None:
        if tokens is not None and tokens < batch_size:
            raise ConfigError(f"data.tokens = {tokens} is less than one batch of {batch_size}")
        self.source, self.batch_size, self.tokens, self.validation_rows = source, batch_size, tokens, validation_rows
        self.plan = Plan(
            source.n_blocks("train"),
            source.block_rows("train"),
            batch_size,
            lanes,
            window_blocks,
            run_seed(seed),
            source.unit,
        )
        self._loader: TrainLoader | None = None
        self._state: dict[str, Any] | None = None

    @property
    def d_in(self) -> list[int]:
        """Width of the input of each SAE."""
        return [pair.widths(self.source)[0] for pair in self.source.pairs]

    @property
    def d_out(self) -> list[int]:
        """Width of the target of each SAE."""
        return [pair.widths(self.source)[1] for pair in self.source.pairs]

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step: of all devices and all accumulated batches."""
        assert self.trainer is not None
        return self.batch_size * self.trainer.accumulate_grad_batches

    def total_steps(self, max_steps: int, accumulate: int = 1) -> int:
        """Optimizer steps of the run.

        Args:
            max_steps: `trainer.max_steps`; -1 if it was not given.
            accumulate: batches of an optimizer step.

        Raises:
            ConfigError: both lengths given.
        """
        if self.tokens is not None and max_steps > 0:
            raise ConfigError("data.tokens and trainer.max_steps both set the length of the run; give one of them")
        if self.tokens is not None:
            return max(1, self.tokens // (self.batch_size * accumulate))
        return max_steps if max_steps > 0 else max(MIN_DEFAULT_STEPS, self.plan.batches_per_pass // accumulate)

    def train_dataloader(self) -> TrainLoader:
        """Batches of the whole run, from the restored position on."""
        assert self.trainer is not None
        mesh = mesh_of(self.trainer)
        # With gradient accumulation a step takes several batches.
        total = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        self._loader = SharedLoader(
            self.source,
            self.plan,
            total,
            latents=mesh.latents,
            rank=mesh.data.rank,
            world=mesh.data.size,
            device=self.trainer.strategy.root_device,
            threads=self.threads,
            reuse=True,  # the trainer is done with a batch when it takes the next
        )
        if self._state is not None:
            self._loader.load_state_dict(self._state)
        elif self.trainer.global_step > 0:
            rank_zero_warn("the checkpoint carries no position in the data: reading starts from the beginning")
        return self._loader

    def read_figures(self, seconds: float) -> dict[str, float]:
        """What reading cost since the last call, `seconds` ago: see `ReadStats.figures` and the source's counters."""
        if self._loader is None:
            return {}
        return {**self._loader.read_stats().figures(seconds), **self.source.counters()}

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Held-out rows; nothing if the dataset has no validation split."""
        if self.source.n_blocks("validation") == 0:
            return []
        assert self.trainer is not None
        group = mesh_of(self.trainer).data
        return ValidationLoader(
            self.source, self.batch_size // group.size, max_rows=self.validation_rows, rank=group.rank, world=group.size
        )

    def transfer_batch_to_device(self, batch: Rows, device: torch.device, dataloader_idx: int) -> Rows:
        """Moves held-out rows; training rows are gathered where they are needed."""
        return tuple(part.to(device, non_blocking=True) for part in batch)

    def on_exception(self, exception: BaseException) -> None:
        """Lets the process end: after a second Ctrl-C, too, nothing more is read."""
        if self._loader is not None:
            self._loader.abort()

    def teardown(self, stage: str) -> None:
        """Lets go of what the source holds."""
        self.source.close()

    def state_dict(self) -> dict[str, Any]:
        """The loader's state: also here, since Lightning drops a loader's own at the end of an epoch [data 5.5]."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the position for the loader to come."""
        self._state = state_dict or None
        if self._state is not None:
            TrainLoader(self.source, self.plan, 0).load_state_dict(self._state)  # refuse early, before weights load
            if self._loader is not None:
                self._loader.load_state_dict(self._state)


def open_live(
    path: str | None,
    sites: list[str],
    model: str | None,
    text: str | None,
    harvest: dict[str, Any] | None,
    *,
    write: bool,
    validation_rows: int,
    lanes: int,
    input: SitesWanted = None,
    target: SitesWanted = None,
) -> BlockSource:
    """The live source behind `data.source = live`: of `sites`, an SAE each, or of `input` and `target`.

    Raises:
        ConfigError: no model or folder, or a wrong option.
    """
    from saeforge.harvest.live import LiveSource  # loads transformers, which shards do not need

    if model is None or path is None:
        missing = "data.model, the language model" if model is None else "data.path, a folder for its tokens"
        raise ConfigError(f"data.source = live needs {missing}")
    clash = sorted({"model", "sites", "out", "text"} & set(harvest or {}))
    if clash:
        raise ConfigError(f"data.harvest.{clash[0]} is given twice: set data.{clash[0].replace('out', 'path')}")
    foreign = [name for name in (*names_in(input), *names_in(target)) if "#" in name]
    if foreign:
        raise ConfigError(
            f"data.input {foreign[0]!r}: with data.source = live all sites are of one model; leave out PATH#"
        )
    check_patterns(input, target)
    wanted = sites or list(dict.fromkeys([*names_in(input), *names_in(target)]))
    options = {"model": model, "sites": wanted, "out": path, **(harvest or {})}
    if text is not None:
        options["text"] = text
    try:
        config = HarvestConfig.build(None, options)
        choice = {} if sites else {"input": input, "target": target}
        return LiveSource(config, write=write, validation_rows=validation_rows, lanes=lanes, **choice)
    except SaeforgeError as error:  # whose advice is for the command `saeforge harvest`
        advice = str(error).replace("--overwrite", "--data.harvest.overwrite").replace("--out", "--data.path")
        raise type(error)(advice) from error

"""`SAEModule`: the LightningModule that hosts the SAEs of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from saeforge.data.source import BlockSource, Pair, Rows
from saeforge.errors import CheckpointError, ConfigError
from saeforge.metrics import Reconstruction
from saeforge.sae import SAE
from saeforge.schedules import Shape
from saeforge.training import sharing
from saeforge.training.data import ActivationData, run_seed
from saeforge.training.identity import check_identity, identity_of
from saeforge.training.member import Member, join_names
from saeforge.training.parts import PARTS, Place, own_rows, put_in, take_out
from saeforge.training.settings import Settings
from saeforge.training.strategy import mesh_of
from saeforge.training.sweep import Entry, entries
from saeforge.training.whitening import Kind
from saeforge.variants import RunSettings, Variant

#: Rows that a variant may look at before the first step (Gao et al. 2024 take the geometric median of 32,768).
INITIAL_ROWS = 32_768
_COMPUTE_DTYPE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


class SAEModule(LightningModule):
    """Trains an SAE variant, or several, for each site of the data. What is left at null is the variant's paper's.

    Args:
        variant: the SAE variant, by entry-point name (`topk`), class path, or a mapping with its options.
        d_in: width of the input of each SAE; linked to the dataset.
        d_out: width of the target of each; linked to the dataset.
        optimizer: any torch optimizer class with its options; null is saeforge's RowAdam as the variant's paper sets
            it. With another optimizer the decoder's norm constraint is restored after its step, and nothing is clipped.
        lr: learning rate of RowAdam.
        max_grad_norm: bound of the global gradient norm in RowAdam; .inf for none.
        lr_warmup_steps: optimizer steps of linear warm-up.
        lr_decay_share: share of the run, at its end, over which the rate falls linearly to 0.
        dead_after_tokens: a latent silent for so many tokens counts as dead; null is the smaller of 10 million and 5%
            of the run.
        resample_steps: optimizer steps after which dead latents are resampled and the rate warms up again; for
            variants that have `reset_latents_` (all built-in ones).
        cuda_graph: replay a step as one CUDA graph where that is possible (topk without dead latents on one GPU), which
            spares small SAEs the launching of kernels; the log says where it is not.
        skip: learn `W_skip x` beside the SAE (a skip transcoder), for any variant; needs data.target.
        seed: of the initial weights; null is seed_everything.
        lr_warmup_shape: linear, or cosine from a tenth.
        lr_decay_shape: linear or cosine.
        target_l0: mean active latents per token that a controller steers to, by scaling the variant's sparsity
            coefficient (l1_relu, gated); for top-k variants set k.
        ema_half_life_steps: average the weights over optimizer steps, with this half-life, and validate and save the
            average; null for none.
        init_from: start from this SAE instead of random weights: a RUN or sae/ folder. The learning rate then warms up
            over 1,000 steps or a tenth of the run.
        whitening: train on decorrelated activations, zca or pca; the saved SAE reads raw ones.
        whitening_shrinkage: share by which their covariance is drawn towards a multiple of the identity; null is 0.01.
        sweep: several SAEs of each site in one run: a mapping from names to what differs from the options here, such as
            `{small: {k: 16}, gated: {variant: gated, l1: 0.02, lr: 3e-4}}`. A variant's options may stand beside the
            run's. Another variant keeps d_sae and the run's options.
        grid: the same from a mapping of options to lists, `{k: [16, 32], d_sae: [2048, 4096]}`: all combinations.
    """

    def __init__(
        self,
        variant: Callable[[int, int], Variant],
        d_in: int | list[int],
        d_out: int | list[int],
        optimizer: OptimizerCallable | None = None,
        lr: float | None = None,
        max_grad_norm: float | None = None,
        lr_warmup_steps: int | None = None,
        lr_decay_share: float | None = None,
        dead_after_tokens: int | None = None,
        resample_steps: list[int] | None = None,
        cuda_graph: bool = False,
        skip: bool = False,
        seed: int | None = None,
        lr_warmup_shape: Shape | None = None,
        lr_decay_shape: Shape | None = None,
        target_l0: float | None = None,
        ema_half_life_steps: float | None = None,
        init_from: str | SAE | None = None,
        whitening: Kind | None = None,
        whitening_shrinkage: float | None = None,
        sweep: dict[str, dict[str, Any] | None] | None = None,
        grid: dict[str, list[Any]] | None = None,
    ) -> None:
        super().__init__()
        settings = Settings(
            optimizer=optimizer,
            lr=lr,
            max_grad_norm=max_grad_norm,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay_share=lr_decay_share,
            dead_after_tokens=dead_after_tokens,
            resample_steps=None if resample_steps is None else tuple(resample_steps),
            cuda_graph=cuda_graph,
            skip=skip,
            seed=run_seed(seed),
            lr_warmup_shape=lr_warmup_shape,
            lr_decay_shape=lr_decay_shape,
            target_l0=target_l0,
            ema_half_life_steps=ema_half_life_steps,
            init_from=init_from,
            whitening=whitening,
            whitening_shrinkage=whitening_shrinkage,
        )
        widths = list(zip(*([d] if isinstance(d, int) else d for d in (d_in, d_out)), strict=True))
        self._entries = entries(variant, settings, sweep, grid, widths[0])
        self._members = nn.ModuleList(_member(entry, pair) for pair in widths for entry in self._entries)
        self._step_before = -1

    @property
    def members(self) -> list[Member]:
        """The SAEs in training."""
        return [member for member in self._members if isinstance(member, Member)]

    @property
    def swept(self) -> bool:
        """Whether a sweep makes the SAEs of each site."""
        return bool(self._entries[0].name)

    def names(self, source: BlockSource) -> list[str]:
        """Of the SAEs, in their order.

        Raises:
            ConfigError: two are the same.
        """
        names = [join_names(pair.name, entry.name) for pair in source.pairs for entry in self._entries]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"model.sweep: two SAEs are called {twice[0]!r}; rename one of the sweep")
        return names

    def check(self, source: BlockSource) -> None:
        """Whether the SAEs can learn what the data holds; before folders are made and loggers start.

        Raises:
            ConfigError: see `Member.check`.
        """
        for member, pair in self._with_pairs(source):
            member.check(pair)

    def check_shared_out(self, ranks: int) -> None:
        """Whether so many ranks can share out the latents of each SAE; before further processes start.

        Raises:
            ConfigError: see `sharing.check_shared_out`; of a sweep, naming its entry.
        """
        for member in self.members:
            try:
                sharing.check_shared_out(member, ranks)
            except ConfigError as error:
                raise ConfigError(f"model.sweep.{member.entry}: {error}" if member.entry else str(error)) from error

    def _with_pairs(self, source: BlockSource) -> Iterator[tuple[Member, Pair]]:
        pairs = [pair for pair in source.pairs for _ in self._entries]
        return zip(self.members, pairs, strict=True)

    @property
    def data(self) -> ActivationData:
        """The run's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ActivationData):
            raise ConfigError("SAEModule trains on an ActivationData data module: trainer.fit(module, datamodule=data)")
        return data

    @property
    def stepped(self) -> bool:
        """Whether the last batch completed an optimizer step; False inside an accumulation of gradients."""
        return self.global_step != self._step_before

    # Set-up ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Binds the run's settings and initialises the weights from data (a checkpoint overwrites them later)."""
        precision = str(self.trainer.precision)
        if precision not in _COMPUTE_DTYPE:
            raise ConfigError(f"trainer.precision = {precision}: expected 32-true or bf16-mixed")
        data, total, mesh = self.data, self.trainer.max_steps, mesh_of(self.trainer)
        rows = data.source.sample(INITIAL_ROWS) if stage == "fit" else ()
        for member, pair in self._with_pairs(data.source):
            dead_after = member.settings.dead_after_tokens
            if dead_after is None:
                dead_after = min(10_000_000, total * data.rows_per_step // 20)
            run = RunSettings(total, dead_after, _COMPUTE_DTYPE[precision], mesh.data)
            sharing.share_out(member, mesh.latents, self.trainer.strategy.root_device)
            member.prepare(pair, data.source.statistics, run)
            if stage == "fit":
                member.initialise(rows)

    def on_fit_start(self) -> None:
        """All is on its device, a checkpoint was read: ranks that share out latents start from the same."""
        for member in self.members:
            sharing.agree(member)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of the SAE, or all of them in one."""
        optimizers = [member.make_optimizer() for member in self.members]
        return optimizers[0] if len(optimizers) == 1 else SideBySide(optimizers)

    # Training ----------------------------------------------------------------------------------------------------

    def training_step(self, rows: Rows, batch_idx: int) -> Tensor:
        """Sum of the losses; no SAE's gradient depends on another. Numerics are the variants' own: autocast is off."""
        self._step_before = self.global_step
        with torch.autocast(self.device.type, enabled=False):
            losses = [member.step(rows, self.global_step) for member in self.members]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Ranks that share out latents step what they all hold by the same gradients."""
        for member in self.members:
            sharing.agree_on_gradients(member)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step and what follows it; callbacks, the one that saves among them, come after."""
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        for member in self.members:
            member.after_step(step)

    def on_validation_epoch_start(self) -> None:
        """Folds the variants."""
        for member in self.members:
            member.start_validation()

    def validation_step(self, rows: Rows, batch_idx: int) -> None:
        """Adds rows to the sums."""
        with torch.autocast(self.device.type, enabled=False):
            for member in self.members:
                member.validate(rows)

    def validation_results(self) -> list[Reconstruction]:
        """Metrics over all ranks, of each SAE; every rank must call it."""
        return [member.validation_result() for member in self.members]

    # Checkpoints -------------------------------------------------------------------------------------------------

    @property
    def shared_out(self) -> bool:
        """Whether this rank holds some of the latents only."""
        return any(member.variant.shard is not None for member in self.members)

    def folded(self, *, kept: bool = True) -> list[SAE]:
        """The plain SAEs as they are now, with their origin.

        Args:
            kept: where ranks share out latents all must call it; those that do not keep the SAEs get none.
        """
        steps, device = self.global_step, self.trainer.strategy.root_device
        origin = (steps, steps * self.data.rows_per_step, str(self.trainer.precision), device)
        saes = [member.folded(*origin, kept=kept) for member in self.members]
        return [sae for sae in saes if sae is not None]

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it, as plain values."""
        return {
            "members": [identity_of(member) for member in self.members],
            # Positions in the data are counted in batches: with another number of them a step, nothing would fit.
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the identity; what has latents, if ranks share them out, is for the strategy to write."""
        checkpoint["saeforge"] = self.identity()
        if self.shared_out:
            checkpoint[PARTS] = take_out(checkpoint, self._places_of_latents(checkpoint))

    def _places_of_latents(self, checkpoint: dict[str, Any]) -> list[Place]:
        """Where the tensors of a checkpoint are that have a row for each latent."""
        found: list[Place] = []
        for number, member in enumerate(self.members):
            names = [f"_members.{number}.{name}" for name in sorted(sharing.cut_names(member))]
            found += [("state_dict", name) for name in names if name in checkpoint["state_dict"]]
            for at, state in enumerate(checkpoint.get("optimizer_states", ())):
                place: Place = ("optimizer_states", at)
                if "parts" in state:
                    state, place = state["parts"][number], (*place, "parts", number)
                for index, parameter in sharing.cut_parameters(member):
                    for key, value in state["state"].get(index, {}).items():
                        if isinstance(value, Tensor) and value.ndim and value.shape[1:] == parameter.shape[1:]:
                            found.append((*place, "state", index, key))
        return found

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another variant or configuration: neither side silently wins.

        Raises:
            CheckpointError: naming each difference.
        """
        saved = checkpoint.get("saeforge")
        if not isinstance(saved, dict):
            raise CheckpointError("this checkpoint was not written by saeforge; give one from RUN/checkpoints")
        earlier = "this checkpoint is an earlier saeforge's; resume with that one, or start a new --run"
        if "members" not in saved:
            raise CheckpointError(earlier)
        given = self.identity()
        if len(saved["members"]) != len(given["members"]):
            names = ", ".join(member["name"] for member in saved["members"])
            raise CheckpointError(
                f"the checkpoint holds {len(saved['members'])} SAEs ({names}), this run trains "
                f"{len(given['members'])}; resume with the same data.sites and model.sweep, or start a new --run"
            )
        for before, now in zip(saved["members"], given["members"], strict=True):
            check_identity(before, now)
        before, now = (part.get("accumulate_grad_batches") for part in (saved, given))
        if before != now:
            raise CheckpointError(
                f"the checkpoint was trained with other settings (accumulate_grad_batches: {before} -> {now}); "
                "resume with the same ones, or start a new --run"
            )
        mesh, folder = mesh_of(self.trainer), checkpoint.pop(PARTS, None)
        if folder is not None:
            put_in(checkpoint, Path(folder), mesh)
        elif self.shared_out:
            own_rows(checkpoint, self._places_of_latents(checkpoint), mesh.latents)
        if self.state_dict().keys() - checkpoint["state_dict"].keys():
            raise CheckpointError(earlier)


def _member(entry: Entry, widths: tuple[int, int]) -> Member:
    """One SAE of one site.

    Raises:
        ConfigError: options that contradict each other; of a sweep, naming its entry.
    """
    if not entry.name:
        return Member(entry.build(*widths), entry.settings)
    try:
        return Member(entry.build(*widths), entry.settings, entry.name)
    except (ConfigError, TypeError) as error:  # TypeError: an option without a default is missing
        raise ConfigError(f"model.sweep.{entry.name}: {error}") from error


class SideBySide(torch.optim.Optimizer):
    """Several optimizers that step together; the parameter groups are theirs."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each; `closure` is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts', in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved by `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

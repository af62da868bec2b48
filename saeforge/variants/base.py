"""The contract of a variant: what it must say, and what it gets for it.

A variant is one final class of about 100 lines. It owns its weights (one latent per row, encoder and decoder alike),
says how they start, what one step's loss terms are, which rows are constrained, and how it folds into a plain `SAE`.
Loggers, devices, precision, optimizers, data and checkpoints are not its business.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from saeforge.data.batch import Batch
from saeforge.errors import ConfigError
from saeforge.ops import Group, Shard, SparseCode, shards
from saeforge.optim.row_adam import unit_rows_
from saeforge.sae import SAE
from saeforge.variants.contract import DataStatistics, Recipe, RunSettings, ScheduleValues, StepOutput, Unfolded
from saeforge.variants.start import InputScale, input_scale
from saeforge.variants.unfolding import unfold

#: Steps between two listings of the dead latents, at most; fewer where so many are a tenth of the time after which a
#: latent counts as dead.
DEAD_LIST_STEPS = 20


class Variant(nn.Module, ABC):
    """Base of all variants. Subclasses are final and override abstract methods only.

    `scale` and `target_scale` are frozen scalars from the dataset's statistics: `step` works on `x * scale`, its
    caller sees raw units only. `input_scale` chooses them: "rms" makes the mean squared norm 1 (Gemma Scope), "sqrt_d"
    the mean norm sqrt(d) (Anthropic, April 2024), "none" leaves the data alone. With `per_source` each of several
    sources side by side (`RunSettings.sources`) has a scalar of its own, and the buffers are (d_in,) and (d_out,).
    """

    #: Name of the scheduled value that makes latents sparser the larger it is, which `target_l0` then steers; None for
    #: variants whose L0 is set by other means (k). An instance may set its own.
    sparsity_schedule: str | None = None
    #: Checks of the conformance kit (docs/conformance.md) that a variant does not hold on purpose: name -> reason.
    exempt_checks: ClassVar[Mapping[str, str]] = {}

    scale: Tensor
    target_scale: Tensor
    tokens_since_fired: Tensor
    firing_counts: Tensor
    listed_as_dead: Tensor
    steps_observed: Tensor
    # The host's copies of the last two; None when they must be read from the device.
    _steps: int | None
    _dead: Tensor | None
    _dead_by_rank: tuple[int, ...]
    #: The latents that it holds, and the names of the parameters and buffers with one entry for each; see `shard_`.
    shard: Shard | None = None
    latent_names: frozenset[str] = frozenset()
    #: The constructor's arguments as given, defaults included: what a checkpoint is compared by.
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Variant:
        """Records `arguments`, so that no variant has to."""
        variant = super().__new__(cls)
        try:
            bound = inspect.signature(cls).bind(*args, **kwargs)
        except TypeError:
            return (
                variant  # unpickling calls without arguments and restores them with the rest; else __init__ complains
            )
        bound.apply_defaults()
        variant.__dict__["arguments"] = dict(bound.arguments)
        return variant

    def __init__(self, d_in: int, d_out: int, *, d_sae: int, input_scale: InputScale, per_source: bool = False) -> None:
        super().__init__()
        for name, value in {"d_in": d_in, "d_out": d_out, "d_sae": d_sae}.items():
            if value < 1:
                raise ConfigError(f"{name} = {value}: expected a positive number")
        if input_scale not in ("rms", "sqrt_d", "none"):
            raise ConfigError(f"input_scale {input_scale!r}: expected 'rms', 'sqrt_d' or 'none'")
        self.d_in, self.d_out, self.d_sae, self.input_scale = d_in, d_out, d_sae, input_scale
        self.run = RunSettings()
        self.register_buffer("scale", torch.ones(d_in if per_source else ()))
        self.register_buffer("target_scale", torch.ones(d_out if per_source else ()))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("firing_counts", torch.zeros(d_sae, dtype=torch.int64), persistent=False)
        self.register_buffer("listed_as_dead", torch.zeros(d_sae, dtype=torch.bool))
        self.register_buffer("steps_observed", torch.zeros((), dtype=torch.int64))
        self._forget_lists()

    # What a variant says -----------------------------------------------------------------------------------------

    @abstractmethod
    def initialise(self, stats: DataStatistics, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Sets all weights before the first step. Equal on all ranks, since its arguments are.

        Args:
            stats: statistics of the training rows.
            x: about 32k rows of raw input, (n, d_in).
            target: the same rows' targets, (n, d_out); the same tensor as `x` for an SAE.
            generator: the only source of randomness, on the CPU.
        """

    @abstractmethod
    def schedules(self, total_steps: int) -> dict[str, Callable[[int], float]]:
        """Named pure functions step -> value; their values reach `step` and are logged under these names."""

    @abstractmethod
    def step(self, batch: Batch, schedule: ScheduleValues) -> StepOutput:
        """Loss terms of one batch, differentiable. Autocast is off; see `RunSettings.compute_dtype`."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Plain torch parameter groups; the extra key `constraint` is "unit_norm" or None."""

    @abstractmethod
    def recipe(self, total_steps: int) -> Recipe:
        """Optimizer settings of the variant's paper."""

    @abstractmethod
    def fold(self) -> SAE:
        """The plain SAE in raw units that computes the same latents and reconstruction."""

    # What it gets ------------------------------------------------------------------------------------------------

    @final
    def bind(self, run: RunSettings) -> None:
        """Takes the settings of a run; called before the first step, also after a resume."""
        self.run = run

    @final
    def set_scale(self, stats: DataStatistics) -> None:
        """Freezes `scale` and `target_scale`; the first thing that `initialise` does."""
        for buffer, part, sources in (
            (self.scale, stats.input, stats.input_sources),
            (self.target_scale, stats.target, stats.target_sources),
        ):
            parts = sources if buffer.ndim and sources else (part,)
            places = buffer.split([len(each.mean) for each in parts]) if buffer.ndim else (buffer,)
            for place, each in zip(places, parts, strict=True):
                place.fill_(input_scale(self.input_scale, each))

    @final
    def scaled(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Input and target in scaled units, fp32 (or fp64 if the weights are)."""
        if shards.current() != self.shard:
            raise RuntimeError(
                "a variant that shares out its latents works inside ops.latents_over(variant.shard) only"
            )
        x = _scaled(batch.x, self.scale)
        return x, x if batch.target is batch.x else _scaled(batch.target, self.target_scale)

    @final
    def mean_rows(self, per_row: Tensor, weight: Tensor | None) -> Tensor:
        """Mean over the rows of the global batch, as this rank's share: data parallelism averages over ranks.

        Args:
            per_row: (B,).
            weight: (B,) or None; weights are normalised over all ranks.
        """
        if weight is None:
            return per_row.mean()
        return (per_row * weight).sum() / self.run.group.mean(weight.sum())

    @final
    def mean_entries(self, per_entry: Tensor, code: SparseCode, weight: Tensor | None) -> Tensor:
        """Mean over rows of the sum over a row's entries; like `mean_rows` of that sum. per_entry: (nnz,)."""
        if weight is None:
            return self.sum_latents(per_entry.sum() / code.n_rows)
        return self.sum_latents((per_entry * weight[code.rows()]).sum() / self.run.group.mean(weight.sum()))

    @final
    def sum_latents(self, own: Tensor) -> Tensor:
        """What is computed from latents, of any shape, summed over the ranks that share them out; else itself.

        `decode` and `mean_entries` do it by themselves. Any other sum over latents must, before it enters a loss.
        """
        return shards.sum_over_latents(own)

    @final
    def for_latents(self, tensor: Tensor) -> Tensor:
        """A tensor without latents (a bias, a row) where latents' weights are multiplied with it outside `encode`.

        Where latents are shared out, each rank's own then give it a part of its gradient.
        """
        return shards.for_latents(tensor)

    @property
    def latent_group(self) -> Group:
        """The ranks that share out the latents; a group of one where none do."""
        return Group() if self.shard is None else self.shard.group

    @final
    def output(self, terms: dict[str, Tensor], code: SparseCode, squared_error: Tensor) -> StepOutput:
        """Packs a step's result.

        Args:
            terms: see `StepOutput`.
            code: see `StepOutput`.
            squared_error: (B,) per row, in scaled target units; with one scale per source (B, d_out), not summed yet.
        """
        raw = (squared_error.detach().sum(0) / self.target_scale.square()).sum()
        return StepOutput(terms, code, {"squared_error": raw})

    @final
    @torch.no_grad()
    def observe(self, code: SparseCode) -> Tensor:
        """Counts who fired, over all rows of the batch; called once after each step. Returns the counts, int64."""
        counts = self.run.group.sum(code.active_counts())
        self.firing_counts += counts
        self.tokens_since_fired += code.n_rows * self.run.group.size
        self.tokens_since_fired.masked_fill_(counts > 0, 0)
        self.steps_observed += 1
        if self._steps is not None:
            self._steps += 1
        tenth = self.run.dead_after_tokens // (10 * max(1, code.n_rows * self.run.group.size))
        if self.observed() % max(1, min(DEAD_LIST_STEPS, tenth)) == 0:
            self.list_dead()
        return counts

    @final
    def observed(self) -> int:
        """Steps observed since the first one of the run; the host's own count, read from the device after a load."""
        if self._steps is None:
            self._steps = int(self.steps_observed)
        return self._steps

    @final
    def list_dead(self) -> None:
        """Renews what `dead_latents` returns; it happens by itself every few steps."""
        self.listed_as_dead.copy_(self.dead())
        self._dead = None

    @final
    def dead_latents(self) -> Tensor:
        """(n,) latents that were dead when they were last listed, ascending.

        How many they are decides shapes, so it must be read from the device; every step would stall a GPU, and a dead
        window of millions of tokens does not notice a few steps.
        """
        if self._dead is None:
            self._dead = self.listed_as_dead.nonzero(as_tuple=True)[0]
            self._dead_by_rank = (len(self._dead),)
            if self.shard is not None:
                counts = torch.tensor([len(self._dead)], device=self._dead.device)
                self._dead_by_rank = tuple(self.shard.group.gather(counts).flatten().tolist())
        return self._dead

    @final
    def dead_by_rank(self) -> tuple[int, ...]:
        """How many `dead_latents` each rank has that shares out the latents; one number where none do.

        A step that does something with dead latents must do it on all these ranks, or on none.
        """
        self.dead_latents()
        return self._dead_by_rank

    @final
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget_lists()

    @final
    def _forget_lists(self) -> None:
        self._steps = self._dead = None

    @final
    def dead(self) -> Tensor:
        """(d_sae,) bool: silent for at least `dead_after_tokens`."""
        return self.tokens_since_fired >= self.run.dead_after_tokens

    @final
    @torch.no_grad()
    def constrain_(self) -> None:
        """Restores the constraints of `param_groups`, after any optimizer but `RowAdam`, which does it itself."""
        for group in self.param_groups():
            if group.get("constraint") == "unit_norm":
                for parameter in group["params"]:
                    unit_rows_(parameter)

    @final
    @torch.no_grad()
    def folded(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        shift: Tensor | None = None,
        k: int | None = None,
        threshold: Tensor | None = None,
    ) -> SAE:
        """Folds scale, pre-encoder bias and decoder norms into an SAE on raw activations.

        Give either `k` or `threshold` (on the variant's own pre-activations). Under a threshold rule decoder rows get
        norm 1, so that values are lengths in activation space; under top-k rescaling rows one by one would change who
        is chosen, so only the scalar is folded in.
        """
        if shift is not None:
            b_enc = b_enc - W_enc @ shift
        unit = self.target_scale
        if unit.ndim:  # the sources' own scalars go into the columns
            W_dec, b_dec, unit = W_dec / unit, b_dec / unit, unit.new_ones(())
        norms = W_dec.norm(dim=1) if k is None else W_dec.new_ones(len(W_dec))
        norms = torch.where(norms > 0, norms, 1.0)  # a latent without a direction stays as it is
        factor = norms / unit
        return SAE(
            W_enc * (factor[:, None] * self.scale),
            b_enc * factor,
            W_dec / norms[:, None],
            b_dec / unit,
            rule="topk" if threshold is None else "threshold",
            k=k,
            threshold=None if threshold is None else threshold * factor,
            copy=False,  # all of them are new
        )

    @final
    @torch.no_grad()
    def unfolded(self, sae: SAE) -> Unfolded:
        """The inverse of `folded`: an SAE's weights in scaled units (float64), for `StartsFrom.unfold_`.

        Decoder rows get norm 1, the encoder takes theirs; that changes who is chosen where a top-k SAE's rows differ in
        norm, which is logged.

        Raises:
            ConfigError: other widths, a skip connection, or an SAE without a linear encoder.
        """
        return unfold(self, sae)

    @final
    @torch.no_grad()
    def kept(self, W_dec: Tensor, b_dec: Tensor) -> SAE:
        """The SAE of a variant that cannot fold (`OwnEncoder`): a frozen copy of itself encodes.

        Args:
            W_dec: (d_sae, d_out) in raw units: what one unit of each latent that `encode` returns adds.
            b_dec: (d_out,) in raw units.
        """
        frozen = copy.deepcopy(self).requires_grad_(False).eval()
        return SAE(None, None, W_dec, b_dec, rule="plugin", encoder=frozen)


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    """Rows in the type of `scale`, times it; what a cast has made is multiplied where it lies."""
    cast = rows.to(scale.dtype)
    return cast * scale if cast is rows else cast.mul_(scale)

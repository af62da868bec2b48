"""Forward passes with something else in the place of a site's activations, and how far the predictions move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.evaluation.held_out import ScoredBatch
from saeforge.lm.hooks import attach
from saeforge.lm.sites import Site

#: (kept rows, d_in) activations at the input site -> (kept rows, d_out) for the target site.
Replace = Callable[[Tensor], Tensor]

# Predictions are compared in fp32 a few rows at a time: 16 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 22


class SplicedModel:
    """A causal language model in which a function of the activations at one site replaces those at another (or there).

    The replacement is computed from the kept rows when the input site runs and put in their place, in the model's own
    dtype, when the target site runs; all other positions keep the model's activations.

    Args:
        model: with its head, without gradients.
        site: where the function reads.
        target: where its result goes; for an SAE the same.
    """

    def __init__(self, model: nn.Module, site: Site, target: Site) -> None:
        self.model, self.site, self.target = model, site, target
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def logits(self, batch: ScoredBatch, replace: Replace | None) -> Tensor:
        """Return the scored predictions, (predictions, vocabulary), in the model's dtype.

        Args:
            batch: what to run.
            replace: what the target site gets; None leaves the model alone.

        Raises:
            ConfigError: a site did not run, ran twice, or after the site that needs it, or is not one row per token.
        """
        arguments = {
            name: value.to(self.device)
            for name in ("input_ids", "attention_mask", "position_ids")
            if (value := getattr(batch.batch, name)) is not None
        }
        handles = []
        try:
            if replace is not None:
                splice = _Splice(self, batch, replace)
                # A hook that is attached first runs first: where both sites are one, it reads before it writes.
                handles.append(attach(self.model, self.site, splice.read))
                handles.append(attach(self.model, self.target, splice.write))
            # With a cache transformers does not keep packed segments apart.
            output: Tensor = self.model(**arguments, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        if replace is not None and splice.new is not None:
            raise ConfigError(f"site {self.target.id} did not run after {self.site.id}; choose another site")
        if replace is not None and not splice.written:
            raise ConfigError(f"site {self.site.id} did not run in a forward pass; choose another site")
        return output.flatten(0, 1).index_select(0, batch.predicting.to(output.device))


class _Splice:
    """What one forward pass carries from the site that is read to the site that is written."""

    def __init__(self, spliced: SplicedModel, batch: ScoredBatch, replace: Replace) -> None:
        self.site, self.target, self.replace = spliced.site, spliced.target, replace
        self.shape = batch.batch.input_ids.shape
        self.kept = batch.kept.to(spliced.device)
        self.new: Tensor | None = None
        self.written = False

    def read(self, x: Tensor) -> None:
        """Compute the replacement now: later modules may change the tensor in place."""
        if self.new is not None or self.written:
            raise ConfigError(f"site {self.site.id}: the module runs more than once in a forward pass; choose another")
        self.new = self.replace(self._rows(x, self.site).index_select(0, self.kept.to(x.device)))

    def write(self, x: Tensor) -> Tensor:
        """Put it in the place of the kept rows."""
        if self.new is None:
            raise ConfigError(f"site {self.target.id} does not run once after {self.site.id}; choose another site")
        rows = self._rows(x, self.target).clone()
        rows.index_copy_(0, self.kept.to(x.device), self.new.to(rows))
        self.new, self.written = None, True
        return rows.reshape(x.shape)

    def _rows(self, x: Tensor, site: Site) -> Tensor:
        if x.shape[:-1].numel() != self.shape.numel() or (x.dim() == 3 and x.shape[:2] != self.shape):
            raise ConfigError(
                f"site {site.id}: activations of shape {tuple(x.shape)} are not one row per token of "
                f"{tuple(self.shape)}; choose another site"
            )
        return x.reshape(-1, x.shape[-1])


@torch.inference_mode()
def compare(original: Tensor, spliced: Tensor, targets: Tensor) -> Tensor:
    """Measure how far predictions move, in fp32, a few rows at a time.

    Args:
        original: (n, vocabulary) logits, any float dtype.
        spliced: (n, vocabulary).
        targets: (n,) int64 tokens that came next.

    Returns:
        (n, 4) float64 on the CPU: cross-entropy of the original and of the spliced, KL(original || spliced), all in
        nats, and whether both put the same token first (ties go to the lowest id).
    """
    step = max(1, _CHUNK_ELEMENTS // original.shape[1])
    parts = []
    for p, q, target in zip(
        original.split(step), spliced.split(step), targets.to(original.device).split(step), strict=True
    ):
        same = p.argmax(1) == q.argmax(1)
        log_p, log_q = p.float().log_softmax(1), q.float().log_softmax(1)
        chosen = target[:, None]
        probability = log_p.exp()
        # Where p underflows to 0 the term is 0, also where a masked logit makes the difference inf - inf.
        terms = torch.where(probability > 0, probability * (log_p - log_q), 0.0)
        columns = [-log_p.gather(1, chosen)[:, 0], -log_q.gather(1, chosen)[:, 0], terms.sum(1), same]
        parts.append(torch.stack([column.double() for column in columns], dim=1).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def sees_the_future(model: SplicedModel, batch: ScoredBatch) -> bool:
    """Say whether an earlier prediction changes when the last scored target is another token."""
    last = int(batch.predicting[-1]) + 1
    ids = batch.batch.input_ids.clone()
    token = int(ids.view(-1)[last])
    ids.view(-1)[last] = token - 1 if token else 1
    changed = ScoredBatch(
        type(batch.batch)(ids, batch.batch.attention_mask, batch.batch.position_ids),
        batch.kept,
        batch.predicting,
        batch.targets,
        batch.documents,
    )
    a, b = model.logits(batch, None).float(), model.logits(changed, None).float()
    # A leak moves logits by their own size; grouped matrix products of a mixture of experts only round differently.
    return bool((a - b).abs().max() > 0.05 * a.std())

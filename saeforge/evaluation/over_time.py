"""What an SAE in training does to its model's loss, again and again on the same held-out contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saeforge.data.shard_source import ShardSource
from saeforge.data.source import Pair
from saeforge.errors import ConfigError
from saeforge.evaluation.effect import contexts_that_fit
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.evaluation.opening import load_judge, open_texts, splice
from saeforge.evaluation.passes import Replace, SplicedModel, compare
from saeforge.lm.causal import CausalLM
from saeforge.lm.origin import origin_from


class EffectOverTime:
    """The overall figures of `measure_effect`, without intervals.

    The ablations hang on no SAE: their passes run once, later looks at the model need two passes instead of four.

    Args:
        model: the model and the site.
        texts: what to run on.
        mean: (d_out,) mean activation of the train split.
    """

    def __init__(self, model: SplicedModel, texts: HeldOutTexts, mean: Tensor) -> None:
        self.model, self.texts, self.mean = model, texts, mean
        self._ablated: dict[str, float] = {}

    @classmethod
    def open(
        cls,
        pairs: Sequence[Pair],
        source: ShardSource,
        *,
        tokens: int,
        device: str,
        model: str | None = None,
        trust_remote_code: bool = False,
    ) -> list[EffectOverTime]:
        """One for each SAE; the model is loaded once.

        Args:
            pairs: what each SAE learns, with its provenance.
            source: the dataset, with held-out documents.
            tokens: predictions to score.
            device: of the model.
            model: where it is now, if it moved.
            trust_remote_code: run Python code that comes with it.

        Raises:
            ConfigError: no causal language model, no texts, several sites side by side.
            DatasetError: damaged texts.
        """
        if source.n_blocks("validation") == 0:
            raise ConfigError("the dataset has no validation split; harvest with a validation_share above 0")
        loaded: CausalLM | None = None
        texts: HeldOutTexts | None = None
        found = []
        for pair in pairs:
            origin = origin_from(pair.identity, model=model, trust_remote_code=trust_remote_code)
            card = pair.identity["model"]
            if loaded is None or texts is None:
                root = pair.identity["dataset_path"]
                texts = open_texts(card, root, source.manifest, "validation", budget=tokens)
                loaded = load_judge(card, origin, device=device)
            mean = torch.tensor(pair.statistics(source)[1].mean)
            found.append(cls(splice(loaded, origin, texts), texts, mean))
        return found

    def measure(self, sae: Replace) -> dict[str, float]:
        """The figures that docs/metrics.md defines for `effect`, `overall`; NaN is undefined.

        Args:
            sae: activations of kept rows (rows, d_in) -> reconstruction (rows, d_out).
        """
        passes: dict[str, Replace] = {"sae": sae}
        if not self._ablated:
            passes["zero"] = lambda x: x.new_zeros(len(x), len(self.mean))
            passes["mean"] = lambda x: self.mean.to(x.device).expand(len(x), -1)
        sums = {name: torch.zeros(4, dtype=torch.float64) for name in passes}
        for batch in self.texts.batches(contexts_that_fit(self.model, self.texts)):
            original = self.model.logits(batch, None)
            for name, replace in passes.items():
                sums[name] += compare(original, self.model.logits(batch, replace), batch.targets).sum(0)
        n = self.texts.tokens
        before, after, divergence, same = (sums["sae"] / n).tolist()
        for name in passes.keys() - {"sae"}:
            self._ablated[f"ce_{name}"] = float(sums[name][1] / n)
        harm = {name: ce - before for name, ce in self._ablated.items()}
        scores = {
            name.replace("ce_", "ce_score_"): (self._ablated[name] - after) / over if over > 0 else math.nan
            for name, over in harm.items()
        }
        return {
            "delta_ce": after - before,
            "ce_original": before,
            "ce_sae": after,
            **self._ablated,
            **scores,
            "kl_sae": divergence,
            "top1_sae": same,
            "tokens": float(n),
        }

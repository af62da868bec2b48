"""What an SAE knows of labels: k-sparse probing and targeted probe perturbation, from one reading of the documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError
from saeforge.evaluation.perturbation import Perturbation, perturb_probes
from saeforge.evaluation.pooled import pool_dataset, pool_texts
from saeforge.evaluation.probing import Probing, probe_latents
from saeforge.lm.labelled import LabelledTexts
from saeforge.metrics.logistic import check_probe
from saeforge.sae import SAE

PROBE_TOKENS = 200_000


@dataclass(frozen=True)
class Labelled:
    """The result of `judge_labels`.

    Attributes:
        probing: k-sparse probing, or None.
        tpp: targeted probe perturbation, or None.
        reason: why one of them is missing, or None.
    """

    probing: Probing | None
    tpp: Perturbation | None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, of the keys of an evaluation."""
        found: dict[str, Any] = {
            "probing": None if self.probing is None else self.probing.to_json(),
            "tpp": None if self.tpp is None else self.tpp.to_json(),
        }
        return found if self.reason is None else {**found, "probing_reason": self.reason}


def judge_labels(
    sae: SAE,
    root: str,
    source: ShardSource,
    split: str,
    *,
    probe: bool | str,
    texts: LabelledTexts | None,
    probe_tokens: int,
    max_tokens: int | None,
    batch_size: int,
    model: str | None,
    trust_remote_code: bool,
    seed: int,
    device: str,
    progress: Callable[[str], Callable[[int, int], None] | None],
) -> Labelled:
    """Reads labelled documents once, then probes and perturbs.

    Args:
        sae: on the device.
        root: of the dataset. source: opened, with the SAE's sites. split: whose documents are judged on.
        probe: True; False; or "auto": if there are labels and scikit-learn, else `reason` says what is missing.
        texts: labelled texts, through the model; None: the dataset's own documents, without it.
        probe_tokens: tokens of the dataset to fit on, at most (whole blocks).
        max_tokens: tokens of the dataset to judge on, at most; None: all.
        batch_size: rows at a time; the result does not depend on it.
        model: where the model is now, if it moved.
        trust_remote_code: run Python code that comes with it.
        seed: of the bootstrap.
        device: torch device.
        progress: what to call with (done, in all), by what is done.

    Raises:
        ConfigError: with `probe` True, or `texts`: what is missing. DatasetError: damaged data.
    """
    if probe is False:
        return Labelled(None, None, "not asked for (probe: false)")
    try:
        check_probe()
        if texts is None:
            pooled = pool_dataset(
                sae,
                root,
                source,
                split,
                test_tokens=max_tokens,
                train_tokens=probe_tokens,
                batch_size=batch_size,
                on_progress=progress("documents"),
            )
        else:
            settings: dict[str, Any] = {"model": model, "trust_remote_code": trust_remote_code, "device": device}
            pooled = pool_texts(sae, texts, **settings, on_progress=progress("texts"))
        probing = probe_latents(pooled, seed=seed, on_progress=progress("probes"))
    except ConfigError as error:  # something is not there; what is there and damaged stays an error
        if probe is True or texts is not None:
            raise
        return Labelled(None, None, str(error))
    if pooled.target is None:
        return Labelled(probing, None, "--probe_texts gives a transcoder's input alone, TPP needs what it writes too")
    return Labelled(probing, perturb_probes(sae, pooled, seed=seed, on_progress=progress("perturbations")))

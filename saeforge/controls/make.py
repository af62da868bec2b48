"""`make_controls`: the controls of an SAE, at its L0 and width, ready to be judged beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saeforge.controls.pca import pca
from saeforge.controls.reinit import harvest_fresh
from saeforge.controls.trained import train_topk
from saeforge.data.shard_source import ShardSource
from saeforge.errors import ConfigError
from saeforge.evaluation.judge import Control
from saeforge.evaluation.opening import open_dataset
from saeforge.evaluation.reconstruction import measure_reconstruction
from saeforge.lm.device import resolve_device
from saeforge.sae import SAE, load

#: What each control is; L0 and d_sae are the SAE's, rounded to whole latents.
CONTROLS = {
    "pca": "the first L0 principal components of training rows, two latents for each (one a sign): the best linear "
    "reconstruction with L0 numbers a token",
    "random_decoder": "topk with k = L0 and d_sae latents, whose decoder stays at the random unit directions that it "
    "began with; encoder and biases are trained",
    "reinit": "topk with k = L0 and d_sae latents, trained and judged on the same text through the same architecture "
    "with freshly initialised weights, at the same site",
}
CONTROL_TOKENS = 1_000_000
_L0_TOKENS = 65_536


def make_controls(
    run: str | Path | SAE,
    names: Sequence[str] = tuple(CONTROLS),
    *,
    data: str | Path | None = None,
    folder: str | Path | None = None,
    split: str = "validation",
    tokens: int = CONTROL_TOKENS,
    lr: float | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
    on_control: Callable[[str], None] | None = None,
) -> dict[str, Control]:
    """Makes the controls of an SAE: `saeforge.evaluate(run, controls=saeforge.make_controls(run))`.

    Each that is done stays in RUN/controls/NAME/sae, and is taken from there when it is asked for again in the same
    way; what was interrupted is made anew (but a harvest goes on).

    Args:
        run: RUN folder, `sae/` folder, or an SAE.
        names: of `CONTROLS`.
        data: dataset; default: the one it was trained on.
        folder: where controls stay; default: RUN/controls, and nowhere without a RUN folder. `reinit` needs one.
        split: of the dataset on which L0 is measured.
        tokens: that a control is trained on, or fewer: as many as the SAE was. PCA is fitted on so many.
        lr: learning rate of topk; default: its recipe.
        model: where the model is now, if it moved.
        trust_remote_code: run Python code that comes with the model.
        seed: of weights, order and random directions.
        device: "auto", "cpu", "cuda", ...
        progress: show training's progress bars.
        on_control: called with the name of each control that is made, when it begins.

    Returns:
        The controls by name, in the order asked for.

    Raises:
        ConfigError: an unknown name, or a control that this SAE cannot have.
        SaeforgeError: as `evaluate`, `saeforge.train` and `saeforge.harvest`.
    """
    for name in names:
        if name not in CONTROLS:
            raise ConfigError(f"control {name!r}: expected some of {', '.join(CONTROLS)}")
    if tokens < 1:
        raise ConfigError(f"tokens = {tokens} of a control: expected a positive number")
    sae = (run if isinstance(run, SAE) else load(run)).to(resolve_device(device))
    if folder is None and not isinstance(run, SAE) and (Path(run) / "sae").is_dir():
        folder = Path(run) / "controls"
    if folder is None and "reinit" in names:
        raise ConfigError("the control reinit keeps a model and its activations: give a RUN folder, or `folder`")
    root, source = open_dataset(sae, data, split)
    if source.n_blocks("train") == 0:
        raise ConfigError(f"{root} has no train split to make controls from; give a harvested dataset with --data")
    l0 = measure_reconstruction(sae, source, split, max_tokens=_L0_TOKENS).metrics.l0_mean
    trained = sae.meta.get("training") or {}
    settings: dict[str, Any] = {
        "dataset": source.fingerprint,
        "d_sae": sae.d_sae,
        "k": min(max(1, round(l0)), sae.d_sae),
        "tokens": min(tokens, trained.get("tokens") or tokens),
        "batch_size": _batch_size(trained, source),
        "lr": lr,
        "seed": seed,
    }
    settings["tokens"] = max(settings["tokens"], settings["batch_size"])
    where: dict[str, Any] = {"model": model, "trust_remote_code": trust_remote_code, "device": device}
    found = {}
    for name in names:
        place = None if folder is None else Path(folder) / name
        wanted = {"control": name, **settings}
        own = None if place is None else _stored(place, wanted)
        acts: Path | None = None
        if name == "reinit":
            assert place is not None
            if own is None and on_control is not None:
                on_control(name)
            acts = harvest_fresh(sae, source, place, n_tokens=max(tokens, _L0_TOKENS), seed=seed, **where)
        elif own is None and on_control is not None:
            on_control(name)
        if own is None:
            own = _make(name, _same_sites(sae, acts) if acts is not None else source, settings, progress, device)
            own.meta = {**own.meta, "control": wanted}
            if place is not None:
                own.save(place / "sae")
        found[name] = Control(own, _describe(name, settings, trained), data=acts, own_model=acts is not None)
    return found


def _make(name: str, source: ShardSource, settings: dict[str, Any], progress: bool, device: str) -> SAE:
    if name == "pca":
        rank = min(settings["k"], source.pairs[0].widths(source)[0])
        return pca(source, rank, max_rows=settings["tokens"])
    wanted = {key: settings[key] for key in ("d_sae", "k", "tokens", "batch_size", "lr", "seed")}
    accelerator = {"cpu": "cpu", "cuda": "gpu"}.get(device.split(":")[0], "auto")
    trainer = {"enable_progress_bar": progress, "accelerator": accelerator}
    return train_topk(source, frozen=name == "random_decoder", trainer=trainer, **wanted)


def _same_sites(sae: SAE, folder: Path) -> ShardSource:
    """Another dataset's activations of an SAE's sites."""
    site, target = sae.meta["site"], sae.meta.get("target")
    return ShardSource(str(folder), input=site["id"], target=None if target is None else target["id"])


def _batch_size(trained: dict[str, Any], source: ShardSource) -> int:
    """Rows of a step of the SAE's own training, 2,048 where it does not say; fewer where data is small."""
    tokens, steps = trained.get("tokens"), trained.get("steps")
    rows = int(tokens // steps) if tokens and steps and tokens % steps == 0 else 2048
    lanes = 8 * source.unit
    while rows > lanes and rows * 4 > source.n_blocks("train") * source.block_rows("train"):
        rows //= 2
    return max(lanes, rows // lanes * lanes)


def _stored(place: Path, wanted: dict[str, Any]) -> SAE | None:
    """The control that was made before in the same way, or None."""
    if not (place / "sae" / "sae.json").is_file():
        return None
    sae = load(place / "sae")
    return sae if sae.meta.get("control") == json.loads(json.dumps(wanted)) else None


def _describe(name: str, settings: dict[str, Any], trained: dict[str, Any]) -> str:
    """What a control is, with its numbers."""
    numbers = f"L0 {settings['k']}, d_sae {settings['d_sae']:,}" if name != "pca" else f"L0 {settings['k']}"
    verb = "fitted" if name == "pca" else "trained"
    theirs = f"; the SAE on {trained['tokens']:,}" if name != "pca" and trained.get("tokens") else ""
    return f"{CONTROLS[name]} ({numbers}; {verb} on {settings['tokens']:,} tokens{theirs})"

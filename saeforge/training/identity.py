"""What a checkpoint must share with the run that resumes it, and what a saved SAE tells of its training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from saeforge import __version__
from saeforge.errors import CheckpointError
from saeforge.registry import VARIANTS
from saeforge.training.init_from import described

if TYPE_CHECKING:
    from saeforge.training.member import Member


def identity_of(member: Member) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it, as plain values."""
    settings = member.optimizer_settings() if member.settings.optimizer is None else {}
    return {
        "name": member.name,
        "sites": _sites(member.pair.identity),
        "variant": VARIANTS.name_of(type(member.variant)).class_path,
        "options": {key: _plain(value) for key, value in member.variant.arguments.items()},
        "optimizer": {
            "class": "RowAdam" if member.settings.optimizer is None else "custom",
            **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        },
        "resample_steps": list(member.resample_steps),
        "skip": member.settings.skip,
        "seed": member.settings.seed,
        "extras": _extras(member),
    }


def _extras(member: Member) -> dict[str, Any]:
    """The options of `docs/training.md` that are on."""
    given = member.settings
    values = {
        "target_l0": given.target_l0,
        "ema_half_life_steps": given.ema_half_life_steps,
        "init_from": None if given.init_from is None else described(given.init_from),
        "whitening": given.whitening,
        "whitening_shrinkage": None if member.whitening is None else member.whitening.shrinkage,
    }
    return {name: value for name, value in values.items() if value is not None}


def origin_of(member: Member, steps: int, tokens: int, precision: str) -> dict[str, Any]:
    """What a saved SAE remembers: its data, its variant with the distribution of that, its training."""
    record = VARIANTS.name_of(type(member.variant))
    return {
        **member.pair.identity,
        "variant": {
            "name": record.name,
            "class_path": record.class_path,
            "distribution": record.distribution,
            "version": record.version,
            "options": identity_of(member)["options"],
        },
        "training": {
            "steps": steps,
            "tokens": tokens,
            "precision": precision,
            "saeforge": __version__,
            "torch": torch.__version__,
        },
    }


def check_identity(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Compares two identities of a member.

    Raises:
        CheckpointError: with every difference as `name: checkpoint -> this run`.
    """
    if saved["variant"] != given["variant"]:
        raise CheckpointError(
            f"the checkpoint holds variant {saved['variant']}, this run asks for {given['variant']}; "
            "resume with the same variant, or start a new --run"
        )
    differences = []
    if "sites" in saved and saved["sites"] != given["sites"]:
        differences.append(f"sites: {saved['sites']} -> {given['sites']}")
    for part in ("options", "optimizer", "extras"):
        then = saved.get(part, {})  # no extras: a checkpoint from before there were any
        for name in sorted(then.keys() | given[part].keys()):
            before, now = then.get(name), given[part].get(name)
            if before != now:
                differences.append(f"{name}: {before} -> {now}")
    for name in ("name", "resample_steps", "skip", "seed"):
        if saved.get(name, False if name == "skip" else None) != given[name]:
            differences.append(f"{name}: {saved.get(name)} -> {given[name]}")
    if differences:
        raise CheckpointError(
            f"the checkpoint was trained with other settings ({'; '.join(differences)}); "
            "resume with the same ones, or start a new --run"
        )


def _sites(identity: dict[str, Any]) -> str:
    """Which sites an SAE reads and writes, in one line; the dataset itself is the loader's to compare."""
    if not identity.get("sources"):
        ends = [(identity.get(part) or {}).get("id") for part in ("site", "target")]
        return " to ".join(end for end in ends if end)
    sides = [identity["sources"], identity.get("targets") or []]
    named = [[f"{(part.get('site') or {}).get('id')}@{part.get('dataset', '')[:8]}" for part in side] for side in sides]
    return " to ".join(" + ".join(side) for side in named if side)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

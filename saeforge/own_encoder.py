"""How an SAE of rule plugin remembers the variant that encodes, and finds it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from saeforge.errors import CheckpointError, ConfigError, SaeforgeError
from saeforge.registry import VARIANTS

PREFIX = "encoder."


def describe(encoder: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Who made an encoder and with which options, as plain JSON values.

    Raises:
        ConfigError: options that are no plain values.
    """
    record = VARIANTS.name_of(type(encoder))
    options = {key: value for key, value in arguments.items() if key not in ("d_in", "d_out")}
    try:
        json.dumps(options)
    except TypeError as error:
        raise ConfigError(
            f"variant {record.name} cannot be saved: its options must be plain values ({error})"
        ) from error
    return {
        "name": record.name,
        "class_path": record.class_path,
        "distribution": record.distribution,
        "version": record.version,
        "options": options,
    }


def rebuild(folder: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The encoder that `describe` described, with its weights.

    Only variants that are installed or registered in this process are imported, never whatever a file names.

    Args:
        folder: for messages. meta: content of its sae.json. tensors: of its weights file, the encoder's under `PREFIX`.

    Raises:
        CheckpointError: the package that trained it is missing, or does not fit.
    """
    made = meta.get("encoder")
    if not isinstance(made, dict) or not isinstance(made.get("options"), dict):
        raise CheckpointError(f"the SAE in {folder} is damaged (encoder); save or copy it again")
    owner = made.get("distribution")
    who = f"{owner} {made.get('version')}" if owner else f"the module of {made.get('class_path')}"
    if not any(record.class_path == made.get("class_path") for record in VARIANTS.records()):
        raise CheckpointError(
            f"the SAE in {folder} does not fold into plain weights: variant {made.get('name')!r} of {who} encodes it, "
            f"which is not installed here; {f'pip install {owner}' if owner else 'register it first'}"
        )
    cls = VARIANTS.load(made["class_path"])
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    try:
        encoder: nn.Module = cls(meta["d_in"], meta["d_out"], **made["options"])
        encoder.load_state_dict(state)
    except (TypeError, RuntimeError, SaeforgeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the SAE in {folder} does not fit what is installed: {reason}; install {who}") from error
    return encoder.to(next(iter(tensors.values())).device).requires_grad_(False).eval()

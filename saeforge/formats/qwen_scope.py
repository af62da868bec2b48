"""Qwen-Scope: one `layerN.sae.pt` for each layer, top-k of raw activations; k stands in the repository's name alone."""

from __future__ import annotations

import re
from pathlib import Path

from saeforge.errors import CheckpointError, ConfigError
from saeforge.formats.base import Format, plain_sae
from saeforge.formats.files import matrix, read_torch, take
from saeforge.sae import SAE

_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPOSITORY = re.compile(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)")


class QwenScope(Format):
    """Qwen-Scope: SAEs of the residual stream; path names the file of one layer, in a folder named as on the hub."""

    title = "Qwen-Scope"
    files = ()  # of a hub one file is fetched, the one that the path names: all layers are tens of gigabytes

    def recognises(self, path: Path) -> bool:
        """By the name of the file, or of the only such file in a folder."""
        return bool(_FILE.fullmatch(path.name)) if path.is_file() else any(path.glob("layer*.sae.pt"))

    def read(self, path: Path) -> SAE:
        """See `Format.read`; W_enc is (d_sae, d_in) there, W_dec (d_out, d_sae)."""
        if path.is_dir():
            files = sorted(path.glob("layer*.sae.pt"))
            if len(files) != 1:
                raise CheckpointError(f"{path} holds {len(files)} files layerN.sae.pt; give the path of one of them")
            path = files[0]
        layer, repository = _FILE.fullmatch(path.name), _REPOSITORY.search(str(path))
        if layer is None or repository is None:
            raise ConfigError(
                f"{path}: k is known from the name of the repository only; keep the file in a folder named as there "
                "(SAE-Res-MODEL-W32K-L0_50/layer3.sae.pt)"
            )
        tensors = take(path, read_torch(path), ("W_enc", "W_dec", "b_enc", "b_dec"))
        return plain_sae(
            path,
            matrix(path, "W_enc", tensors["W_enc"]),
            tensors["b_enc"],
            matrix(path, "W_dec", tensors["W_dec"]).T,
            tensors["b_dec"],
            k=int(repository[2]),
            meta={"imported": {"model_name": repository[1], "hook_name": f"blocks.{layer[1]}.hook_resid_post"}},
        )

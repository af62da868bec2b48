"""`model.init_from`: a run that starts from a trained SAE instead of random weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from saeforge.errors import ConfigError
from saeforge.sae import SAE, load
from saeforge.variants import StartsFrom, Variant

#: Steps of the learning rate's warm-up where neither the run nor the recipe asks for more: Adam starts without moments,
#: and its first steps are as long in directions of noise as in any other.
WARMUP_STEPS = 1000


def warmup_steps(total_steps: int) -> int:
    """The least default warm-up of a run that starts from an SAE: 1,000 steps, or a tenth of a shorter run."""
    return min(WARMUP_STEPS, total_steps // 10)


def check_offered(variant: Variant) -> None:
    """Refuses a variant that cannot start from an SAE.

    Raises:
        ConfigError: it has no `unfold_`.
    """
    if not isinstance(variant, StartsFrom):
        raise ConfigError(
            f"model.init_from: {type(variant).__name__} cannot start from an SAE (it has no unfold_); leave it out, or "
            "add that method to the variant"
        )


def open_sae(given: str | Path | SAE, *names: str) -> SAE:
    """The SAE to start from.

    Args:
        given: itself, or whatever `saeforge.load` reads; of a RUN with several SAEs, the one with the first of the
            names that is there.
        names: of the SAE in training, and of its site; "" where there is one.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    if isinstance(given, SAE):
        return given
    folder = Path(given)
    return load(next((folder / name for name in names if name and (folder / name / "sae").is_dir()), folder))


def described(given: str | Path | SAE) -> str:
    """What a checkpoint remembers of it: the path, or a digest of the weights."""
    if not isinstance(given, SAE):
        return str(given)
    digest = hashlib.sha256()
    for name, tensor in sorted(given.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"SAE {digest.hexdigest()[:16]}"

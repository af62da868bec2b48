"""A language model with fresh weights: the control of what its training has to do with a finding."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

from saeforge.lm.load import load_error, load_tokenizer, quiet, read_config, resolve_model


def save_fresh_model(
    model: str,
    folder: str | Path,
    *,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Saves a model's architecture with freshly drawn weights, and its tokenizer, as a HuggingFace folder.

    The weights are those that the architecture's own initialisation draws, in fp32. A folder that holds a model already
    is left alone.

    Args:
        model: folder, hub name, `package:NAME` or `demo`.
        folder: to write.
        seed: of the weights.
        revision: of a hub model.
        trust_remote_code: run Python code that comes with it.

    Returns:
        The folder.

    Raises:
        ConfigError: there is no such model, or it cannot be built.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    original = resolve_model(model)
    tokenizer = load_tokenizer(model, revision, trust_remote_code=trust_remote_code)
    with quiet(), torch.random.fork_rng(devices=[]):
        config = read_config(model, original, revision, trust_remote_code)
        torch.manual_seed(seed)
        try:
            fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError:  # an encoder
            try:
                fresh = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
            except ValueError as error:
                raise load_error(model, "it cannot be built from its configuration", error) from error
        part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.float().save_pretrained(part)
            tokenizer.save_pretrained(part)
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder

"""A whole causal language model with its head and tokenizer: to judge an SAE by its effect, and to steer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from saeforge.errors import ConfigError
from saeforge.lm.load import MODEL_DTYPES, find_card, first_line, load_tokenizer, quiet, read_config, resolve_model


@dataclass
class CausalLM:
    """A causal language model in evaluation mode, without gradients.

    Attributes:
        model: with its head, on its device.
        tokenizer: its tokenizer.
        context_limit: longest sequence that the model allows, or None.
        card: what identifies the model, as in a dataset's manifest.
    """

    model: nn.Module
    tokenizer: Any
    context_limit: int | None
    card: dict[str, Any]


def load_causal_lm(name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "cpu") -> CausalLM:
    """Load a model that predicts the next token.

    Args:
        name: folder, hub name, `package:NAME` or `demo`.
        revision: hub revision.
        dtype: "auto" (the checkpoint's), "float32" or "bfloat16".
        device: torch device that exists.

    Raises:
        ConfigError: no such model, or one that is no causal language model.
    """
    folder = resolve_model(name)
    with quiet():
        config = read_config(name, folder, revision)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                revision=revision,
                config=config,
                dtype="auto" if dtype == "auto" else MODEL_DTYPES[dtype],
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"model {name!r} is no causal language model: {first_line(error)}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise ConfigError(f"model {name!r} is no causal language model: its checkpoint lacks {missing}")
    model.eval().requires_grad_(False).to(device)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return CausalLM(model, load_tokenizer(name, revision), limit, find_card(name, folder, model, config, revision))

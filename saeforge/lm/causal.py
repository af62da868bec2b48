"""A whole causal language model with its head and tokenizer: to judge an SAE by its effect, and to steer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from saeforge.errors import ConfigError
from saeforge.lm.load import MODEL_DTYPES, find_card, load_error, load_tokenizer, quiet, read_config, resolve_model


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


def load_causal_lm(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> CausalLM:
    """Load a model that predicts the next token.

    Args:
        name: folder, hub name, `package:NAME` or `demo`.
        revision: hub revision.
        dtype: "auto" (the checkpoint's), "float32" or "bfloat16".
        device: torch device that exists.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ConfigError: no such model, or one that is no causal language model.
    """
    folder = resolve_model(name)
    with quiet():
        config = read_config(name, folder, revision, trust_remote_code)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                revision=revision,
                config=config,
                dtype="auto" if dtype == "auto" else MODEL_DTYPES[dtype],
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise load_error(name, "it is no causal language model", error) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise ConfigError(f"model {name!r} is no causal language model: its checkpoint lacks {missing}")
    model.eval().requires_grad_(False).to(device)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokenizer = load_tokenizer(name, revision, trust_remote_code=trust_remote_code)
    return CausalLM(model, tokenizer, limit, find_card(name, folder, model, config, revision))

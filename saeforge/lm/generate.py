"""Text from a causal language model: batches, sampled with noise that depends on the seed and the prompt alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from saeforge.errors import ConfigError
from saeforge.lm.causal import CausalLM
from saeforge.lm.tokens import find_specials


@dataclass(frozen=True)
class Continuation:
    """What the model wrote after a prompt.

    Attributes:
        prompt: token ids that it read, special ones included.
        tokens: token ids that it wrote, without the EOS that ended them.
        text: of these tokens, as it stands behind the prompt.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def generate(
    causal: CausalLM,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 60,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    greedy: bool = False,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Continuation]:
    """Continue prompts; the model's own generation settings (penalties, its temperature) do not apply.

    A token is sampled as the argmax of log probability plus Gumbel noise, and the noise of the n-th prompt's t-th token
    depends on (seed, n, t) alone: not on the global random state, the device, or the batch. So two calls with one seed
    differ only where their models do: plain and steered text are compared under the same luck.

    Args:
        causal: model and tokenizer.
        prompts: texts, continued after the tokenizer's BOS, if it has one.
        max_new_tokens: most tokens to write; an EOS ends it earlier.
        temperature: above 0; 1 samples the model's own distribution.
        top_p: sample from the most likely tokens that hold this share, in (0, 1].
        seed: of the noise, at least 0.
        greedy: the most likely token each time; the three above do not matter then.
        batch_size: prompts at a time, padded on the left.
        on_progress: called with (prompts done, prompts in all).

    Returns:
        One continuation per prompt, in their order.

    Raises:
        ConfigError: impossible settings, an empty prompt for a tokenizer without BOS, or a prompt that leaves no room
            in the model's context.
    """
    _check(max_new_tokens, temperature, top_p, seed, batch_size)
    specials = find_specials(causal.tokenizer)
    ids = [
        [*specials.prefix, *causal.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        for text in prompts
    ]
    for text, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise ConfigError(f"prompt {text!r} has no tokens, and the tokenizer no BOS to begin with; give some text")
        if causal.context_limit is not None and len(tokens) + max_new_tokens > causal.context_limit:
            raise ConfigError(
                f"prompt {text[:40]!r} has {len(tokens)} tokens; with max_new_tokens {max_new_tokens} that is more "
                f"than the model's {causal.context_limit}; shorten one of them"
            )
    ends = _end_ids(causal)
    results: list[Continuation] = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        noise = None if greedy else _Noise([(seed, start + n) for n in range(len(part))])
        written = _continue(causal, part, max_new_tokens, specials.pad, ends, noise, temperature, top_p)
        for prompt, tokens in zip(part, written, strict=True):
            length = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
            kept = tokens[:length]
            results.append(Continuation(tuple(prompt), tuple(kept), _text_of(causal.tokenizer, prompt, kept)))
        if on_progress is not None:
            on_progress(len(results), len(ids))
    return results


def _text_of(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """Return the text that tokens add to a prompt: alone, some tokenizers would take the space from their beginning."""
    before, both = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, [*prompt, *tokens]))
    if both.startswith(before):
        return both.removeprefix(before)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))  # they complete the prompt's last character


class _Noise(LogitsProcessor):
    """Adds Gumbel noise to log probabilities, a stream of its own for each row."""

    def __init__(self, seeds: Sequence[tuple[int, int]]) -> None:
        self.streams = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise = np.stack([stream.gumbel(size=scores.shape[1]) for stream in self.streams])
        return scores.double() + torch.from_numpy(noise).to(scores.device)


def _continue(
    causal: CausalLM,
    ids: list[list[int]],
    max_new_tokens: int,
    pad: int,
    ends: list[int],
    noise: _Noise | None,
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    """Return what the model writes after each prompt, up to the longest of the batch."""
    model: Any = causal.model
    device = next(model.parameters()).device
    longest = max(map(len, ids))
    tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    processors = LogitsProcessorList()
    if noise is not None:
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(noise)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=ends or None
    )
    with torch.no_grad(), _own_settings_away(model):
        out = model.generate(
            input_ids=tokens, attention_mask=mask, generation_config=config, logits_processor=processors
        )
    return [row[longest:] for row in out.tolist()]


@contextlib.contextmanager
def _own_settings_away(model: Any) -> Iterator[None]:
    """Hide a model's generation settings: `generate` fills whatever a given configuration leaves open from them."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _end_ids(causal: CausalLM) -> list[int]:
    """Return the ids that end a text: the tokenizer's EOS, and those that the model's settings name."""
    named = getattr(getattr(causal.model, "generation_config", None), "eos_token_id", None)
    found = set(named) if isinstance(named, list | tuple) else {named}
    return sorted({int(token) for token in {*found, causal.tokenizer.eos_token_id} if token is not None})


def _check(max_new_tokens: int, temperature: float, top_p: float, seed: int, batch_size: int) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigError(f"{name} = {value}: expected at least {least}")
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature = {temperature:g}: expected above 0; for the most likely token give greedy")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p:g}: expected above 0 and at most 1")

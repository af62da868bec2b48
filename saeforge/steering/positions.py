"""Which tokens of a forward pass may be edited: special ones never, padding never, the prompt or what follows it.

A hook inside the model sees activations only. What they belong to is known where the whole model is called: token ids,
mask and cache are its arguments. And only `generate` knows how long its prompt is, for without a cache each of its
steps looks like a longer prompt; so while a choice of prompt or generated stands, calls of `generate` are watched too.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from saeforge.errors import ConfigError
from saeforge.lm.tokens import find_specials

Where = Literal["all", "prompt", "generated"]


class Positions:
    """Follows a model's forward passes; a context manager.

    Attributes:
        editable: bool (batch, length) of the pass that is running; None between passes.
        generate_prompt: length of the prompt of the `generate` that is running, which sets it; else None.
    """

    def __init__(self, model: nn.Module, where: Where, special_ids: frozenset[int] | None) -> None:
        """Attaches nothing yet.

        Args:
            model: the model that will be called: its arguments are read.
            where: which tokens.
            special_ids: token ids that are never edited; None edits every token.

        Raises:
            ConfigError: `where` is none of the three.
        """
        if where not in get_args(Where):
            raise ConfigError(f"where is {where!r}; expected one of {', '.join(get_args(Where))}")
        self.model = model
        self.where = where
        self.editable: Tensor | None = None
        self.generate_prompt: int | None = None
        self._special = None if special_ids is None else torch.tensor(sorted(special_ids), dtype=torch.int64)
        self._names = list(inspect.signature(model.forward).parameters)
        self._pass_prompt: int | None = None  # length of the running pass, if it begins a sequence of its own
        self._cache_prompts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._exit = ExitStack()

    def __enter__(self) -> Positions:
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._exit.callback(before.remove)
        after = self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._exit.callback(after.remove)
        if self.where != "all" and hasattr(self.model, "generate"):
            self._exit.callback(self._watch_generate())
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, embeds, mask = (given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        tokens = embeds if ids is None else ids
        if tokens is None:
            raise ConfigError("steering: the model is called without input_ids or inputs_embeds; give it one of them")
        editable = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        length = editable.shape[1]
        if self._special is not None:
            if ids is None:
                raise ConfigError(
                    "steering: inputs_embeds do not say which tokens are special; give input_ids, or skip_special=False"
                )
            self._special = self._special.to(ids.device)
            editable &= ~torch.isin(ids, self._special)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ConfigError(
                    "steering: a prepared attention mask does not say which tokens are padding; give one of shape "
                    "(batch, length), and generate with the default cache"
                )
            editable &= mask[:, -length:].to(editable.device, torch.bool)
        if self.where != "all":
            start, prompt = self._start_and_prompt(given.get("past_key_values"), length)
            in_prompt = torch.arange(start, start + length, device=editable.device) < prompt
            editable &= in_prompt if self.where == "prompt" else ~in_prompt
        self.editable = editable

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.editable = None
        if self._pass_prompt is not None and output is not None:  # None: the pass failed
            cache = _cache_of(output)
            if cache is not None:
                self._cache_prompts[cache] = self._pass_prompt
        self._pass_prompt = None

    def _start_and_prompt(self, cache: Any, length: int) -> tuple[int, int]:
        """Return how many tokens came before this pass, and how many are the prompt."""
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise ConfigError(
                f"steering where={self.where!r}: past_key_values is a {type(cache).__name__}; give a transformers Cache"
            )
        start = 0 if cache is None else int(cache.get_seq_length())
        if self.generate_prompt is not None:
            if cache is None and length < self.generate_prompt:  # its state is kept in some other way
                raise ConfigError(
                    f"steering where={self.where!r}: {type(self.model).__name__} keeps no key-value cache to count "
                    "tokens by; generate with use_cache=False, or steer where='all'"
                )
            return start, self.generate_prompt
        if start == 0:
            self._pass_prompt = length
            return 0, length
        if cache not in self._cache_prompts:
            raise ConfigError(
                f"steering where={self.where!r}: past_key_values were filled outside of this context, so where the "
                "prompt ends is not known; fill them inside, or steer where='all'"
            )
        return start, self._cache_prompts[cache]

    def _watch_generate(self) -> Callable[[], None]:
        """Be told the prompt's length by the model's `generate`; return what ends it."""
        model: Any = self.model
        watched = vars(model).get("generate")
        if not isinstance(watched, _WatchedGenerate):
            watched = _WatchedGenerate(model.generate, own=watched)
            model.generate = watched
        watched.watchers.append(self)

        def leave() -> None:
            watched.watchers.remove(self)
            if watched.watchers or vars(model).get("generate") is not watched:
                return
            if watched.own is None:
                del model.generate  # the class's shows again
            else:
                model.generate = watched.own

        return leave


class _WatchedGenerate:
    """Stands before a model's `generate`: one for all contexts of the model, which may end in any order."""

    def __init__(self, plain: Callable[..., Any], own: Any) -> None:
        """Takes what is to be called, and the same if somebody had put it on the model itself, else None."""
        functools.update_wrapper(self, plain)
        self.plain, self.own = plain, own
        self.watchers: list[Positions] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        length = _prompt_length(args, kwargs)
        before = [(positions, positions.generate_prompt) for positions in self.watchers]
        for positions, _ in before:
            positions.generate_prompt = length
        try:
            return self.plain(*args, **kwargs)
        finally:
            for positions, outer in before:
                positions.generate_prompt = outer


def find_special_ids(model: nn.Module, tokenizer: Any, special_ids: Iterable[int] | None) -> frozenset[int]:
    """Return the ids that are never edited: those given, else the tokenizer's, else the model's BOS, EOS and PAD.

    Raises:
        ConfigError: none of them says any.
    """
    if special_ids is not None:
        return frozenset(special_ids)
    if tokenizer is not None:
        return find_specials(tokenizer).dropped
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found: set[int] = set()
    for source in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(source, name, None)
            found |= set() if value is None else set(value) if isinstance(value, list | tuple) else {int(value)}
    if not found:
        raise ConfigError(
            "steering: the model's configuration names no special tokens; give tokenizer= or special_ids=, or "
            "skip_special=False"
        )
    return frozenset(found)


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the prompt's length of a call of `generate`; without a prompt it begins with one token, BOS."""
    if kwargs.get("inputs_embeds") is not None:
        return int(kwargs["inputs_embeds"].shape[1])
    ids = args[0] if args else kwargs.get("inputs")
    ids = kwargs.get("input_ids") if ids is None else ids
    return 1 if ids is None else int(ids.shape[1])


def _cache_of(output: Any) -> Any:
    """Return the key-value cache in a model's output, or None."""
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)

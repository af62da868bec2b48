"""Options of a harvest. No torch here: the command line parses them in a blink."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from saeforge.errors import ConfigError

# What may differ between two runs of the same harvest: it changes neither rows nor their order.
_NOT_HASHED = ("out", "overwrite")


@dataclass
class HarvestConfig:
    """What to harvest, from which model and text, and how to store it."""

    model: str
    """HuggingFace model: a folder, a hub name, package:NAME for one inside an installed Python package, or demo, the
    small language model that ships with saeforge."""

    sites: list[str]
    """Places in the model: resid_post.6, mlp_out.3, blocks.6.hook_resid_post, or module paths with :in or :out."""

    out: str
    """Folder of the dataset; an interrupted harvest in it goes on."""

    text: str = "stdlib"
    """Source of text: a folder of text files, a .jsonl file (fields text or messages, and if wanted label), stdlib, the
    source of the running Python's standard library, or demo, about 450,000 tokens of languages and code, labelled."""

    chat_keep: Literal["all", "assistant"] = "all"
    """Of conversations (.jsonl lines with messages, through the tokenizer's chat template): keep all tokens, or only
    those that the model would write."""

    n_tokens: int = 10_000_000
    """Activations to keep, all splits together; special tokens do not count."""

    context_length: int | None = None
    """Longest piece of a document that the model sees at once, in tokens; null: 512, or what the model allows if that
    is less."""

    batch_contexts: int = 16
    """Contexts per forward pass."""

    revision: str | None = None
    """Revision of the model on the hub."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model; false: a model that needs it is refused, and none of it runs."""

    device_map: str | None = None
    """Spread a model over several devices with accelerate: auto, balanced, balanced_low_0 or sequential; null: all of
    it on device."""

    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model; auto is that of its checkpoint."""

    store_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the stored activations."""

    validation_share: float = 0.1
    """Share of the documents held out for validation, by hash of the document; 0 for none."""

    document_tokens: int | None = None
    """Most tokens to keep of one document, so that a few long ones do not fill the budget; null for all."""

    pack: bool | Literal["auto"] = "auto"
    """Several documents in one context: auto packs if this model is seen to keep them apart, true demands it."""

    drop_first: bool | Literal["auto"] = "auto"
    """Drop the first token of each context piece; auto does so if the tokenizer puts no special token before a text."""

    bucket_rows: int | None = None
    """Rows shuffled together and committed at once (a power of two); null: up to 1,048,576 as memory allows."""

    group_rows: int = 1
    """Neighbouring tokens of a document that stay together when rows are shuffled: 1, 2, 4, 8 or 16. What fills no
    whole group is not kept."""

    max_norm: float | None = 10.0
    """Leave out tokens whose norm is more than so many times the median (of a fixed sample of the training text), at
    any site: attention sinks and their like; null keeps them."""

    seed: int = 0
    """Chooses documents and the order of contexts and rows."""

    device: str = "auto"
    """Torch device; auto is cuda if there is one, else cpu."""

    overwrite: bool = False
    """Remove a different dataset in the same folder first."""

    @classmethod
    def build(cls, config: HarvestConfig | None, options: dict[str, Any]) -> HarvestConfig:
        """Merge a configuration with keyword options and check the result.

        Raises:
            ConfigError: unknown, missing or wrong option.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                raise ConfigError(f"unknown harvest option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        given = {name: getattr(config, name) for name in names} if config is not None else {}
        values = {**given, **options}
        missing = [name for name in ("model", "sites", "out") if name not in values]
        if missing:
            raise ConfigError(f"harvest needs the option {missing[0]!r}")
        built = cls(**values)
        built.check()
        return built

    def check(self) -> None:
        """Raise ConfigError unless every value has its type and range."""
        hints = typing.get_type_hints(type(self))
        for option in dataclasses.fields(self):
            value, hint = getattr(self, option.name), hints[option.name]
            if not _fits(value, hint):
                expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                raise ConfigError(f"harvest option {option.name} = {value!r}: expected {expected}")
        for name in ("n_tokens", "context_length", "batch_contexts", "document_tokens", "bucket_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"harvest option {name} = {value}: expected at least 1")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"harvest option validation_share = {self.validation_share}: expected 0 to less than 1")
        if self.bucket_rows is not None and self.bucket_rows & (self.bucket_rows - 1):
            raise ConfigError(f"harvest option bucket_rows = {self.bucket_rows}: expected a power of two")
        if self.group_rows not in (1, 2, 4, 8, 16):
            raise ConfigError(f"harvest option group_rows = {self.group_rows}: expected 1, 2, 4, 8 or 16")
        if self.max_norm is not None and self.max_norm <= 1:
            raise ConfigError(f"harvest option max_norm = {self.max_norm}: expected more than 1, or null")
        if not self.sites:
            raise ConfigError("harvest option sites is empty: name at least one, for example resid_post.6")

    def identity(self) -> dict[str, Any]:
        """Return the options that decide which bytes are written."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_HASHED}
        # 10 and 10.0 are one option
        return given | {
            name: float(given[name]) for name in ("validation_share", "max_norm") if given[name] is not None
        }


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type of the kinds used above."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)

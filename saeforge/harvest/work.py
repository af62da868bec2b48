"""What a harvest works on: a loaded model, and what it is to see. Text here; anything else in `inputs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from saeforge.harvest.config import HarvestConfig
from saeforge.harvest.prepare import Prepared, open_prepared, prepare
from saeforge.lm.capture import Capture
from saeforge.lm.isolation import probe_isolation
from saeforge.lm.load import LoadedModel, load_model, load_tokenizer, tokenizer_card
from saeforge.lm.tokens import choose_context_length, find_specials


class Options(Protocol):
    """What the writing of rows needs of a harvest's options; see `HarvestConfig` for each."""

    out: str
    overwrite: bool
    device: str
    store_dtype: Any
    validation_share: float
    batch_contexts: int
    bucket_rows: int | None
    group_rows: int
    max_norm: float | None
    seed: int

    def identity(self) -> dict[str, Any]:
        """Return the options that decide which bytes are written."""


class Work(Protocol):
    """A loaded model and what it is to see."""

    @property
    def loaded(self) -> LoadedModel:
        """The model with its resolved sites."""

    @property
    def tokenizer_card(self) -> dict[str, Any]:
        """What identifies the tokenizer; empty if there is none."""

    def prepare(self, folder: Path, capture: Capture) -> Prepared:
        """Return what the folder `tokens/` holds of an earlier run, or make it: splits, order and kept rows of all."""

    def open(self, folder: Path) -> Prepared:
        """Return what is prepared, by this process or another."""

    def origin(self, prepared: Prepared) -> dict[str, Any]:
        """Return what a manifest says of where the rows come from."""


@dataclass(frozen=True)
class TextWork:
    """A language model, its tokenizer and text."""

    config: HarvestConfig
    loaded: LoadedModel
    tokenizer: Any
    tokenizer_card: dict[str, Any]

    @classmethod
    def load(cls, config: HarvestConfig, device: str) -> TextWork:
        """Load model and tokenizer."""
        tokenizer = load_tokenizer(config.model, config.revision, trust_remote_code=config.trust_remote_code)
        loaded = load_model(
            config.model,
            config.sites,
            revision=config.revision,
            dtype=config.model_dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
            device_map=config.device_map,
        )
        return cls(config, loaded, tokenizer, tokenizer_card(tokenizer))

    def prepare(self, folder: Path, capture: Capture) -> Prepared:
        """Store the packed tokens."""
        return open_prepared(folder) or prepare(
            folder,
            self.config,
            choose_context_length(self.config.context_length, self.loaded.context_limit, self.tokenizer),
            self.tokenizer,
            find_specials(self.tokenizer),
            lambda segments: probe_isolation(capture, segments),
        )

    def open(self, folder: Path) -> Prepared:
        """Open the packed tokens."""
        prepared = open_prepared(folder)
        assert prepared is not None, "the plan is recorded after the tokens"
        return prepared

    def origin(self, prepared: Prepared) -> dict[str, Any]:
        """Return the text and how much of it was asked for."""
        config = self.config
        return {"source": config.text, "n_tokens": config.n_tokens, "document_tokens": config.document_tokens}

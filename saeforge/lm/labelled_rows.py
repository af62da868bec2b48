"""The activations of labelled documents, from the model that an SAE belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from saeforge.errors import ConfigError
from saeforge.lm.capture import Capture
from saeforge.lm.labelled import LabelledTexts
from saeforge.lm.origin import origin_of
from saeforge.lm.read import cut_documents, read_activations
from saeforge.lm.tokens import choose_context_length, find_specials
from saeforge.sae import SAE

KEPT_BYTES = 1 << 29  # more activations than that are computed anew for a second pass

Progress = Callable[[str, int, int], None]


class Reader:
    """The activations of labelled documents at an SAE's site, as often as they are asked for, always in one order.

    Attributes:
        document: int32 (tokens,), the document of each row, known after the first pass.
        n_train: rows of train documents.
    """

    def __init__(
        self,
        sae: SAE,
        texts: LabelledTexts,
        *,
        model: str | None = None,
        trust_remote_code: bool = False,
        device: str = "cpu",
        context_length: int | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        """Load the model and cut the texts.

        Args:
            sae: says model and site.
            texts: documents.
            model: where the model is now, if it moved.
            trust_remote_code: run Python code that comes with the model.
            device: torch device.
            context_length: longest context; None: as in a harvest, what the model allows, at most 512.
            batch_tokens: most tokens of a forward pass.

        Raises:
            ConfigError: the SAE does not say its model, the model is another now, or a document holds no token.
        """
        origin = origin_of(sae, model=model, trust_remote_code=trust_remote_code)
        self.loaded = origin.load_base(device=device)
        self.origin, self.device, self.batch_tokens = origin, device, batch_tokens
        tokenizer = origin.load_tokenizer()
        specials = find_specials(tokenizer)
        self.context_length = choose_context_length(context_length, self.loaded.context_limit, tokenizer)
        self.segments = cut_documents(texts.texts, tokenizer, specials, self.context_length)
        self.pad = specials.pad
        kept = np.zeros(len(texts.texts), np.int64)
        for segment in self.segments:
            kept[segment.document] += segment.kept
        if not kept.all():
            raise ConfigError(f"text {texts.names[int(kept.argmin())]!r} holds no token of its own; remove it")
        self.tokens = kept
        self.document = np.zeros(0, np.int32)
        self.n_train = int(kept[texts.train].sum())
        self._kept: list[tuple[torch.Tensor, np.ndarray]] = []
        self._keep = int(kept.sum()) * sae.d_in * 4 <= KEPT_BYTES

    def batches(self, what: str, on_progress: Progress | None = None) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yield activations float32 (rows, d_in) on the device, and the document of each row."""
        if self._kept:
            yield from self._kept
            return
        documents, kept = [], []

        def progress(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(what, done, total)

        with Capture(self.loaded.model, self.loaded.sites) as capture:
            for batch in read_activations(
                capture, self.segments, pad=self.pad, batch_tokens=self.batch_tokens, on_progress=progress
            ):
                document = batch.rows[:, 0].astype(np.int32)
                documents.append(document)
                x = batch.x.float()
                if self._keep:
                    kept.append((x, document))
                yield x, document
        self.document, self._kept = np.concatenate(documents), kept

"""What ships with the package so that a first run needs no download: a small language model, labelled passages.

The passages were written for this project: one JSON-lines file per label (a language, a kind of code, or an
English theme), half of each for training and half held out. See `passages_path`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path", "passages_path"]

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """The folder of the demo language model, in HuggingFace format: weights, configuration and tokenizer."""
    return _HERE / "model"


def passages_path() -> Path:
    """The folder of labelled passages, `<label>.jsonl`.

    Each line is an object with `label` (the file's stem), `split` ("train" or "test") and `text` (40 to 100
    whitespace-separated words). Passages with split "test" are for judging only: no harvest may read them.

    Returns:
        The folder inside the installed package.
    """
    return _HERE / "passages"

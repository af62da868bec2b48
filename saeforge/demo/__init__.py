"""What ships with the package so that a first run needs no download: a small language model, and labelled text.

The passages were written for this project: one JSON-lines file per label (a language, a kind of code, or an
English theme), half of each for training and half held out. More text, for harvests, was written by the model itself.
See `passages_path` and `text_path`; LICENSE-demo tells what the model was trained on and its licence.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path", "passages_path", "text_path"]

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


def text_path() -> Path:
    """The gzipped JSON lines (fields `name`, `label`, `text`) that `scripts/sample_demo_text.py` drew from the model.

    `text.json` beside it tells from which model, how, and how much of each label. The text "demo" of a harvest holds
    these documents, the train passages, and pieces of Python's standard library.
    """
    return _HERE / "text.jsonl.gz"

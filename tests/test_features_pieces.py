"""The text of each token: together they are the text, and no character is torn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast as FastTokenizer

from saeforge.features.pieces import Pieces
from saeforge.lm.load import load_tokenizer
from tests.tiny_models import make_documents, save_model

TEXT = "the cat “sät” on 日本語, 🦜🏳️‍🌈\n\tà 7 hills"


def bytes_only() -> Any:
    """A byte-level tokenizer that learned no merges: one token a byte."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [""],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False),
    )
    return FastTokenizer(tokenizer_object=tokenizer, bos_token="<s>")


def byte_fallback() -> Any:
    """A tokenizer as Llama 2 has: ▁ for spaces, <0xNN> for what is not in the vocabulary."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in ("▁", "▁the", "▁cat", "t", "h", "e", "s"):
        words[word] = len(words)
    tokenizer: Any = Tokenizer(models.BPE(words, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return FastTokenizer(tokenizer_object=tokenizer)


def test_bytes_of_one_character_stand_at_the_token_that_completes_it() -> None:
    tokenizer = bytes_only()
    pieces = Pieces(tokenizer)(tokenizer("é日a")["input_ids"])
    assert pieces == ["", "é", "", "", "日", "a"]


@pytest.mark.parametrize("make", [bytes_only, byte_fallback])
def test_pieces_together_are_the_text(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer)(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).removeprefix(" ") == TEXT  # Metaspace puts a space first
    assert "�" not in "".join(pieces)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_real_tokenizers_of_all_kinds(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_model(kind, tmp_path)))
    text = make_documents(3)[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer)(ids)
    assert "".join(pieces).strip() == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    assert all(pieces)


def test_special_and_unknown_ids_are_shown_by_name() -> None:
    tokenizer = bytes_only()
    assert Pieces(tokenizer)([tokenizer.bos_token_id, 9999]) == ["<s>", "<9999>"]


def test_a_torn_character_is_replaced_and_does_not_eat_the_next() -> None:
    tokenizer = bytes_only()
    torn = tokenizer("é")["input_ids"][:1]
    assert Pieces(tokenizer)([*torn, *tokenizer("ab")["input_ids"]]) == ["", "�a", "b"]

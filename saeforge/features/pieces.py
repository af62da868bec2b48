"""From token ids to the text that each stands for, with characters that several tokens share kept whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, cast

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """Splits decoded text by token.

    Every token is first turned into its bytes, once. Then text is decoded byte by byte, and a character belongs to the
    token that completes it: the tokens before it that hold only a part of it have an empty piece.

    Args:
        tokenizer: a HuggingFace tokenizer, byte-level or not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._text: dict[int, str | None] = {}  # None where a token holds parts of characters
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        self._alphabet = _byte_level_alphabet() if _is_byte_level(decoder) else None
        self._added = {str(token) for token in tokenizer.get_added_vocab()}
        # A first token may lose its space or gain one: what a token adds is seen behind another one.
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor = ids[0] if ids else None

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token of a sequence."""
        for token in set(ids).difference(self._text):
            self._learn(token)
        texts = [self._text[token] for token in ids]
        if None not in texts:
            return cast(list[str], texts)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(self._bytes[token]) for token in ids]

    def _learn(self, token: int) -> None:
        content = self._bytes[token] = self._bytes_of(token)
        try:
            self._text[token] = content.decode()
        except UnicodeDecodeError:
            self._text[token] = None

    def _bytes_of(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the model's vocabulary is larger than the tokenizer's
            return f"<{token}>".encode()
        if name in self._added:
            return str(name).encode()
        if self._alphabet is not None:
            return bytes(byte for char in name for byte in self._alphabet.get(char) or char.encode())
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte:
            return bytes([int(byte[1], 16)])
        if self._anchor is None:
            return self._decode([token]).encode()
        before, both = self._decode([self._anchor]), self._decode([self._anchor, token])
        return (both.removeprefix(before) if both.startswith(before) else self._decode([token])).encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether a tokenizer's decoder maps characters to bytes as GPT-2's does, alone or as one step of several."""
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", [])))


def _byte_level_alphabet() -> dict[str, bytes]:
    """Return GPT-2's printable character for each byte, reversed."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    characters = [*map(chr, plain), *(chr(256 + number) for number in range(len(others)))]
    return {char: bytes([byte]) for char, byte in zip(characters, [*plain, *others], strict=True)}

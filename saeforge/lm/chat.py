"""Conversations to tokens through a tokenizer's chat template, and which of them the model would write itself.

The model's own tokens are those of the content of the assistant's messages and what ends its turn. Where the template
marks them ({% generation %}) its marks count. Elsewhere they are found by rendering: what the whole conversation has
beyond the prompt for a message (the messages before it, with the generation prompt) and up to the end of the message
(the messages up to it). Both must be prefixes of the whole conversation, or the template is told to be unfit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from saeforge.errors import ConfigError
from saeforge.lm.load import first_line
from saeforge.lm.tokens import Specials

ChatKeep = Literal["all", "assistant"]
Messages = Sequence[Mapping[str, Any]]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ELSE = "use chat_keep: all, or a tokenizer whose chat template marks the assistant's tokens with {% generation %}"


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation.

    Attributes:
        ids: token ids, the template's special tokens among them.
        keep: bool, the tokens that were asked for, special tokens not yet taken out.
        begins_with_prefix: whether the template writes the special tokens itself that the tokenizer puts before a text;
            they are not among `ids`.
    """

    ids: list[int]
    keep: np.ndarray
    begins_with_prefix: bool


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer.

    Args:
        tokenizer: of the model.
        specials: of the tokenizer.
        keep: all tokens, or those that the model would write.

    Attributes:
        record: what a dataset says of its conversations: keep, how the mask was made, sha256 of the template.

    Raises:
        ConfigError: the tokenizer has no chat template, or cannot tell which characters a token stands for.
    """

    def __init__(self, tokenizer: Any, specials: Specials, keep: ChatKeep) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the text holds conversations (messages), and this model's tokenizer has no chat template; use the "
                "chat model's tokenizer, or give the lines as text"
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(f"the tokenizer has several chat templates and none is the default: {error}") from error
        if keep == "assistant" and not tokenizer.is_fast:
            raise ConfigError(
                "chat_keep: assistant needs a fast tokenizer, this model has none; use chat_keep: all instead"
            )
        self.tokenizer = tokenizer
        self.keep = keep
        self.marked = bool(_MARKED.search(template))
        self.prefix = list(specials.prefix)
        self.special_ids = specials.dropped
        mask = {"all": "none", "assistant": "generation marks" if self.marked else "prefix rendering"}[keep]
        self.record = {"keep": keep, "mask": mask, "template_sha256": hashlib.sha256(template.encode()).hexdigest()}

    def __call__(self, messages: Messages, name: str) -> Conversation:
        """Render one conversation.

        Args:
            messages: with `role` and `content`.
            name: of the document, for messages.

        Raises:
            ConfigError: the template refuses the conversation, or the assistant's tokens cannot be told apart.
        """
        if self.keep == "all":
            ids = self._tokenize(self._render(messages, name))["input_ids"]
            keep = np.ones(len(ids), dtype=bool)
        elif self.marked:
            ids, keep = self._by_marks(messages, name)
        else:
            ids, keep = self._by_prefixes(messages, name)
        begins = bool(self.prefix) and ids[: len(self.prefix)] == self.prefix
        skip = len(self.prefix) if begins else 0
        return Conversation(list(ids[skip:]), keep[skip:], begins)

    def _render(self, messages: Messages, name: str, *, prompt: bool = False) -> str:
        """Return the text of messages, if wanted with what asks the model for the next one."""
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise ConfigError(
                f"conversation {name}: the chat template refuses this conversation: {first_line(error)}"
            ) from error
        return str(text)

    def _tokenize(self, text: str, **options: Any) -> Any:
        # The template writes all special tokens itself.
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)

    def _by_marks(self, messages: Messages, name: str) -> tuple[list[int], np.ndarray]:
        """Return ids and mask by the template's own marks."""
        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # as above
            raise ConfigError(
                f"conversation {name}: the chat template refuses this conversation: {first_line(error)}"
            ) from error
        keep = np.array(rendered["assistant_masks"], dtype=bool)
        if not keep.any() and any(message["role"] == "assistant" and message["content"] for message in messages):
            raise ConfigError(
                f"conversation {name}: the chat template's {{% generation %}} marks nothing that the assistant says"
            )
        return list(rendered["input_ids"]), keep

    def _by_prefixes(self, messages: Messages, name: str) -> tuple[list[int], np.ndarray]:
        """Return ids and mask by rendering the conversation up to each message of the assistant."""
        whole = self._render(messages, name)
        tokens = self._tokenize(whole, return_offsets_mapping=True)
        ids = list(tokens["input_ids"])
        starts = np.array([start for start, _ in tokens["offset_mapping"]], dtype=np.int64)
        keep = np.zeros(len(ids), dtype=bool)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise ConfigError(f"conversation {name}: the conversation begins with the assistant; {_ELSE}")
            before = self._render(messages[:number], name, prompt=True)
            after = self._render(messages[: number + 1], name)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ConfigError(
                    f"conversation {name}: the chat template writes message {number + 1} in another way when more "
                    f"follows or before it is answered, so that the assistant's tokens cannot be told apart; {_ELSE}"
                )
            # A token that begins in the prompt and ends in the answer is none that the model would write.
            mine = np.flatnonzero((starts >= len(before)) & (starts < len(after)))
            keep[self._without_separator(ids, mine)] = True
        return ids, keep

    def _without_separator(self, ids: Sequence[int], mine: np.ndarray) -> np.ndarray:
        """Leave out white space after the last special token: it parts messages, the model stops before it."""
        special = [place for place, at in enumerate(mine) if ids[at] in self.special_ids]
        if not special:
            return mine
        rest = [ids[at] for at in mine[special[-1] + 1 :]]
        return mine if rest and self.tokenizer.decode(rest).strip() else mine[: special[-1] + 1]

"""Conversations: what is kept, counted by hand, for templates like ChatML, Llama 3 and Gemma, marked or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast as FastTokenizer

from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError
from saeforge.harvest import harvest
from saeforge.lm.chat import ChatRenderer
from saeforge.lm.text import open_text
from saeforge.lm.tokens import find_specials
from tests.tiny_models import WORDS, save_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{GEN}{{ m.content }}<|im_end|>{END}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{GEN}{{ m.content | trim }}<|eot_id|>{END}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Gemma knows no system message, and calls the assistant model.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'assistant' %}{GEN}{{ m.content | trim }}<end_of_turn>{END}"
    "{% else %}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA}
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on mat"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "rain"},
]


def mark(template: str, marked: bool) -> str:
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return template.replace("{GEN}", begin).replace("{END}", end)


def words_tokenizer(kind: str, *, marked: bool = False, template: str | None = None) -> Any:
    """One token a word, a line break, a special token: masks can be counted on the fingers."""
    special = ["<bos>", "<unk>", *SPECIAL[kind]]
    plain = ["\n", "\n\n", "user", "assistant", "model", "system", *dict.fromkeys(WORDS)]
    tokenizer: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *plain])}, unk_token="<unk>"))
    from tokenizers import Regex

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    if kind == "llama":  # Llama 3's own: marked as special, but in no list of special tokens
        tokenizer.add_special_tokens(SPECIAL[kind])
    fast = FastTokenizer(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>", model_max_length=128)
    if kind != "llama":
        fast.add_special_tokens({"additional_special_tokens": SPECIAL[kind]})
    fast.chat_template = mark(TEMPLATES[kind], marked) if template is None else template
    return fast


def kept_words(tokenizer: Any, keep: str, talk: Any = TALK) -> list[str]:
    specials = find_specials(tokenizer)
    found = ChatRenderer(tokenizer, specials, keep)(talk, "talk")  # type: ignore[arg-type]
    assert found.keep.shape == (len(found.ids),)
    return [
        tokenizer.convert_ids_to_tokens([i])[0]
        for i, kept in zip(found.ids, found.keep.tolist(), strict=True)
        if kept and i not in specials.dropped
    ]


def test_special_tokens_of_a_template_are_never_kept() -> None:
    tokenizer = words_tokenizer("llama")
    ends = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert ends not in tokenizer.all_special_ids
    assert ends in find_specials(tokenizer).dropped


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_the_assistants_words_are_kept_and_nothing_else(kind: str, marked: bool) -> None:
    tokenizer = words_tokenizer(kind, marked=marked)
    assert kept_words(tokenizer, "assistant") == ["sat", "on", "mat", "rain"]
    renderer = ChatRenderer(tokenizer, find_specials(tokenizer), "assistant")
    assert renderer.record["mask"] == ("generation marks" if marked else "prefix rendering")
    # With its special tokens the mask ends at the end of the turn, which the model writes too; not at the break after.
    found = renderer(TALK, "talk")
    ends = {"chatml": "<|im_end|>", "llama": "<|eot_id|>", "gemma": "<end_of_turn>"}
    masked = [tokenizer.convert_ids_to_tokens([i])[0] for i, k in zip(found.ids, found.keep, strict=True) if k]
    assert masked == ["sat", "on", "mat", ends[kind], "rain", ends[kind]]
    assert found.begins_with_prefix == (kind != "chatml")
    assert found.ids[0] != tokenizer.bos_token_id


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_all_keeps_every_word_roles_and_breaks_included(kind: str) -> None:
    me = "model" if kind == "gemma" else "assistant"
    breaks = "\n\n" if kind == "llama" else "\n"
    turns = [
        ["user", breaks, "the", "cat"],
        [me, breaks, "sat", "on", "mat"],
        ["user", breaks, "why"],
        [me, breaks, "rain"],
    ]
    end = [] if kind == "llama" else ["\n"]
    assert kept_words(words_tokenizer(kind), "all") == [word for turn in turns for word in (*turn, *end)]


def test_a_template_without_special_tokens_keeps_what_the_assistant_says() -> None:
    plain = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer = words_tokenizer("chatml", template=plain)
    assert kept_words(tokenizer, "assistant") == ["sat", "on", "mat", "\n", "rain", "\n"]


def test_one_token_over_prompt_and_answer_is_none_of_the_models_own() -> None:
    """Llama's two line breaks and one of the content are a single token here, which the model would never write."""
    template = mark(LLAMA, False).replace(" | trim", "")
    talk = [TALK[0], {"role": "assistant", "content": "\nsat on"}]
    assert kept_words(words_tokenizer("llama", template=template), "assistant", talk) == ["sat", "on"]


def test_what_the_template_changes_later_is_refused() -> None:
    """Qwen 3 writes thoughts into the last answer only."""
    answer = "{{ m.content }}<|im_end|>{% else %}"
    thinks = mark(CHATML, False).replace(answer, "{% if loop.last %}why {% endif %}" + answer)
    with pytest.raises(ConfigError, match=r"talk: the chat template writes message 2 in another way .* chat_keep: all"):
        kept_words(words_tokenizer("chatml", template=thinks), "assistant")
    assert kept_words(words_tokenizer("chatml", template=thinks), "assistant", TALK[:2]) == ["why", "sat", "on", "mat"]


@pytest.mark.parametrize(
    ("kind", "talk", "message"),
    [
        ("gemma", [{"role": "system", "content": "red"}, *TALK], "refuses this conversation: no system role"),
        ("chatml", TALK[1:], "begins with the assistant"),
    ],
)
def test_conversations_that_cannot_be_rendered_are_told(kind: str, talk: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        kept_words(words_tokenizer(kind), "assistant", talk)
    assert "\n" not in str(caught.value)


def test_marks_that_mark_nothing_and_a_missing_template_are_told() -> None:
    nothing = mark(CHATML, False) + "{% generation %}{% endgeneration %}"
    with pytest.raises(ConfigError, match="marks nothing that the assistant says"):
        kept_words(words_tokenizer("chatml", template=nothing), "assistant")
    with pytest.raises(ConfigError, match="has no chat template"):
        kept_words(words_tokenizer("chatml", template=""), "all")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "line 2: expected `messages` to be a list of at least one"),
        ({"messages": [{"role": "user"}]}, "line 2: expected each message to be an object with strings"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "strings `role` and `content`"),
        ({"messages": TALK, "text": "a"}, "line 2: both `text` and `messages`"),
    ],
)
def test_wrong_lines_are_told(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps({'text': 'good'})}\n{json.dumps(line)}\n")
    source = open_text(str(path), conversations=True)
    assert source[0].text == "good"
    with pytest.raises(ConfigError, match=message):
        source[1]
    with pytest.raises(ConfigError, match=r"a conversation .* only a harvest reads them"):
        open_text(str(path))[1]


@pytest.fixture(scope="module")
def chat_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose tokenizer has a Llama 3 template, and a file of texts and conversations, some longer than 64."""
    home = tmp_path_factory.mktemp("chats")
    save_model("llama", home / "llama")
    tokenizer = FastTokenizer.from_pretrained(home / "llama")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL["llama"]})
    tokenizer.chat_template = mark(LLAMA, False)
    tokenizer.save_pretrained(home / "llama")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(200):
        says = [" ".join(rng.choice(WORDS, size=12 + 20 * (i % 2))) for i in range(4)]
        talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(says)]
        lines.append({"text": " ".join(says)} if number % 4 == 0 else {"messages": talk, "label": "chat"})
    (home / "mixed.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[1]])) + "\n")
    return home


@pytest.mark.parametrize("keep", ["all", "assistant"])
def test_a_harvest_of_conversations_keeps_the_right_tokens(chat_home: Path, tmp_path: Path, keep: str) -> None:
    manifest = harvest(
        model=str(chat_home / "llama"),
        sites=["resid_post.0"],
        out=str(tmp_path / "o"),
        text=str(chat_home / "mixed.jsonl"),
        chat_keep=keep,
        n_tokens=10**6,
        context_length=64,
        validation_share=0.0,
        max_norm=None,
        device="cpu",
    )
    tokenizer = FastTokenizer.from_pretrained(chat_home / "llama")
    chat = manifest.packing["chat"]
    assert chat["keep"] == keep
    assert chat["mask"] == {"all": "none", "assistant": "prefix rendering"}[keep]
    assert manifest.packing["counts"]["duplicates"] == 1
    data = [json.loads(line) for line in (chat_home / "mixed.jsonl").read_text().splitlines()]
    wanted: dict[tuple[int, int], int] = {}
    documents = [json.loads(s) for s in (tmp_path / "o" / "tokens" / "documents.jsonl").read_text().splitlines()]
    for document in documents:
        line = data[int(document["name"].removeprefix("line ")) - 1]
        if "text" in line:
            ids = tokenizer(line["text"], add_special_tokens=False)["input_ids"]
            wanted |= {(document["id"], i): token for i, token in enumerate(ids)}
            continue
        at = 0
        for message in line["messages"]:  # by hand: header, role, header, break, content, end of turn
            parts = [
                "<|start_header_id|>",
                message["role"],
                "<|end_header_id|>",
                "\n\n",
                message["content"],
                "<|eot_id|>",
            ]
            for number, part in enumerate(parts):
                ids = tokenizer(part, add_special_tokens=False)["input_ids"]
                if number in (1, 3, 4) and (keep == "all" or (number == 4 and message["role"] == "assistant")):
                    wanted |= {(document["id"], at + i): token for i, token in enumerate(ids)}
                at += len(ids)
        assert document["tokens"] == at
    dataset = ActivationDataset.open(tmp_path / "o")
    rows = np.concatenate([dataset.read_rows("train", i) for i in range(dataset.n_blocks("train"))]).tolist()
    found = {(document, position): token for document, position, token, _ in rows}
    assert len(found) == len(rows) == len(wanted) - sum(split.dropped_rows for split in manifest.splits.values())
    assert found.items() <= wanted.items()
    # Every piece begins with one BOS, also the later ones of a long conversation.
    tokens, offsets = (np.load(tmp_path / "o" / "tokens" / f"train.{name}.npy") for name in ("tokens", "offsets"))
    within = np.load(tmp_path / "o" / "tokens" / "train.within.npy")
    assert set(tokens[offsets[:-1]].tolist()) == {tokenizer.bos_token_id}
    assert set(tokens[within == 0].tolist()) == {tokenizer.bos_token_id}
    assert (tokens == tokenizer.bos_token_id).sum() == (within == 0).sum()

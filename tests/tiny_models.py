"""Tiny random language models with tokenizers, saved to folders, for tests without a network."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from saeforge.lm.load import quiet

WORDS = "the cat sat on a red mat and then it ran over seven green hills to see why rain fell in spain".split()
D = 32
N_LAYERS = 4


def make_documents(n: int, *, words: int = 60, seed: int = 0) -> list[str]:
    """Return `n` different texts of about `words` words; every third one is short."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words // 6 if i % 3 == 0 else words)) + f" {i}." for i in range(n)]


def write_text_folder(folder: Path, documents: list[str]) -> Path:
    """Write one file per document, half of them in each of two subfolders."""
    for number, text in enumerate(documents):
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """Write one JSON object per document."""
    lines = [json.dumps({"text": text, "label": f"l{i % 2}"}) for i, text in enumerate(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _tokenizer(kind: str) -> Any:
    """Train a tokenizer on the vocabulary: gpt2 adds nothing, llama a BOS, bert CLS and SEP."""
    tokenizer: Any
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer.train_from_iterator(
            make_documents(50), trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>"] if kind == "gpt2" else ["<unk>", "<s>", "</s>"]
        tokenizer.train_from_iterator(
            make_documents(50), trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
        )
        if kind == "gpt2":
            names = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
        else:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return FastTokenizer(tokenizer_object=tokenizer, model_max_length=128, **names)


def save_model(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model (4 layers, width 32, 128 positions) with its tokenizer; kind: gpt2, llama or bert."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(kind)
    vocabulary = max(len(tokenizer), 160)
    model: Any
    # Weights ten times the usual, so that attention matters and a leak between documents cannot hide.
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=128,
                n_embd=D,
                n_layer=N_LAYERS,
                n_head=4,
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=D,
                intermediate_size=48,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.2,
            )
        )
    else:
        model = BertModel(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=D,
                intermediate_size=48,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=4,
                max_position_embeddings=128,
                initializer_range=0.2,
            )
        )
    with quiet():  # transformers draws a bar
        model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def own_modules(folder: Path) -> Iterator[None]:
    """Has transformers keep the code that comes with models in a folder, and forget it at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", [*sys.path])  # transformers appends the folder
        forget_code()
        yield
        forget_code()


def forget_code() -> None:
    """Lets transformers run a model's code again when it is loaded again."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]

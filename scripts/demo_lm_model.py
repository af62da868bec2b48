"""The demo language model's shape and recipe, its tokenizer, its files, and how well it predicts text.

The files are written by hand rather than by `save_pretrained`, so that they are the same whichever version of
transformers trained them, and read the same in 4.57 and 5.x.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_lm_text import Document, labels
from safetensors.torch import save as weights_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from saeforge.errors import ConfigError

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]


@dataclass(frozen=True)
class Shape:
    """The network; the defaults make 6.8 million parameters."""

    vocab_size: int = 8192
    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 4
    intermediate: int = 688
    context: int = 256

    def config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "head_dim": self.d_model // self.n_heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.02,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            # Versions 4 and 5 of transformers look for these two in different places.
            "rope_theta": 10000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            # The file's 16 bits are for size. Version 5 would compute in them by default, version 4 in 32.
            "torch_dtype": "float32",
            "dtype": "float32",
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }

    def build(self, attention: str = "sdpa") -> LlamaForCausalLM:
        """A network with fresh weights, from torch's global generator."""
        return LlamaForCausalLM(LlamaConfig.from_dict(self.config(), attn_implementation=attention))


@dataclass(frozen=True)
class Recipe:
    """What decides the result, apart from text and length; a checkpoint goes on only with the recipe it began with."""

    shape: Shape = field(default_factory=Shape)
    batch_tokens: int = 8192
    lr: float = 4e-3
    warmup: int = 100  # steps
    temperature: float = 0.5
    dropout: float = 0.1
    held_out: float = 0.05
    seed: int = 0


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the training documents; every label counts the same, up to a factor of three.

    Raises:
        ConfigError: If the text does not give that many tokens.
    """
    texts: dict[str, list[str]] = {}
    for document in documents:
        if not document.held_out:
            texts.setdefault(document.label, []).append(document.text)
    least = min(sum(map(len, parts)) for parts in texts.values())
    chosen: list[str] = []
    for parts in texts.values():
        stride = max(1.0, sum(map(len, parts)) / (3 * least))  # evenly over the label's text
        chosen += [parts[int(i * stride)] for i in range(int(len(parts) / stride))]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(chosen, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, expected {vocab_size}: add text or lower --vocab-size"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without BOS and EOS."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def save_model(
    folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, shape: Shape, facts: dict[str, Any]
) -> None:
    """Writes a model folder for AutoModelForCausalLM and AutoTokenizer, in place of the one before.

    Args:
        folder: Target; one that exists must have been written here (it holds training.json).
        model: The network, on any device; its weights are stored in float16.
        tokenizer: From `train_tokenizer`.
        shape: What `model` was built from.
        facts: JSON for training.json.

    Raises:
        ConfigError: If `folder` holds something else.
    """
    check_target(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    weights = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    (new / "model.safetensors").write_bytes(weights_file(weights, metadata={"format": "pt"}))
    tokenizer.save(str(new / "tokenizer.json"))
    special = {"pad_token": SPECIAL[PAD], "bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that both version 4 and 5 know
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": True}
    for name, content in (
        ("config", shape.config()),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer_config),
        ("special_tokens_map", special),
        ("training", facts),
    ):
        (new / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Raises ConfigError if `folder` holds anything but a model written by `save_model`."""
    if folder.exists() and not (folder / "training.json").is_file() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds no model of this script: give an empty or a new folder for the model")


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """torch.save that leaves either the old file or the whole new one."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


@torch.no_grad()
def document_bits(
    model: LlamaForCausalLM, ids: Sequence[Sequence[int]], context: int, *, batch: int = 32, autocast: bool = False
) -> list[float]:
    """Bits that the model needs for each document's tokens, the first one after BOS; EOS is not scored.

    Longer documents are read in windows that overlap by half, so that a token has at least half a context before it.

    Args:
        model: In any mode; it is left as it was.
        ids: Token ids of each document, without BOS and EOS.
        context: Tokens that the model reads at once.
        batch: Windows per forward pass.
        autocast: Whether to compute in bfloat16.
    """
    windows: list[tuple[int, list[int], int]] = []  # (document, inputs and last target, first scored target)
    for number, document in enumerate(ids):
        tokens, start, scored = [BOS, *document], 0, 1
        while scored < len(tokens):
            end = min(start + context + 1, len(tokens))
            windows.append((number, tokens[start:end], scored - start))
            start, scored = start + context // 2, end
    windows.sort(key=lambda window: len(window[1]))  # little padding

    training, device = model.training, model.device
    model.eval()
    bits = np.zeros(len(ids))
    for first in range(0, len(windows), batch):
        part = windows[first : first + batch]
        padded = torch.full((len(part), max(len(tokens) for _, tokens, _ in part)), PAD)
        scored_at = torch.zeros(padded.shape, dtype=torch.bool)
        for row, (_, tokens, begin) in enumerate(part):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            scored_at[row, begin : len(tokens)] = True
        nats = token_losses(model, padded.to(device), autocast=autocast).cpu().double() * scored_at[:, 1:]
        np.add.at(bits, [number for number, _, _ in part], nats.sum(1).numpy() / math.log(2))
    model.train(training)
    return bits.tolist()


def token_losses(model: LlamaForCausalLM, tokens: Tensor, *, autocast: bool) -> Tensor:
    """-ln p of each next token: `tokens` is (batch, n + 1), the result (batch, n), float32."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        tokens.shape[0], -1
    )


def bits_per_byte(documents: Sequence[Document], bits: Sequence[float]) -> dict[str, float]:
    """Label: bits over UTF-8 bytes of its documents."""
    totals = {label: [0.0, 0] for label in labels(documents)}
    for document, cost in zip(documents, bits, strict=True):
        totals[document.label][0] += cost
        totals[document.label][1] += len(document.text.encode())
    return {label: cost / size for label, (cost, size) in totals.items()}

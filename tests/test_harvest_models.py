"""Harvested rows equal those of an independent hook, one document at a time, for nine architectures.

The rule: models run in float32 and rows are stored as bfloat16. A stored value may differ from the hook's by one unit
in the last place of bfloat16 at the hook's value (2**-7 of its power of two), or, where it is near zero, by 2**-18 of
the largest value of its row: float32 sums come in another order, as the harvest pads, packs and batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    ViTConfig,
)

from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.harvest import harvest, harvest_inputs
from saeforge.lm.load import quiet
from tests.tiny_models import _tokenizer, make_documents, write_jsonl

CONTEXT = 48
WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE |= {"initializer_range": 0.2}  # ten times the usual: attention matters, and a leak cannot hide
TEXT: dict[str, Any] = WIDE | {"vocab_size": 160, "max_position_embeddings": 128}
GROUPED: dict[str, Any] = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
NEAR: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=160,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt_neox": GPTNeoXConfig(**TEXT, **ENDS),
    "llama": LlamaConfig(**TEXT, num_key_value_heads=2),
    "gemma2": Gemma2Config(**GROUPED, **NEAR),
    "gemma3_text": Gemma3TextConfig(**GROUPED, **NEAR),
    "qwen3": Qwen3Config(**GROUPED, **ENDS),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, **MOE, **ENDS),
    "bert": BertConfig(**TEXT),
}
# What a stranger would hook: the list of layers, and in a layer what is added to the residual stream.
PLACES = {
    "gpt2": ("h", "attn", "mlp"),
    "gpt_neox": ("layers", "attention", "mlp"),
    "llama": ("layers", "self_attn", "mlp"),
    "gemma2": ("layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "qwen3": ("layers", "self_attn", "mlp"),
    "qwen3_moe": ("layers", "self_attn", "mlp"),
    "bert": ("encoder.layer", "attention.output.dense", "output.dense"),
    "vit": ("layers", "attention", "mlp"),
    "vit in transformers 4": ("encoder.layer", "attention.output.dense", "output.dense"),
}
TOKENIZERS = {
    "gpt2": "gpt2",
    "gpt_neox": "gpt2",
    "qwen3": "gpt2",
    "qwen3_moe": "gpt2",
    "bert": "bert",
}  # others: llama's
SITES = ["resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1", "resid_post.2"]  # the last one before a final norm


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hooked(model: nn.Module, kind: str, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ten lines: one item, one pass, (tokens, d) at each site."""
    layers, attention, mlp = PLACES[kind]
    caught: dict[str, torch.Tensor] = {}
    at = {"attn_out.1": f"1.{attention}", "mlp_out.1": f"1.{mlp}", "resid_post.1": "1", "resid_post.2": "2"}

    def keep(name: str, x: Any) -> None:
        caught[name] = (x if isinstance(x, torch.Tensor) else x[0])[0].clone()

    modules = {name: model.get_submodule(f"{layers}.{path}") for name, path in at.items()}
    handles = [m.register_forward_hook(lambda _, a, o, name=name: keep(name, o)) for name, m in modules.items()]
    handles.append(modules["resid_post.1"].register_forward_pre_hook(lambda _, a: keep("resid_pre.1", a[0])))
    with torch.no_grad():
        model(**arguments)
    for handle in handles:
        handle.remove()
    return caught


def worst(stored: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of what the rule allows."""
    ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp_min(1e-30))) - 7)
    allowed = torch.maximum(ulp, expected.abs().amax(dim=1, keepdim=True) * 2**-18)
    return float(((stored.float() - expected).abs() / allowed).max())


def check(root: Path, expected: dict[tuple[int, int], dict[str, torch.Tensor]]) -> np.ndarray:
    """Compare every stored row of every site; return the provenance."""
    rows = np.empty((0, 4), dtype=np.int64)
    for site in SITES:
        dataset = ActivationDataset.open(root, site=site)
        assert dataset.dtype == torch.bfloat16
        x = torch.cat([dataset.read_block("train", i).clone() for i in range(dataset.n_blocks("train"))])
        rows = np.concatenate([dataset.read_rows("train", i) for i in range(dataset.n_blocks("train"))]).astype(
            np.int64
        )
        wanted = torch.stack([expected[document, position][site] for document, position, *_ in rows.tolist()])
        assert worst(x, wanted) <= 1, site
        # And not by chance: other rows are far away.
        assert worst(x, wanted.roll(1, dims=0)) > 100
        assert len({(document, position) for document, position, *_ in rows.tolist()}) == len(rows) >= 2048
    return rows


def add_up(kind: str, at: dict[str, torch.Tensor]) -> None:
    """What attention and MLP add is what the residual stream gains; BERT has norms in between."""
    if kind != "bert":
        total = at["resid_pre.1"] + at["attn_out.1"] + at["mlp_out.1"]
        torch.testing.assert_close(total, at["resid_post.1"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_rows_of_language_models(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    tokenizer = _tokenizer(TOKENIZERS.get(kind, "llama"))
    with quiet():
        AutoModel.from_config(CONFIGS[kind]).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    texts = make_documents(90)
    manifest = harvest(
        model=str(tmp_path / "m"),
        sites=SITES,
        out=str(tmp_path / "o"),
        text=str(write_jsonl(tmp_path / "t.jsonl", texts)),
        n_tokens=2500,
        context_length=CONTEXT,
        batch_contexts=8,
        validation_share=0.0,
        bucket_rows=1024,
        max_norm=None,
        device="cpu",
    )
    assert manifest.packing["packed"] == (kind != "bert")
    model = AutoModel.from_pretrained(tmp_path / "m").eval()
    documents = [json.loads(line) for line in (tmp_path / "o" / "tokens" / "documents.jsonl").read_text().splitlines()]
    before = [
        i for i in (tokenizer.cls_token_id if kind == "bert" else tokenizer.bos_token_id,) if tokenizer("").input_ids
    ]
    after = [tokenizer.sep_token_id] if kind == "bert" else []
    room = CONTEXT - len(before) - len(after)
    expected: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    ids_of: dict[int, list[int]] = {}
    for document in documents:
        text = texts[int(document["name"].removeprefix("line ")) - 1]
        ids = ids_of[document["id"]] = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            found = hooked(model, kind, {"input_ids": torch.tensor([[*before, *piece, *after]])})
            add_up(kind, found)
            for i in range(len(piece)):
                expected[document["id"], start + i] = {site: x[len(before) + i] for site, x in found.items()}
    rows = check(tmp_path / "o", expected)
    assert all(ids_of[document][position] == token for document, position, token, _ in rows.tolist())
    assert Manifest.load(tmp_path / "o" / "manifest.json").model["dtype"] == "float32"


def test_rows_of_a_vision_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModel.from_config(ViTConfig(**WIDE, image_size=16, patch_size=4)).eval()
    images = torch.randn(140, 3, 16, 16)
    harvest_inputs(
        model,
        lambda numbers: {"pixel_values": images[numbers]},
        items=len(images),
        name="noise",
        sites=SITES,
        out=tmp_path / "o",
        validation_share=0.0,
        bucket_rows=1024,
        max_norm=None,
    )
    kind = "vit" if hasattr(model, "layers") else "vit in transformers 4"
    expected: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for item in range(len(images)):
        found = hooked(model, kind, {"pixel_values": images[item : item + 1]})
        add_up("vit", found)
        for position in range(17):
            expected[item, position] = {site: x[position] for site, x in found.items()}
    check(tmp_path / "o", expected)

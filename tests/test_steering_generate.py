"""Steering while text is generated: the same text with and without a cache, in a padded batch and alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from saeforge.demo import model_path
from saeforge.errors import ConfigError
from saeforge.sae import SAE
from saeforge.steering import Add, Clamp, Edit, Scale, steer
from tests.causal_models import KINDS, make_model, make_sae, some_ids, steered_by_hand

NEW = 64
EDITS: dict[int, Edit] = {3: Add(1.5), 20: Scale(-3), 41: Clamp(0)}
RULES: dict[int, Any] = {3: lambda f: f + 1.5, 20: lambda f: -3 * f, 41: torch.zeros_like}


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None, *, new: int = NEW, **options: Any) -> Tensor:
    """The new tokens, (batch, new)."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return out[:, ids.shape[1] :]


def left_padded(rows: Sequence[Tensor], pad: int = 7) -> tuple[Tensor, Tensor]:
    """One batch; the padding is an ordinary token, so that only the mask tells."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((longest - len(row),), pad), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return ids, mask


@pytest.mark.parametrize(
    ("rule", "where"), [("threshold", "all"), ("threshold", "generated"), ("topk", "all"), ("topk", "prompt")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_same_cached_uncached_and_padded(kind: str, rule: str, where: Any) -> None:
    model, sae = make_model(kind), make_sae(rule, kind)
    prompts = [some_ids(1, length, seed=length)[0] for length in (5, 11)]
    plain = greedy(model, *left_padded(prompts))
    with steer(model, sae, EDITS, where=where):
        cached = torch.cat([greedy(model, prompt[None]) for prompt in prompts])
        uncached = greedy(model, prompts[1][None], use_cache=False)
        padded = greedy(model, *left_padded(prompts))
        assert torch.equal(uncached, cached[1:2])
        assert torch.equal(padded, cached)
    assert cached.shape == (2, NEW)
    assert (cached != plain).any(1).all()  # every text is another one


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_a_loop_that_edits_by_position(kind: str, where: Any) -> None:
    model, sae, prompts = make_model(kind), make_sae("threshold", kind), some_ids(2, 9)
    prompts[0, 0] = 1  # BOS
    ids = prompts
    for _ in range(24):
        position = torch.arange(ids.shape[1]).expand_as(ids)
        mask = {"all": position >= 0, "prompt": position < 9, "generated": position >= 9}[where] & (ids > 2)
        with steered_by_hand(model, kind, sae, RULES, mask):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    with steer(model, sae, EDITS, where=where):
        assert torch.equal(greedy(model, prompts, new=24), ids[:, 9:])
        assert torch.equal(greedy(model, prompts, new=24, use_cache=False), ids[:, 9:])


def test_prompt_generated_and_all_are_different_texts() -> None:
    model, sae, ids = make_model("llama"), make_sae("topk"), some_ids(1, 9)
    texts = [greedy(model, ids, new=24)]
    for where in ("all", "prompt", "generated"):
        with steer(model, sae, EDITS, where=where):
            texts.append(greedy(model, ids, new=24))
    assert len({tuple(text[0].tolist()) for text in texts}) == 4


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama"])
def test_beams_score_what_the_same_steering_scores_in_one_pass(kind: str, where: Any) -> None:
    model, sae = make_model(kind), make_sae("topk", kind)
    ids, mask = left_padded([some_ids(1, length, seed=length)[0] for length in (6, 9)])
    options: dict[str, Any] = dict(
        num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, max_new_tokens=20
    )
    with steer(model, sae, EDITS, where=where) as steering:
        found = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)
    sequences = found.sequences
    assert sequences.shape == (4, 29)
    full = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 20, dtype=mask.dtype)], 1)
    position = torch.arange(29).expand(4, -1)
    editable = {"all": position >= 0, "prompt": position < 9, "generated": position >= 9}[where] & (full == 1)
    places = (full.cumsum(1) - 1).clamp_min(0)
    scores = {}
    for name, rules in (("steered", RULES), ("plain", {})):
        with steered_by_hand(model, kind, sae, rules, editable & (sequences > 2)):
            logits = model(input_ids=sequences, attention_mask=full, position_ids=places).logits
        chosen = logits[:, 8:-1].log_softmax(-1).gather(-1, sequences[:, 9:, None])
        scores[name] = chosen.sum((1, 2)) / 20
    torch.testing.assert_close(scores["steered"], found.sequences_scores, rtol=1e-4, atol=1e-4)
    assert (scores["plain"] - scores["steered"]).abs().max() > 0.1
    assert steering.audit().touched > 0


def test_each_generate_begins_with_its_own_prompt() -> None:
    model, sae = make_model("llama"), make_sae("threshold")
    first, second = some_ids(1, 5), some_ids(1, 6)
    expected = []
    for ids in (first, second):
        with steer(model, sae, EDITS, where="generated"):
            expected.append(greedy(model, ids, new=12))
    longer = torch.cat([first, expected[0][:, :1]], 1)  # looks like the next step of the first text
    with steer(model, sae, EDITS, where="generated"):
        longer_alone = greedy(model, longer, new=12)
    assert not torch.equal(longer_alone[:, :11], expected[0][:, 1:])
    for use_cache in (True, False):
        with steer(model, sae, EDITS, where="generated") as steering:
            assert torch.equal(greedy(model, first, new=12, use_cache=use_cache), expected[0])
            assert torch.equal(greedy(model, first, new=1, use_cache=use_cache), expected[0][:, :1])
            assert steering.audit().selected == (11 if use_cache else 66)
            assert torch.equal(greedy(model, longer, new=12, use_cache=use_cache), longer_alone)
            assert torch.equal(greedy(model, second, new=12, use_cache=use_cache), expected[1])


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_the_prompt_may_be_read_in_pieces_and_guessed_ahead(where: Any) -> None:
    model, sae, ids = make_model("llama"), make_sae("threshold"), some_ids(1, 13)
    ids[0, 6:9] = ids[0, 1:4]  # something to look up
    with steer(model, sae, EDITS, where=where):
        expected = greedy(model, ids, new=32)
        for option, size in (("prefill_chunk_size", 4), ("prefill_chunk_size", 6), ("prompt_lookup_num_tokens", 3)):
            assert torch.equal(greedy(model, ids, None, new=32, **{option: size}), expected)


def test_positions_in_passes_that_are_called_by_hand() -> None:
    model, sae, ids = make_model("qwen3"), make_sae("topk", "qwen3"), some_ids(2, 12)
    plain = model(input_ids=ids).logits
    with steer(model, sae, EDITS, where="all"):
        everywhere = model(input_ids=ids).logits
    with steer(model, sae, EDITS, where="prompt"):
        assert torch.equal(model(input_ids=ids).logits, everywhere)
    with steer(model, sae, EDITS, where="generated") as steering:
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert steering.audit().touched == 0
    for where in ("prompt", "generated"):
        position = torch.arange(12).expand(2, -1)
        with steered_by_hand(model, "qwen3", sae, RULES, position < 7 if where == "prompt" else position >= 7):
            expected = model(input_ids=ids).logits
        with steer(model, sae, EDITS, where=where) as steering:
            other = model(input_ids=ids[:, :3], use_cache=True)  # a second text, between the steps of the first
            out = model(input_ids=ids[:, :7], use_cache=True)
            parts = [out.logits]
            for step in range(7, 12):
                model(input_ids=ids[:, step : step + 1], past_key_values=other.past_key_values)
                out = model(input_ids=ids[:, step : step + 1], past_key_values=out.past_key_values, return_dict=True)
                parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with steer(model, sae, EDITS, where="generated"), pytest.raises(ConfigError, match="filled outside"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_a_cache_from_before_is_part_of_the_prompt_of_generate() -> None:
    model, sae, ids = make_model("gpt2"), make_sae("threshold", "gpt2"), some_ids(1, 12)
    with steer(model, sae, EDITS, where="generated"):
        expected = greedy(model, ids, new=16)
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        assert torch.equal(greedy(model, ids, new=16, past_key_values=cache), expected)


def test_a_prompt_of_embeddings() -> None:
    model, sae, ids = make_model("llama"), make_sae("threshold"), some_ids(1, 9)
    embeds = model.get_input_embeddings()(ids)
    for where in ("all", "prompt", "generated"):
        with steer(model, sae, EDITS, where=where, skip_special=False):
            expected = greedy(model, ids, new=16)
            given = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=0,
            )
            assert torch.equal(given, expected)


@pytest.mark.skipif(
    not (model_path() / "model.safetensors").is_file(), reason="the demo language model is not in this checkout"
)
@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_the_demo_model_writes_the_same_text_cached_uncached_and_padded(rule: str) -> None:
    from saeforge.lm.causal import load_causal_lm

    causal = load_causal_lm("demo", dtype="float32")
    model: Any = causal.model
    layer = make_sae(rule, d=model.config.hidden_size)
    sae = SAE(
        layer.W_enc, layer.b_enc, layer.W_dec / 4, layer.b_dec, rule=layer.rule, threshold=layer.threshold, k=layer.k
    )
    texts = ["The bridge over the bay", "def main(argv):", "Once upon a time there was a small"]
    prompts = [torch.tensor(causal.tokenizer(text)["input_ids"]) for text in texts]
    plain = greedy(model, *left_padded(prompts), eos_token_id=None)
    with steer(model, sae, EDITS, site="resid_post.3", tokenizer=causal.tokenizer) as steering:
        cached = torch.cat([greedy(model, prompt[None], eos_token_id=None) for prompt in prompts])
        assert torch.equal(greedy(model, prompts[0][None], eos_token_id=None, use_cache=False), cached[:1])
        assert torch.equal(greedy(model, *left_padded(prompts), eos_token_id=None), cached)
    assert (cached != plain).any()  # a random SAE need not change the greedy text of every prompt
    assert steering.audit().touched > 0
    nothing: dict[int, Edit] = {3: Scale(1), 5: Add(0)}
    with steer(model, sae, nothing, site="resid_post.3", tokenizer=causal.tokenizer):
        unchanged = model(input_ids=prompts[0][None]).logits
    assert torch.equal(unchanged, model(input_ids=prompts[0][None]).logits)

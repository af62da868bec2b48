"""Segments and contexts: what is cut, kept and packed; and whether a model keeps packed segments apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeforge.errors import ConfigError
from saeforge.lm.capture import Capture
from saeforge.lm.isolation import probe_isolation
from saeforge.lm.load import load_model, load_tokenizer
from saeforge.lm.pack import Contexts, pack_segments, write_contexts
from saeforge.lm.tokens import NO_POSITION, Cutter, Specials, choose_context_length, find_specials
from tests.tiny_models import make_documents, save_model

PLAIN = Specials(prefix=(), suffix=(), dropped=frozenset(), pad=0)
WRAPPED = Specials(prefix=(1,), suffix=(2, 3), dropped=frozenset({1, 2, 3}), pad=0)


@pytest.mark.parametrize(
    ("kind", "prefix", "suffix", "dropped"),
    [("gpt2", (), (), {0}), ("llama", (1,), (), {1, 2}), ("bert", (2,), (3,), {0, 2, 3, 4})],
)
def test_specials_are_found_and_unknown_tokens_stay(
    tmp_path: Path, kind: str, prefix: tuple[int, ...], suffix: tuple[int, ...], dropped: set[int]
) -> None:
    specials = find_specials(load_tokenizer(str(save_model(kind, tmp_path))))
    assert (specials.prefix, specials.suffix, set(specials.dropped)) == (prefix, suffix, dropped)


@given(
    st.lists(st.integers(0, 9), max_size=60),
    st.integers(5, 20),
    st.booleans(),
    st.sampled_from([PLAIN, WRAPPED]),
    st.one_of(st.none(), st.integers(1, 30)),
)
def test_segments_cover_a_document_and_keep_its_text_within_the_budget(
    ids: list[int], length: int, drop_first: bool, specials: Specials, budget: int | None
) -> None:
    cutter = Cutter(specials, length, drop_first=drop_first)
    segments = cutter.cut(7, ids, budget=budget)
    kept = []
    for segment in segments:
        assert segment.document == 7
        assert len(segment.tokens) <= length
        assert segment.kept > 0
        n = len(specials.prefix)
        inner = slice(n, len(segment.tokens) - len(specials.suffix))
        assert tuple(segment.tokens[:n]) == specials.prefix
        assert tuple(segment.tokens[inner.stop :]) == specials.suffix
        assert not segment.keep[:n].any()
        assert not segment.keep[inner.stop :].any()
        assert set(segment.positions[: inner.start]) <= {NO_POSITION}
        assert [ids[p] for p in segment.positions[inner]] == segment.tokens[inner].tolist()
        kept += segment.positions[segment.keep].tolist()
    room = length - len(specials.prefix) - len(specials.suffix)
    wanted = [i for i, t in enumerate(ids) if t not in specials.dropped and not (drop_first and i % room == 0)]
    assert kept == wanted[:budget]


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_length 4 leaves no room"):
        Cutter(WRAPPED, 4, drop_first=False)


@given(st.lists(st.integers(1, 32), max_size=80))
def test_packing_places_every_segment_once_and_wastes_little(lengths: list[int]) -> None:
    contexts = pack_segments(lengths, 32)
    assert sorted(number for context in contexts for number in context) == list(range(len(lengths)))
    used = [sum(lengths[number] for number in context) for context in contexts]
    assert all(0 < total <= 32 for total in used)
    assert sum(total <= 16 for total in used) <= 1  # two half-empty contexts would have been one


@pytest.mark.parametrize("packed", [True, False])
def test_contexts_read_back_every_kept_token_with_its_provenance(tmp_path: Path, packed: bool) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, 100, size=n).tolist() for n in rng.integers(1, 50, size=40)]
    cutter = Cutter(WRAPPED, 24, drop_first=False)
    segments = [segment for i, ids in enumerate(documents) for segment in cutter.cut(i, ids)]
    write_contexts(tmp_path, "train", segments, capacity=24, packed=packed, seed=3)
    contexts = Contexts(tmp_path, "train", packed=packed, pad=0)
    assert contexts.kept_rows == sum(len(ids) for ids in documents)
    assert (len(contexts) < len(segments)) == packed
    rows = []
    for start in range(0, len(contexts), 5):
        stop = min(start + 5, len(contexts))
        batch = contexts.batch(start, stop)
        tokens = batch.batch.input_ids
        assert len(batch.kept) == len(batch.rows) == contexts.kept_before[stop] - contexts.kept_before[start]
        assert np.array_equal(tokens.flatten()[batch.kept].numpy(), batch.rows[:, 2])
        assert np.array_equal(batch.kept.numpy() // tokens.shape[1] + start, batch.rows[:, 3])
        if packed:
            assert batch.batch.attention_mask is None
            positions = batch.batch.position_ids
            assert positions is not None
            # A segment begins with the prefix and only there; padding is a segment of its own.
            starts = (positions == 0).flatten()
            assert set(tokens.flatten()[starts].tolist()) <= {1, 0}
            assert starts[tokens.flatten() == 1].all()
        else:
            assert batch.batch.position_ids is None
            assert batch.batch.attention_mask is not None
            assert torch.equal(batch.batch.attention_mask.bool(), tokens != 0)
        rows.append(batch.rows)
    everything = np.concatenate(rows)
    for document, ids in enumerate(documents):
        mine = everything[everything[:, 0] == document]
        assert mine[np.argsort(mine[:, 1]), 2].tolist() == ids


def test_the_order_of_contexts_depends_on_the_seed_alone(tmp_path: Path) -> None:
    cutter = Cutter(PLAIN, 8, drop_first=False)
    segments = [cutter.cut(i, [i] * 5)[0] for i in range(50)]

    def order(seed: int) -> list[int]:
        write_contexts(tmp_path, "train", segments, capacity=8, packed=False, seed=seed)
        rows: Any = Contexts(tmp_path, "train", packed=False, pad=0).batch(0, 50).rows
        return [int(document) for document in rows[::5, 0]]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == list(range(50))


def segments_for(folder: Path) -> list[Any]:
    tokenizer = load_tokenizer(str(folder))
    cutter = Cutter(find_specials(tokenizer), 64, drop_first=False)
    ids = tokenizer(make_documents(4), add_special_tokens=False)["input_ids"]
    return [segment for number, tokens in enumerate(ids) for segment in cutter.cut(number, tokens)]


@pytest.mark.parametrize(
    ("asked", "model", "tokenizer", "expected"),
    [
        (None, None, 10**30, 512),
        (None, 4096, 10**30, 512),
        (None, 256, 10**30, 256),
        (None, 512, 256, 256),
        (1024, 4096, 10**30, 1024),
        (256, 512, 256, 256),
    ],
)
def test_contexts_are_as_long_as_model_and_tokenizer_allow(
    asked: int | None, model: int | None, tokenizer: int, expected: int
) -> None:
    assert choose_context_length(asked, model, SimpleNamespace(model_max_length=tokenizer)) == expected
    with pytest.raises(ConfigError, match="context_length 600: this model and its tokenizer allow 300"):
        choose_context_length(600, 300, SimpleNamespace(model_max_length=tokenizer + 300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "isolated"), [("gpt2", True), ("llama", True), ("bert", False)])
def test_the_probe_tells_models_that_isolate_from_those_that_leak(
    tmp_path: Path, kind: str, isolated: bool, dtype: torch.dtype
) -> None:
    folder = save_model(kind, tmp_path, dtype=dtype)
    loaded = load_model(str(folder), ["resid_post.2"])
    with Capture(loaded.model, loaded.sites) as capture:
        result = probe_isolation(capture, segments_for(folder))
    assert result.isolated == isolated, result
    assert (result.leak == 0) == isolated


@pytest.mark.parametrize("blind", ["mask", "positions"])
def test_the_probe_sees_a_weak_leak_and_wrong_positions(tmp_path: Path, blind: str) -> None:
    folder = save_model("gpt2", tmp_path)
    loaded = load_model(str(folder), ["resid_post.2"])
    model: Any = loaded.model
    forward: Callable[..., Any] = model.forward

    def broken(input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
        if blind == "positions" and position_ids is not None:
            # Segments stay apart, but the second one counts on from the first.
            mask = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
            return forward(input_ids, position_ids=position_ids + mask.cumsum(-1))
        return forward(input_ids)

    model.forward = broken
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)  # attention hardly matters now
    with Capture(model, loaded.sites) as capture:
        result = probe_isolation(capture, segments_for(folder))
    assert not result.isolated
    assert ("see each other" in result.reason) == (blind == "mask"), result

"""Steering one forward pass: not a bit where nothing is edited, and x + (f' - f) d where something is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from saeforge.errors import ConfigError, SaeforgeError
from saeforge.lm.hooks import attach
from saeforge.lm.sites import Site
from saeforge.sae import SAE
from saeforge.steering import Add, Clamp, Edit, LatentScales, Scale, steer
from tests.causal_models import D_SAE, KINDS, SITE, SPECIAL, D, dense_latents, make_model, make_sae, some_ids
from tests.causal_models import steered_by_hand as by_hand

RULES = ("threshold", "topk")
NOTHING: list[dict[int, Edit]] = [
    {},
    {3: Scale(1)},
    {3: Add(0)},
    {3: Scale(1), 9: Add(0), 11: Add(0, "max")},
]
EVERY = LatentScales(dict.fromkeys(range(D_SAE), 2.0), dict.fromkeys(range(D_SAE), 0.5))


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    out: Tensor = model(input_ids=ids, **more).logits
    return out


def site_output(model: Any, kind: str, ids: Tensor, **more: Any) -> Tensor:
    """What the next layer gets, whatever hooks were set before."""
    seen: list[Tensor] = []
    handle = attach(model, Site(make_sae("topk", kind).meta["site"]["module_path"], "out"), lambda x: seen.append(x))
    model(input_ids=ids, **more)
    handle.remove()
    return seen[0]


def firing(sae: SAE, model: Any, kind: str, ids: Tensor) -> list[int]:
    """Latents that fire at some of these tokens but not at all, most often firing first."""
    counts = (dense_latents(sae, site_output(model, kind, ids)).reshape(-1, D_SAE) != 0).sum(0)
    best = [int(i) for i in counts.argsort(descending=True) if counts[i] < ids.numel()]
    assert counts[best[3]] > 0
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_nothing_changes_no_bit(kind: str, rule: str, dtype: torch.dtype) -> None:
    model, sae, ids = make_model(kind, dtype), make_sae(rule, kind), some_ids(2, 24)
    plain = logits(model, ids)
    for edits in NOTHING:
        with steer(model, sae, edits, scales=EVERY) as steering:
            assert torch.equal(logits(model, ids), plain)
        assert steering.audit().touched == 0
        assert steering.audit().selected == 48


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_edits_equal_the_formula(kind: str, rule: str) -> None:
    model, sae, ids = make_model(kind), make_sae(rule, kind), some_ids(2, 24)
    a, b, c, d, *_ = firing(sae, model, kind, ids)
    plain = logits(model, ids)
    cases: list[tuple[dict[int, Edit], dict[int, Any]]] = [
        ({a: Clamp(1.5)}, {a: lambda f: torch.full_like(f, 1.5)}),
        ({a: Clamp(-2)}, {a: lambda f: torch.full_like(f, -2)}),
        ({a: Clamp(-1, "max")}, {a: lambda f: torch.full_like(f, -2)}),
        ({a: Clamp(0)}, {a: torch.zeros_like}),
        ({a: Clamp(-3, when_active=True)}, {a: lambda f: torch.where(f != 0, -3.0, 0.0)}),
        ({a: Scale(-2)}, {a: lambda f: -2 * f}),
        ({a: Add(3, "p99")}, {a: lambda f: f + 1.5}),
        (
            {a: Clamp(4), b: Scale(3), c: Add(1), d: Clamp(0)},
            {a: lambda f: torch.full_like(f, 4), b: lambda f: 3 * f, c: lambda f: f + 1, d: torch.zeros_like},
        ),
    ]
    for edits, rules in cases:
        with steer(model, sae, edits, scales=EVERY):
            steered = logits(model, ids)
        with by_hand(model, kind, sae, rules, None):
            expected = logits(model, ids)
        torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)
        assert (expected - plain).abs().max() > 0.01  # else the comparison would mean nothing


def test_clamping_to_what_it_is_changes_nothing_to_speak_of() -> None:
    model, sae, ids = make_model("llama"), make_sae("threshold"), some_ids(1, 8)
    f = dense_latents(sae, site_output(model, "llama", ids))[0, -1]
    latent = int(f.argmax())
    keep = ids[:, :-1].unique().tolist()  # the last token alone is edited
    assert int(ids[0, -1]) not in keep
    with steer(model, sae, {latent: Clamp(f[latent].item())}, special_ids=keep):
        same = logits(model, ids)
    with steer(model, sae, {latent: Clamp(f[latent].item() + 1)}, special_ids=keep):
        moved = logits(model, ids)
    torch.testing.assert_close(same, logits(model, ids), rtol=0, atol=1e-5)
    assert (moved - same).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_padding_are_not_edited(kind: str) -> None:
    model, sae, ids = make_model(kind), make_sae("threshold", kind), some_ids(3, 12)
    ids[:, 0], ids[1, 5] = 1, 2  # BOS; an EOS inside
    mask = torch.ones_like(ids)
    mask[2, :4] = 0  # the padding holds an ordinary id: only the mask tells
    special = torch.isin(ids, torch.tensor(sorted(SPECIAL)))
    edits, rules = {7: Add(2.0)}, {7: lambda f: f + 2}
    for options, editable in (
        ({}, ~special & (mask == 1)),
        ({"skip_special": False}, mask == 1),
        ({"special_ids": {5, int(ids[0, 3])}}, ~torch.isin(ids, torch.tensor([5, int(ids[0, 3])])) & (mask == 1)),
    ):
        with steer(model, sae, edits, **options) as steering:
            steered = logits(model, ids, attention_mask=mask)
        with by_hand(model, kind, sae, rules, editable):
            expected = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(steered[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)
        audit = steering.audit()
        assert (audit.tokens, audit.selected, audit.touched) == (36, int(editable.sum()), int(editable.sum()))


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_no_edit_touches_keep_their_bits_in_bf16(rule: str) -> None:
    model, sae, ids = make_model("llama", torch.bfloat16), make_sae(rule), some_ids(2, 30)
    zero = torch.tensor(-0.0, dtype=torch.bfloat16)
    layer = model.model.layers[1]
    odd = layer.register_forward_hook(lambda m, a, x: torch.cat([x[..., :1] * 0 + zero, x[..., 1:]], -1))
    (latent, *_) = firing(sae, model, "llama", ids)
    x = site_output(model, "llama", ids)
    fires = dense_latents(sae, x)[..., latent] != 0
    assert fires.any()
    assert not fires.all()
    with steer(model, sae, {latent: Scale(3)}) as steering:
        new = site_output(model, "llama", ids)
    assert new.dtype == torch.bfloat16
    assert torch.equal(new[~fires].view(torch.int16), x[~fires].view(torch.int16))  # adding 0 would lose the sign of -0
    assert (new[fires] != x[fires]).any(1).all()
    expected = (x.double() + 2 * dense_latents(sae, x)[..., latent, None] * sae.W_dec[latent].double()).bfloat16()
    torch.testing.assert_close(new[fires], expected[fires], rtol=0.01, atol=0.01)
    assert steering.audit().touched == int(fires.sum())
    odd.remove()


def test_the_audit_counts_and_averages() -> None:
    model, sae, ids = make_model("gpt2"), make_sae("threshold", "gpt2"), some_ids(2, 16)
    ids[0, :3] = 1
    a, b, *_ = firing(sae, model, "gpt2", ids)
    x = site_output(model, "gpt2", ids)[ids != 1].double()
    f = dense_latents(sae, x)
    edits: dict[int, Edit] = {a: Scale(0), b: Clamp(2, when_active=True)}
    with steer(model, sae, edits) as steering:
        assert steering.audit().touched == 0
        logits(model, ids)
        once = steering.audit()
        logits(model, ids)
    audit = steering.audit()
    assert (once.tokens, once.selected) == (32, 29)
    assert (audit.tokens, audit.selected, audit.touched) == (64, 58, 2 * once.touched)
    assert once.touched == int(((f[:, a] != 0) | (f[:, b] != 0)).sum())
    new_b = torch.where(f[:, b] != 0, 2.0, 0.0)
    delta = -f[:, a, None] * sae.W_dec[a].double() + (new_b - f[:, b])[:, None] * sae.W_dec[b].double()
    ratio = delta.norm(dim=1) / x.norm(dim=1)
    for result in (once, audit):
        assert result.latents[a].before == pytest.approx(f[:, a].mean().item(), rel=1e-5)
        assert result.latents[a].after == pytest.approx(0, abs=1e-6)
        assert result.latents[b].after == pytest.approx(new_b.mean().item(), rel=1e-5)
        assert result.relative_change == pytest.approx(ratio.sum().item() / once.touched, rel=1e-5)
    assert audit.to_json()["latents"][b]["edit"] == "clamp:2:active"


def test_contexts_nest_and_each_edits_what_the_former_left() -> None:
    model, ids = make_model("qwen3"), some_ids(2, 20)
    first, second = make_sae("threshold", "qwen3"), make_sae("topk", "qwen3", seed=5)
    with (
        by_hand(model, "qwen3", first, {4: lambda f: f + 2}, None),
        by_hand(model, "qwen3", second, {8: lambda f: torch.full_like(f, 3)}, None),
    ):
        expected = logits(model, ids)
    with steer(model, first, {4: Add(2)}) as outer:
        alone = logits(model, ids)
        with steer(model, second, {8: Clamp(3)}):
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(model, ids), alone)
    assert outer.audit().selected == 3 * 40
    assert (expected - alone).abs().max() > 0.01


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("where", ["all", "generated"])
def test_nothing_stays_behind(where: Any) -> None:
    model, sae, ids = make_model("gpt_neox"), make_sae("topk", "gpt_neox"), some_ids(1, 8)
    plain = logits(model, ids)
    with pytest.raises(RuntimeError, match="mine"), steer(model, sae, {3: Add(5)}, where=where):
        raise RuntimeError("mine")
    assert count_hooks(model) == 0
    assert "generate" not in vars(model)
    with steer(model, sae, {3: Add(5)}, where=where):  # a pass that fails, caught inside
        for bad in (torch.tensor([[10**6]]), None):
            with pytest.raises((IndexError, ConfigError)):
                model(input_ids=bad)
        with pytest.raises(ConfigError, match="outside of a forward pass"):  # what the failed pass knew is gone
            model.gpt_neox(input_ids=ids)
        assert torch.equal(logits(model, ids), plain) == (where == "generated")
    with pytest.raises(ConfigError, match="latent 96"):
        steer(model, sae, {96: Add(5)}).__enter__()
    assert count_hooks(model) == 0
    assert "generate" not in vars(model)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("patched", [False, True])
def test_contexts_may_end_in_any_order(patched: bool) -> None:
    model, sae, ids = make_model("llama"), make_sae("topk"), some_ids(1, 8)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    if patched:
        model.generate = functools.partial(model.generate)
    own = vars(model).get("generate")
    first = steer(model, sae, {3: Add(5)}, where="generated")
    second = steer(model, sae, {4: Add(5)}, where="prompt")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    changed = model.generate(ids, max_new_tokens=8, do_sample=False)
    second.__exit__(None, None, None)
    assert count_hooks(model) == 0
    assert vars(model).get("generate") is own
    assert not torch.equal(plain, changed)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_a_site_may_be_named_and_its_output_may_be_a_tuple() -> None:
    model, sae, ids = make_model("gpt2"), make_sae("threshold", "gpt2"), some_ids(1, 9)
    with steer(model, sae, {3: Add(2)}):
        expected = logits(model, ids)
    sae.meta = {}
    for site in (SITE, "blocks.1.hook_resid_post", "h.1", "transformer.h.1:out", Site("h.2", "in"), "resid_pre.2"):
        with steer(model, sae, {3: Add(2)}, site=site):
            assert torch.equal(logits(model, ids), expected)
    with steer(model, sae, {3: Add(2)}, site="attn_out.1", skip_special=False) as steering:
        changed = logits(model, ids)
    assert steering.audit().touched == 9
    assert not torch.equal(changed, expected)

    assert isinstance(model.transformer.h[1].attn(torch.zeros(1, 2, D)), tuple)  # that it was one


def test_gradients_flow_through_and_inference_mode_leaves_no_mark() -> None:
    model, sae, ids = make_model("llama"), make_sae("threshold"), some_ids(1, 9)
    with torch.inference_mode():
        context = steer(model, sae, {3: Add(2)}, skip_special=False)
        context.__enter__()
        logits(model, ids)
    embeds = model.get_input_embeddings()(ids).clone().requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    context.__exit__(None, None, None)
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_autocast_does_not_reach_the_edit() -> None:
    model, sae, ids = make_model("llama"), make_sae("threshold"), some_ids(2, 9)
    a, *_ = firing(sae, model, "llama", ids)
    with torch.autocast("cpu", torch.bfloat16):
        x = site_output(model, "llama", ids)
        with steer(model, sae, {a: Clamp(2)}):
            new = site_output(model, "llama", ids)
    f = dense_latents(sae, x)[..., a, None]
    expected = (x.double() + (2 - f) * sae.W_dec[a].double()).to(x.dtype)
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_right_is_refused() -> None:
    model, sae, ids = make_model("llama"), make_sae("threshold"), some_ids(1, 8)
    edits: dict[int, Edit] = {3: Add(2)}

    def refuse(words: str, other: SAE = sae, given: Any = edits, on: Any = model, **options: Any) -> None:
        with pytest.raises(SaeforgeError, match=words), steer(on, other, given, **options):
            logits(model, ids)

    refuse("0 to 95", given={96: Clamp(0)})
    refuse("where is 'late'", where="late")
    refuse("saeforge features build", given={3: Add(1, "max")})
    refuse("its p99 is not known", given={3: Add(1, "p99")}, scales=LatentScales())
    refuse("does not exist", given={3: Add(1, "p99")}, scales="no/run")
    refuse("no module layers.1", on=make_model("gpt2"))
    refuse("unknown site 'layer.1'", site="layer.1")
    refuse("say where in a model it belongs", other=SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, rule="topk", k=2))
    refuse("not one row of 16 per token", other=make_sae("topk", d=16))
    skip = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, rule="topk", k=2, W_skip=torch.zeros(D, D), meta=sae.meta)
    refuse("transcoder", other=skip)
    elsewhere = make_sae("topk")
    elsewhere.meta["target"] = {**elsewhere.meta["site"], "module_path": "layers.1.mlp"}
    refuse("transcoder", other=elsewhere)
    elsewhere.meta["target"] = dict(elsewhere.meta["site"])  # a target that is the site is no transcoder
    with steer(model, elsewhere, edits):
        logits(model, ids)
    with steer(model, sae, edits):
        with pytest.raises(ConfigError, match="which tokens are special"):
            model(inputs_embeds=torch.randn(1, 4, D))
        with pytest.raises(ConfigError, match="which tokens are padding"):
            logits(model, ids, attention_mask=torch.ones(1, 1, 8, 8))
    silent = make_model("llama")
    for config in (silent.config, silent.generation_config):
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    refuse("names no special tokens", on=silent)

"""An SAE attached to a model: what takes the activations' place, for transformers, TransformerLens and nnsight.

The two tools are stood in for by classes with the parts of their interfaces that are used; tests/test_interop_peers.py
does the same with the tools themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import saeforge
from saeforge.errors import ConfigError
from saeforge.sae import SAE
from saeforge.steering import Clamp, Edit, Scale, Splice, attached
from tests.tiny_models import D, save_model

D_SAE = 48
SITE = {"id": "layers.1:out", "module_path": "layers.1", "where": "out"}
IDS = torch.arange(5, 23).reshape(2, 9)


def make_sae(rule: str = "threshold", *, d_in: int = D, d_out: int = D, skip: bool = False, **meta: Any) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(D_SAE, d_in, generator=generator), torch.randn(D_SAE, d_out, generator=generator)
    b_enc, b_dec = torch.randn(D_SAE, generator=generator), torch.randn(d_out, generator=generator)
    options: dict[str, Any] = {"k": 5} if rule == "topk" else {"threshold": torch.rand(D_SAE, generator=generator)}
    W_skip = torch.randn(d_out, d_in, generator=generator) if skip else None
    return SAE(W_enc, b_enc, W_dec, b_dec, rule=rule, W_skip=W_skip, meta=meta, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path_factory.mktemp("models") / "llama"))
    return model.eval()


def layer_output(model: Any) -> Tensor:
    """What the layer after SITE reads."""
    seen: list[Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(IDS)
    handle.remove()
    return seen[0]


# ---- the function


@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_the_reconstruction_takes_the_activations_place(rule: str) -> None:
    sae, x = make_sae(rule), torch.randn(2, 3, D)
    splice = Splice(sae)
    torch.testing.assert_close(splice(x, hook=None), sae(x))
    assert splice.code is not None
    assert torch.equal(splice.code.to_dense(), sae.encode(x).to_dense())
    assert splice.runs == 1


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_error_kept_nothing_changes_to_the_bit(grad: bool, dtype: torch.dtype) -> None:
    x = torch.randn(4, D).to(dtype)
    with torch.set_grad_enabled(grad):
        assert torch.equal(Splice(make_sae(), keep_error=True)(x), x)


@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_edits_move_along_the_decoder_and_nothing_else(rule: str, keep_error: bool) -> None:
    sae, x = make_sae(rule), torch.randn(40, D)
    edits: dict[int, Edit] = {3: Clamp(2.0), 7: Scale(0.0), 11: Scale(3.0)}
    f = sae.encode(x).to_dense()
    edited = f.clone()
    edited[:, 3], edited[:, 7], edited[:, 11] = 2.0, 0.0, 3 * f[:, 11]
    expected = sae.decode(edited) + ((x - sae.decode(f)) if keep_error else 0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = Splice(sae, keep_error=keep_error, edits=edits)(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    untouched = Splice(sae, keep_error=True, edits={7: Scale(0.0)})(x)
    assert torch.equal(untouched[f[:, 7] == 0], x[f[:, 7] == 0])
    assert not torch.equal(untouched, x)


@pytest.mark.parametrize("rule", ["threshold", "topk"])
def test_gradients_go_through_the_latents_and_not_through_the_error(rule: str) -> None:
    sae = make_sae(rule)
    weight, x = torch.randn(6, D), torch.randn(6, D, requires_grad=True)
    splice = Splice(sae, keep_error=True)
    (splice(x) * weight).sum().backward()
    assert splice.code is not None
    assert splice.code.values.grad is not None
    rows, latents = splice.code.rows(), splice.code.indices
    torch.testing.assert_close(
        splice.code.values.grad, (weight[rows] * sae.W_dec[latents]).sum(1), rtol=1e-4, atol=1e-4
    )
    # Through the active latents back to x: no identity beside it.
    active = (sae.encode(x).to_dense() != 0).float()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, ((weight @ sae.W_dec.T) * active) @ sae.W_enc, rtol=1e-4, atol=1e-3)


def test_latents_have_gradients_where_nothing_before_them_does() -> None:
    splice = Splice(make_sae())
    splice(torch.randn(3, D)).sum().backward()
    assert splice.code is not None
    assert splice.code.values.grad is not None
    with torch.no_grad():
        assert not splice(torch.randn(3, D)).requires_grad


def test_a_clamped_latent_passes_no_gradient() -> None:
    splice = Splice(make_sae(), edits={2: Clamp(1.0)})
    splice(torch.randn(30, D)).sum().backward()
    assert splice.code is not None
    grad, clamped = splice.code.values.grad, splice.code.indices == 2
    assert grad is not None
    assert clamped.any()
    assert grad[clamped].abs().max() < 1e-4 < grad[~clamped].abs().max()


def test_tokens_outside_of_the_mask_keep_their_bits() -> None:
    sae, x = make_sae(), torch.randn(2, 4, D)
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    found = Splice(sae, mask=mask)(x)
    assert torch.equal(found[~mask], x[~mask])
    torch.testing.assert_close(found[mask], sae(x)[mask])
    with pytest.raises(ConfigError, match="one value for each"):
        Splice(sae, mask=mask[:1])(x)


def test_heads_side_by_side_are_one_activation() -> None:
    sae, x = make_sae(), torch.randn(2, 3, 4, D // 4)  # as TransformerLens's hook_z has it
    torch.testing.assert_close(Splice(sae)(x), sae(x.reshape(2, 3, D)).reshape(x.shape))


def test_a_transcoder_reads_one_place_and_writes_the_other() -> None:
    sae = make_sae("topk", d_out=20, skip=True)
    x, y = torch.randn(3, D), torch.randn(3, 20)
    splice = Splice(sae)
    splice.read(x)
    torch.testing.assert_close(splice.write(y), sae(x))
    kept = Splice(sae, keep_error=True, edits={int(sae.encode(x).indices[0]): Scale(0.0)})
    kept.read(x)
    latent = int(sae.encode(x).indices[0])
    without = sae.encode(x).to_dense()
    without[:, latent] = 0
    torch.testing.assert_close(kept.write(y), y + sae.decode(without, x) - sae(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="before the one that it reads, or twice"):
        kept.write(y)
    kept.read(x)
    with pytest.raises(ConfigError, match="read 3 tokens and is to write 2"):
        kept.write(y[:2])


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(3, D + 1), "reads 32 values a token"), (torch.zeros(3, D, device="meta"), "the SAE is on cpu")],
)
def test_activations_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Splice(make_sae())(x)


def test_edits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="has 48 latents"):
        Splice(make_sae(), edits={48: Clamp(0)})
    with pytest.raises(ConfigError, match="give scales=RUN"):
        Splice(make_sae(), edits=["3=add:1max"])


# ---- in a model of transformers


@torch.no_grad()
def test_attached_to_a_model_of_transformers_what_follows_sees_the_reconstruction(llama: Any) -> None:
    sae = make_sae(site=SITE)
    before, plain = layer_output(llama), llama(IDS).logits
    for site in (None, "resid_post.1", "blocks.1.hook_resid_post", "model.layers.1", "layers.1:out"):
        with saeforge.attached(llama, sae, site=site) as splice:
            after = layer_output(llama)
            assert not torch.equal(llama(IDS).logits, plain)
        torch.testing.assert_close(after, sae(before))
        assert splice.runs == 2
    assert torch.equal(llama(IDS).logits, plain)  # nothing stays behind
    with attached(llama, sae, keep_error=True):
        assert torch.equal(llama(IDS).logits, plain)


@torch.no_grad()
def test_a_transcoder_takes_the_place_of_an_mlp(llama: Any) -> None:
    sae = make_sae("topk", skip=True)
    seen: dict[str, Tensor] = {}
    handle = llama.model.layers[1].mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    try:
        with attached(llama, sae, site="mlp_in.1", target="blocks.1.hook_mlp_out"):
            llama(IDS)
    finally:
        handle.remove()
    seen_after: list[Tensor] = []
    with attached(llama, sae, site="mlp_in.1", target="mlp_out.1"):
        handle = llama.model.layers[1].mlp.register_forward_hook(lambda m, args, out: seen_after.append(out))
        llama(IDS)
        handle.remove()
    torch.testing.assert_close(seen_after[0], sae(seen["x"]))


@torch.no_grad()
def test_contexts_nest_and_errors_leave_no_hook(llama: Any) -> None:
    plain = llama(IDS).logits
    one, two = make_sae(site=SITE), make_sae("topk")
    with attached(llama, one), attached(llama, two, site="resid_post.2"):
        both = llama(IDS).logits
    with attached(llama, one):
        assert not torch.equal(llama(IDS).logits, both)
    with pytest.raises(ZeroDivisionError), attached(llama, one):
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="layers, 0 to 3"), attached(llama, one, site="mlp_in.1", target="mlp_out.9"):
        pass
    assert torch.equal(llama(IDS).logits, plain)


def test_any_torch_module_will_do() -> None:
    model = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, 3))
    x = torch.randn(5, 4)
    sae = make_sae()
    with torch.no_grad(), attached(model, sae, site="1"):
        found = model(x)
    torch.testing.assert_close(found, model[2](sae(model[1](model[0](x)))).detach())


# ---- in what stands in for TransformerLens and nnsight


class HookPoint(nn.Module):
    """TransformerLens's: returns what it gets, and gives hook functions `(activation, hook=...)`."""

    name = ""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Hooked(nn.Module):
    """The part of HookedTransformer's interface that is used, over layers of a model of transformers."""

    def __init__(self, layers: nn.ModuleList, rotary: Callable[..., Any]) -> None:
        super().__init__()
        self.layers, self.rotary = layers, rotary
        self.points = nn.ModuleList(HookPoint() for _ in layers)
        self.hook_dict = {f"blocks.{i}.hook_resid_post": point for i, point in enumerate(self.points)}

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        for layer, point in zip(self.layers, self.points, strict=True):
            found = layer(x, position_embeddings=self.rotary(x, positions), position_ids=positions)
            x = point(found if isinstance(found, Tensor) else found[0])
        return x

    @contextmanager
    def hooks(self, fwd_hooks: list[tuple[str, Callable[..., Any]]]) -> Any:
        handles = []
        for name, fn in fwd_hooks:
            point = self.hook_dict[name]
            handles.append(point.register_forward_hook(lambda m, args, out, fn=fn, point=point: fn(out, hook=point)))
        yield self
        for handle in handles:
            handle.remove()


@pytest.fixture
def hooked(llama: Any) -> Hooked:
    return Hooked(llama.model.layers, llama.model.rotary_emb)


@torch.no_grad()
def test_a_splice_is_a_hook_function_of_transformer_lens(hooked: Hooked) -> None:
    sae, x = make_sae(site=SITE), torch.randn(2, 5, D)
    splice = Splice(sae)
    with hooked.hooks([("blocks.1.hook_resid_post", splice)]):
        by_hook = hooked(x)
    for site in (None, "resid_post.1", "blocks.1.hook_resid_post", "layers.1:out", "model.layers.1"):
        with attached(hooked, sae, site=site):
            assert torch.equal(hooked(x), by_hook)
    assert not torch.equal(hooked(x), by_hook)
    assert splice.runs == 1


def test_a_hook_that_the_model_has_not_is_named(hooked: Hooked) -> None:
    for site, message in (
        ("mlp_out.1", r"has no hook blocks\.1\.hook_mlp_out"),
        ("blocks.1.attn.hook_k", r"has no hook blocks\.1\.attn\.hook_k"),
        (None, "give site="),
    ):
        with pytest.raises(ConfigError, match=message), attached(hooked, make_sae(), site=site):
            pass


class Envoy:
    """nnsight's: not a module, keeps one."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module


@torch.no_grad()
def test_what_nnsight_wraps_is_found(llama: Any) -> None:
    sae = make_sae(site=SITE)
    with attached(llama, sae):
        expected = llama(IDS).logits
    with attached(Envoy(llama), sae) as splice:
        assert torch.equal(llama(IDS).logits, expected)
    assert splice.runs == 1
    with pytest.raises(ConfigError, match="dispatch=True"), attached(Envoy(nn.Linear(2, 2, device="meta")), sae):
        pass
    with pytest.raises(ConfigError, match=r"saeforge\.Splice"), attached(object(), sae):
        pass


def test_the_names_are_public() -> None:
    assert saeforge.attached is attached
    assert saeforge.Splice is Splice


# ---- what TransformerLens's names mean


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hook_names_of_transformer_lens_are_sites(kind: str, tmp_path: Path) -> None:
    from saeforge.lm.capture import Capture, TokenBatch
    from saeforge.lm.load import load_model

    folder = save_model(kind, tmp_path / kind)
    names = "hook_resid_pre hook_resid_mid hook_resid_post hook_attn_out hook_mlp_out ln1.hook_normalized".split()
    names += ["ln2.hook_normalized", "attn.hook_z", "mlp.hook_post"]
    loaded = load_model(str(folder), [f"blocks.1.{name}" for name in names])
    with Capture(loaded.model, loaded.sites) as capture:
        found = capture(TokenBatch(IDS))
    at = {name: found[site.id] for name, site in zip(names, loaded.sites, strict=True)}
    before, middle, after = at["hook_resid_pre"], at["hook_resid_mid"], at["hook_resid_post"]
    torch.testing.assert_close(middle, before + at["hook_attn_out"])
    torch.testing.assert_close(after, middle + at["hook_mlp_out"])
    layer = loaded.model.get_submodule({"gpt2": "h.1", "llama": "layers.1"}[kind])
    ln1, ln2, out, down = (
        layer.get_submodule(path)
        for path in {
            "gpt2": ("ln_1", "ln_2", "attn.c_proj", "mlp.c_proj"),
            "llama": ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"),
        }[kind]
    )
    torch.testing.assert_close(at["ln1.hook_normalized"], ln1(before))
    torch.testing.assert_close(at["ln2.hook_normalized"], ln2(middle))
    torch.testing.assert_close(out(at["attn.hook_z"]), at["hook_attn_out"])
    torch.testing.assert_close(down(at["mlp.hook_post"]), at["hook_mlp_out"])

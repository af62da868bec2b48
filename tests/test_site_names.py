"""Names of places: aliases, TransformerLens's hooks, and the reasons why some of its hooks are no sites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeforge.data.site_names import HOOKS, hook_of_alias, no_equal_place, parse_alias, processing_note
from saeforge.data.writer import write_dataset
from saeforge.errors import ConfigError, DatasetError
from saeforge.formats.hooks import transformer_lens_name
from saeforge.lm.load import load_model
from tests.tiny_models import save_model


def test_a_hook_and_its_alias_are_one_place() -> None:
    for hook, kind in HOOKS.items():
        name = f"blocks.12.{hook}"
        assert parse_alias(name) == parse_alias(f"{kind}.12") == (kind, 12)
        assert hook_of_alias(name) == name
        assert parse_alias(str(hook_of_alias(f"{kind}.12"))) == (kind, 12)
        assert no_equal_place(name) is None
    for name in ("layers.3", "h.1.mlp:out", "resid_post.x", "blocks.1", "my.hooks.3"):
        assert (parse_alias(name), hook_of_alias(name), no_equal_place(name)) == (None, None, None)


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ("blocks.2.hook_mlp_in", r"resid_mid\.2; what the MLP reads is mlp_in\.2"),
        ("blocks.2.hook_attn_in", r"resid_pre\.2"),
        ("blocks.2.attn.hook_q", r"layers\.2\.self_attn\.q_proj"),
        ("blocks.2.attn.hook_pattern", "those of a block that have one: hook_resid_pre"),
        ("hook_embed", r"resid_pre\.0"),
        ("ln_final.hook_normalized", "the last norm"),
    ],
)
def test_a_hook_without_an_equal_place_says_what_is_nearest(hook: str, reason: str, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match=reason):
        load_model(str(folder), [hook])


def test_a_parallel_model_has_no_middle(tmp_path: Path) -> None:
    folder = save_model("bert", tmp_path / "bert")
    with pytest.raises(
        ConfigError, match="resid_mid has no known module here; give a module path, for example of: encoder"
    ):
        load_model(str(folder), ["blocks.1.hook_resid_mid"])


@pytest.mark.parametrize(
    ("hook", "options", "said"),
    [
        ("blocks.1.hook_resid_post", None, "center_writing_weights"),
        ("blocks.1.ln2.hook_normalized", None, "fold_ln"),
        ("blocks.1.attn.hook_z", None, "fold_value_biases"),
        ("blocks.1.hook_resid_post", {"center_writing_weights": True}, "from_pretrained_no_processing"),
        ("blocks.1.hook_resid_post", {}, None),  # SAELens loads without processing
        ("blocks.1.hook_resid_post", {"fold_ln": False}, None),
        ("blocks.1.mlp.hook_post", None, None),  # the same either way
        ("layers.1", None, None),
    ],
)
def test_what_folding_changes_is_said(hook: str, options: dict[str, bool] | None, said: str | None) -> None:
    note = processing_note(hook, options)
    assert (note is None) if said is None else (note is not None and said in note)


def test_a_dataset_finds_its_site_by_either_name(tmp_path: Path) -> None:
    splits = {"train": torch.randn(2048, 4), "validation": torch.randn(2048, 4)}
    written = write_dataset(tmp_path, splits, site="layers.1:out")
    for alias in ("resid_post.1", "blocks.1.hook_resid_post"):
        manifest = replace(written, sites=(replace(written.sites[0], alias=alias),))
        for name in ("resid_post.1", "blocks.1.hook_resid_post", "layers.1"):
            assert manifest.site(name, root=tmp_path).id == "layers.1:out"
        with pytest.raises(DatasetError, match="holds no site"):
            manifest.site("blocks.2.hook_resid_post", root=tmp_path)


def test_exports_name_the_hook_that_imports_understand() -> None:
    for path, where, alias in (
        ("layers.3", "out", "resid_post.3"),
        ("h.3", "in", "resid_pre.3"),
        ("h.3.mlp", "out", "mlp_out.3"),
        ("layers.3.self_attn", "out", "attn_out.3"),
    ):
        assert transformer_lens_name({"module_path": path, "where": where}) == hook_of_alias(alias)

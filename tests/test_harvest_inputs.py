"""Any model through a function that makes its inputs: rows, provenance, splits, restarts, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import EsmConfig, EsmModel, EsmTokenizer, ViTConfig, ViTModel

from saeforge.data.shards import ActivationDataset
from saeforge.errors import ConfigError, DatasetError
from saeforge.evaluation.held_out import HeldOutTexts
from saeforge.harvest import harvest, harvest_inputs, run
from saeforge.lm.load import quiet
from saeforge.lm.tokens import NO_POSITION

ITEMS = 300
PATCHES = 17  # 4 x 4, and CLS
PROTEINS = [
    "".join(np.random.default_rng(i).choice(list("ACDEFGHIKLMNPQRSTVWY"), size=8 + i % 23)) for i in range(ITEMS)
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
    )
    return ViTModel(config).eval()


def images(numbers: list[int]) -> dict[str, torch.Tensor]:
    made = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(number)) for number in numbers]
    return {"pixel_values": torch.stack(made)}


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ESM with its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("esm")
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(letters))
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=len(letters),
        mask_token_id=letters.index("<mask>"),
        pad_token_id=1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        position_embedding_type="rotary",
    )
    with quiet():
        EsmModel(config).save_pretrained(folder)
        EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def options(out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "items": ITEMS,
        "name": "noise v1",
        "sites": ["resid_post.1"],
        "out": out,
        "store_dtype": "float32",
        "validation_share": 0.5,
        "bucket_rows": 1024,
        "max_norm": None,
        "device": "cpu",
    } | changes


def rows_of(root: Path, split: str) -> tuple[torch.Tensor, np.ndarray]:
    dataset = ActivationDataset.open(root)
    blocks = [dataset.read_block(split, i).clone() for i in range(dataset.n_blocks(split))]
    rows = [dataset.read_rows(split, i) for i in range(dataset.n_blocks(split))]
    return torch.cat(blocks), np.concatenate(rows).astype(np.int64)


def plain(model: nn.Module, path: str, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    """Activations of one item by a hook of its own, (tokens, d)."""
    caught = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda m, a, o: caught.append(o if isinstance(o, torch.Tensor) else o[0])
    )
    with torch.no_grad():
        model(**arguments)
    hook.remove()
    return caught[0][0]


def test_patches_of_images_are_rows(tmp_path: Path) -> None:
    model = vit().train()
    frozen = model.get_submodule("embeddings").eval()
    keep = torch.arange(PATCHES) > 0  # not CLS
    manifest = harvest_inputs(model, images, keep=keep, **options(tmp_path / "o"))
    assert (model.training, frozen.training) == (True, False)
    site = manifest.sites[0].module_path
    assert (manifest.packing["tokens_per_item"], manifest.text["source"]) == (PATCHES, "noise v1")
    model.eval()
    seen = set()
    documents = [json.loads(line) for line in (tmp_path / "o" / "tokens" / "documents.jsonl").read_text().splitlines()]
    assert [d["id"] for d in documents] == list(range(ITEMS))
    for split in ("train", "validation"):
        x, rows = rows_of(tmp_path / "o", split)
        assert {documents[item]["split"] for item in rows[:, 0]} == {split}
        assert set(rows[:, 2].tolist()) == {NO_POSITION}
        assert np.array_equal(rows[:, 0], rows[:, 3])
        assert set(rows[:, 1].tolist()) == set(range(1, PATCHES))
        for item in sorted(set(rows[:, 0].tolist())):
            mine = rows[:, 0] == item
            expected = plain(model, site, images([item]))
            torch.testing.assert_close(x[torch.from_numpy(mine)], expected[rows[mine, 1]], rtol=1e-5, atol=1e-5)
        seen |= {(item, position) for item, position in rows[:, :2].tolist()}
        assert len(set(rows[:100, 0].tolist())) > 30  # shuffled
    assert len(seen) == ITEMS * (PATCHES - 1) - sum(split.dropped_rows for split in manifest.splits.values())


def test_a_vision_model_by_name_is_cut_after_its_site(tmp_path: Path) -> None:
    with quiet():
        vit().save_pretrained(tmp_path / "vit")
    by_name = harvest_inputs(str(tmp_path / "vit"), images, **options(tmp_path / "a"))
    assert (by_name.model["layers"], by_name.model["layers_loaded"]) == (3, 2)
    harvest_inputs(vit(), images, **options(tmp_path / "b"))
    for split in ("train", "validation"):
        (x, rows), (y, others) = rows_of(tmp_path / "a", split), rows_of(tmp_path / "b", split)
        assert np.array_equal(rows, others)
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    half = harvest_inputs(str(tmp_path / "vit"), images, model_dtype="bfloat16", **options(tmp_path / "c"))
    assert half.model["dtype"] == "bfloat16"  # pixels follow the model's precision


def protein_inputs(folder: Path) -> tuple[Callable[[list[int]], Any], Callable[[Any], torch.Tensor]]:
    tokenizer = EsmTokenizer.from_pretrained(folder)

    def inputs(numbers: list[int]) -> Any:
        return tokenizer([PROTEINS[i] for i in numbers], padding=True, return_tensors="pt")

    def residues(batch: Any) -> torch.Tensor:
        return ~torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))

    return inputs, residues


def test_proteins_of_different_lengths_are_rows(proteins: Path, tmp_path: Path) -> None:
    inputs, residues = protein_inputs(proteins)
    names = [f"family {i % 40}" for i in range(ITEMS)]
    manifest = harvest_inputs(
        str(proteins), inputs, keep=residues, names=names, labels=names, **options(tmp_path / "o", name="proteins")
    )
    assert manifest.packing["counts"]["kept_tokens"] == sum(map(len, PROTEINS))
    model = EsmModel.from_pretrained(proteins).eval()
    tokenizer = EsmTokenizer.from_pretrained(proteins)
    families: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        x, rows = rows_of(tmp_path / "o", split)
        families[split] = {names[item] for item in rows[:, 0]}
        for item in sorted(set(rows[:, 0].tolist()))[:40]:
            mine = rows[:, 0] == item
            ids = tokenizer(PROTEINS[item], return_tensors="pt")
            expected = plain(model, manifest.sites[0].module_path, dict(ids))
            torch.testing.assert_close(x[torch.from_numpy(mine)], expected[rows[mine, 1]], rtol=1e-4, atol=1e-5)
            letters = tokenizer.convert_ids_to_tokens(rows[mine, 2].tolist())
            assert letters == [PROTEINS[item][position - 1] for position in rows[mine, 1]]  # behind <cls>
    assert not families["train"] & families["validation"]


def test_proteins_are_also_text(proteins: Path, tmp_path: Path) -> None:
    """With a tokenizer, a line each: no function needed, special tokens are known."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROTEINS))
    manifest = harvest(
        model=str(proteins),
        text=str(tmp_path / "p.jsonl"),
        **{key: options(tmp_path / "o")[key] for key in ("sites", "store_dtype", "max_norm", "device")},
        out=str(tmp_path / "o"),
        validation_share=0.0,
    )
    assert manifest.packing["counts"]["kept_tokens"] == sum(map(len, PROTEINS))
    x, rows = rows_of(tmp_path / "o", "train")
    documents = [json.loads(line) for line in (tmp_path / "o" / "tokens" / "documents.jsonl").read_text().splitlines()]
    texts = [PROTEINS[int(document["name"].removeprefix("line ")) - 1] for document in documents]
    model, tokenizer = EsmModel.from_pretrained(proteins).eval(), EsmTokenizer.from_pretrained(proteins)
    for document in range(20):
        mine = rows[:, 0] == document
        expected = plain(model, manifest.sites[0].module_path, dict(tokenizer(texts[document], return_tensors="pt")))
        torch.testing.assert_close(x[torch.from_numpy(mine)], expected[rows[mine, 1] + 1], rtol=1e-4, atol=1e-5)


class Frames(nn.Module):
    """No transformer, no configuration: two numbers a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.layer(sound)))


def sounds(numbers: list[int]) -> dict[str, torch.Tensor]:
    return {"sound": torch.tensor(numbers, dtype=torch.float32)[:, None, None] + torch.rand(20, 2)[None] * 0 + 1.0}


def test_a_killed_harvest_of_inputs_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(tmp_path / "o", sites=["layer"], batch_items=7)
    harvest_inputs(Frames(), sounds, **(given | {"out": tmp_path / "whole"}))
    real, left = run.make_rows, [2]

    def dies(*args: Any, **keywords: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **keywords)

    torch.manual_seed(0)
    model = Frames()
    monkeypatch.setattr(run, "make_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        harvest_inputs(model, sounds, **given)
    monkeypatch.setattr(run, "make_rows", real)
    assert not (tmp_path / "o" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="the model changed since"):
        harvest_inputs(Frames(), sounds, **given)
    with pytest.raises(ConfigError, match=r"other options \(name differ"):
        harvest_inputs(model, sounds, **(given | {"name": "noise v2"}))
    resumed = harvest_inputs(model, sounds, **given)
    torch.manual_seed(0)
    again = harvest_inputs(Frames(), sounds, **(given | {"out": tmp_path / "again"}))
    assert resumed.fingerprint == again.fingerprint
    assert rows_of(tmp_path / "o", "train")[0].shape[1] == 8


def test_inputs_that_change_between_calls_are_told(tmp_path: Path) -> None:
    calls = [0]

    def keep(batch: Any) -> torch.Tensor:
        calls[0] += 1
        return torch.arange(20).expand(len(batch["sound"]), 20) < 20 - (calls[0] > 43)

    with pytest.raises(DatasetError, match=r"item \d+ keeps 19 tokens now, and another number"):
        harvest_inputs(Frames(), sounds, keep=keep, **options(tmp_path / "o", sites=["layer"], batch_items=7))


def test_what_needs_text_says_that_there_is_none(tmp_path: Path) -> None:
    manifest = harvest_inputs(Frames(), sounds, **options(tmp_path / "o", sites=["layer"]))
    with pytest.raises(ConfigError, match="holds no text; this needs a dataset made by `saeforge harvest`"):
        HeldOutTexts(tmp_path / "o", manifest, "validation", budget=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ["resid_post.0"]}, "no plain list of layers; give a module path"),
        ({"sites": ["lay"]}, "unknown site 'lay'"),
        ({"sites": "layer"}, "sites = 'layer': expected a list"),
        ({"items": 0}, "items = 0: expected at least 1"),
        ({"batch_items": 0}, "batch_items = 0"),
        ({"store_dtype": "float16"}, "store_dtype = 'float16'"),
        ({"bucket_rows": 1000}, "expected a power of two"),
        ({"validation_share": 1.5}, "validation_share = 1.5"),
        ({"names": ["a"]}, "names has 1 entries for 300 items"),
        ({"keep": torch.ones(3, dtype=torch.bool)}, "keep is for 3 tokens, the sites have 20"),
        ({"keep": torch.ones(20)}, "keep: expected a bool tensor"),
        (
            {"keep": lambda batch: torch.ones(20, dtype=torch.bool)},
            r"keep returned torch.bool \(20,\)",
        ),
        ({"inputs": lambda numbers: torch.zeros(1)}, "inputs returned Tensor: expected the model's keyword"),
        ({"inputs": lambda numbers: {"sound": torch.zeros(len(numbers) + 1, 20, 2)}}, "not one row per token"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = {"inputs": sounds} | options(tmp_path / "o", sites=["layer"]) | changes
    with pytest.raises(ConfigError, match=message) as caught:
        harvest_inputs(Frames(), **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()

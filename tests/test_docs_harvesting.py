"""docs/harvesting.md is true: its Python runs, its commands parse."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EsmConfig, EsmModel, EsmTokenizer, ViTConfig, ViTModel

from saeforge.data.shards import ActivationDataset
from saeforge.harvest import HarvestConfig
from saeforge.lm.load import quiet
from saeforge.lm.text import open_text

DOCS = Path(__file__).parents[1] / "docs" / "harvesting.md"
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), flags=re.S)
    assert found
    return found


COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("--")[1])
def test_commands_parse(command: str, tmp_path: Path) -> None:
    from saeforge.cli.harvest import make_parser

    words = shlex.split(command)
    argv = words[words.index("harvest") + 1 :]
    assert words[words.index("harvest") - 1] == "saeforge"
    if "harvest.yaml" in argv:
        (tmp_path / "harvest.yaml").write_text("model: m\nsites: [resid_post.1]\nout: o\n")
        argv[argv.index("harvest.yaml")] = str(tmp_path / "harvest.yaml")
    parsed = make_parser().parse_args(argv).as_dict()
    HarvestConfig.build(None, {key: value for key, value in parsed.items() if key != "config"})


def test_lines_of_conversations_are_read(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(blocks("json")))
    document = open_text(str(tmp_path / "chats.jsonl"), conversations=True)[0]
    assert document.messages is not None
    assert [message["role"] for message in document.messages] == ["user", "assistant"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny models in folders of the names that stand in the text, and data."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, ".", "-", "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    esm = EsmConfig(
        vocab_size=len(vocabulary),
        pad_token_id=1,
        mask_token_id=32,
        position_embedding_type="rotary",
        num_hidden_layers=6,
        max_position_embeddings=1026,
        **small,
    )
    with quiet():
        ViTModel(ViTConfig(num_hidden_layers=8, image_size=16, patch_size=4, **small)).save_pretrained(
            "google/vit-base-patch16-224"
        )
        EsmModel(esm).save_pretrained("facebook/esm2_t6_8M_UR50D")
        EsmTokenizer("vocab.txt").save_pretrained("facebook/esm2_t6_8M_UR50D")
    rng = np.random.default_rng(0)
    np.save("photos.npy", rng.integers(0, 256, (1500, 16, 16, 3), dtype=np.uint8))
    proteins = ["".join(rng.choice(list(LETTERS), size=rng.integers(20, 60))) for _ in range(2000)]
    Path("proteins.txt").write_text("".join(f"family{i % 300} {p}\n" for i, p in enumerate(proteins)))
    return tmp_path


def test_python_runs(models: Path) -> None:
    images, proteins = blocks("python")
    assert max(len(block.strip().splitlines()) for block in (images, proteins)) <= 15
    torch.set_num_threads(1)
    exec(compile(images, str(DOCS), "exec"), {})
    photos = ActivationDataset.open("acts/photos")
    assert photos.d == 16
    assert {int(p) for i in range(photos.n_blocks("train")) for p in photos.read_rows("train", i)[:, 1]} == set(
        range(17)
    )
    exec(compile(proteins, str(DOCS), "exec"), {})
    documents = [json.loads(s) for s in Path("acts/families/tokens/documents.jsonl").read_text().splitlines()]
    splits = {split: {d["name"] for d in documents if d["split"] == split} for split in ("train", "validation")}
    assert splits["validation"]
    assert not splits["train"] & splits["validation"]
    lines = [line.split()[1] for line in Path("proteins.txt").read_text().splitlines()]
    assert [document["kept"] for document in documents] == [len(line) for line in lines]

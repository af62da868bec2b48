"""SAEs that other tools wrote, read here, give those tools' own latents and outputs (scripts/make_format_golden.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saeforge import formats
from saeforge.formats import read

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/expected.safetensors"))
#: float32: the shift goes into the bias there, comes off the input here. Sums of 12 products of size 1, 24 rows.
TOLERANCE = 3e-6


def test_there_are_files_of_every_tool() -> None:
    assert {folder.parent.name for folder in FOLDERS} == {"dictionary_learning", "saelens", "sparsify"}
    assert len(FOLDERS) == 20


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_theirs_read_here_computes_what_it_computes_there(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    sae = read(folder)
    acts = sae.encode(expected["x"]).to_dense()
    assert torch.equal(acts != 0, expected["acts"] != 0)
    assert 0 < (acts != 0).float().mean() < 0.9  # else the line above says little
    error = (sae(expected["x"]) - expected["out"]).norm() / expected["out"].norm()
    assert error < TOLERANCE
    # Latents of SAELens' rescaled top-k are in units of the decoder's norm there, and here.
    assert (acts - expected["acts"]).norm() / expected["acts"].norm() < TOLERANCE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_what_was_read_can_be_written_in_the_same_format_again(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    formats.write(read(folder), tmp_path / "out", folder.parent.name)
    again = read(tmp_path / "out")
    assert torch.equal(again.encode(expected["x"]).to_dense() != 0, expected["acts"] != 0)
    assert (again(expected["x"]) - expected["out"]).norm() / expected["out"].norm() < TOLERANCE


def test_the_tools_words_for_the_origin_are_kept() -> None:
    saelens = read(GOLDEN / "saelens" / "jumprelu").meta["imported"]
    assert (saelens["model_name"], saelens["hook_name"]) == ("gpt2-small", "blocks.5.hook_resid_post")
    assert saelens["format"] == "saelens"
    theirs = read(GOLDEN / "dictionary_learning" / "BatchTopKSAE").meta["imported"]
    assert (theirs["model_name"], theirs["layer"], theirs["dict_class"]) == ("gpt2", 5, "BatchTopKSAE")

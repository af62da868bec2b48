"""The SAE as a plain thing: its rules, its file, and nothing but torch and safetensors to use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saeforge
from saeforge import sae as sae_module
from saeforge.errors import CheckpointError, ConfigError
from saeforge.sae import FORMAT_VERSION, META_FILE, SAE, WEIGHTS_FILE

D_IN, D_OUT, D_SAE = 5, 4, 20


def make(rule: str = "threshold", *, d_out: int = D_IN, skip: bool = False, **options: Any) -> SAE:
    g = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {"threshold": torch.rand(D_SAE, generator=g)} if rule == "threshold" else {"k": 3}
    return SAE(
        torch.randn(D_SAE, D_IN, generator=g),
        torch.randn(D_SAE, generator=g),
        torch.randn(D_SAE, d_out, generator=g),
        torch.randn(d_out, generator=g),
        rule=rule,  # type: ignore[arg-type]
        W_skip=torch.randn(d_out, D_IN, generator=g) if skip else None,
        **{**given, **options},
    )


def dense_latents(sae: SAE, x: Tensor) -> Tensor:
    """The rules by hand."""
    pre = x @ sae.W_enc.T + sae.b_enc
    if sae.threshold is not None:
        return torch.where(pre > sae.threshold, pre, 0.0)
    assert sae.k is not None
    order = torch.sort(pre, dim=1, descending=True, stable=True).indices[:, : sae.k]
    return torch.zeros_like(pre).scatter(1, order, pre.gather(1, order)).relu()


CASES: list[dict[str, Any]] = [
    {"rule": "threshold"},
    {"rule": "topk"},
    {"rule": "threshold", "d_out": D_OUT, "skip": True},
    {"rule": "topk", "d_out": D_OUT},
]


# Rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_encode_follows_the_rule_and_sparse_decode_equals_dense_decode(case: dict[str, Any]) -> None:
    sae, x = make(**case).double(), torch.randn(30, D_IN, dtype=torch.float64)
    truth = dense_latents(sae, x)
    code = sae.encode(x)
    torch.testing.assert_close(code.to_dense(), truth)
    assert 0 < int((truth != 0).sum()) < truth.numel()
    expected = truth @ sae.W_dec + sae.b_dec
    if sae.W_skip is not None:
        expected = expected + x @ sae.W_skip.T
    for latents in (code, truth):
        torch.testing.assert_close(sae.decode(latents, x), expected)
    torch.testing.assert_close(sae(x), expected)


def test_tensors_are_copied_unless_they_are_given_away() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    kept = SAE(eye, zero, eye, zero, rule="topk", k=1)
    given = SAE(eye, zero, eye.T, zero, rule="topk", k=1, copy=False)
    assert given.W_enc.data_ptr() == eye.data_ptr() != kept.W_enc.data_ptr()
    assert all(tensor.is_contiguous() for tensor in (*kept.buffers(), *given.buffers()))


def test_the_threshold_itself_is_not_active_and_zero_means_relu() -> None:
    eye = torch.eye(3)
    sae = SAE(eye, torch.zeros(3), eye, torch.zeros(3), rule="threshold", threshold=torch.tensor([0.0, 1.0, 2.0]))
    x = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.5, 2.0], [-1.0, 3.0, 3.0]])
    assert sae.encode(x).to_dense().tolist() == [[1, 0, 0], [0, 1.5, 0], [0, 3, 3]]


def test_topk_keeps_positive_values_only_and_ties_go_to_the_lowest_index() -> None:
    eye = torch.eye(4)
    sae = SAE(eye, torch.zeros(4), eye, torch.zeros(4), rule="topk", k=2)
    code = sae.encode(torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -2.0, 5.0, -1.0], [-1.0, -1.0, -1.0, -1.0]]))
    assert code.to_dense().tolist() == [[1, 1, 0, 0], [0, 0, 5, 0], [0, 0, 0, 0]]
    assert code.l0().tolist() == [2, 1, 0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(D_IN,), (7, D_IN), (2, 3, D_IN), (0, D_IN)])
def test_leading_dimensions_are_rows_and_come_back(case: dict[str, Any], shape: tuple[int, ...]) -> None:
    sae, x = make(**case), torch.randn(shape)
    out = sae(x)
    assert out.shape == (*shape[:-1], sae.d_out)
    torch.testing.assert_close(out.reshape(-1, sae.d_out), sae(x.reshape(-1, D_IN)))
    code = sae.encode(x)
    assert code.n_rows == x.numel() // D_IN
    dense = code.to_dense().reshape(*shape[:-1], D_SAE)
    torch.testing.assert_close(sae.decode(dense, x), out)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_type_of_the_input(weights: torch.dtype, rows: torch.dtype) -> None:
    sae, x = make(skip=True).to(weights), torch.randn(6, D_IN).to(rows)
    assert sae(x).dtype == rows
    assert sae.encode(x).values.dtype == weights
    torch.testing.assert_close(sae(x).float(), make(skip=True)(x.float()), rtol=0.1, atol=0.3)


def test_wrong_width_is_named() -> None:
    with pytest.raises(ConfigError, match="6 wide, this SAE reads 5"):
        make().encode(torch.zeros(2, 6))


def test_a_skip_connection_needs_the_input() -> None:
    sae = make(skip=True)
    with pytest.raises(ConfigError, match=r"decode\(code, x\)"):
        sae.decode(sae.encode(torch.zeros(2, D_IN)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b_enc": torch.zeros(3)}, r"b_enc has shape \(3,\), expected \(20,\)"),
        ({"W_dec": torch.zeros(19, D_IN)}, "W_dec"),
        ({"b_dec": torch.zeros(6)}, "b_dec"),
        ({"W_skip": torch.zeros(D_IN, 6)}, "W_skip"),
        ({"threshold": torch.zeros(3)}, "threshold"),
        ({"threshold": -torch.ones(D_SAE)}, "threshold is negative"),
        ({"threshold": None}, "rule 'threshold' needs threshold"),
        ({"k": 3}, "needs threshold, W_enc, b_enc and nothing else"),
        ({"rule": "topk", "threshold": None}, "rule 'topk' needs k"),
        ({"rule": "topk", "k": 3}, "needs k, W_enc, b_enc and nothing else"),
        ({"rule": "topk", "threshold": None, "k": 0}, "k = 0"),
        ({"rule": "topk", "threshold": None, "k": 21}, "k = 21"),
        ({"rule": "batch_topk"}, "rule 'batch_topk'"),
    ],
)
def test_parts_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "W_enc": torch.zeros(D_SAE, D_IN),
        "b_enc": torch.zeros(D_SAE),
        "W_dec": torch.zeros(D_SAE, D_IN),
        "b_dec": torch.zeros(D_IN),
        "rule": "threshold",
        "threshold": torch.zeros(D_SAE),
    }
    with pytest.raises(ConfigError, match=message):
        SAE(**{**parts, **options})


# Files ------------------------------------------------------------------------------------------------------------

META = {"site": {"id": "blocks.3:out"}, "variant": {"name": "topk", "options": {"k": 3}}, "list": [1, 2.5, None, True]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_save_and_load_give_the_same_bits(case: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    sae = make(**case, meta=META).to(dtype)
    assert sae.save(tmp_path / "a" / "sae") == tmp_path / "a" / "sae"
    again = SAE.load(tmp_path / "a" / "sae")
    assert (again.rule, again.k, again.meta) == (sae.rule, sae.k, META)
    assert again.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)
    again.save(tmp_path / "b")
    for name in (WEIGHTS_FILE, META_FILE):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / "sae" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [META_FILE, WEIGHTS_FILE]
    assert "site=blocks.3:out" in repr(again)


def test_meta_cannot_overwrite_what_the_file_needs(tmp_path: Path) -> None:
    sae = make(meta={"version": 99, "k": 7, "rule": "topk", "note": "kept"})
    again = SAE.load(sae.save(tmp_path))
    assert (again.rule, again.k, again.meta) == ("threshold", None, {"note": "kept"})


@pytest.mark.parametrize("fail_at", [WEIGHTS_FILE, META_FILE])
def test_a_failing_disk_leaves_nothing_half_written(
    fail_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = os.fsync
    files: list[str] = []

    def full(descriptor: int) -> None:
        files.append(WEIGHTS_FILE if not files else META_FILE)
        if files[-1] == fail_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(sae_module.os, "fsync", full)
    other = make("threshold", meta={"note": 1})
    other.W_enc.add_(1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        other.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [META_FILE, WEIGHTS_FILE]  # no temporary file is left
    assert (tmp_path / META_FILE).read_bytes() == before[META_FILE]
    if fail_at == WEIGHTS_FILE:
        assert (tmp_path / WEIGHTS_FILE).read_bytes() == before[WEIGHTS_FILE]


def test_meta_that_json_cannot_hold_fails_before_anything_is_written(tmp_path: Path) -> None:
    make().save(tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    bad = make(meta={"tensor": torch.zeros(2)})
    bad.W_enc.add_(1)
    with pytest.raises(TypeError, match="JSON"):
        bad.save(tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not save"):
        make().save(tmp_path / "file" / "sae")


def edit_meta(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        meta = json.loads((folder / META_FILE).read_text())
        for name, value in changes.items():
            if value is ...:
                del meta[name]
            else:
                meta[name] = value
        (folder / META_FILE).write_text(json.dumps(meta))

    return apply


def edit_weights(**changes: Tensor | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        for name, value in changes.items():
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        save_file(tensors, folder / WEIGHTS_FILE)

    return apply


def cut(name: str, share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / META_FILE).unlink(), r"sae\.json is missing"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), r"sae\.safetensors is missing"),
        (cut(META_FILE, 0.5), "damaged"),
        (cut(WEIGHTS_FILE, 0.5), "damaged"),
        (cut(WEIGHTS_FILE, 0.0), "damaged"),
        (lambda folder: (folder / META_FILE).write_bytes(b"\xff\xfe"), "damaged"),
        (lambda folder: (folder / META_FILE).write_text("[1]"), "not a saeforge SAE"),
        (edit_meta(format="sae_lens"), "not a saeforge SAE"),
        (edit_meta(version=FORMAT_VERSION + 1), f"SAE format {FORMAT_VERSION + 1}, this saeforge reads up to"),
        (edit_meta(version=...), "damaged"),
        (edit_meta(version="two"), "damaged"),
        (edit_meta(rule=...), "damaged"),
        (edit_meta(k=...), "damaged"),
        (edit_meta(rule="topk"), "damaged"),
        (edit_meta(d_sae=21), "damaged"),
        (edit_weights(W_dec=None, b_enc=None), "lacks W_dec, b_enc|lacks b_enc, W_dec"),
        (edit_weights(b_enc=torch.zeros(3)), "damaged"),
        (edit_weights(W_enc=torch.zeros(3)), "damaged"),
        (edit_weights(threshold=None), "damaged"),
    ],
)
def test_a_folder_that_is_not_a_whole_sae_is_refused(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        SAE.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_takes_a_run_folder_or_an_sae_folder(tmp_path: Path) -> None:
    sae = make()
    sae.save(tmp_path / "run" / "sae")
    for path in (tmp_path / "run", tmp_path / "run" / "sae", str(tmp_path / "run")):
        assert torch.equal(saeforge.load(path).W_enc, sae.W_enc)


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        saeforge.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"sae\.json is missing"):
        saeforge.load(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no finished SAE yet.*--ckpt_path last"):
        saeforge.load(tmp_path / "run")


def test_loading_and_encoding_import_torch_and_safetensors_alone(tmp_path: Path) -> None:
    make("topk").save(tmp_path)
    script = f"""
import sys, torch, safetensors.torch
before = set(sys.modules)
import saeforge
sae = saeforge.load({str(tmp_path)!r})
assert sae(torch.ones(2, 5)).shape == (2, 5)
assert sae.encode(torch.ones(2, 5)).n_rows == 2
added = {{name.split(".")[0] for name in set(sys.modules) - before}} - {{name.split(".")[0] for name in before}}
heavy = "lightning transformers webdataset omegaconf jsonargparse wandb entrypoints".split()
print(sorted(added - set(sys.stdlib_module_names)), [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['saeforge'] []", done.stdout


def test_files_of_two_saves_are_not_one_sae(tmp_path: Path) -> None:
    """A save that is cut off between its two files leaves new weights beside the old rule and provenance."""
    for name, seed in (("old", 0), ("new", 1)):
        torch.manual_seed(seed)
        weights = torch.randn(8, 4)
        SAE(weights, torch.randn(8), weights, torch.randn(4), rule="topk", k=2 + seed).save(tmp_path / name)
    (tmp_path / "new" / WEIGHTS_FILE).replace(tmp_path / "old" / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="belong to two SAEs"):
        SAE.load(tmp_path / "old")

"""`import_activations`: every row once, in the right split, cast as said; damage and interruption change nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saeforge.data.imports import import_activations
from saeforge.data.imports.units import _striped
from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.data.verify import verify_dataset
from saeforge.data.writer import DatasetWriter
from saeforge.errors import ConfigError, DatasetError, SaeforgeError

D = 8


def numbered(n: int, first: int = 0, dtype: str = "<f4") -> np.ndarray:
    """Rows that say their number: (n, 8), the first two entries are number // 1000 and number % 1000."""
    x = np.random.default_rng(first).standard_normal((n, D))
    numbers = np.arange(first, first + n)
    x[:, 0], x[:, 1] = numbers // 1000, numbers % 1000
    return x.astype(dtype)


def numbers_of(x: torch.Tensor) -> list[int]:
    return (x[:, 0].double() * 1000 + x[:, 1].double()).long().tolist()


def read_all(root: Path, split: str) -> tuple[torch.Tensor, np.ndarray]:
    dataset = ActivationDataset.open(root)
    blocks = range(dataset.n_blocks(split))
    rows = np.concatenate([dataset.read_rows(split, block) for block in blocks])
    return torch.cat([dataset.read_block(split, block) for block in blocks]), rows


def tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and path.name not in (".lock", "dataset.json"))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture
def flat(tmp_path: Path) -> list[Path]:
    """Two .npy files, 24,576 rows together."""
    np.save(tmp_path / "a.npy", numbered(16384))
    np.save(tmp_path / "b.npy", numbered(8192, first=16384))
    return [tmp_path / "a.npy", tmp_path / "b.npy"]


# ---- which rows go where


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_is_stored_once_unchanged(flat: list[Path], tmp_path: Path, shuffle: bool) -> None:
    out = tmp_path / "out"
    manifest = import_activations(flat, out, shuffle=shuffle, bucket_rows=4096, site="layer.3:in", model="tiny")
    source = torch.from_numpy(np.concatenate([np.load(path) for path in flat]))
    stored = {split: read_all(out, split) for split in ("train", "validation")}
    seen = {split: numbers_of(x) for split, (x, _) in stored.items()}
    assert len(seen["train"]) + len(seen["validation"]) + sum(s.dropped_rows for s in manifest.splits.values()) == 24576
    assert len({*seen["train"], *seen["validation"]}) == len(seen["train"]) + len(seen["validation"])
    for split, (x, rows) in stored.items():
        assert torch.equal(x, source[seen[split]])
        # Where a row comes from: runs of 256 rows numbered through both files, and the place in the run.
        assert (rows[:, 0].astype(int) * 256 + rows[:, 1]).tolist() == seen[split]
        assert np.array_equal(rows[:, 0], rows[:, 3])
        assert seen[split] == sorted(seen[split]) or shuffle
    assert seen["train"] != sorted(seen["train"]) or not shuffle
    assert (manifest.site(None, root=out).id, manifest.model) == ("layer.3:in", {"name": "tiny"})
    assert verify_dataset(out) == []


def test_a_shuffled_block_mixes_the_whole_data(flat: list[Path], tmp_path: Path) -> None:
    """Runs are permuted over everything, so a bucket of a sixth of the rows has rows from everywhere."""
    import_activations(flat, tmp_path / "out", bucket_rows=4096)
    first = numbers_of(read_all(tmp_path / "out", "train")[0][:1024])
    assert np.histogram(first, bins=4, range=(0, 24576))[0].min() > 64


def test_contexts_never_straddle_the_split(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbered(15 * 2000).reshape(2000, 15, D))
    import_activations([tmp_path / "x.npy"], tmp_path / "out", validation_share=0.2)
    contexts = {split: set(read_all(tmp_path / "out", split)[1][:, 3].tolist()) for split in ("train", "validation")}
    assert not contexts["train"] & contexts["validation"]
    x, rows = read_all(tmp_path / "out", "train")
    assert (rows[:, 0].astype(int) * 15 + rows[:, 1]).tolist() == numbers_of(x)


def test_held_out_units_come_from_everywhere_and_few_have_a_neighbour_in_training() -> None:
    held_out = np.flatnonzero(_striped(2000, 0.2))
    assert np.histogram(held_out, bins=4, range=(0, 2000))[0].tolist() == [100] * 4
    assert (np.diff(held_out) > 1).sum() == 15


@pytest.mark.parametrize(("units", "share"), [(1, 0.5), (10, 0.1), (17, 0.3), (1000, 0.1), (1000, 0.999), (5, 0.0)])
def test_stripes_hold_out_exactly_the_share(units: int, share: float) -> None:
    assert _striped(units, share).sum() == round(share * units)


def test_seed_changes_the_order_and_nothing_else(flat: list[Path], tmp_path: Path) -> None:
    orders = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        import_activations(flat, tmp_path / name, seed=seed)
        orders.append(numbers_of(read_all(tmp_path / name, "validation")[0]))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    aligned = [Manifest.load(tmp_path / name / "manifest.json").alignment_sha256 for name in "abc"]
    assert aligned[0] == aligned[1] != aligned[2]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_no_validation_split_if_none_is_wanted(flat: list[Path], tmp_path: Path) -> None:
    assert set(import_activations(flat, tmp_path / "out", validation_share=0).splits) == {"train"}


# ---- dtypes


@pytest.mark.parametrize(
    ("found", "wanted", "stored", "note"),
    [
        ("<f4", "auto", torch.float32, ""),
        ("<f2", "auto", torch.float32, "stored exactly as float32"),
        ("<f8", "auto", torch.float32, "rounded to float32"),
        ("<f4", "bfloat16", torch.bfloat16, "rounded to bfloat16"),
        ("<u2", "auto", torch.bfloat16, "taken for the bits of bfloat16"),
        ("<u2", "float32", torch.float32, "stored exactly as float32"),
    ],
)
def test_values_are_cast_as_said(tmp_path: Path, found: str, wanted: str, stored: torch.dtype, note: str) -> None:
    x = torch.from_numpy(numbered(4096, dtype="<f8"))
    if found == "<u2":
        x = x.bfloat16()
        np.save(tmp_path / "x.npy", x.view(torch.int16).numpy().view("<u2"))
    else:
        np.save(tmp_path / "x.npy", x.numpy().astype(found))
        x = torch.from_numpy(x.numpy().astype(found))
    notes: list[str] = []
    import_activations(
        [tmp_path / "x.npy"],
        tmp_path / "out",
        dtype=wanted,
        shuffle=False,
        validation_share=0,
        note=notes.append,
    )
    y, _ = read_all(tmp_path / "out", "train")
    assert y.dtype == stored
    assert torch.equal(y, x.to(stored))
    assert note in " ".join(notes)
    assert bool(notes) == bool(note)


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, "auto"), (-np.inf, "auto"), (1e300, "auto")])
def test_a_value_that_is_not_finite_names_file_and_row(tmp_path: Path, bad: float, dtype: str) -> None:
    x = numbered(8192, dtype="<f8")
    x[5003, 2] = bad
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DatasetError, match=r"x\.npy, row 5003: NaN or infinite \(as float32\)"):
        import_activations([tmp_path / "x.npy"], tmp_path / "out", dtype=dtype, validation_share=0.3)
    assert not (tmp_path / "out" / "manifest.json").exists()


# ---- formats


def test_safetensors_tars_and_folders_give_the_same_rows_as_npy(tmp_path: Path) -> None:
    import webdataset as wds

    parts = np.split(numbered(8192), 4)
    for name in ("npy", "tensors", "tars"):
        (tmp_path / name).mkdir()
    for i, part in enumerate(parts):
        np.save(tmp_path / "npy" / f"{i}.npy", part)
    save_file({f"p{i}": torch.from_numpy(part) for i, part in enumerate(parts)}, tmp_path / "tensors" / "x.safetensors")
    with wds.TarWriter(str(tmp_path / "tars" / "x.tar")) as sink:
        for i, part in enumerate(parts):
            sink.write({"__key__": f"{i}", "acts.npy": part})
    stored = []
    for name in ("npy", "tensors", "tars"):
        import_activations([tmp_path / name], tmp_path / "out" / name, validation_share=0.3)
        stored.append(read_all(tmp_path / "out" / name, "train")[0])
    assert torch.equal(stored[0], stored[1])
    assert torch.equal(stored[0], stored[2])


def saelens_cache(folder: Path, acts: np.ndarray, tokens: np.ndarray | None, files: int = 3) -> Path:
    """What SAELens' CacheActivationsRunner leaves: lists of lists with the marks of datasets' Array2D, in streams."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir()
    contexts, length, d = acts.shape
    kinds = {"float32": pa.float32(), "float16": pa.float16()}
    nested = pa.list_(pa.list_(kinds[acts.dtype.name]))
    marks = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([[length, d], acts.dtype.name]),
    }
    fields = [pa.field("blocks.2.hook_resid_post", nested, metadata=marks)]
    if tokens is not None:
        fields.append(pa.field("token_ids", pa.list_(pa.int32(), length)))
    schema = pa.schema(fields)
    names = []
    for number, part in enumerate(np.array_split(np.arange(contexts), files)):
        names.append(f"data-{number:05d}-of-{files:05d}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in np.array_split(part, 2):
                inner = pa.ListArray.from_arrays(
                    pa.array(np.arange(0, (len(batch) * length + 1) * d, d), pa.int32()), pa.array(acts[batch].ravel())
                )
                outer = pa.ListArray.from_arrays(
                    pa.array(np.arange(0, (len(batch) + 1) * length, length), pa.int32()), inner
                )
                columns: list[Any] = [outer.cast(nested)]
                if tokens is not None:
                    flat = pa.array(tokens[batch].ravel(), pa.int32())
                    columns.append(pa.FixedSizeListArray.from_arrays(flat, length))
                writer.write_batch(pa.record_batch(columns, schema=schema))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_cache_of_saelens_keeps_contexts_and_tokens(tmp_path: Path, dtype: str) -> None:
    acts = np.random.default_rng(0).standard_normal((500, 16, D)).astype(dtype)
    tokens = np.random.default_rng(1).integers(0, 50257, (500, 16)).astype(np.int32)
    folder = saelens_cache(tmp_path / "cache", acts, tokens)
    manifest = import_activations([folder], tmp_path / "out", validation_share=0.3, bucket_rows=2048)
    assert manifest.site(None, root=tmp_path).id == "blocks.2.hook_resid_post:out"
    assert manifest.text["token_ids"] is True
    assert [source["first_context"] for source in manifest.text["sources"]] == [0, 167, 334]
    for split in ("train", "validation"):
        x, rows = read_all(tmp_path / "out", split)
        assert np.array_equal(x.numpy(), acts[rows[:, 3], rows[:, 1]])
        assert np.array_equal(rows[:, 2], tokens[rows[:, 3], rows[:, 1]])


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_of_some_tokens_are_left_out_and_counted(tmp_path: Path, shuffle: bool) -> None:
    """Every other row is stored once, in its context, also where a whole context, or its middle, is left out."""
    acts = np.random.default_rng(0).standard_normal((500, 16, D)).astype("float32")
    tokens = np.random.default_rng(1).integers(2, 90, (500, 16)).astype(np.int32)
    tokens[:, 0] = tokens[7, 5] = tokens[200] = 1
    acts[tokens == 1] = np.nan  # so that even looking at one is an error
    acts[..., 0] = np.where(tokens == 1, np.nan, np.arange(500 * 16).reshape(500, 16))
    folder = saelens_cache(tmp_path / "cache", acts, tokens)
    options: Any = dict(validation_share=0.3, bucket_rows=2048, shuffle=shuffle)
    notes: list[str] = []
    manifest = import_activations([folder], tmp_path / "out", skip_token_ids=[99, 1, 1], note=notes.append, **options)
    skipped = int((tokens == 1).sum())
    assert manifest.text["skipped"] == {"token_ids": [1, 99], "rows": skipped}
    assert notes == [f"{skipped:,} of 8,000 rows are left out: they are of tokens 1, 99"]
    seen: list[int] = []
    for split in ("train", "validation"):
        x, rows = read_all(tmp_path / "out", split)
        assert np.array_equal(x.numpy(), acts[rows[:, 3], rows[:, 1]])
        assert np.array_equal(rows[:, 2], tokens[rows[:, 3], rows[:, 1]])
        found = x[:, 0].long().tolist()
        assert shuffle != (found == sorted(found))
        seen += found
    dropped = sum(split.dropped_rows for split in manifest.splits.values())
    assert len(set(seen)) == len(seen) == 8000 - skipped - dropped
    assert verify_dataset(tmp_path / "out") == []
    with pytest.raises(ConfigError, match="skip_token_ids"):
        import_activations([folder], tmp_path / "out", skip_token_ids=[1], **options)
    with pytest.raises(DatasetError, match=r"hook_resid_post, row 0: NaN"):
        import_activations([folder], tmp_path / "all", **(options | {"shuffle": False}))


def test_tokens_to_skip_need_token_ids(flat: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.npy does not say which tokens .* leave out --skip_token_ids"):
        import_activations(flat, tmp_path / "out", skip_token_ids=[1])
    with pytest.raises(ConfigError, match="skip_token_ids = -1: expected token ids"):
        import_activations(flat, tmp_path / "out", skip_token_ids=[-1])
    assert not (tmp_path / "out").exists()


def test_a_cache_without_tokens_or_a_single_file_is_read_too(tmp_path: Path) -> None:
    acts = np.random.default_rng(0).standard_normal((200, 16, D)).astype("float32")
    folder = saelens_cache(tmp_path / "cache", acts, None, files=1)
    (file,) = folder.glob("*.arrow")
    manifest = import_activations([file], tmp_path / "out", validation_share=0, shuffle=False)
    assert manifest.text["token_ids"] is False
    assert np.array_equal(read_all(tmp_path / "out", "train")[0].numpy(), acts.reshape(-1, D))


def test_a_damaged_or_unfinished_cache_is_an_error(tmp_path: Path) -> None:
    acts = np.zeros((200, 16, D), "float32")
    folder = saelens_cache(tmp_path / "cache", acts, None)
    last = sorted(folder.glob("*.arrow"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-8])  # pyarrow reads it without complaint
    with pytest.raises(DatasetError, match="lacks the mark of its end: truncated"):
        import_activations([folder], tmp_path / "out")
    last.write_bytes(content[: len(content) // 2] + content[-8:])
    with pytest.raises(DatasetError, match="no whole Arrow stream file"):
        import_activations([folder], tmp_path / "out")
    last.unlink()
    with pytest.raises(DatasetError, match=r"data-00002-of-00003\.arrow is missing, state\.json lists it"):
        import_activations([folder], tmp_path / "out")
    (folder / ".tmp_shards").mkdir()
    with pytest.raises(DatasetError, match="interrupted while it cached"):
        import_activations([folder], tmp_path / "out")


def test_arrow_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data-00000-of-00001.arrow").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow; pip install 'saeforge\[parquet\]'"):
        import_activations([tmp_path], tmp_path / "out")


# ---- interruption, and what is in the way


def test_a_killed_import_looks_unfinished_and_goes_on_to_the_same_bytes(flat: list[Path], tmp_path: Path) -> None:
    import_activations(flat, tmp_path / "whole", bucket_rows=2048)
    code = (
        "import os, signal, sys\n"
        "from saeforge.data.imports import import_activations\n"
        "from saeforge.data.writer import DatasetWriter\n"
        "write, left = DatasetWriter.write_bucket, int(sys.argv[1])\n"
        "def killed(self, *args, **options):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(self, *args, **options)\n"
        "DatasetWriter.write_bucket = killed\n"
        "import_activations(sys.argv[3:], sys.argv[2], bucket_rows=2048)\n"
    )
    out = tmp_path / "out"
    for buckets in (3, 5):
        done = subprocess.run([sys.executable, "-c", code, str(buckets), str(out), *map(str, flat)], timeout=60)
        assert done.returncode == -9
        assert not (out / "manifest.json").exists()
        with pytest.raises(DatasetError, match=r"no manifest\.json"):
            ActivationDataset.open(out)
    written: list[int] = []
    import_activations(flat, out, bucket_rows=2048, progress=lambda done, total: written.append(total))
    assert set(written) == {24576 - 8 * 2048}
    assert tree(out) == tree(tmp_path / "whole")


def test_a_finished_import_is_not_done_again(flat: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = import_activations(flat, tmp_path / "out")
    monkeypatch.delattr(DatasetWriter, "write_bucket")
    assert import_activations(flat, tmp_path / "out") == first


def test_other_options_or_files_need_overwrite(flat: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_activations(flat, out)
    with pytest.raises(ConfigError, match=r"made with other options or sources \(seed\); give --overwrite"):
        import_activations(flat, out, seed=1)
    with pytest.raises(ConfigError, match="import, validation_share"):
        import_activations(flat[:1], out, validation_share=0.2)
    import_activations(flat, out, seed=1, overwrite=True)
    import_activations(flat, tmp_path / "fresh", seed=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_sources_that_changed_between_two_runs_are_not_mixed(
    flat: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        write = DatasetWriter.write_bucket

        def stopped(self: DatasetWriter, split: str, bucket: int, *args: Any, **options: Any) -> None:
            if bucket == 2:
                raise KeyboardInterrupt
            write(self, split, bucket, *args, **options)

        patch.setattr(DatasetWriter, "write_bucket", stopped)
        with pytest.raises(KeyboardInterrupt):
            import_activations(flat, out, bucket_rows=2048)
    np.save(flat[1], -np.load(flat[1]))  # of the same size and header
    with pytest.raises(ConfigError, match="the sources changed since"):
        import_activations(flat, out, bucket_rows=2048)
    import_activations(flat, out, bucket_rows=2048, overwrite=True)
    import_activations(flat, tmp_path / "fresh", bucket_rows=2048)
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    flat: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("saeforge.data.imports.run.shutil.disk_usage", lambda path: usage)
    with pytest.raises(SaeforgeError, match=r"needs 1 MiB more, .* has 0 MiB free"):
        import_activations(flat, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*.tar"))


def test_foreign_folders_are_left_alone(flat: list[Path], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tex\)"):
        import_activations(flat, tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_what_cannot_be_imported_is_one_clear_error(flat: list[Path], tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((4096, D + 1), "<f4"))
    (tmp_path / "x.pt").touch()
    (tmp_path / "x.csv").touch()
    shutil.copy(flat[0], tmp_path / "mixed.npy")
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([*flat, tmp_path / "wide.npy"], {}, "is 8 wide, .*wide.npy 9"),
        ([flat[0], flat[0]], {}, "is given twice"),
        ([tmp_path / "x.pt"], {}, r"x\.pt is a pickle"),
        ([tmp_path / "x.csv"], {}, r"x\.csv: expected \.npy, \.safetensors"),
        ([tmp_path], {}, "expected files of one kind"),
        (flat, {"validation_share": 0.01}, "split validation would have 256 rows, at least 2048"),
        (flat, {"validation_share": 1.0}, "expected 0 to less than 1"),
        (flat, {"dtype": "float16"}, "expected auto, bfloat16 or float32"),
        (flat, {"bucket_rows": 3000}, "expected a power of two"),
        (flat, {"bucket_rows": 16}, "less than one block"),
        (flat, {"site": "../x"}, "expected a module path"),
    ]
    for sources, options, says in cases:
        with pytest.raises((ConfigError, DatasetError), match=says):
            import_activations(sources, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    import_activations(flat, tmp_path / "done")
    with pytest.raises(ConfigError, match="is a dataset of saeforge already"):
        import_activations([tmp_path / "done"], tmp_path / "out")

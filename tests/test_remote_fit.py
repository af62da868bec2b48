"""A dataset behind a URL through the whole house: fit, evaluate, features; the same to the bit as from the folder."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saeforge.cli.main import main
from saeforge.data.remote import RemoteStorage
from saeforge.data.shards import ActivationDataset
from saeforge.data.storage import open_storage
from saeforge.data.verify import _Tokens, verify_dataset
from saeforge.errors import DatasetError
from saeforge.harvest import harvest
from saeforge.lm.pack import open_stored
from saeforge.sae import load
from tests.faulty_server import Asked, FaultyServer, serve
from tests.tiny_models import make_documents, save_model, write_text_folder

pytest.importorskip("aiohttp", reason="http needs the extra `remote`")


@pytest.fixture(autouse=True)
def _patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_READ_WAIT", "0.001")
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("remote")
    save_model("llama", home / "llama")
    harvest(
        model=str(home / "llama"),
        sites=["resid_post.1"],
        out=str(home / "acts"),
        text=str(write_text_folder(home / "text", make_documents(140, words=80))),
        n_tokens=11_000,
        context_length=64,
        batch_contexts=8,
        store_dtype="float32",
        validation_share=0.35,
        bucket_rows=2048,
        device="cpu",
    )
    return home / "acts"


@pytest.fixture
def server(dataset: Path) -> Iterator[FaultyServer]:
    with serve(dataset) as running:
        yield running


def tensors(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "sae").glob("*.safetensors")
    return load_file(path)


def fit(data: str | Path, run: Path) -> dict[str, torch.Tensor]:
    """Train shortly; return the SAE's tensors."""
    options: dict[str, Any] = {
        "run": run,
        "data.path": data,
        "data.batch_size": 256,
        "data.tokens": 256 * 30,
        "model.variant": "topk",
        "model.variant.d_sae": 64,
        "model.variant.k": 4,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 10,
        "trainer.enable_progress_bar": "false",
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return tensors(run)


@pytest.fixture(scope="module")
def run(dataset: Path) -> Path:
    """A run on the folder."""
    fit(dataset, dataset.parent / "run")
    return dataset.parent / "run"


def test_fit_on_a_url_gives_the_sae_of_the_folder_to_the_bit_though_a_tenth_of_all_requests_fails(
    run: Path, server: FaultyServer, tmp_path: Path
) -> None:
    rng = random.Random(0)

    def fault(asked: Asked) -> str:
        return rng.choice(["500", "drop", "short", "429"]) if rng.random() < 0.1 else ""

    server.fault = fault
    remote, local = fit(server.url, tmp_path / "remote"), tensors(run)
    assert local.keys() == remote.keys()
    assert all(torch.equal(local[name], remote[name]) for name in local)
    assert load(tmp_path / "remote").meta["dataset_path"] == server.url


def test_features_and_judgement_take_a_url_and_download_its_tokens_once(run: Path, server: FaultyServer) -> None:
    assert main(["evaluate", str(run), "--data", server.url, "--effect", "false"]) == 0
    build = ["features", "build", str(run), "--data", server.url, "--device", "cpu", "--split", "validation"]
    assert main(build) == 0
    assert any(asked.file.startswith("tokens/") for asked in server.asked)
    server.asked.clear()
    assert main([*build, "--overwrite"]) == 0
    assert {asked.file for asked in server.asked if asked.range not in (None, "bytes=0-0")} == set()


@pytest.mark.parametrize("cache", ["50", "0"])
def test_stored_tokens_come_once_checked_and_stay_readable(
    dataset: Path, server: FaultyServer, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_CACHE_GB", cache)
    packing = ActivationDataset.open(dataset).manifest.packing
    local = open_stored(dataset, packing, ["train", "validation"])
    server.once("500", ".tokens.npy")
    remote = open_stored(server.url, packing, ["train", "validation"])
    assert remote.documents == local.documents
    for split, contexts in local.contexts.items():
        for name, array in contexts.arrays.items():
            assert np.array_equal(array, remote.contexts[split].arrays[name])
        assert torch.equal(contexts.batch(0, 5).kept, remote.contexts[split].batch(0, 5).kept)
    server.asked.clear()
    open_stored(server.url, packing, ["validation"])
    assert (server.asked == []) == (cache == "50")


def test_damaged_or_lost_tokens_at_the_origin_are_an_error(dataset: Path, server: FaultyServer) -> None:
    packing = ActivationDataset.open(dataset).manifest.packing
    server.always("wrong", "train.keep.npy")
    with pytest.raises(DatasetError, match=r"tokens/train\.keep\.npy is damaged \(its sha256 does not match, twice\)"):
        open_stored(server.url, packing, ["train"])
    assert list(open_stored(server.url, packing, ["validation"]).contexts) == ["validation"]
    server.always("404", "train.keep.npy")
    with pytest.raises(DatasetError, match=r"tokens/train\.keep\.npy is missing; restore it, or harvest again"):
        open_stored(server.url, packing, ["train"])
    server.always("")
    open_stored(server.url, packing, ["train"])


def test_where_the_cache_has_no_room_tokens_go_to_another_disk_with_one_warning(
    dataset: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = ActivationDataset.open(dataset).manifest.packing
    download, full = RemoteStorage._download, [tmp_path / "cache"]

    def fill_up(self: RemoteStorage, file: str, path: Path) -> str:
        if any(path.is_relative_to(folder) for folder in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return download(self, file, path)

    monkeypatch.setattr(RemoteStorage, "_download", fill_up)
    with pytest.warns(UserWarning, match=r"No space left on device\): reading goes on without it"):
        stored = open_stored(server.url, packing, ["validation"])
    assert stored.documents == open_stored(dataset, packing, ["validation"]).documents
    full.append(Path("/"))
    with (
        pytest.warns(UserWarning, match="reading goes on without it"),
        pytest.raises(DatasetError, match=r"the tokens of http://.* cannot be stored in .*: No space left"),
    ):
        open_stored(server.url, packing, ["validation"])


def test_a_manifest_cannot_have_files_written_elsewhere(dataset: Path, server: FaultyServer, tmp_path: Path) -> None:
    packing = dict(ActivationDataset.open(dataset).manifest.packing)
    (dataset.parent / "outside").write_bytes(b"")
    packing["files"] = {"train.tokens.npy/../../../outside": "0" * 64}
    with pytest.raises(DatasetError, match=r"the manifest names the file 'train\.tokens\.npy/\.\./"):
        open_stored(server.url, packing, ["train"])


def test_a_harvest_is_sound_and_verify_reads_the_origin_not_the_cache(dataset: Path, server: FaultyServer) -> None:
    assert verify_dataset(dataset) == []
    remote = ActivationDataset.open(server.url)
    remote.read_block("train", 0)
    server.asked.clear()
    assert verify_dataset(server.url) == []
    assert {asked.file for asked in server.asked} >= {
        path.relative_to(dataset).as_posix() for path in dataset.rglob("*.*") if path.suffix in (".tar", ".npy")
    }
    server.always("wrong", "train.offsets.npy")
    assert [str(finding) for finding in verify_dataset(server.url)] == [
        "tokens/train.offsets.npy: is damaged: its sha256 does not match"
    ]


def test_provenance_is_held_against_the_tokens(dataset: Path) -> None:
    """Rows of another harvest, with right checksums everywhere, are found."""
    table = [(0, ActivationDataset.open(dataset).read_rows("train", 0))]
    packing = ActivationDataset.open(dataset).manifest.packing
    names = {name: sha for name, sha in packing["files"].items() if name.startswith("train.")}
    tokens = _Tokens(open_storage(dataset), "train", names)
    assert list(tokens.faults(table)) == []
    for column, word in [(0, "does not hold"), (1, "does not hold"), (2, "does not hold"), (3, "does not hold")]:
        wrong = table[0][1].copy()
        wrong[7, column] += 1
        assert [number for number, fault in tokens.faults([(4, wrong)]) if word in fault] == [4], column
    wrong = table[0][1].copy()
    wrong[3, 3] = 10**6
    ((number, fault),) = tokens.faults([(2, wrong)])
    assert (number, "contexts beyond" in fault) == (2, True)
    wrong = table[0][1].copy()
    wrong[3] = wrong[4]
    ((number, fault),) = tokens.faults([(1, wrong)])
    assert (number, "twice" in fault) == (1, True)

"""Datasets behind URLs: the same rows as on disk, whatever the network does, or an error that names shard and block."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch

from saeforge.data.manifest import Manifest
from saeforge.data.shards import ActivationDataset
from saeforge.data.verify import verify_dataset
from saeforge.data.writer import write_dataset
from saeforge.errors import ConfigError, DatasetError
from tests.faulty_server import PASSING, Asked, FaultyServer, serve

pytest.importorskip("aiohttp", reason="http needs the extra `remote`")
D = 8
SHARD = r"http://127.0.0.1:\d+/data/array\.out/train-000001\.tar, block 0"


@pytest.fixture(autouse=True)
def _patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRIES": "3", "WAIT": "0.001", "TIMEOUT": "10"}.items():
        monkeypatch.setenv(f"SAEFORGE_READ_{name}", value)
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "acts"
    rows = torch.randn(2048, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    write_dataset(root, {"train": rows}, bucket_rows=1024)
    return root


@pytest.fixture
def dataset(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "a b" / "acts")


@pytest.fixture
def server(dataset: Path) -> Iterator[FaultyServer]:
    with serve(dataset) as running:
        yield running


def everything(dataset: ActivationDataset) -> dict[str, list[torch.Tensor]]:
    """All activations, and every eighth block of the provenance."""
    n = dataset.n_blocks("train")
    return {
        "acts": [dataset.read_block("train", index) for index in range(n)],
        "rows": [torch.from_numpy(dataset.read_rows("train", index)) for index in range(0, n, 8)],
    }


def same(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        len(a[key]) == len(b[key]) and all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True)) for key in a
    )


def first_of_second_shard(dataset: ActivationDataset) -> int:
    return len(dataset.site.shards["train"][0].blocks)


# The same rows ---------------------------------------------------------------------------------------------------


def test_a_url_gives_the_rows_of_the_folder_and_the_cache_gives_them_again(dataset: Path, server: FaultyServer) -> None:
    local, remote = ActivationDataset.open(dataset), ActivationDataset.open(server.url + "/")
    assert (remote.location, remote.fingerprint) == (server.url, local.fingerprint)
    rows = everything(local)
    before = remote.counts.origin_bytes
    assert same(rows, everything(remote))
    payload = sum(x.nbytes for blocks in rows.values() for x in blocks)
    assert (remote.counts.origin_bytes - before, remote.counts.cache_bytes, remote.counts.retries) == (payload, 0, 0)
    again = ActivationDataset.open(server.url)
    server.asked.clear()
    assert same(rows, everything(again))
    assert server.asked == []
    assert again.counts.cache_bytes == payload


def test_fsspec_memory_and_file_urls(dataset: Path) -> None:
    rows = everything(ActivationDataset.open(dataset))
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/bucket/acts", recursive=True)
    try:
        remote = ActivationDataset.open("memory://bucket/acts")
        assert same(rows, everything(remote))
        assert same(rows, everything(ActivationDataset.open("memory://bucket/acts")))
        assert verify_dataset("memory://bucket/acts") == []
        with memory.open("/bucket/acts/array.out/train-000001.tar", "r+b") as file:
            file.truncate(5000)
        with pytest.raises(DatasetError, match=r"train-000001\.tar has 5000 bytes, the manifest says"):
            ActivationDataset.open("memory://bucket/acts")
        memory.rm("/bucket/acts/array.out/train-000001.tar")
        with pytest.raises(DatasetError, match=r"memory://bucket/acts/array\.out/train-000001\.tar is missing"):
            ActivationDataset.open("memory://bucket/acts")
        with pytest.raises(DatasetError, match=r"no manifest\.json in memory://bucket/elsewhere: expected a finished"):
            ActivationDataset.open("memory://bucket/elsewhere")
    finally:
        memory.rm("/bucket", recursive=True)
    assert same(rows, everything(ActivationDataset.open(f"file://{dataset}")))


def test_threads_pickles_and_forks_read_the_same(
    dataset: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFORGE_CACHE_GB", "0")
    remote = ActivationDataset.open(server.url)
    expected = everything(ActivationDataset.open(dataset))["acts"]
    with ThreadPoolExecutor(6) as pool:
        read = list(pool.map(lambda index: remote.read_block("train", index), list(range(len(expected))) * 2))
    assert all(torch.equal(a, b) for a, b in zip(read, expected * 2, strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(remote)).read_block("train", 3), expected[3])
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:  # connections and their thread stayed with the parent
        good = torch.equal(remote.read_block("train", 5), expected[5])
        os.write(send, b"y" if good else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        assert pipe.read() == b"y"
    assert torch.equal(remote.read_block("train", 5), expected[5])


def test_the_manifest_is_never_taken_from_a_cache(dataset: Path, server: FaultyServer) -> None:
    first = ActivationDataset.open(server.url)
    everything(first)
    shutil.rmtree(dataset)
    write_dataset(dataset, {"train": torch.randn(2048, D).bfloat16()}, bucket_rows=512)
    second = ActivationDataset.open(server.url)
    assert second.fingerprint == Manifest.load(dataset / "manifest.json").fingerprint != first.fingerprint
    assert torch.equal(second.read_block("train", 0), ActivationDataset.open(dataset).read_block("train", 0))


# Faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_one_retry(
    dataset: Path, server: FaultyServer, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "slow":
        monkeypatch.setenv("SAEFORGE_READ_TIMEOUT", "1")
    remote = ActivationDataset.open(server.url)
    index = first_of_second_shard(remote)
    server.once(fault)
    read = remote.read_block("train", index)
    assert torch.equal(read, ActivationDataset.open(dataset).read_block("train", index))
    # aiohttp itself asks again where a kept connection was closed before the answer began.
    assert remote.counts.retries == (0 if fault == "close" else 1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", r"cannot be read, tried 3 times: HTTP 500 \(OSError\); check the address and the network"),
        ("drop", r"cannot be read, tried 3 times: .*; check"),
        ("short", r"cannot be read, tried 3 times: 128 bytes came, 256 were asked for"),
        ("wrong", r"cannot be read, tried 2 times: checksum mismatch, the data is damaged; restore it"),
        ("shifted", r"cannot be read, tried 3 times: the server sent bytes from"),
        ("slow", r"cannot be read, tried 3 times: .*Timeout"),
        ("404", r"the file is missing \(HTTP 404\); restore it"),
        ("403", r"HTTP 403: not allowed"),
        ("418", r"the server answers HTTP 418 without the range"),
        ("ignore-range", r"the server ignores ranges and sends whole files"),
    ],
)
def test_a_fault_that_stays_is_an_error_that_names_shard_and_block(
    server: FaultyServer, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "slow":
        monkeypatch.setenv("SAEFORGE_READ_TIMEOUT", "0.5")
    remote = ActivationDataset.open(server.url)
    server.always(fault)
    with pytest.raises(DatasetError, match=f"{SHARD}: {words}") as caught:
        remote.read_block("train", first_of_second_shard(remote))
    assert "\n" not in str(caught.value)
    server.always("")
    remote.read_block("train", first_of_second_shard(remote))  # and nothing wrong was kept


def test_a_server_that_ignores_ranges_is_refused_at_open_before_it_sends_much(server: FaultyServer) -> None:
    server.always("ignore-range")
    with pytest.raises(DatasetError, match=r"\.tar: the server ignores ranges and sends whole files; use one"):
        ActivationDataset.open(server.url)


def test_redirects_are_followed_and_a_lost_dataset_is_said_to_be_lost(server: FaultyServer, dataset: Path) -> None:
    server.fault = lambda asked: "redirect"
    assert same(everything(ActivationDataset.open(dataset)), everything(ActivationDataset.open(server.url)))
    with pytest.raises(DatasetError, match=r"no manifest\.json in http://127\.0\.0\.1:\d+/data/other"):
        ActivationDataset.open(server.url + "/other")
    (dataset / "array.out" / "train-000001.tar").unlink()
    with pytest.raises(DatasetError, match=r"shard http://.*/array\.out/train-000001\.tar is missing; restore it"):
        ActivationDataset.open(server.url)


@pytest.mark.parametrize("fault", ["short", "wrong", "500", "drop"])
def test_a_manifest_that_came_damaged_is_read_again(server: FaultyServer, dataset: Path, fault: str) -> None:
    server.once(fault, "manifest.json")
    assert ActivationDataset.open(server.url).fingerprint == ActivationDataset.open(dataset).fingerprint
    server.always(fault, "manifest.json")
    with pytest.raises(DatasetError, match=r"manifest\.json"):
        ActivationDataset.open(server.url)


def test_random_faults_give_the_right_rows_or_an_error_and_never_others(
    dataset: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = ActivationDataset.open(dataset), ActivationDataset.open(server.url)
    faults = [fault for fault in (*PASSING, "404", "403", "ignore-range", "redirect") if fault != "slow"]
    rng = random.Random(0)

    def fault(asked: Asked) -> str:
        return rng.choice(faults) if rng.random() < 0.6 else ""

    server.fault = fault
    errors, read = [], 0
    for index in range(remote.n_blocks("train")):
        expected = local.read_block("train", index)
        try:
            block = remote.read_block("train", index)
        except DatasetError as error:
            errors.append(str(error))
        else:
            assert torch.equal(block, expected)
            read += 1
    assert all("/array.out/train-00000" in error and ", block " in error for error in errors)
    assert min(read, len(errors)) > 10


def test_retries_leave_the_random_numbers_of_training_alone(server: FaultyServer) -> None:
    remote = ActivationDataset.open(server.url)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    server.once("500")
    remote.read_block("train", 0)
    assert remote.counts.retries == 1
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(states[2], torch.get_rng_state())


# What may be asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("pipe:cat acts.tar", "runs no shell commands"),
        ("ftp://host/acts", r"cannot read ftp://; give a folder, or a URL that starts with file://, s3://, gs://"),
        ("simplecache::s3://bucket/acts", "cannot read simplecache::s3://"),
        ("acts/rows.pth", "does not open pickles"),
        ("https://host/acts.PT", "does not open pickles"),
        ("s3://bucket/rows.pkl", "does not open pickles"),
        ("https://host/acts?token=1", r"without \? or #"),
        ("s3://", "expected the address of a dataset's folder"),
    ],
)
def test_what_is_no_dataset_is_refused_before_anything_is_read(location: str, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        ActivationDataset.open(location)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named_with_its_command(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DatasetError, match=rf"{scheme}:// needs the package {package}; pip install {package}$"):
        ActivationDataset.open(f"{scheme}://bucket/acts")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("hf://datasets/me/acts", "datasets/me/acts/resolve/main"),
        ("hf://datasets/me/acts@v2/layer 3/", "datasets/me/acts/resolve/v2/layer%203"),
        ("hf://me/acts@refs/pr/7/a/b", "me/acts/resolve/refs%2Fpr%2F7/a/b"),
    ],
)
def test_the_hub_is_read_by_ranges_at_the_files_own_addresses(
    dataset: Path, tmp_path: Path, url: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    shutil.copytree(dataset, tmp_path / "hub" / unquote(place))
    with serve(tmp_path / "hub") as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        remote = ActivationDataset.open(url)
        assert remote.location == url.rstrip("/")
        assert torch.equal(remote.read_block("train", 3), ActivationDataset.open(dataset).read_block("train", 3))
        assert {asked.authorization for asked in server.asked} == {"Bearer hf_me"}
    with pytest.raises(DatasetError, match="expected hf://datasets/USER/NAME or"):
        ActivationDataset.open("hf://datasets")


def test_a_password_is_used_and_never_shown(server: FaultyServer) -> None:
    remote = ActivationDataset.open(server.url.replace("http://", "http://me:secret@"))
    assert {asked.authorization for asked in server.asked} == {"Basic " + b64encode(b"me:secret").decode()}
    assert remote.location == server.url
    server.always("500")
    with pytest.raises(DatasetError, match="HTTP 500") as caught:
        remote.read_block("train", 0)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("fault", ["error", "short", "wrong", "hangs"])
def test_other_file_systems_get_the_same_patience(
    dataset: Path, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAEFORGE_READ_TIMEOUT", "0.5")
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/bucket/acts", recursive=True)
    remote = ActivationDataset.open("memory://bucket/acts")
    original, left = type(memory).cat_file, [fault]

    def cat_file(self: Any, path: str, start: int, end: int) -> bytes:
        content = original(self, path, start=start, end=end)
        now = left.pop() if left else ""
        if now == "error":
            raise OSError("the line is dead")
        if now == "hangs":
            time.sleep(1.5)
        return {"short": content[:-1], "wrong": content[:-1] + bytes([content[-1] ^ 1])}.get(now, content)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    try:
        assert torch.equal(remote.read_block("train", 9), ActivationDataset.open(dataset).read_block("train", 9))
        assert remote.counts.retries == 1
        shutil.rmtree(tmp_path / "cache")
        left += [fault] * 3
        with pytest.raises(
            DatasetError, match=r"memory://bucket/acts/array\.out/train-000000\.tar, block 9: cannot be"
        ):
            remote.read_block("train", 9)
    finally:
        memory.rm("/bucket", recursive=True)


def test_numbers_in_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_READ_TRIES", "many")
    with pytest.raises(ConfigError, match="SAEFORGE_READ_TRIES=many: expected a number, 0 or more"):
        ActivationDataset.open("memory://bucket/acts")

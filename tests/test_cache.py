"""The cache: by content, within its cap, shared by processes, and never a reason for a wrong row or a failed run."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest

from saeforge.data import cache as cache_module
from saeforge.data.cache import Cache
from saeforge.errors import ConfigError


def content(number: int, size: int = 1000) -> memoryview:
    return memoryview(bytearray(np.random.default_rng(number).bytes(size)))


def key(number: int) -> str:
    return f"{number:064x}-4096-1000"


def load(cache: Cache, number: int, size: int = 1000) -> bool:
    memory = memoryview(bytearray(size))
    found = cache.load(key(number), memory, zlib.crc32(content(number, size)))
    assert not found or memory == content(number, size)
    return found


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "entries").rglob("*") if path.is_file()]


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


def age(cache: Cache, number: int, seconds: float) -> None:
    path = cache._path(key(number))
    assert path is not None
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def test_what_is_stored_is_found_by_any_process_and_under_no_other_key(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    assert not load(cache, 1)
    cache.store(key(1), content(1))
    assert load(cache, 1)
    assert load(Cache(tmp_path, 10**6), 1)
    assert not load(cache, 2)
    assert [path.name for path in entries(tmp_path)] == [key(1)]


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty"])
def test_a_damaged_entry_is_a_miss_and_is_removed(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.store(key(1), content(1))
    (path,) = entries(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[500] ^= 1 if damage == "flip" else 0
    path.write_bytes(bytes({"flip": whole, "cut": whole[:-1], "longer": whole + b"x", "empty": b""}[damage]))
    assert not load(cache, 1)
    assert entries(tmp_path) == []
    cache.store(key(1), content(1))
    assert load(cache, 1)


def test_the_cap_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10_000)
    for number in range(9):
        cache.store(key(number), content(number))
        age(cache, number, 100 - number)
    assert load(cache, 0)  # now the youngest
    for number in range(9, 12):
        cache.store(key(number), content(number))
        assert total(tmp_path) <= 10_000
    kept = {number for number in range(12) if load(cache, number)}
    assert {0, 9, 10, 11} <= kept
    assert not {1, 2} & kept
    assert kept == {0, *range(min(kept - {0}), 12)}  # nothing younger went before something older
    cache.store(key(50), content(50, 10_001))  # larger than the cap: not kept, and nothing goes for it
    assert {number for number in range(12) if load(cache, number)} == kept


def test_what_earlier_processes_left_counts(tmp_path: Path) -> None:
    for number in range(8):
        Cache(tmp_path, 10_000).store(key(number), content(number))
        age(Cache(tmp_path, 10_000), number, 100 - number)
    small = Cache(tmp_path, 3000)
    small.store(key(8), content(8))
    assert total(tmp_path) <= 3000
    assert load(small, 8)
    assert not load(small, 0)


def test_off_means_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("SAEFORGE_CACHE_GB", "0")
    cache = Cache.from_environment()
    cache.store(key(1), content(1))
    assert not load(cache, 1)
    with cache.workplace() as place:
        (place / "file").write_bytes(b"x")
        cache.adopt("0" * 64, place / "file")
        assert not cache.link("0" * 64, place / "other")
    assert not place.exists()
    assert not (tmp_path / "c").exists()


def test_the_folder_and_the_cap_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAEFORGE_CACHE", "SAEFORGE_CACHE_GB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = Cache.from_environment()
    assert (cache.folder, cache.cap) == (tmp_path / ".cache" / "saeforge", 50 * 10**9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert Cache.from_environment().folder == tmp_path / "x" / "saeforge"
    monkeypatch.setenv("SAEFORGE_CACHE", str(tmp_path / "s"))
    monkeypatch.setenv("SAEFORGE_CACHE_GB", "0.5")
    cache = Cache.from_environment()
    assert (cache.folder, cache.cap) == (tmp_path / "s", 500_000_000)
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("SAEFORGE_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match=f"SAEFORGE_CACHE_GB={wrong}: expected a number, 0 or more"):
            Cache.from_environment()


def test_a_full_disk_is_one_warning_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.store(key(1), content(1))

    def full(self: Path, data: memoryview) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match=r"cannot be written \(No space left on device\): reading goes on without it"):
        cache.store(key(2), content(2))
    cache.store(key(3), content(3))  # a second warning would be an error
    assert [path.name for path in entries(tmp_path)] == [key(1)]
    assert load(cache, 1)


def test_a_folder_that_cannot_be_made_is_one_warning_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file", 10**6)
    with pytest.warns(UserWarning, match="reading goes on without it"):
        cache.store(key(1), content(1))
    assert not load(cache, 1)
    with cache.workplace() as place:
        assert place.is_dir()


@pytest.mark.parametrize("links", [True, False])
def test_whole_files_are_adopted_linked_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:  # some network disks

        def refuse(self: Path, target: Path) -> None:
            if not target.exists():
                raise FileNotFoundError(target)
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    cache = Cache(tmp_path, 10**6)
    with cache.workplace() as place:
        path = place / "train.tokens.npy"
        np.save(path, np.arange(100))
        sha256 = cache_module.hash_file(path)
        assert not cache.link(sha256, place / "again.npy")
        cache.adopt(sha256, path)
    assert not place.exists()
    with cache.workplace() as place:
        assert cache.link(sha256, place / "again.npy")
        array = np.load(place / "again.npy", mmap_mode="r")
    (entry,) = entries(tmp_path)
    entry.unlink()  # as an eviction by another process would
    assert np.array_equal(array, np.arange(100))
    with cache.workplace() as place:
        np.save(place / "a.npy", np.arange(100))
        cache.adopt(sha256, place / "a.npy")
        cache.adopt(sha256, place / "a.npy")  # twice the same: two processes at once
    (entry,) = entries(tmp_path)
    damaged = bytearray(entry.read_bytes())
    damaged[-1] ^= 1
    entry.write_bytes(bytes(damaged))
    with cache.workplace() as place:
        assert not cache.link(sha256, place / "again.npy")
        assert list(place.iterdir()) == []
    assert entries(tmp_path) == []


@pytest.mark.parametrize("wrong", ["../../x", "a" * 63, "/tmp/x-1-2", f"{'a' * 64}-1-2/../../x", ""])
def test_a_key_that_is_no_hash_names_no_file(tmp_path: Path, wrong: str) -> None:
    cache = Cache(tmp_path / "c", 10**6)
    cache.store(wrong, content(1))
    assert not cache.load(wrong, content(1), zlib.crc32(content(1)))
    assert list(tmp_path.rglob("*")) == []


def test_a_cache_that_is_removed_under_way_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 10**6)
    cache.store(key(1), content(1))
    shutil.rmtree(tmp_path / "c")
    assert not load(cache, 1)
    cache.store(key(2), content(2))
    assert load(cache, 2)


def test_what_killed_processes_left_is_swept_away_after_a_day(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10_000)
    cache.store(key(1), content(1))
    (entry,) = entries(tmp_path)
    old, young = entry.with_name("a.part-1-1"), entry.with_name("b.part-2-2")
    left = tmp_path / "work" / "saeforge-left"
    left.mkdir(parents=True)
    for path in (old, young, left / "file"):
        path.write_bytes(b"half")
    for path in (old, left):
        os.utime(path, (1, 1))
    Cache(tmp_path, 10_000).store(key(2), content(2))
    assert not old.exists()
    assert not left.exists()
    assert young.exists()


WORKER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import numpy as np
    from saeforge.data.cache import Cache
    from tests.test_cache import content, key, load
    cache = Cache(Path(sys.argv[1]), 20_000)
    rng = np.random.default_rng(int(sys.argv[2]))
    hits = 0
    for _ in range(400):
        number = int(rng.integers(40))
        if load(cache, number):
            hits += 1
        else:
            cache.store(key(number), content(number))
    print(hits)
    """
)


def test_three_processes_share_a_cache_that_is_too_small(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for number in range(3)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert err == ""
        assert int(out) > 20
    # Each process sees its own writes at once and those of the others when it looks, before its next write.
    assert total(tmp_path) <= 20_000 + 2 * 1000
    assert not [path for path in entries(tmp_path) if ".part-" in path.name]
    cache = Cache(tmp_path, 20_000)
    assert sum(load(cache, number) for number in range(40)) == len(entries(tmp_path)) > 10

"""Harvests that are killed, stopped, out of space, or many at once end in the same bytes as one left in peace."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saeforge.errors import ConfigError, SaeforgeError
from saeforge.harvest import locks
from saeforge.harvest.ranks import Rank
from tests.tiny_models import make_documents, save_model, write_text_folder

ROOT = Path(__file__).parent.parent
Jobs = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Run harvests in processes of their own, side by side; see `tests.harvest_processes`."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.harvest_processes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(jobs) + "\n")
        server.stdin.flush()
        return list(json.loads(server.stdout.readline()))

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_model("llama", home / "llama")
    write_text_folder(home / "text", make_documents(90))
    return home


def options(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(home / "llama"),
        "sites": ["resid_post.1", "resid_pre.1"],
        "out": str(out),
        "text": str(home / "text"),
        "n_tokens": 3_600,
        "context_length": 64,
        "batch_contexts": 8,
        "validation_share": 0,
        "bucket_rows": 512,
        "group_rows": 2,
        "device": "cpu",
    } | changes


def files_of(root: Path) -> dict[str, bytes]:
    """Everything but locks: the card too, as all versions are the same here."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != ".lock" and not name.startswith(".claims/")}


@pytest.fixture(scope="module")
def whole(home: Path, jobs: Jobs) -> dict[str, Any]:
    """An undisturbed harvest: its files and its steps."""
    (result,) = jobs({"options": options(home, home / "whole")})
    assert result["status"] == 0, result["err"]
    return {"files": files_of(home / "whole"), **result}


def assert_same(root: Path, whole: dict[str, Any]) -> None:
    found = files_of(root)
    assert found.keys() == whole["files"].keys()
    assert [name for name in found if found[name] != whole["files"][name]] == []


def points(steps: list[str], count: int) -> list[int]:
    """Choose different steps, as evenly over their kinds as there are enough, at random within each; 1 is the first."""
    rng = random.Random(5)
    numbers = {kind: [n for n, step in enumerate(steps, start=1) if step == kind] for kind in sorted(set(steps))}
    rounds = [rng.sample(found, len(found)) for found in numbers.values()]
    return [point for turn in itertools.zip_longest(*rounds) for point in turn if point is not None][:count]


def kill_and_go_on(home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any], at: list[int]) -> None:
    for point in at:
        given = options(home, tmp_path / str(point))
        (killed,) = jobs({"options": given, "at": point})
        assert killed["status"] == -9, (point, killed["err"])
        # The order of steps is not fixed where threads write shards, but all of it is one of the kinds.
        assert len(killed["steps"]) >= point
        (finished,) = jobs({"options": given})
        assert finished["status"] == 0, (point, finished["err"])
        assert not set(finished["made"]) & set(killed["made"]), "what is committed is not made again"
        assert_same(tmp_path / str(point), whole)


def test_steps_cover_a_harvest(whole: dict[str, Any]) -> None:
    files = ("shard", "record", "tokens", "card", "manifest")
    renames = {f"{when} {file}" for when in ("rename", "renamed") for file in files}
    assert set(whole["steps"]) == {"cut", "forward", "merge", "header", "fsync", "bucket", "finish"} | renames


def test_killed_at_three_points(home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any]) -> None:
    steps = whole["steps"]
    last = {kind: max(n for n, step in enumerate(steps, start=1) if step == kind) for kind in set(steps)}
    shards = [number for number, step in enumerate(steps, start=1) if step == "rename shard"]
    kill_and_go_on(
        home, tmp_path, jobs, whole, [shards[len(shards) // 2], last["renamed record"], last["renamed manifest"]]
    )


@pytest.mark.slow
def test_killed_at_fifty_random_points(home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any]) -> None:
    kill_and_go_on(home, tmp_path, jobs, whole, points(whole["steps"], 50))


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_the_work_and_one_is_killed(
    home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any], count: int
) -> None:
    blocks = whole["steps"].count("header")
    for turn in range(5):  # on a busy machine the others may have done everything before the first one begins
        out = tmp_path / f"o{turn}"
        group: list[dict[str, Any]] = [{"options": options(home, out), "slow": 0.25} for _ in range(count)]
        group[0]["at"] = ["header", 6 + blocks // len(whole["made"]) // 2]  # in the middle of its first bucket
        results = jobs(*group)
        if results[0]["status"]:
            break
    assert [result["status"] for result in results] == [-9, *[0] * (count - 1)], results
    made = [bucket for result in results for bucket in result["made"]]
    assert sorted(made) == sorted(whole["made"]), "each bucket is committed once"
    assert all(result["made"] for result in results[1:])
    assert_same(out, whole)


def test_who_waits_takes_over_when_the_preparing_process_is_killed(
    home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any]
) -> None:
    """Whoever comes first is killed in the middle of the text, then whoever was waiting, then the third one is left."""
    given = options(home, tmp_path / "o")
    cuts = whole["steps"].count("cut")
    results = jobs(*({"options": given, "at": ["cut", cuts // 2]} for _ in range(2)), {"options": given, "slow": 0.1})
    statuses = [result["status"] for result in results]
    assert statuses[2] == 0, results
    assert set(statuses[:2]) <= {0, -9}  # 0: it came after the third, and had nothing to prepare
    assert_same(tmp_path / "o", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_three_processes_killed_at_random_until_one_is_through(
    home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any], seed: int
) -> None:
    given, rng = options(home, tmp_path / "o"), random.Random(seed)
    statuses: list[int] = []
    while 0 not in statuses:
        results = jobs(*({"options": given, "at": rng.randint(1, 300), "slow": 0.05} for _ in range(3)))
        statuses += [result["status"] for result in results]
        assert set(statuses) <= {0, -9}, results
    assert statuses.count(-9) > 3
    assert_same(tmp_path / "o", whole)


def test_ranks_begin_with_buckets_of_their_own_and_rank_0_alone_speaks(
    home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any]
) -> None:
    given = options(home, tmp_path / "o")
    ranks = [
        {"options": given, "slow": 0.5, "environment": {"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}}
        for i in (0, 1)
    ]
    results = jobs(*ranks)
    assert [result["status"] for result in results] == [0, 0], results
    assert_same(tmp_path / "o", whole)
    assert "train" in results[0]["out"]
    assert results[1]["out"] == ""
    made = [result["made"] for result in results]
    assert sorted(made[0] + made[1]) == sorted(whole["made"])
    for number in (0, 1):  # first its own, in order; then what the other has not come to
        own = [bucket for bucket in whole["made"][number::2] if bucket in made[number]]
        assert own
        assert made[number][: len(own)] == own


def test_an_overwriting_process_is_refused_while_others_harvest(home: Path, tmp_path: Path, jobs: Jobs) -> None:
    root = tmp_path / "o"
    (done,) = jobs({"options": options(home, root)})
    assert done["status"] == 0, done["err"]
    with (root / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as a process that harvests does
        before = files_of(root)
        (refused,) = jobs({"options": options(home, root, seed=1, overwrite=True)})
        assert refused["status"] == 2
        assert "another harvest is writing to" in refused["err"]
        (same,) = jobs({"options": options(home, root, overwrite=True)})
        assert same["status"] == 0
        assert same["out"].startswith("already finished")
        assert files_of(root) == before
    (replaced,) = jobs({"options": options(home, root, seed=1, overwrite=True)})
    assert replaced["status"] == 0, replaced["err"]
    assert files_of(root)["manifest.json"] != before["manifest.json"]


def test_a_claimed_bucket_is_waited_for_and_its_strange_parts_are_left(
    home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any]
) -> None:
    """A live process holds the claim of bucket 1 and commits it; another one does all the rest and waits."""
    root = tmp_path / "o"
    given = options(home, root)
    at = whole["steps"].index("bucket") + 1
    (killed,) = jobs({"options": given, "at": at})
    assert killed["status"] == -9
    part = root / "rows" / "train-000001.tar.part-elsewhere-1-abc"
    part.write_bytes(b"in work")
    claim = root / ".claims" / "train-000001"
    descriptor = locks.take(claim)
    assert descriptor is not None
    code = (
        "import sys, time; from pathlib import Path; root = Path(sys.argv[1])\n"
        "while len(list((root / 'index').glob('*.json'))) < int(sys.argv[2]): time.sleep(0.05)\n"
    )
    # Let go when all other buckets are there: the lock is the kernel's, and dies with the last holder.
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(root), str(len(whole["made"]) - 1)], pass_fds=[descriptor]
    )
    os.close(descriptor)
    (finished,) = jobs({"options": given})
    assert holder.wait() == 0
    assert finished["status"] == 0, finished["err"]
    assert finished["made"][-1] == "train-1"
    assert finished["err"].count(f"waiting for other processes to finish 1 buckets of {root}") == 1
    assert not part.exists()  # removed with the claim, not before: nothing else would have been left of it
    assert_same(root, whole)


KINDS = ("cut", "forward", "merge", "header", "rename shard", "rename record", "renamed card", "rename manifest")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "header" else pytest.mark.slow) for kind in KINDS]
)
def test_ctrl_c_anywhere_says_how_to_go_on(
    home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any], kind: str
) -> None:
    given = options(home, tmp_path / "o")
    middle = (whole["steps"].count(kind) + 1) // 2
    (stopped,) = jobs({"options": given, "at": [kind, middle], "signal": "SIGINT"})
    assert stopped["status"] == 130, stopped["err"]
    assert stopped["err"].splitlines()[-1] == "saeforge: stopped; the same command goes on where this one was"
    assert list((tmp_path / "o").rglob("*.part-*")) == []
    (finished,) = jobs({"options": given})
    assert finished["status"] == 0, finished["err"]
    assert_same(tmp_path / "o", whole)


@pytest.mark.parametrize("tenth", [pytest.param(n, marks=[] if n == 5 else pytest.mark.slow) for n in range(0, 11)])
def test_a_full_disk_is_told_and_leaves_no_half_file(
    home: Path, tmp_path: Path, jobs: Jobs, whole: dict[str, Any], tenth: int
) -> None:
    hit = [number for number, step in enumerate(whole["steps"], start=1) if step in ("fsync", "header", "rename shard")]
    root = tmp_path / "o"
    (full,) = jobs({"options": options(home, root), "at": hit[(len(hit) - 1) * tenth // 10], "signal": "full"})
    assert full["status"] == 2, full
    assert full["err"].splitlines()[-1].startswith("saeforge: error: no space left")
    assert "free some space and run the same command again" in full["err"].splitlines()[-1]
    for name, content in files_of(root).items():
        if name.endswith(".tar") or name.startswith("index/") or name == "manifest.json":
            assert content == whole["files"][name], f"{name} is not whole"
    assert list(root.rglob("*.part-*")) == []
    (finished,) = jobs({"options": options(home, root)})
    assert finished["status"] == 0, finished["err"]
    assert_same(root, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_others_fill_meanwhile(home: Path, small_disk: Path, jobs: Jobs, whole: dict[str, Any]) -> None:
    """Enough is free at the start, so that it is found out in the middle of writing."""
    filler = small_disk / "filler"
    given = options(home, small_disk / "o")
    (killed,) = jobs({"options": given, "at": whole["steps"].index("bucket") + 20})
    assert killed["status"] == -9
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(bytes(free - 20_000))
    (full,) = jobs({"options": given})
    assert full["status"] == 2
    assert "free" in full["err"].splitlines()[-1]
    filler.unlink()
    (finished,) = jobs({"options": given})
    assert finished["status"] == 0, finished["err"]
    assert_same(small_disk / "o", whole)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with pytest.raises(SaeforgeError, match=r"has no file locks \(flock: No locks available\).*choose an --out"):
        locks.take(tmp_path / "l")


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes the file between another's open and lock: the other must not believe that it holds it."""
    path = tmp_path / "l"
    real, calls = locks.fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    descriptor = locks.take(path)
    assert len(calls) == 2
    assert descriptor is not None
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    assert locks.take(path) is None
    os.close(descriptor)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank()),
        ({"SLURM_NTASKS": "4"}, Rank()),  # in an allocation, but not started by srun
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Rank(3, 8, 1, 2)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x1),2"},
            Rank(5, 6, 1, 4),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "7", "SLURM_NTASKS": "8"}, Rank(0, 1)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, Rank(1, 2, 1, 2)),  # Lightning's launcher
    ],
)
def test_ranks_are_read_from_torchrun_and_slurm(environment: dict[str, str], rank: Rank) -> None:
    assert Rank.here(environment) == rank


def test_ranks_spread_over_devices_and_buckets() -> None:
    ranks = [Rank(i, 4, i % 2, 2) for i in range(4)]
    assert [rank.device("auto", "cuda", 2) for rank in ranks] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert ranks[3].device("auto", "cpu", 0) == "cpu"
    assert ranks[3].device("cuda:0", "cuda:0", 2) == "cuda:0"
    assert Rank().device("auto", "cuda", 2) == "cuda"
    assert ranks[1].own_first(list(range(10))) == [1, 5, 9, 0, 2, 3, 4, 6, 7, 8]
    with pytest.raises(ConfigError, match="WORLD_SIZE = 'two': expected a number"):
        Rank.here({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(ConfigError, match="RANK = 4 and WORLD_SIZE = 4: expected a rank below"):
        Rank.here({"RANK": "4", "WORLD_SIZE": "4"})

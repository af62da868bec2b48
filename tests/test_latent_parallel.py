"""`trainer.strategy: latent_parallel`: any layout trains what one device trains, and goes on from any other's state."""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saeforge
from saeforge.data.plan import Plan
from saeforge.data.source import Rows
from saeforge.data.tensor_source import TensorSource
from saeforge.errors import CheckpointError, ConfigError, DatasetError
from saeforge.ops import Group, Shard, latents_over
from saeforge.registry import VARIANTS
from saeforge.sae import SAE
from saeforge.training import parts, whole
from saeforge.training.data import ActivationData
from saeforge.training.member import Member
from saeforge.training.module import SAEModule
from saeforge.training.settings import Settings
from saeforge.training.shared_rows import SharedLoader
from saeforge.training.sharing import check_shared_out
from saeforge.training.trainer import SAETrainer
from saeforge.variants import TopK
from tests.mesh_worker import STEPS, fit
from tests.ranks import Threads
from tests.toy import toy_dataset, toy_rows

ROOT = Path(__file__).parents[1]
INSTALLED = {record.name for record in VARIANTS.records()}
EVERYTHING = {"target_l0": 8.0, "ema_half_life_steps": 5.0, "whitening": "zca", "resample_steps": [6]}
SWEEP = {"sweep": {"a": {"k": 8}, "b": {"variant": "gated", "lr": 3e-4}}}
FITS: dict[str, dict[str, Any]] = {
    "topk": {"variant": "topk", "options": {"k": 4}},
    "everything": {"variant": "gated", "settings": EVERYTHING},
    "sweep": {"variant": "topk", "options": {"k": 4}, "settings": SWEEP, "steps": 6},
    "multi_k": {"variant": "topk", "options": {"k": 8, "k_start": 12, "multi_k": 2}},
    "l1_relu": {"variant": "l1_relu", "options": {"l1": 1.0}},
    "gated": {"variant": "gated"},
    "batchtopk": {"variant": "batchtopk", "options": {"k": 4}},
    "matryoshka": {"variant": "matryoshka", "options": {"k": 4}},
    "jumprelu": {"variant": "jumprelu", "options": {"bandwidth": 0.1}},
    # Unclipped at the test's rates. Clipped, as its recipe is, it amplifies the last bit at 1e-3, tenfold every ten
    # steps once p is below 0.4; so there at its own rate.
    "panneal": {"variant": "panneal", "settings": {"max_grad_norm": math.inf}},
    "panneal clipped": {"variant": "panneal", "settings": {"lr": 3e-4}},
    "crosscoder": {"variant": "crosscoder", "options": {"k": 4}},
    "skip transcoder": {
        "variant": "topk",
        "options": {"k": 4, "pre_bias": False},
        "settings": {"skip": True, "ema_half_life_steps": 5.0},
        "transcoder": True,
    },
    "free rows": {"variant": "batchtopk", "options": {"k": 4, "decoder_norm": "free"}},
    "accumulate": {"variant": "topk", "options": {"k": 4}, "accumulate": 2},
}
FAST = ("topk", "everything", "sweep")
LATENT = {"strategy": "latent_parallel"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"ranks": 1},
    "ddp 2": {"ranks": 2},
    "ddp 4": {"ranks": 4},
    "latent 2": {"ranks": 2, **LATENT},
    "latent 4": {"ranks": 4, **LATENT},
    "2x2": {"ranks": 4, **LATENT, "latents": 2},
}

Figures = list[dict[str, float]]


def fit_on_meshes(dataset: Path, folder: Path, stages: dict[str, Any], seconds: float) -> dict[str, dict[str, Figures]]:
    """Runs the worker; the figures of every step, by stage and fit."""
    out = folder / "figures.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.mesh_worker", str(dataset), str(out), json.dumps(stages)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, dict[str, Figures]] = json.loads(out.read_text())
    return result


def assert_same_run(found: Figures, one: Figures) -> None:
    """Two layouts of a run: losses within the rounding of sums in another order."""
    assert len(found) == len(one)
    for there, here in zip(found, one, strict=True):
        # A resumed run has not validated yet.
        assert there.keys() >= {name for name in here if not name.endswith("val_fvu")}
        for name, value in here.items():
            kind = name.split("/")[-1]
            # Adam divides rounding noise by itself where a gradient is near 0: weights part sooner than the loss.
            bound = {"loss": 1e-5, "fvu": 1e-4, "val_fvu": 1e-4, "l0": 1e-3}.get(kind, 0.0)
            if name in there:
                assert there[name] == pytest.approx(value, rel=bound, abs=0), (name, here["step"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset."""
    return toy_dataset(tmp_path_factory.mktemp("toy") / "acts")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's fits have their RUN folders."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(dataset: Path, runs: Path) -> dict[str, dict[str, Figures]]:
    """Some fits on one device and on two that share out the latents, and one that moves between the two."""
    topk = {**FITS["topk"], "settings": {"ema_half_life_steps": 5.0}}
    third, two_thirds = STEPS // 3, 2 * STEPS // 3
    moving, still, whole_run = ({**topk, "run": str(runs / name)} for name in ("moving", "still", "one"))
    stages = {
        "one": {
            "ranks": 1,
            "fits": {
                **{name: FITS[name] for name in FAST},
                "whole": whole_run,
                "moving": {**moving, "stop_after": third},
            },
        },
        "latent 2": {
            **LAYOUTS["latent 2"],
            "fits": {
                **{name: FITS[name] for name in FAST},
                "moving": {**moving, "stop_after": two_thirds, "resume": True},
                "whole": {**topk, "run": str(runs / "two")},
                "still": {**still, "stop_after": third},
            },
        },
        "latent 2, again": {**LAYOUTS["latent 2"], "fits": {"still": {**still, "resume": True}}},
        "one, again": {"ranks": 1, "fits": {"moving": {**moving, "resume": True}}},
    }
    return fit_on_meshes(dataset, runs, stages, 170)


@pytest.mark.parametrize("name", FAST)
def test_two_ranks_that_share_out_latents_train_what_one_device_trains(
    name: str, found: dict[str, dict[str, Figures]]
) -> None:
    assert_same_run(found["latent 2"][name], found["one"][name])
    if name == "topk":
        assert max(step["dead"] for step in found["one"][name]) > 0, "AuxK was not compared"


def test_a_run_moves_between_layouts(found: dict[str, dict[str, Figures]], runs: Path) -> None:
    moved = found["one"]["moving"] + found["latent 2"]["moving"] + found["one, again"]["moving"]
    assert [step["step"] for step in moved] == list(range(1, STEPS + 1))
    assert_same_run(moved, found["one"]["whole"])
    one, other = (saeforge.load(runs / name) for name in ("one", "moving"))
    torch.testing.assert_close(other.W_enc, one.W_enc, rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in (runs / "moving" / "checkpoints").iterdir()) == ["last.ckpt"]


def test_a_resumed_run_of_the_same_layout_has_the_same_bits(found: dict[str, dict[str, Figures]], runs: Path) -> None:
    straight = found["latent 2"]["whole"]
    for halves, whole_step in zip(
        found["latent 2"]["still"] + found["latent 2, again"]["still"], straight, strict=True
    ):
        assert halves["loss"] == whole_step["loss"]
    for file in ("sae.safetensors", "sae.json"):
        assert (runs / "still" / "sae" / file).read_bytes() == (runs / "two" / "sae" / file).read_bytes()


@pytest.mark.usefixtures("found")
def test_the_folded_sae_is_the_same_file_from_any_layout(dataset: Path, runs: Path, tmp_path: Path) -> None:
    """The SAE that two ranks put together, and that of one device which resumes their last checkpoint."""
    shutil.copytree(runs / "two", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "sae")
    resume(dataset, tmp_path / "run")
    for file in ("sae.safetensors", "sae.json"):
        assert (tmp_path / "run" / "sae" / file).read_bytes() == (runs / "two" / "sae" / file).read_bytes()


def resume(dataset: Path, run: Path) -> None:
    """Resumes the finished `topk` run of the module on one device, in this process."""
    fit(
        str(dataset),
        {"ranks": 1},
        {**FITS["topk"], "settings": {"ema_half_life_steps": 5.0}, "run": str(run), "resume": True},
    )


@pytest.mark.slow
@pytest.mark.timeout(3700)
@pytest.mark.parametrize(("precision", "lr", "bound"), [("float64", 1e-3, 1e-9), ("float32", 1e-4, 1e-5)])
def test_every_variant_on_every_layout_has_the_losses_of_one_device(
    precision: str, lr: float, bound: float, dataset: Path, tmp_path: Path
) -> None:
    """Over 200 steps.

    In float64 at a fast rate: the layouts compute the same. In float32 at a rate nearer to the papers': at ten times
    that, some runs meet forks where one bit decides whether a latent fires, and training amplifies it
    (docs/scaling.md).
    """
    fits = {
        name: {**given, "steps": 200, "settings": {"lr": lr, **given.get("settings", {})}}
        for name, given in FITS.items()
        if given["variant"] in INSTALLED
    }
    wide = {"float64": precision == "float64"}
    stages = {name: {**layout, **wide, "fits": fits} for name, layout in LAYOUTS.items()}
    figures = fit_on_meshes(dataset, tmp_path, stages, 3600)
    apart = {
        (name, layout): parting(figures[layout][name], figures["one"][name]) for name in fits for layout in LAYOUTS
    }
    for (name, layout), most in apart.items():
        print(f"{precision} {layout:9} {name:16} {most:.1e}")
    assert {where: most for where, most in apart.items() if most > bound} == {}


def parting(found: Figures, one: Figures) -> float:
    """The largest relative difference of two runs' losses at the same step."""
    assert len(found) == len(one)
    return max(
        abs(there[key] - value) / value
        for there, here in zip(found, one, strict=True)
        for key, value in here.items()  # a batch that only accumulates reads nothing out
        if key.endswith("loss")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts", [("one", "latent 4", "latent 2"), ("ddp 2", "latent 2", "ddp 4"), ("2x2", "ddp 2", "latent 4")]
)
def test_any_layout_goes_on_from_any_other(layouts: tuple[str, ...], dataset: Path, tmp_path: Path) -> None:
    chosen = {name: FITS[name] for name in ("topk", "everything", "sweep")}
    fits = {name: {**given, "steps": STEPS, "run": str(tmp_path / name)} for name, given in chosen.items()}
    alone = {name: {**given, "run": None} for name, given in fits.items()}
    stages: dict[str, Any] = {"alone": {"ranks": 1, "fits": alone}}
    for number, layout in enumerate(layouts, 1):
        ends = {"resume": number > 1, "stop_after": number * STEPS // 3}
        stages[str(number)] = {**LAYOUTS[layout], "fits": {name: {**given, **ends} for name, given in fits.items()}}
    figures = fit_on_meshes(dataset, tmp_path, stages, 600)
    for name in fits:
        moved = [step for number in "123" for step in figures[number][name]]
        assert [step["step"] for step in moved] == list(range(1, STEPS + 1))
        assert_same_run(moved, figures["alone"][name])


# What is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> TensorSource:
    """Rows in memory."""
    return TensorSource(toy_rows(4096))


@pytest.mark.parametrize(
    ("trainer", "options", "settings", "words"),
    [
        ({"devices": 3, "latents": 2}, {}, {}, r"trainer\.latents = 2 does not divide 3 processes"),
        ({"devices": 3}, {}, {}, "d_sae = 128 does not divide among 3 ranks"),
        ({"devices": 2}, {"d_sae": 32}, {}, "d_sae = 32 is also a width"),
        ({"devices": 2}, {}, {"optimizer": torch.optim.Adafactor}, "Adafactor may look at whole weights"),
        ({"devices": 2}, {}, {"grid": {"d_sae": [64, 63]}}, r"model\.sweep\.d63: d_sae = 63 does not divide"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_other_processes_start(
    trainer: dict[str, Any],
    options: dict[str, Any],
    settings: dict[str, Any],
    words: str,
    rows: TensorSource,
    tmp_path: Path,
) -> None:
    data = ActivationData.of(rows, batch_size=64)
    build = functools.partial(TopK, **{"d_sae": 128, "k": 4, **options})
    module = SAEModule(build, data.d_in, data.d_out, **settings)
    host = SAETrainer(
        accelerator="cpu", strategy="latent_parallel", max_steps=2, default_root_dir=str(tmp_path / "run"), **trainer
    )
    with pytest.raises(ConfigError, match=words):
        host.fit(module, data)
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopK, "encode", lambda self, x: x, raising=False)
    member = Member(TopK(4, 4, d_sae=8, k=2), Settings())
    check_shared_out(member, 1)
    with pytest.raises(ConfigError, match="TopK encodes by itself"):
        check_shared_out(member, 2)


def test_a_number_of_latent_ranks_is_for_its_strategy_and_positive() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.latents = 2 is for trainer\.strategy = latent_parallel, not for ddp"
    ):
        SAETrainer(accelerator="cpu", strategy="ddp", devices=2, latents=2)
    with pytest.raises(ConfigError, match=r"trainer\.latents = 0: expected a positive number"):
        SAETrainer(accelerator="cpu", strategy="latent_parallel", devices=2, latents=0)


def test_null_latent_ranks_are_all_of_them() -> None:
    """So that a configuration of a cluster can be tried on a laptop."""
    trainer = SAETrainer(accelerator="cpu", devices=1, strategy="latent_parallel")
    strategy: Any = trainer.strategy
    assert strategy.sizes(1) == (1, 1)
    assert strategy.sizes(8) == (1, 8)


# Reading once -----------------------------------------------------------------------------------------------------


class OfOneReader(TensorSource):
    """A source that one rank alone may read."""

    def __init__(self, rank: int) -> None:
        self.rank = 0
        super().__init__(toy_rows(4096).bfloat16(), lanes=2)
        self.rank = rank

    def read_block(self, split: str, index: int, into: Rows | None = None) -> Rows:
        """Fails on other ranks."""
        if self.rank:
            raise DatasetError("read twice")
        return super().read_block(split, index, into)


def test_the_ranks_of_a_latent_group_train_on_what_the_first_reads() -> None:
    def batches(latents: Group) -> tuple[list[Tensor], int, int]:
        source = OfOneReader(latents.rank)
        plan = Plan(source.n_blocks("train"), source.block_rows("train"), 256, 2, 4, 0, 1)
        loader = SharedLoader(source, plan, 9, latents=latents, reuse=True)
        loader.load_state_dict({**loader.state_dict(), "position": 2})
        read = [batch[0].clone() for batch in loader]
        return read, loader.position, latents.sent["copy"]

    (alone, _, nothing), pair = batches(Group()), Threads(2).run(batches)
    assert nothing == 0
    assert len(alone) == 7
    for read, position, _ in pair:
        assert position == 9
        assert all(torch.equal(a, b) for a, b in zip(read, alone, strict=True))
    assert [sent for *_, sent in pair] == [7 * 256 * 32 * 2, 0]


# The SAE that ranks put together ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["topk", "threshold"])
def test_the_parts_of_an_sae_join_in_small_pieces(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "CHUNK_BYTES", 100)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (24, 5), "b_enc": (24,), "W_dec": (24, 7), "b_dec": (7,), "W_skip": (7, 5)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    skip = tensors.pop("W_skip")
    chosen: dict[str, Any] = {"k": 20} if rule == "topk" else {"threshold": torch.rand(24, generator=generator)}
    given = SAE(**tensors, rule=rule, W_skip=skip, meta={"site": {"id": "h.3"}}, **chosen)  # type: ignore[arg-type]

    def join(latents: Group) -> SAE | None:
        shard = Shard.of(24, latents)
        with latents_over(shard):
            part = given.part(shard)
        return whole.whole(part, shard, torch.device("cpu"), kept=latents.rank == 0)

    kept, *others = Threads(4).run(join)
    assert others == [None] * 3
    assert kept is not None
    assert (kept.rule, kept.k, kept.meta) == (given.rule, given.k, given.meta)
    for name, tensor in given.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name


# Damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(runs: Path, tmp_path: Path, found: Any) -> Path:
    """A run of two ranks, to be damaged."""
    return shutil.copytree(runs / "two", tmp_path / "run")


def folder_of(run: Path) -> Path:
    """What its ranks wrote beside the checkpoint."""
    (folder,) = (run / "checkpoints").glob("last.ckpt.parts-*")
    return folder


def test_a_missing_or_damaged_part_is_one_line(copied: Path, dataset: Path) -> None:
    folder = folder_of(copied)
    largest = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cannot be read"):
        resume(dataset, copied)
    largest.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        resume(dataset, copied)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"last\.ckpt\.parts-"):
        resume(dataset, copied)


class Trap:
    """What would run code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("trap", [Trap(), os.system, subprocess.Popen, torch.load])
def test_nothing_but_descriptions_is_unpickled(trap: Any, copied: Path, dataset: Path) -> None:
    (folder_of(copied) / ".metadata").write_bytes(pickle.dumps(trap))
    with pytest.raises(CheckpointError, match="it asks for"):
        resume(dataset, copied)


def test_rows_that_do_not_divide_are_refused() -> None:
    checkpoint = {"state_dict": {"W": torch.zeros(9, 2)}}
    with pytest.raises(CheckpointError, match="9 latents do not divide among 2"):
        parts.own_rows(checkpoint, [("state_dict", "W")], Group(2, 1))


def test_what_is_taken_out_stays_where_it_was() -> None:
    """An optimizer gives out the dicts that it works with."""
    state = {"exp_avg": torch.ones(2), "step": torch.ones(())}
    checkpoint = {"optimizer_states": [{"state": {3: state}}]}
    taken = parts.take_out(checkpoint, [("optimizer_states", 0, "state", 3, "exp_avg")])
    assert torch.equal(taken['["optimizer_states", 0, "state", 3, "exp_avg"]'], torch.ones(2))
    assert state.keys() == {"exp_avg", "step"}
    assert checkpoint["optimizer_states"][0]["state"][3].keys() == {"step"}


def test_a_new_checkpoint_removes_what_belonged_to_the_old_one(tmp_path: Path) -> None:
    for name in ("last.ckpt.parts-1", "last.ckpt.parts-2", ".last.ckpt.parts-3.part", "best.ckpt.parts-4"):
        (tmp_path / name).mkdir()
    parts.remove_others(tmp_path / "last.ckpt", "last.ckpt.parts-2")
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt.parts-2", "best.ckpt.parts-4"}

"""Latents shared out over ranks: losses, gradients, weights and the SAE are those of one device."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeforge.errors import ConfigError
from saeforge.ops import Above, BatchTopK, Group, Selection, Shard, SparseCode, TopK, encode, latents_over
from saeforge.registry import VARIANTS
from saeforge.variants import Batch, mean_norm_of_others, random_rows, random_unit_rows, shard_, start
from saeforge.variants import TopK as TopKSAE
from tests import latents_worker
from tests.latents import D_SAE, ROWS, STEPS, D, Trained, data, together, train
from tests.ranks import Threads, on_mesh

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "topk": ("topk", {"k": 3, "aux": 0.5, "k_aux": 4}, {}),
    "topk, few dead": ("topk", {"k": 8, "aux": 0.5, "k_aux": 64}, {"weighted": True}),
    "topk, k above a shard's latents": ("topk", {"k": 12, "k_start": 20, "aux": 0.5, "k_aux": 10}, {}),
    "topk, multi_k": ("topk", {"k": 3, "multi_k": 4, "aux": 0.5, "k_aux": 4}, {}),
    "topk, transcoder": ("topk", {"k": 4, "pre_bias": False, "encoder_init": "unit_probes"}, {"d_out": 9}),
    "l1_relu": ("l1_relu", {"l1": 1.0, "l1_warmup_share": 0.5}, {}),
    "gated": ("gated", {"l1": 0.1}, {"weighted": True}),
    "batchtopk": ("batchtopk", {"k": 2.5, "aux": 0.5, "k_aux": 4}, {}),
    "matryoshka": ("matryoshka", {"k": 4, "aux": 0.5, "k_aux": 4}, {}),
    "matryoshka, random prefixes": ("matryoshka", {"k": 4, "random_prefixes": 4, "selection": "topk"}, {}),
    "jumprelu": ("jumprelu", {"bandwidth": 0.3, "aux": 0.5, "k_aux": 4, "frequency_scale": 0.1}, {}),
    "jumprelu, quadratic": ("jumprelu", {"loss": "quadratic", "l0_target": 4, "bandwidth": 0.3}, {}),
    "jumprelu, quadratic over the batch": (
        "jumprelu",
        {"loss": "quadratic", "l0_target": 4, "bandwidth": 0.3, "l0_over": "batch"},
        {"weighted": True},
    ),
    "jumprelu, tanh": ("jumprelu", {"loss": "tanh", "init_l0": 6, "preact": 0.1, "pre_bias": True}, {}),
    "jumprelu, tanh of the dead": (
        "jumprelu",
        {"loss": "tanh", "init_l0": 3, "preact": 0.1, "preact_over": "dead"},
        {"weighted": True},
    ),
    "panneal": ("panneal", {"sparsity": 0.1, "anneal_start_share": 0.0}, {}),
    "crosscoder": ("crosscoder", {"k": 3, "aux": 0.5, "k_aux": 4}, {"sources": (5, 7)}),
    "crosscoder, l1": ("crosscoder", {"sparsity": "l1"}, {"sources": (5, 7)}),
}
ROOT = Path(__file__).parents[1]
INSTALLED = {record.name for record in VARIANTS.records()}
MESHES = [(1, 2), (1, 4), (2, 2)]


def compare(one: Trained, mesh: list[list[Trained]], tolerance: float) -> None:
    """Everything that the ranks hold against what one device has."""
    names = mesh[0][0].variant.latent_names
    for key, value in together([rank.start for rank in mesh[0]], names).items():
        torch.testing.assert_close(value, one.start[key], rtol=tolerance, atol=tolerance, msg=f"start of {key}")
    for row in mesh:
        for step in range(STEPS):
            assert all(rank.losses[step] == row[0].losses[step] for rank in row), "ranks of latents differ in a loss"
            for term, loss in one.losses[step].items():
                assert row[0].losses[step][term] == pytest.approx(loss, rel=tolerance, abs=tolerance), (term, step)
            grads = together([rank.grads[step] for rank in row], names)
            assert grads.keys() == one.grads[step].keys()
            for key, value in grads.items():
                torch.testing.assert_close(value, one.grads[step][key], rtol=10 * tolerance, atol=tolerance, msg=key)
        state = together([rank.variant.state_dict() for rank in row], names)
        for key, value in one.variant.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=tolerance, atol=tolerance, msg=f"end of {key}")


@pytest.mark.parametrize(("rows", "latents"), MESHES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_what_one_device_trains(case: str, rows: int, latents: int) -> None:
    name, options, settings = CASES[case]
    if name not in INSTALLED:
        pytest.skip(f"saeforge-{name} is not installed")
    one = train(name, options, **settings)
    mesh = on_mesh(rows, latents, lambda latents, group: train(name, options, latents, group, **settings))
    compare(one, mesh, 1e-10)
    if "aux" in options:
        assert any(step["aux"] > 0 for step in one.losses), "AuxK was not compared"


@pytest.mark.parametrize("case", ["topk", "topk, multi_k", "l1_relu", "gated", "batchtopk", "crosscoder"])
def test_in_fp32_too(case: str) -> None:
    """By the C++ kernels, where they are."""
    name, options, settings = CASES[case]
    if name not in INSTALLED:
        pytest.skip(f"saeforge-{name} is not installed")
    settings = {**settings, "dtype": torch.float32}
    one = train(name, options, **settings)
    mesh = on_mesh(2, 2, lambda latents, group: train(name, options, latents, group, **settings))
    compare(one, mesh, 1e-5)


def test_in_bf16_up_to_the_rounding_of_what_travels() -> None:
    settings: dict[str, Any] = {"dtype": torch.float32, "compute": torch.bfloat16}
    one = train("topk", CASES["topk"][1], **settings)
    (ranks,) = on_mesh(1, 2, lambda latents, group: train("topk", CASES["topk"][1], latents, group, **settings))
    for step in range(STEPS):
        assert ranks[0].losses[step] == ranks[1].losses[step]
        assert ranks[0].losses[step]["mse"] == pytest.approx(one.losses[step]["mse"], rel=2e-2)


@pytest.mark.parametrize("case", ["topk", "gated", "batchtopk"])
def test_the_folded_parts_encode_and_decode_together(case: str) -> None:
    name, options, _ = CASES[case]
    if name not in INSTALLED:
        pytest.skip(f"saeforge-{name} is not installed")
    one, x = train(name, options).sae, data(50, seed=7)

    def work(latents: Group, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sae = train(name, options, latents, group).sae
        with latents_over(Shard.of(D_SAE, latents)):
            code = sae.encode(x)
            return code.to_dense(), sae.decode(code), latents.sum(code.l0()), sae.decode(code.to_dense())

    (ranks,) = on_mesh(1, 4, work)
    code = one.encode(x)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks], dim=1), code.to_dense(), rtol=1e-9, atol=1e-9)
    for _, rebuilt, l0, dense in ranks:
        torch.testing.assert_close(rebuilt, one.decode(code), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dense, rebuilt, rtol=1e-12, atol=1e-12)
        assert torch.equal(l0, code.l0())


# Selections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("k", [1, 3, 9, 16])
def test_ties_over_ranks_go_to_the_lowest_latent(k: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    pre = (2 * torch.randn(30, 16, generator=generator)).round().to(dtype)
    pre[0], pre[1, 3], pre[2, 5:] = 1.0, torch.nan, -torch.inf
    weight = torch.eye(16, dtype=dtype)
    pre = pre.nan_to_num(1e9, 1e9, -1e9)  # a product with the identity would spread NaN over a row
    whole = encode(pre, weight, None, TopK(k))

    def work(group: Group) -> SparseCode:
        shard = Shard.of(16, group)
        with latents_over(shard):
            return encode(pre, weight[shard.first : shard.last], None, TopK(k))

    codes = Threads(n).run(work)
    entries = [(code.rows(), code.indices + code.first, code.values) for code in codes]
    found = sorted(zip(*(torch.cat(part).tolist() for part in zip(*entries, strict=True)), strict=True))
    assert found == list(zip(whole.rows().tolist(), whole.indices.tolist(), whole.values.tolist(), strict=True))


@pytest.mark.parametrize("select", [TopK(20), BatchTopK(8), Above(12.0)])
def test_screened_selections_too(select: Selection) -> None:
    """Shards so large that a bf16 product screens them, where the processor has one."""
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(64, 64, generator=generator), torch.randn(2**15, 64, generator=generator)
    whole = encode(x, weight, None, select)

    def work(group: Group) -> SparseCode:
        shard = Shard.of(2**15, group)
        with latents_over(shard):
            return encode(x, weight[shard.first : shard.last], None, copy.copy(select))

    codes = Threads(2).run(work)
    assert 0 < whole.nnz == sum(code.nnz for code in codes)
    together = torch.cat([code.to_dense() for code in codes], dim=1)
    torch.testing.assert_close(together, whole.to_dense(), rtol=1e-5, atol=1e-5)


def test_a_nan_is_selected_on_the_rank_that_has_it() -> None:
    def work(group: Group) -> int:
        shard = Shard(group, 4 * group.rank, 4 * group.rank + 4, 8)
        table = torch.tensor([[0.0, 1.0, 2.0]]) if group.rank else torch.tensor([[3.0, torch.nan, -torch.inf]])
        return int(shard.own_of_largest(table, 1, lambda pre, k: pre.argsort(dim=1, descending=True)[:, :k]).sum())

    assert Threads(2).run(work) == [1, 0]


def test_more_than_there_are_is_refused_by_the_number_of_all_latents() -> None:
    def work(group: Group) -> None:
        with latents_over(Shard.of(8, group)):
            encode(torch.ones(2, 3), torch.ones(4, 3), None, TopK(9))

    with pytest.raises(ConfigError, match="k = 9 is larger than the 8 latents"):
        Threads(2).run(work)


# Exchanges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_step_are_those_of_the_formulas(compute: torch.dtype) -> None:
    """The table in saeforge/ops/shards.py, to the byte."""
    k, n, v, c = 3, 4, 4, compute.itemsize
    settings: dict[str, Any] = {"dtype": torch.float32, "compute": compute}

    def sent(name: str, options: dict[str, Any]) -> list[dict[str, int]]:
        (ranks,) = on_mesh(1, n, lambda latents, group: train(name, options, latents, group, **settings))
        assert all(rank.sent == ranks[0].sent for rank in ranks)
        return ranks[0].sent

    clip = 8
    for step in sent("topk", {"k": k, "aux": 0.0}):
        assert step == {"gather": ROWS * k * v, "sum": ROWS * D * c + D * v + clip}
    for step in sent("topk", {"k": 20, "aux": 0.0}):
        assert step["gather"] == ROWS * (D_SAE // n) * v
    for step in sent("topk", {"k": k, "multi_k": 4, "aux": 0.0}):
        assert step == {"gather": ROWS * (D_SAE // n + k) * v, "sum": 2 * ROWS * D * c + D * v + clip}
    for step in sent("gated", {}):
        assert step == {"sum": 2 * ROWS * D * c + D * v + v + clip}
    for step in sent("l1_relu", {}):
        assert step == {"sum": ROWS * D * c + v + clip}
    if "batchtopk" in INSTALLED:
        choice, offers = 8 * (3 * 2**11 + D_SAE), 2 * 8  # the most that a row took, and whether a row wants more
        for step in sent("batchtopk", {"k": k, "aux": 0.0}):
            assert step["sum"] == choice + ROWS * D * c + D * v + clip
            assert step["minimum"] == offers + v  # and the threshold that the SAE keeps
    if "matryoshka" in INSTALLED:
        for step in sent("matryoshka", {"k": k, "groups": [4, 8], "selection": "topk", "aux": 0.0}):
            assert step == {"gather": ROWS * k * v, "sum": 3 * ROWS * D * c + D * v + clip}


def test_dead_latents_add_a_second_reconstruction_and_their_candidates() -> None:
    k_aux = 4
    (ranks,) = on_mesh(1, 2, lambda latents, group: train("topk", {"k": 1, "k_aux": k_aux}, latents, group))
    seen = set()
    for step, dead in zip(ranks[0].sent, ranks[0].dead, strict=True):
        seen.add(sum(dead) > k_aux)
        candidates = ROWS * min(k_aux, max(dead)) * 8 if sum(dead) > k_aux else 0
        assert step["gather"] == ROWS * 8 + candidates
        assert step["sum"] == (1 + (sum(dead) > 0)) * ROWS * D * 8 + D * 8 + 8
    assert True in seen


def test_one_device_sends_nothing() -> None:
    group = Group()
    train("topk", {"k": 3}, group, group)
    assert not group.sent


# Starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
@pytest.mark.parametrize(("n", "d"), [(64, 12), (40, 7), (24, 1), (120, 3), (36, 5), (8, 1), (4, 3)])
def test_a_rank_draws_the_rows_of_one_device_in_chunks(
    n: int, d: int, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "_CHUNK_ELEMENTS", 16 * d)
    one = torch.Generator().manual_seed(3)
    whole, after = random_rows(n, d, one, draw), torch.randn(5, generator=one)

    def work(group: Group) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        with latents_over(Shard.of(n, group)):
            return random_rows(n, d, generator, draw), torch.randn(5, generator=generator)

    parts = Threads(4).run(work)
    assert torch.equal(torch.cat([rows for rows, _ in parts]), whole)
    assert all(torch.equal(later, after) for _, later in parts)


def test_probes_are_drawn_whole_and_a_wrong_number_of_rows_is_refused() -> None:
    def work(group: Group) -> Tensor:
        with latents_over(Shard.of(8, group)):
            with pytest.raises(ConfigError, match="5 random rows"):
                random_unit_rows(5, 3, torch.Generator())
            return random_unit_rows(8, 3, torch.Generator().manual_seed(0), latents=False)

    whole = random_unit_rows(8, 3, torch.Generator().manual_seed(0))
    assert all(torch.equal(part, whole) for part in Threads(2).run(work))


def test_the_other_latents_are_those_of_all_ranks() -> None:
    rows = data(8)
    for latents in ([1, 2, 6], list(range(8))):

        def work(group: Group, latents: list[int] = latents) -> Tensor:
            shard = Shard.of(8, group)
            own = [latent - shard.first for latent in latents if shard.first <= latent < shard.last]
            with latents_over(shard):
                return mean_norm_of_others(rows[shard.first : shard.last], torch.tensor(own, dtype=torch.int64))

        whole = mean_norm_of_others(rows, torch.tensor(latents))
        for part in Threads(2).run(work):
            torch.testing.assert_close(part, whole, rtol=1e-12, atol=0)


def test_a_run_starts_from_the_part_of_an_sae_that_is_its_own() -> None:
    sae = train("topk", {"k": 3}).sae

    def work(latents: Group, group: Group) -> dict[str, Tensor]:
        variant = train("topk", {"k": 3}, latents, group).variant
        assert isinstance(variant, TopKSAE)
        with latents_over(variant.shard):
            variant.unfold_(sae)
        return dict(variant.state_dict())

    (ranks,) = on_mesh(1, 2, work)
    again = train("topk", {"k": 3}).variant
    assert isinstance(again, TopKSAE)
    again.unfold_(sae)
    whole = together(
        [{name: rank[name] for name in ("W_enc", "W_dec")} for rank in ranks], frozenset(["W_enc", "W_dec"])
    )
    torch.testing.assert_close(whole, {"W_enc": again.W_enc.data, "W_dec": again.W_dec.data}, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_sae = 10 does not divide among 4 ranks"):
        Shard.of(10, Group(4, 0))
    with pytest.raises(ConfigError, match="is also a width of the data"):
        shard_(TopKSAE(8, 8, d_sae=8, k=2), Shard.of(8, Group(2, 0)))
    with pytest.raises(ConfigError, match="a shard of 16 latents does not fit"):
        shard_(TopKSAE(4, 4, d_sae=8, k=2), Shard.of(16, Group(2, 0)))
    refused = TopKSAE(4, 4, d_sae=8, k=2)
    refused.exempt_checks = {"latents": "it is too small"}  # type: ignore[misc]
    with pytest.raises(ConfigError, match="TopK cannot share out its latents: it is too small; let devices"):
        shard_(refused, Shard.of(8, Group(2, 0)))
    variant = TopKSAE(4, 4, d_sae=8, k=2)
    shard_(variant, Shard.of(8, Group(2, 1)))
    with pytest.raises(ConfigError, match="sharded already"):
        shard_(variant, Shard.of(8, Group(2, 1)))
    assert variant.W_enc.shape == (4, 4)
    assert variant.b_dec.shape == (4,)
    assert variant.latent_names >= {"W_enc", "W_dec", "b_enc", "tokens_since_fired"}
    assert "b_dec" not in variant.latent_names


def test_a_step_outside_of_its_shard_is_an_error_not_a_smaller_dictionary() -> None:
    variant = TopKSAE(4, 4, d_sae=8, k=2)
    shard_(variant, Shard.of(8, Group(2, 0)))
    x = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="latents_over"):
        variant.step(Batch(x, x), {})


# Processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_train_what_one_device_trains(rows: int, tmp_path: Path) -> None:
    """Over gloo, and in bf16 to the same bits on both ranks of latents."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.latents_worker", str(rows)]
    files = [str(tmp_path / "store"), str(tmp_path / "out")]
    processes = [
        subprocess.Popen([*command, str(rank), *files], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2 * rows)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-3000:]
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2 * rows)]
    for name, (variant, options, compute) in latents_worker.CASES.items():
        low = compute == torch.bfloat16
        one = train(variant, options, dtype=torch.float32 if low else compute, compute=compute)
        for row in range(rows):
            (losses, first, sent, names), (others, second, sent_too, _) = (
                rank[name] for rank in ranks[2 * row : 2 * row + 2]
            )
            assert losses == others
            assert sent == sent_too
            state = together([first, second], frozenset(names))
            for step in range(STEPS):
                assert losses[step] == pytest.approx(one.losses[step], rel=2e-2 if low else 1e-10, abs=1e-10)
            if not low:
                torch.testing.assert_close(state, dict(one.variant.state_dict()), rtol=1e-10, atol=1e-10)


MEMORY = """
import resource, torch
from saeforge.data.moments import Moments
from saeforge.ops import Group, Shard, latents_over
from saeforge.registry import VARIANTS
from saeforge.variants import DataStatistics, shard_

class Alone(Group):  # the others send what this rank does
    def _all_reduce(self, tensor, kind): return tensor
    def _all_gather(self, tensor): return torch.stack([tensor] * self.size)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def start(name, d_sae, ranks):
    variant = VARIANTS.load(name)(256, 256, d_sae=d_sae)
    shard = Shard.of(d_sae, Alone(ranks, 5))
    shard_(variant, shard)
    with latents_over(shard):
        variant.initialise(DataStatistics(stats, stats), x, x, torch.Generator().manual_seed(0))
    return variant

x = torch.randn(4096, 256)
stats = Moments.of(x.numpy()).statistics()
names = ("topk", "l1_relu", "gated")
for name in names:
    start(name, 2**14, 64)
before = peak()
for name in names:
    variant = start(name, 2**18, 64)  # a weight of 256 MiB; a rank's is 4
    assert sum(p.numel() for p in variant.parameters()) < 2.2e6
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux counts it")
def test_no_rank_ever_holds_a_whole_weight_to_start_with() -> None:
    """From the constructor to the last number that `initialise` sets, which are the rows of one device (above)."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(map(int, done.stdout.split())) < 100  # of 512 MiB
